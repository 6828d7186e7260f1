"""Training an autoencoder: the step, the loop of a stage, and the stages of a method one after the other."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable, Iterator
from itertools import islice
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from dae.config import Config
from dae.data.augmentation import augment
from dae.data.loader import AnyDataset, TrainLoader, evaluation_batches
from dae.distributed import failing_together, in_global_order, rank, run_on_first_process, sum_over_processes, world_size
from dae.losses import PerceptualLoss, reconstruction_loss
from dae.metrics import CodebookUsage, psnr
from dae.models import Autoencoder, choose_kernels
from dae.models.latent import identify
from dae.models.pretrained_encoder import PretrainedEncoder
from dae.progress import progress_bar
from dae.quantizers import Encoding
from dae.seeding import seed_for, set_seed
from dae.training.adversary import Adversary, build_discriminator
from dae.training.checkpoint import Checkpoint
from dae.training.engine import Engine
from dae.training.initialization import load_decoder, load_encoder
from dae.training.latent import images_to_measure, latent_with_moments
from dae.training.loop import Training, is_due, validation_images
from dae.training.optimization import build_optimizer
from dae.training.pictures import reconstruction_sheet
from dae.training.signals import averaged, latent_signals
from dae.training.stages import Stage, plan_stages, saved_discriminators

if TYPE_CHECKING:
    from dae.data import ImageData
    from dae.data.tensors import TensorLoader
    from dae.training.run import Run

STATISTICS_IMAGES, STATISTICS_BATCH = 4096, 64  # of which a latent is measured, and how many are encoded at once
Loaders = Callable[[Stage, str], "TrainLoader | TensorLoader"]  # (stage, purpose) -> batches: to train on, or for k-means


def build_autoencoder(config: Config, stage: Stage) -> Autoencoder:
    """A new autoencoder with the decoder of `stage`, initialised from the seed or with the weights at `init_from`."""
    torch.manual_seed(seed_for(config.seed, "autoencoder"))
    architecture = dataclasses.replace(config.autoencoder, decoder=stage.decoder)
    autoencoder = Autoencoder(architecture, config.data.channels, config.data.resolution)
    if config.init_from:
        load_encoder(autoencoder, config.init_from)
        if config.method != "refit" or config.refit.decoder == "old":
            load_decoder(autoencoder, config.init_from)
    return autoencoder


def build_perceptual_loss(config: Config, stage: Stage) -> PerceptualLoss | None:
    """The frozen loss network of a stage; None if its weight is 0. ValueError: the images are too small for it."""
    if stage.config.loss.perceptual == 0:
        return None
    if (got := config.data.resolution) < (minimum := PerceptualLoss.minimum_size):
        raise ValueError(f"{stage.name}.loss.perceptual needs data.resolution of at least {minimum}, got {got}")
    return PerceptualLoss.from_pretrained(stage.config.loss.perceptual_weights)


def enter_stage(config: Config, stage: Stage, autoencoder: Autoencoder, *, first: bool) -> None:
    """The switch to a stage: its decoder, new or with the weights at `init_from`, and the latent frozen if it says so.

    Args:
        first: the stage that `build_autoencoder` built the decoder of.
    """
    if stage.keeps_decoder and stage.decoder != autoencoder.config.decoder:
        autoencoder.replace_decoder(stage.decoder, keep_weights=True)
    elif not first and not stage.keeps_decoder:
        set_seed(config.seed, stage.name, "decoder")
        autoencoder.replace_decoder(stage.decoder)
        if config.init_from:
            load_decoder(autoencoder, config.init_from)
    stage.freeze(autoencoder)


def train_stages(
    config: Config,
    autoencoder: Autoencoder,
    loaders: Loaders,
    engine: Engine,
    *,
    heldout: AnyDataset | None = None,
    run: Run | None = None,
    resumed: Checkpoint | None = None,
) -> None:
    """Train the stages of `config.method`, in place.

    Args:
        autoencoder: as `build_autoencoder` makes it for the first stage, on the engine's device.
        loaders: batches {"image": [B, C, H, W], ...} of a stage.
        heldout: images of the validations; None for none.
        run: where log and checkpoints go, the model at the end of each stage but the last, and with `save_discriminator` the
            discriminators; None for nowhere.
        resumed: the checkpoint to go on from.

    Raises:
        FloatingPointError: the loss is not finite.
    """
    stages, steps_before = plan_stages(config), 0
    for stage in stages:
        enter_stage(config, stage, autoencoder, first=stage is stages[0])
        if resumed is None or resumed.state["stage"] == stage.name:
            learns_anew = resumed is None and not config.init_from and stage is stages[0]
            perceptual = build_perceptual_loss(config, stage)
            training = StageTraining(config, stage, autoencoder, loaders, engine, perceptual, new_codebook=learns_anew)
            train_stage(training, heldout, run, steps_before, training.state.restore(resumed))
            resumed = None
            if run is not None:
                name_latent(config, autoencoder, loaders, stages[0])
            if run is not None and stage is not stages[-1]:
                run_on_first_process(functools.partial(autoencoder.save_pretrained, run.folder / stage.name))
            if run is not None and training.adversary is not None and stage.name in (folders := saved_discriminators(config)):
                save = training.adversary.discriminator.save_pretrained
                run_on_first_process(functools.partial(save, run.folder / folders[stage.name]))
        steps_before += stage.config.max_train_steps


def name_latent(config: Config, autoencoder: Autoencoder, loaders: Loaders, first: Stage) -> None:
    """Measure the latent for `latent.json`, unless it is that of the stage before; always on the images of the first stage."""
    known = autoencoder.latent
    if known is None or not known.images or identify(autoencoder) is not known:
        autoencoder.latent = latent_with_moments(config, autoencoder, loaders(first, "latent"), images_to_measure(first))


def train_stage(training: StageTraining, heldout: AnyDataset | None, run: Run | None, steps_before: int, start: int) -> None:
    """Train a stage from its step `start` on; `steps_before` counts the steps of earlier stages, for the log."""
    config, stage, state = training.config, training.stage, training.state
    total = stage.config.max_train_steps
    bar = progress_bar(total, start, f"{stage.name}, {stage.decoder.family} decoder", shown=run is not None)
    training.autoencoder.train()
    for step in range(start, total):
        training.step(step)
        done, step_of_run = step + 1, steps_before + step + 1
        bar.update()
        if is_due(done, config.logging_steps, total):
            training.log(done, bar, run, step_of_run)
        if heldout is not None and is_due(done, config.validation_steps, total):
            with training.averaged(), training.engine.autocast():
                values = validate(config, training.autoencoder, heldout, validation_images(config, stage.config))
                if run is not None:
                    show_reconstructions(run, step_of_run, training.autoencoder, heldout)
            if run is not None:
                run.record(step_of_run, values, stage=stage.name, split="validation")
            training.autoencoder.train()
        if run is not None and is_due(step_of_run, config.checkpointing_steps, steps_before + total):
            run.save(step_of_run, *state.pack(), stage=stage.name, stage_step=done)
    bar.close()
    if state.ema:
        training.trained.load_state_dict(state.ema.state_dict())  # the average is delivered, and frozen by stage 2
    training.end()


class StageTraining(Training):
    """The training step of a stage: of the autoencoder, as far as it is not frozen, or of the decoder alone on a frozen latent.

    Args:
        autoencoder: with the decoder of `stage`, on the engine's device.
        loaders: batches of the stage's training images.
        perceptual: the frozen loss network, of no optimiser and in no checkpoint; with a weight above 0 it is needed.
        new_codebook: initialise the codebook by k-means, if this stage learns it, and measure the latent of a pretrained encoder.
    """

    columns = ("image",)

    def __init__(
        self,
        config: Config,
        stage: Stage,
        autoencoder: Autoencoder,
        loaders: Loaders,
        engine: Engine,
        perceptual: PerceptualLoss | None = None,
        *,
        new_codebook: bool = True,
    ):
        self.stage, self.autoencoder, self.perceptual = stage, autoencoder, perceptual
        self.encoding: Encoding | None = None  # of the last micro-step, for `signals`
        self.layout = torch.channels_last if config.channels_last else torch.contiguous_format
        self._place(autoencoder, config, autoencoder.device)
        loader = loaders(stage, "order")
        self.learns_codebook = autoencoder.bottleneck.learns_codebook and not stage.trains_decoder_alone
        if self.learns_codebook and new_codebook:
            initialize_codebook(config, autoencoder, loaders(stage, "codebook"))
        if isinstance(autoencoder.encoder, PretrainedEncoder) and new_codebook:
            measure_latent(autoencoder.encoder, loaders(stage, "statistics"), stage.config.train_batch_size)
        autoencoder.enable_gradient_checkpointing(stage.config.gradient_checkpointing)
        trained = autoencoder.decoder if stage.trains_decoder_alone else autoencoder
        super().__init__(config, stage.config, stage.name, trained, autoencoder, loader, engine)

        loss = stage.config.loss
        self.adversary: Adversary | None = None
        if loss.adversarial > 0:
            set_seed(config.seed, stage.name, "discriminator")
            discriminator = build_discriminator(config, loss, engine.device, self.layout)
            optimizer = build_optimizer(discriminator, stage.config, loss.discriminator_learning_rate)
            discriminate, prepared = engine.prepare(discriminator, optimizer)
            self.synchronized.append(discriminate)
            self.state.modules["discriminator"], self.state.optimizers["discriminator_optimizer"] = discriminator, prepared
            self.adversary = Adversary(loss, discriminator, discriminate, engine)
            if self.adversary.lecam is not None:
                self.state.modules["lecam"] = self.adversary.lecam
        if perceptual is not None:
            self._place(perceptual, config, engine.device)

    def twin(self, engine: Engine) -> StageTraining:
        config, loader = dataclasses.replace(self.config, compile=False, cuda_graphs=False), self.state.loader
        copied = copy.deepcopy(self.autoencoder)
        made = StageTraining(config, self.stage, copied, lambda *_: loader, engine, self.perceptual, new_codebook=False)  # type: ignore[arg-type,return-value]
        for name, module in self.state.modules.items():
            made.state.modules[name].load_state_dict(module.state_dict())
        return made

    def _place(self, module: nn.Module, config: Config, device: torch.device) -> None:
        module.to(device=device, memory_format=self.layout)  # type: ignore[call-overload]
        choose_kernels(module, config.kernels)

    def frozen(self) -> list[nn.Module]:
        encoder = [self.autoencoder.encoder] if self.stage.latent_frozen else []
        bottleneck = [self.autoencoder.bottleneck] if self.stage.trains_decoder_alone else []
        return [*encoder, *bottleneck, *([] if self.perceptual is None else [self.perceptual])]

    def learned_codebook(self) -> nn.Module | None:
        return self.autoencoder.bottleneck if self.learns_codebook else None

    def update_codebook(self) -> None:
        if self.learns_codebook:
            self.autoencoder.bottleneck.update_codebook()

    def signals(self) -> dict[str, float]:
        found, bottleneck = super().signals(), self.autoencoder.bottleneck
        if self.encoding is not None and not self.stage.trains_decoder_alone:
            codes = bottleneck.num_codes(self.autoencoder.config) if bottleneck.discrete else None
            found |= latent_signals(self.encoding, codes)
        return found if self.adversary is None else found | averaged(self.adversary.signals())

    def end(self) -> None:
        self.encoding = None
        if self.adversary is not None:
            self.adversary.latest.clear()
        super().end()

    def phase(self, number: int) -> object:
        """The weight of the adversarial loss, and whether the discriminator is penalised."""
        return None if self.adversary is None else (self.adversary.weight(number), self.adversary.penalised(number))

    def micro_step(self, batch: dict[str, Tensor], number: int) -> Tensor:
        """Add the gradients of a batch; returns its reconstruction loss."""
        loss_config, data = self.stage.config.loss, self.config.data
        images = augment(batch["image"], random_flip=data.random_flip, random_affine=data.random_affine)
        images = images.contiguous(memory_format=self.layout)
        sample, encoding = self.reconstruct(images)
        reconstruction = reconstruction_loss(sample, images, loss_config)
        if self.perceptual is not None:
            with self.engine.autocast():
                distance = self.perceptual(sample, images).mean()
            reconstruction = reconstruction + loss_config.perceptual * distance
        loss = reconstruction if self.stage.trains_decoder_alone else reconstruction + encoding.loss
        if self.adversary is not None and self.adversary.weight(number) > 0:
            scaled = functools.partial(self.engine.scaled, optimizer=self.state.optimizers["optimizer"])
            loss = loss + self.adversary.generator_term(reconstruction, sample, number, scaled)
        self.backward(loss)
        if self.adversary is not None:
            self.backward(self.adversary.discriminator_term(images, sample, number), "discriminator_optimizer")
        if self.learns_codebook:
            self.autoencoder.bottleneck.observe(encoding)
        self.encoding = encoding.detached()
        return reconstruction.detach()

    def reconstruct(self, images: Tensor) -> tuple[Tensor, Encoding]:
        if not self.stage.trains_decoder_alone:
            output = self.model(images)
            return output.sample, output.encoding
        with torch.no_grad(), self.engine.autocast():
            encoding = self.autoencoder.encode(images, sample_posterior=True)
        return self.model(encoding.latents), encoding


def training_loader(config: Config, data: ImageData, stage: Stage, purpose: str) -> TrainLoader:
    """Loader of training images for a stage, in an order seeded by the purpose."""
    return TrainLoader(
        data.train,
        stage.config.train_batch_size,
        seed=seed_for(config.seed, stage.name, purpose),
        num_workers=config.data.num_workers,
        shuffle_buffer_size=config.data.shuffle_buffer_size,
    )


@torch.no_grad()
def initialize_codebook(config: Config, autoencoder: Autoencoder, batches: TrainLoader | TensorLoader) -> None:
    """k-means on the untrained encoder's outputs for the first images: 16 vectors per code, of at most 64 batches."""
    images = -(-16 * max(autoencoder.bottleneck.factors(autoencoder.config)) // autoencoder.latent_size**2)
    mine, features = len(range(rank(), images, world_size())), []  # this process's share, whatever the batch size
    with failing_together():
        for batch in islice(batches, 64):
            features.append(autoencoder.encode(batch["image"].to(autoencoder.device)).features)
            if sum(map(len, features)) >= mine:
                break
    generator = torch.Generator().manual_seed(seed_for(config.seed, "codebook"))
    autoencoder.bottleneck.initialize_codebook(torch.cat(features)[:mine], generator)


@torch.no_grad()
def measure_latent(encoder: PretrainedEncoder, batches: TrainLoader | TensorLoader, batch_size: int) -> None:
    """Set mean and standard deviation of each channel of its features: sums in float64 over at most `STATISTICS_IMAGES` images.

    Each process encodes the images of all in the same portions, so that no bit depends on how many there are.
    """
    per_batch, device = batch_size * world_size(), encoder.latent_mean.device
    count = max(1, min(batches.rows or STATISTICS_IMAGES, STATISTICS_IMAGES) // per_batch)
    totals, places = torch.zeros(2, len(encoder.latent_mean), dtype=torch.float64, device=device), 0
    remaining = iter(batches)
    for _ in range(count):
        with failing_together():
            mine = next(remaining)["image"].to(device)
        for images in in_global_order(mine).split(STATISTICS_BATCH):
            found = encoder.features(images).double()
            totals += torch.stack([found.sum((0, 2, 3)), found.square().sum((0, 2, 3))])
            places += found[:, 0].numel()
    mean, square = totals / places
    encoder.set_latent_statistics(mean, (square - mean.square()).clamp(min=0).sqrt())


@torch.no_grad()
def validate(config: Config, autoencoder: Autoencoder, heldout: AnyDataset, most_images: int) -> dict[str, float]:
    """PSNR on held-out images of all processes, and the usage of a codebook, if there is one.

    At most `data.validation_size` images and `most_images`.
    """
    autoencoder.eval()
    totals = torch.zeros(2, dtype=torch.float64, device=autoencoder.device)  # sum of PSNR, number of images
    bottleneck = autoencoder.bottleneck
    usage = CodebookUsage(*bottleneck.vocabulary(autoencoder.config)) if bottleneck.discrete else None
    limit = min(config.data.validation_size, most_images)
    batches: Iterator[dict] = evaluation_batches(heldout, config.evaluation.batch_size, limit=limit)
    with failing_together():
        for batch in islice(batches, rank(), None, world_size()):
            images = batch["image"].to(autoencoder.device)
            output = autoencoder(images)
            ratios = psnr(output.sample.float().clamp(-1, 1), images).double()
            totals += torch.stack([ratios.sum(), totals.new_tensor(len(images))])
            if usage:
                usage.update(output.encoding.indices.cpu())
    ratio, images_seen = sum_over_processes(totals).tolist()
    values = {"psnr": ratio / images_seen}
    if usage:
        usage.all_reduce()
        values |= {"codebook_usage": usage.usage, "codebook_perplexity": usage.perplexity, "codebook_entropy": usage.entropy}
    return values


def show_reconstructions(run: Run, step: int, autoencoder: Autoencoder, heldout: AnyDataset) -> None:
    """Some held-out images beside their reconstructions, for trackers that take pictures."""
    with failing_together():
        if run.shows_images():
            count = run.config.logged_images
            shown = next(evaluation_batches(heldout, count, limit=count))
            run.record_picture(step, "reconstructions", reconstruction_sheet(autoencoder, shown["image"]))
