"""Training a prior on encodings: the step, the loop, and the fit of a prior without steps."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dae.config import Config
from dae.data.cache import EncodedDataset, EncodingCache
from dae.distributed import failing_together, run_on_first_process
from dae.hub import load_weights
from dae.models import Prior
from dae.priors import PriorFamily
from dae.progress import progress_bar
from dae.seeding import set_seed
from dae.training.checkpoint import Checkpoint
from dae.training.ema import EMA
from dae.training.engine import Engine
from dae.training.loop import global_mean, is_due, refuse_non_finite, validation_images
from dae.training.optimization import build_optimizer, build_scheduler
from dae.training.state import TrainingState

if TYPE_CHECKING:
    import numpy as np

    from dae.data import TrainLoader
    from dae.data.tensors import TensorLoader
    from dae.training.run import Run


@dataclass
class Best:
    """What is delivered: the weights of a step, and their held-out score, if it was measured."""

    step: int
    tensors: dict[str, Tensor]
    score: float | None = None


class PriorTraining:
    """What a prior trains with, and its step.

    Args:
        family: of the prior; one that is not fitted.
        prior: on the engine's device.
        loader: batches of encodings and labels.
    """

    def __init__(self, config: Config, family: PriorFamily, prior: Prior, loader: TrainLoader | TensorLoader, engine: Engine):
        settings = config.prior
        self.config, self.family, self.prior, self.engine = config, family, prior, engine
        self.parameters = list(prior.parameters())
        prior.gradient_checkpointing = settings.gradient_checkpointing
        ema = EMA(prior, settings.ema_decay) if settings.use_ema else None
        optimizer = build_optimizer(prior, settings)
        scheduler = build_scheduler(optimizer, settings)
        self.model, optimizer = engine.prepare(torch.compile(prior) if config.compile else prior, optimizer)
        self.state = TrainingState({"model": prior}, {"optimizer": optimizer}, scheduler, loader, ema, engine.scaler)
        self.batches = iter(loader)

    def step(self, number: int) -> None:
        """Step `number`: loss, optimiser, schedule, average."""
        settings, parts = self.config.prior, self.config.prior.gradient_accumulation_steps
        for micro in range(parts):
            set_seed(self.config.seed, "prior", number, micro)  # the only source of this micro-step's randomness
            batch = {name: column.to(self.engine.device, non_blocking=True) for name, column in next(self.batches).items()}
            with self.engine.synchronize(self.model, when=micro == parts - 1):
                loss = self.family.loss(self.model, self.prior, batch)
                self.engine.backward(loss / parts)
            self.state.losses.append(loss.detach())
        if settings.max_grad_norm > 0:
            self.engine.clip(self.parameters, settings.max_grad_norm)
        self.engine.step(self.state.optimizers.values())
        self.state.scheduler.step()
        if self.state.ema:
            self.state.ema.update(self.prior)


def train_by_steps(
    training: PriorTraining,
    heldout: EncodedDataset | None,
    *,
    run: Run | None = None,
    resumed: Checkpoint | None = None,
    picture: Callable[[], np.ndarray] | None = None,
    save_best: Callable[[Best], None] | None = None,
) -> Best:
    """The loop. The prior ends with the weights that are returned: the last ones, or the best with `prior.early_stopping`.

    Args:
        heldout: encodings of the validations; None for none.
        run: where log and checkpoints go; None for nowhere.
        resumed: the checkpoint to go on from.
        picture: of samples, for trackers that take pictures.
        save_best: called by the first process with `prior.early_stopping`, whenever a validation was the best so far.

    Raises:
        FloatingPointError: the loss is not finite.
    """
    config, family, prior, state, ema = training.config, training.family, training.prior, training.state, training.state.ema
    settings, total = config.prior, config.prior.max_train_steps
    start, best = state.restore(resumed), None
    if resumed and "best" in resumed.state:  # in every checkpoint: whatever becomes of the file, resuming can deliver them
        best = Best(**resumed.state["best"], tensors=resumed.tensors["best"])
    if heldout is not None:
        heldout = heldout.spread(validation_images(config, settings))
    bar = progress_bar(total, start, "prior", shown=run is not None)
    prior.train()
    for step in range(start, total):
        training.step(step)
        done = step + 1
        bar.update()
        if is_due(done, config.logging_steps, total):
            values = {"loss": global_mean(state.losses), "lr": state.scheduler.get_last_lr()[0]}
            state.losses.clear()
            refuse_non_finite(values["loss"], "prior", done)
            bar.set_postfix(loss=f"{values['loss']:.4f}")
            if run is not None:
                run.record(done, values, stage="prior", split="train")
        if heldout is not None and is_due(done, config.validation_steps, total):
            with ema.swapped_in(prior) if ema else contextlib.nullcontext():
                with failing_together():
                    score = family.score(prior, heldout, config)
                if run is not None:
                    run.record(done, {family.criterion: score}, stage="prior", split="validation")
                with failing_together():
                    if picture is not None:
                        run.record_picture(done, "samples", picture())
                if best is None or score < best.score or not settings.early_stopping:
                    best = Best(done, _copied(prior.state_dict()), score)
                    if settings.early_stopping and save_best is not None:
                        run_on_first_process(lambda best=best: save_best(best))
            prior.train()
        if run is not None and is_due(done, config.checkpointing_steps, total):
            tensors, rest = state.pack()
            if best is not None:
                tensors, rest = tensors | {"best": best.tensors}, rest | {"best": {"step": best.step, "score": best.score}}
            run.save(done, tensors, rest, stage="prior", stage_step=done)
    bar.close()
    if best is None:  # without validation, or of a checkpoint that an earlier version wrote
        best = Best(total, _copied((ema or prior).state_dict()))
    prior.load_state_dict(best.tensors)
    training.engine.free_memory()
    return best


def _copied(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: weight.detach().cpu().clone() for name, weight in weights.items()}


def deliver(prior: Prior, best: Best, family: PriorFamily, heldout: EncodedDataset, run: Run, card: Callable[[int], str]) -> None:
    """Measure what takes too long for every validation, and save the prior; for one process."""
    logged, last = {(row["split"], row["step"]) for row in run.history()}, run.config.prior.max_train_steps
    if best.score is not None and ("validation", best.step) not in logged:  # the log was lost
        run.record(best.step, {family.criterion: best.score}, stage="prior", split="validation")
    if family.costly_bits and ("delivered", last) not in logged:
        bits = family.bits_per_image(prior, heldout, run.config)
        run.record(last, {family.bits_key: bits}, stage="prior", split="delivered")
    prior.save_pretrained(run.folder, card=card(best.step))


def fit(
    prior: Prior, family: PriorFamily, cache: EncodingCache, run: Run, resumed: Checkpoint | None, card: Callable[[int], str]
) -> None:
    """A prior without steps: one fit, one entry of the log per split, one checkpoint; resuming finds it done."""
    if resumed is not None:
        load_weights(prior, resumed.tensors["model"], str(resumed.path))

    def log_fit() -> None:
        if resumed is None:
            family.fit(prior, cache, run.config)
        if not run.history():
            for split, encoded in (("train", cache.train), ("validation", cache.validation)):
                values = {family.criterion: family.score(prior, encoded, run.config)}
                run.record(1, values, stage="prior", split=split)

    run_on_first_process(log_fit)
    if resumed is None:
        run.save(1, {"model": prior.state_dict()}, {}, stage="prior", stage_step=1)
    run_on_first_process(lambda: prior.save_pretrained(run.folder, card=card(1)))
