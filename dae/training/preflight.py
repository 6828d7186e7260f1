"""A few real steps on copies before a long run, and what they must show: `preflight=true`.

`dae.training.rehearsal` finds what cannot run, by two images through each model. Preflight finds what runs and does not train: it
takes steps of the same classes on real batches, in each stage, with the adversarial loss on, and looks at what moved and why. It
knows no names of modules or losses: parameters are those of the modules that a checkpoint holds, weights of losses are the knobs
that say so (`weight` of `dae.config.knobs.knob`).
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from dae.config import Config, OptimizationConfig, StageConfig
from dae.distributed import run_on_first_process
from dae.models import Prior
from dae.priors import PriorFamily
from dae.quantizers.tokens import digits_of
from dae.training.autoencoder import Loaders, StageTraining, build_autoencoder, build_perceptual_loss, enter_stage
from dae.training.loop import Training
from dae.training.movement import OFF, Movement
from dae.training.prior import PriorTraining
from dae.training.probe import Gradients, ProbeEngine, gradients, watched
from dae.training.stages import Stage, plan_stages

log = logging.getLogger(__name__)
STEPS, MORE_STEPS = 4, 8  # a zero-initialised gate moves in the first step, what it hides in the second; patience for the rest
WARM_UP = 10  # steps at most: at the rates of a long one, weights would not move visibly
FACTOR = 1000.0  # by which a weight is changed to see whether a gradient depends on it
LOSS_SCALES = (2.0**16, 2.0**12, 2.0**8, 2.0**4, 1.0)  # of fp16: what a scaler would settle on
LOST = 1e-4  # share of the gradient's norm below which a tensor may lose its own in 16 bits
DEVIATIONS = (1e-4, 1e4)  # of a channel of the latent: what float32 and 16 bits leave room for
FIT = 10.0  # factor between the deviation that a prior assumes and the batch's
DEAD = 0.1  # share of the codes that a batch should use after k-means, if all were used alike
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class Preflight:
    """What a preflight that found nothing did."""

    tensors: int
    steps: int
    seconds: float

    def __str__(self) -> str:
        return f"preflight: {self.steps} steps on copies, all of {self.tensors} tensors as they should be, {self.seconds:.1f} s"


def preflight_autoencoder(config: Config, loaders: Loaders, device: torch.device) -> None:
    """Take a few steps of each stage of `config.method` on an autoencoder of its own; without effect if `preflight` is false.

    The first process does it for all, and what it raises all raise. The global random state is as before.

    Args:
        loaders: batches of a stage; called for new loaders.

    Raises:
        ValueError: a step does not train what it should, with the remedy; or what a model, a loss or the data refuse.
    """

    def check() -> None:
        started, tensors, steps, own = time.monotonic(), 0, 0, short(config)
        stages = plan_stages(own)
        autoencoder = build_autoencoder(own, stages[0]).to(device)
        for stage in stages:
            enter_stage(own, stage, autoencoder, first=stage is stages[0])
            autoencoder.train()
            with _trainable(stage.name):
                engine, perceptual = (
                    ProbeEngine(device, DTYPES.get(own.mixed_precision or "no")),
                    build_perceptual_loss(own, stage),
                )
                new = stage is stages[0] and not own.init_from
                training = StageTraining(own, stage, autoencoder, loaders, engine, perceptual, new_codebook=new)
                found = _check_training(training, stage.config, _numbers(stage, training))
                _check_latent(training, found.batches, after_kmeans=new)
            tensors, steps = tensors + found.tensors, steps + found.steps
        log.info("%s", Preflight(tensors, steps, time.monotonic() - started))

    _on_copies(config, device, check)


def preflight_prior(
    config: Config, family: PriorFamily, prior: Prior, loader: Callable[[], object], device: torch.device
) -> None:
    """As `preflight_autoencoder`, for the prior that is about to be trained; a copy of it is.

    Args:
        loader: makes a new loader of the encodings.
    """

    def check() -> None:
        started, own = time.monotonic(), short(config)
        with _trainable("prior"):
            engine, trained = ProbeEngine(device, DTYPES.get(own.mixed_precision or "no")), copy.deepcopy(prior).train()
            training = PriorTraining(own, family, trained, loader(), engine)  # type: ignore[arg-type]
            found = _check_training(training, own.prior, list(range(STEPS)))
            _check_scale(trained, found.batches)
        log.info("%s", Preflight(found.tensors, found.steps, time.monotonic() - started))

    if not family.fitted:
        _on_copies(config, device, check)


def _on_copies(config: Config, device: torch.device, check: Callable[[], None]) -> None:
    if not config.preflight:
        return

    def alone() -> None:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.enable_grad():
            check()
        if device.type == "cuda":
            torch.cuda.empty_cache()

    run_on_first_process(alone)


def short(config: Config) -> Config:
    """The configuration of the copies: computed eagerly, few micro-batches per step, a short warm-up, no decay of the rates."""
    own = copy.deepcopy(config)
    own.compile = own.cuda_graphs = False
    for section in (own.stage1, own.stage2, own.prior):
        section.lr_scheduler, section.lr_warmup_steps = "constant", min(WARM_UP, section.lr_warmup_steps)
        section.gradient_accumulation_steps = min(2, section.gradient_accumulation_steps)
    return own


def _numbers(stage: Stage, training: StageTraining) -> list[int]:
    """Numbers of the steps to take: the first ones, or those from which on the adversarial loss has its weight."""
    loss = stage.config.loss
    if training.adversary is None:
        return list(range(STEPS))
    full = loss.adversarial_start + max(0, loss.adversarial_ramp - 1)
    if full >= stage.config.max_train_steps:
        log.warning(
            "%s: the adversarial loss has its weight from step %d on, the stage ends at %d; lower %s.loss.adversarial_start",
            stage.name, full, stage.config.max_train_steps, stage.name,
        )  # fmt: skip
    if loss.r1 > 0:  # begin with a step that is penalised
        full = -(-full // loss.r1_every) * loss.r1_every
    before = [0] if loss.adversarial_start > 0 else []
    return before + [full + i for i in range(STEPS)]


@dataclass
class _Found:
    tensors: int
    steps: int
    batches: list[dict[str, Tensor]]


def _check_training(training: Training, settings: OptimizationConfig, numbers: list[int]) -> _Found:
    """All that is true of any training; the training is changed by the steps."""
    name, engine = training.name, cast(ProbeEngine, training.engine)
    batches: list[dict[str, Tensor]] = []
    taken = training.next_batch

    def remembered() -> dict[str, Tensor]:
        batches.append(taken())
        return batches[-1]

    batch = remembered()
    with _whole(training) as found_broken:
        _check_precision(training, batch, numbers[-STEPS], found_broken)
    _check_losses(training, batch, numbers[-STEPS])
    training.next_batch = remembered  # type: ignore[method-assign]
    movement = Movement(training)
    engine.losses.clear()
    for number in numbers:
        training.step(number)
    while movement.waiting() and len(numbers) < STEPS + MORE_STEPS:
        numbers.append(numbers[-1] + 1)
        training.step(numbers[-1])
    if not torch.stack(engine.losses).isfinite().all():
        raise ValueError(
            f"{name}: the loss is not finite within {len(numbers)} steps; lower {name}.learning_rate, or lengthen "
            f"{name}.lr_warmup_steps{OFF}"
        )
    _check_variance(name, batches)
    movement.check(batch, numbers[-1])
    return _Found(len(movement), len(numbers), batches)


@contextlib.contextmanager
def _whole(training: Training) -> Iterator[list]:
    modules = dict(training.state.modules)
    if (perceptual := getattr(training, "perceptual", None)) is not None:
        modules["perceptual"] = perceptual
    with watched(modules, training.settings.train_batch_size) as found:
        yield found


def _check_precision(training: Training, batch: dict[str, Tensor], number: int, broken: list) -> None:
    """ValueError if the loss or its gradients are not finite, or in 16 bits are lost against float32 on the same batch."""
    engine, name = cast(ProbeEngine, training.engine), training.name
    dtype, engine.dtype = engine.dtype, None
    exact = gradients(training, batch, number)
    engine.dtype = dtype
    if not exact.finite:
        where = f"; it arises in {broken[0]}" if broken else ""
        raise ValueError(
            f"{name}: the loss or its gradient is not finite on the first batch{where}; look at these images and weights{OFF}"
        )
    if dtype is None:
        return
    precision = next(key for key, value in DTYPES.items() if value is dtype)
    for scale in LOSS_SCALES if dtype == torch.float16 else (1.0,):
        broken.clear()
        engine.scale = scale
        narrow = gradients(training, batch, number)
        if narrow.finite:
            break
    if not narrow.finite:
        where = f", first in {broken[0]}" if broken else ""
        raise ValueError(
            f"{name}: in {precision} the loss or its gradient is not finite{where}, in float32 it is; use mixed_precision=no"
            f"{' or bf16' if precision == 'fp16' else ''}, or smaller weights of the losses{OFF}"
        )
    if lost := _lost(training, exact, narrow):
        raise ValueError(
            f"{name}: in {precision} the gradient of {len(lost)} tensors, such as {lost[0]}, is exactly zero, in float32 it is "
            f"not; use mixed_precision=no, or larger weights of the losses{OFF}"
        )


def _lost(training: Training, exact: Gradients, narrow: Gradients) -> list[str]:
    """Tensors whose gradient is zero in 16 bits and in float32 more than rounding, measured by their part of the model."""
    names = {p: f"{file}.{n}" for file, module in training.state.modules.items() for n, p in module.named_parameters()}
    parts: dict[str, list[tuple[str, float, bool]]] = {}
    for p, gradient in exact.values.items():
        name, lost = names.get(p, "of no module"), p not in narrow.values or not bool(narrow.values[p].any())
        parts.setdefault(".".join(name.split(".")[:2]), []).append((name, float(gradient.norm()), lost))
    whole = {part: math.hypot(*(norm for _, norm, _ in found)) for part, found in parts.items()}
    return [name for part, found in parts.items() for name, norm, lost in found if lost and norm > LOST * whole[part]]


@contextlib.contextmanager
def _trainable(name: str) -> Iterator[None]:
    """Torch's refusal to differentiate what no parameter was used for, as a sentence."""
    try:
        yield
    except RuntimeError as error:
        if "does not require grad" not in str(error) and "appears to not have been used in the graph" not in str(error):
            raise
        raise ValueError(
            f"{name}: a loss depends on no parameter that is trained ({str(error).splitlines()[0]}); see that nothing detaches "
            f"it, and that its model is not frozen{OFF}"
        ) from error


def weights_of_losses(settings: object) -> Iterator[tuple[str, float]]:
    """Knobs of a section that weight a loss, and their values, where these are not 0."""
    for field in dataclasses.fields(settings):  # type: ignore[arg-type]
        value = getattr(settings, field.name)
        if field.metadata.get("weight") and isinstance(value, float) and value != 0:
            yield field.name, value


def _check_losses(training: Training, batch: dict[str, Tensor], number: int) -> None:
    """ValueError if a loss of nonzero weight has no gradient on a parameter of any optimiser: a change of it changes none."""
    engine, name, settings = cast(ProbeEngine, training.engine), training.name, training.settings
    dtype, engine.dtype, engine.scale = engine.dtype, None, 1.0
    first, again = gradients(training, batch, number), gradients(training, batch, number)
    noise = 2 * first.distance(again)  # 0 where the device computes the same bits each time
    sections = [(f"{name}.loss", settings.loss, True)] if isinstance(settings, StageConfig) else []
    modules = list(training.trained.modules())
    if any(module in modules for module in training.frozen()):  # an encoder that a commitment would draw, for example
        modules = []
    own = {id(c): (type(m).__name__, c, False) for m in modules if _is_section(c := getattr(m, "config", None))}
    for where, section, must_count in [*sections, *own.values()]:
        for knob, weight in weights_of_losses(section):
            setattr(section, knob, weight * FACTOR)
            changed = gradients(training, batch, number)
            setattr(section, knob, weight)
            silent = changed.losses.shape == first.losses.shape and torch.equal(changed.losses, first.losses)
            if changed.distance(first) <= noise and (must_count or not silent):
                raise ValueError(
                    f"{name}: the loss of {where}.{knob}={weight:g} reaches no optimiser: no gradient depends on it; see that "
                    f"nothing detaches it, or set its weight to 0{OFF}"
                )
    engine.dtype = dtype


def _is_section(config: object) -> bool:
    return dataclasses.is_dataclass(config) and not isinstance(config, type)


def _check_variance(name: str, batches: list[dict[str, Tensor]]) -> None:
    """ValueError if in all batches the rows are equal, or every image is constant."""
    for column in batches[0]:
        if batches[0][column].ndim < 2:  # labels, numbers of rows
            continue
        rows = torch.cat([batch[column] for batch in batches])
        what = "images" if column == "image" else "encodings"
        if len(rows) > 1 and (rows == rows[:1]).all():
            raise ValueError(
                f"{name}: all {len(rows)} {what} of the first batches are equal: there is nothing to learn; look at the data set "
                f"and data.image_column{OFF}"
            )
        flat = rows.flatten(1)
        if column == "image" and (flat == flat[:, :1]).all():
            raise ValueError(
                f"{name}: each of the {len(rows)} images of the first batches is one colour: there is nothing to learn; look at "
                f"the data set and data.image_column{OFF}"
            )


@torch.no_grad()
def _check_latent(training: StageTraining, batches: list[dict[str, Tensor]], after_kmeans: bool) -> None:
    """ValueError if the codes of a discrete latent are dead, or the deviation of a continuous one is out of range."""
    autoencoder, name = training.autoencoder, training.name
    if training.stage.trains_decoder_alone:
        return
    encoding, config = autoencoder.encode(torch.cat([batch["image"] for batch in batches])), autoencoder.config
    if encoding.indices is not None:
        factors = autoencoder.bottleneck.factors(config)
        digits = digits_of(encoding.indices.flatten(), factors)
        placed = after_kmeans and training.learns_codebook and config.vq.kmeans_iterations > 0
        for digit, size in zip(digits.unbind(-1), factors, strict=True):
            used, latents = len(digit.unique()), len(digit)
            expected = size * -math.expm1(latents * math.log1p(-1 / size)) if size > 1 else 1.0
            if (used == 1 and min(size, latents) > 1 and len(factors) == 1) or (placed and used < DEAD * expected):
                raise ValueError(
                    f"{name}: {latents:,} latents of the first batches use {used:,} of {size:,} codes, where "
                    f"about {expected:,.0f} would be if all were alike: codes are dead; look for an encoder whose output hardly "
                    f"varies, or set a smaller {name}.learning_rate or autoencoder.vq.codebook_size{OFF}"
                )
    elif encoding.log_variance is not None:
        mean, log_variance = (x.float().transpose(0, 1).flatten(1) for x in (encoding.features, encoding.log_variance))
        std = (mean.var(1, correction=0) + log_variance.exp().mean(1)).sqrt()
        if not ((std >= DEVIATIONS[0]) & (std <= DEVIATIONS[1])).all():
            raise ValueError(
                f"{name}: the standard deviations of the latent's channels reach from {std.min():.3g} to {std.max():.3g}, a "
                f"prior assumes {DEVIATIONS[0]:g} to {DEVIATIONS[1]:g}; look at the encoder's initialisation and the scale of "
                f"the images, or set a larger autoencoder.kl.kl_weight{OFF}"
            )


@torch.no_grad()
def _check_scale(prior: Prior, batches: list[dict[str, Tensor]]) -> None:
    """ValueError if a continuous latent in the prior's scale has not about mean 0 and deviation 1."""
    assumed, moments = getattr(prior, "latent_std", None), [batch["moments"] for batch in batches if "moments" in batch]
    if not isinstance(assumed, Tensor) or not moments:
        return
    mean, log_variance = torch.cat(moments).float().flatten(0, 1).chunk(2, dim=1)  # [B copies, D, h, w]
    std = (mean.var((0, 2, 3), correction=0) + log_variance.exp().mean((0, 2, 3))).sqrt()
    assumed = assumed.to(std).flatten()
    ratio = std / assumed
    usual = (assumed >= DEVIATIONS[0]) & (assumed <= DEVIATIONS[1])
    if not (ratio.isfinite().all() and usual.all() and (ratio > 1 / FIT).all() and (ratio < FIT).all()):
        worst = int((ratio.log().abs().nan_to_num(torch.inf) + (~usual).to(ratio)).argmax())
        raise ValueError(
            f"prior: it assumes a deviation of {assumed[worst]:.3g} in channel {worst} of the latent, the first batches have "
            f"{std[worst]:.3g}: expected {DEVIATIONS[0]:g} to {DEVIATIONS[1]:g}, and within a factor of {FIT:g} of each other; "
            f"encode the images anew with this autoencoder, or train it with another autoencoder.kl.kl_weight{OFF}"
        )
