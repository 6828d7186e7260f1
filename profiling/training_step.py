"""One step of the recipes as a function, with a clock inside: what profile_step.py and bench_step.py run.

The steps follow the loops of recipes/train_dae.py and recipes/train_prior.py for one process, without accelerate, which a
machine that only measures need not have. What differs: no checkpoints, logs or validation; the codebook starts at random; an
adversarial loss is on from the first step; the prior's tokens are random.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dae.config import (
    AutoencoderConfig,
    Config,
    DataConfig,
    DecoderConfig,
    LossConfig,
    PriorConfig,
    StageConfig,
    VQConfig,
    from_dict,
)
from dae.losses import PerceptualLoss, adaptive_weight, discriminator_loss, generator_loss, reconstruction_loss
from dae.models import ARPrior, Autoencoder, PatchDiscriminator, choose_kernels
from dae.quantizers import VectorQuantizer
from dae.training import EMA, Stage, build_optimizer, build_scheduler


def vqgan256() -> Config:
    """The models of recipes/configs/imagenet256.yaml, bfloat16 and channels_last, one GPU's batch (a test compares them)."""
    stage = StageConfig(
        train_batch_size=16, learning_rate=1e-4, max_train_steps=200000, lr_warmup_steps=2000, ema_decay=0.9999,
        loss=LossConfig(l1=1.0, l2=1.0),
    )  # fmt: skip
    adversarial = LossConfig(l1=1.0, l2=1.0, adversarial=0.1, adversarial_start=20000, discriminator_layers=3)
    return Config(
        mixed_precision="bf16",
        channels_last=True,
        data=DataConfig(resolution=256, channels=3),
        autoencoder=AutoencoderConfig(
            base_channels=128, channel_multipliers=[1, 1, 2, 2, 4], num_blocks=2, attention_resolutions=[16],
            latent_channels=64, vq=VQConfig(codebook_size=16384),
        ),
        auxiliary_decoder=DecoderConfig(family="dropout", dropout=0.5),
        stage1=stage,
        stage2=dataclasses.replace(stage, loss=adversarial),
        prior=PriorConfig(
            width=768, depth=12, num_heads=12, dropout=0.1, max_train_steps=400000, train_batch_size=32, learning_rate=4e-4,
            lr_warmup_steps=5000, adam_weight_decay=0.05, ema_decay=0.9999, early_stopping=False, augmented_copies=1,
        ),
    )  # fmt: skip


def vq32() -> Config:
    """The models of recipes/configs/photos.yaml: 32x32 RGB (a test compares them)."""
    stage = StageConfig(
        max_train_steps=2000, train_batch_size=32, learning_rate=1e-3, ema_decay=0.995, loss=LossConfig(l1=1.0, l2=1.0)
    )
    return Config(
        data=DataConfig(resolution=32, channels=3),
        autoencoder=AutoencoderConfig(base_channels=32, channel_multipliers=[1, 2, 4], vq=VQConfig(codebook_size=256)),
        auxiliary_decoder=DecoderConfig(family="dropout", dropout=0.5),
        stage1=stage,
        stage2=dataclasses.replace(stage, loss=LossConfig(l1=1.0, l2=1.0, adversarial=0.1, adversarial_start=500)),
        prior=PriorConfig(
            width=192, depth=6, num_heads=6, dropout=0.1, token_noise=0.1, max_train_steps=2000, train_batch_size=32,
            learning_rate=1e-3, adam_weight_decay=0.05,
        ),
    )  # fmt: skip


# Configurations that need no YAML reader, for a machine with torch alone.
PRESETS: dict[str, Callable[[], Config]] = {"vq32": vq32, "vqgan256": vqgan256}


def override(config: Config, overrides: list[str]) -> Config:
    """The configuration with `a.b=c` set, c as JSON or else as a word; ValueError for a key that there is not.

    `dae.config.load_config` checks more, and needs OmegaConf.
    """
    values = dataclasses.asdict(config)
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals:
            raise ValueError(f"expected an override `key=value`, got {text!r}")
        *sections, name = key.split(".")
        section = values
        for part in sections:
            section = section.get(part)
            if not isinstance(section, dict):
                raise ValueError(f"unknown key {key!r}: the configuration has no section {part!r}")
        try:
            section[name] = json.loads(value)
        except json.JSONDecodeError:
            section[name] = value
    return from_dict(Config, values)


@dataclass
class Stamp:
    """From here to the next stamp, time belongs to this phase and block; the last stamp of a step has no block."""

    phase: str
    block: str
    seconds: float  # of the host's clock
    event: torch.cuda.Event | None  # the same place in the GPU's stream


class Clock:
    """Divides all of a step's time among phases (data, forward, backward, update) and blocks of the model.

    `enter` is a boundary of the forward pass: what follows belongs to the block it names. The gradient that passes the same
    boundary in the backward pass hands over to the block before. So the times add up to the step, with nothing left out;
    a forward hook before a module is enough, and code between modules counts to the block that was entered last.
    """

    def __init__(self, device: torch.device, on: bool = True):
        self.device, self.on = device, on
        self.phase, self.block = "", ""
        self.stamps: list[Stamp] = []

    def stamp(self, phase: str, block: str) -> None:
        if not self.on:
            return
        self.phase, self.block = phase, block
        event = None
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
        self.stamps.append(Stamp(phase, block, time.perf_counter(), event))

    def enter(self, block: str, x: Any) -> Any:
        """Begin `block` in the forward pass; returns x, whose gradient ends the block's backward pass."""
        # Other phases: layers that gradient checkpointing runs again belong to the backward pass of their block.
        if not self.on or self.phase != "forward":
            return x
        before = self.block
        self.stamp("forward", block)
        if isinstance(x, Tensor) and x.requires_grad:
            x = x.view_as(x)  # a tensor of this block alone: its gradient does not wait for other users of x
            x.register_hook(lambda _: self._leave(before))
        return x

    def _leave(self, before: str) -> None:
        if self.phase == "backward":  # not in the small backward passes that the adaptive weight takes in the forward pass
            self.stamp("backward", before)

    def watch(self, module: nn.Module, block: str) -> None:
        """Enter `block` whenever the module is called."""
        module.register_forward_pre_hook(lambda _, args: (self.enter(block, args[0]), *args[1:]))

    def take(self) -> list[Stamp]:
        stamps, self.stamps = self.stamps, []
        return stamps


def seconds_of(stamps: list[Stamp]) -> dict[tuple[str, str], float]:
    """Seconds of each (phase, block) of one step, in the order of their first stamps; on CUDA by the stream's own events."""
    if stamps[-1].event is not None:
        stamps[-1].event.synchronize()
    found: dict[tuple[str, str], float] = {}
    for a, b in itertools.pairwise(stamps):
        spent = b.seconds - a.seconds if a.event is None else a.event.elapsed_time(b.event) / 1000
        found[a.phase, a.block] = found.get((a.phase, a.block), 0.0) + spent
    return found


def watch_encoder(clock: Clock, autoencoder: Autoencoder) -> None:
    encoder, size = autoencoder.encoder, autoencoder.resolution
    clock.watch(encoder.conv_in, f"encoder {size}x{size}")
    for level, layers in enumerate(encoder.levels):
        clock.watch(layers, f"encoder {size >> level}x{size >> level}")
    clock.watch(encoder.norm_out, "encoder out")
    clock.watch(autoencoder.bottleneck, "bottleneck")


def watch_decoder(clock: Clock, autoencoder: Autoencoder) -> None:
    decoder, size = autoencoder.decoder, autoencoder.latent_size
    if not hasattr(decoder, "levels"):
        clock.watch(decoder, "decoder")
        return
    clock.watch(decoder.conv_in, f"decoder {size}x{size}")
    for level, layers in enumerate(decoder.levels):
        clock.watch(layers, f"decoder {size << level}x{size << level}")
    clock.watch(decoder.norm_out, "decoder out")


def watch_prior(clock: Clock, prior: ARPrior) -> None:
    clock.watch(prior, "embedding")
    for block in prior.blocks:
        clock.watch(block.norm_attention, "attention")
        clock.watch(block.norm_mlp, "MLP")
    clock.watch(prior.norm, "head and loss")


class TrainingStep:
    """What the steps of autoencoder and prior share: precision, gradient clipping, optimisers, the average of the weights."""

    def __init__(self, config: Config, settings: Any, device: torch.device, clock: Clock):
        self.config, self.settings, self.device, self.clock = config, settings, device, clock
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(config.mixed_precision or "no")
        self.autocast = lambda: torch.autocast(device.type, dtype) if dtype else contextlib.nullcontext()
        self.scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
        self.layout = torch.channels_last if config.channels_last else torch.contiguous_format
        self.modules: dict[str, nn.Module] = {}
        self.optimizers: list[torch.optim.Optimizer] = []

    def train(self, trained: nn.Module) -> nn.Module:
        """Take up what is trained; returns what to call."""
        self.trained = trained
        self.ema = EMA(trained, self.settings.ema_decay) if self.settings.use_ema else None
        self.optimizers.append(build_optimizer(trained, self.settings))
        self.scheduler = build_scheduler(self.optimizers[0], self.settings)
        return torch.compile(trained) if self.config.compile else trained

    def backward(self, loss: Tensor, block: str) -> None:
        self.clock.stamp("backward", block)
        self.scaler.scale(loss / self.settings.gradient_accumulation_steps).backward()

    def update(self) -> None:
        if self.settings.max_grad_norm > 0:
            self.clock.stamp("update", "gradient clipping")
            self.scaler.unscale_(self.optimizers[0])
            torch.nn.utils.clip_grad_norm_(self.trained.parameters(), self.settings.max_grad_norm)
        self.clock.stamp("update", "AdamW")
        for optimizer in self.optimizers:
            self.scaler.step(optimizer)
            optimizer.zero_grad()
        self.scaler.update()
        self.scheduler.step()

    def average(self) -> None:
        if self.ema:
            self.clock.stamp("update", "average of weights")
            self.ema.update(self.trained)

    def state_bytes(self) -> dict[str, int]:
        """Bytes that stay from step to step: weights and buffers, the optimisers' moments, the average of the weights."""

        def count(tensors: Iterator[Tensor]) -> int:
            return sum(
                {t.data_ptr(): t.numel() * t.element_size() for t in tensors if t.device.type == self.device.type}.values()
            )

        modules = self.modules.values()
        states = [state for optimizer in self.optimizers for state in optimizer.state.values()]
        return {
            "weights": count(t for m in modules for t in itertools.chain(m.parameters(), m.buffers())),
            "optimisers": count(t for state in states for t in state.values() if isinstance(t, Tensor)),
            "average": count(iter(self.ema.state_dict().values())) if self.ema else 0,
        }


class AutoencoderStep(TrainingStep):
    """A step of recipes/train_dae.py.

    Args:
        stage: which decoder, what is frozen, losses and optimiser.
        batches: endless batches of images [B, C, H, W] on the host.
        prepare: what is done to a batch on the device before the step, such as augmentation.
        autoencoder: takes the place of the one that `config` and `stage` describe.
        pretrained: read the perceptual loss's weights as the recipe does; False leaves them random, which takes as long.
    """

    def __init__(
        self,
        config: Config,
        stage: Stage,
        batches: Iterator[Tensor],
        device: torch.device,
        clock: Clock,
        *,
        prepare: Callable[[Tensor], Tensor] = lambda images: images,
        autoencoder: Autoencoder | None = None,
        pretrained: bool = False,
    ):
        super().__init__(config, stage.config, device, clock)
        self.stage, self.batches, self.prepare, loss = stage, batches, prepare, stage.config.loss
        if autoencoder is None:
            architecture = dataclasses.replace(config.autoencoder, decoder=stage.decoder)
            autoencoder = Autoencoder(architecture, config.data.channels, config.data.resolution)
        self.autoencoder = self.modules["autoencoder"] = autoencoder.to(device, memory_format=self.layout).train()
        choose_kernels(autoencoder, config.kernels)
        if stage.latent_frozen:
            autoencoder.freeze_latent()
        self.learns_codebook = isinstance(autoencoder.bottleneck, VectorQuantizer) and not stage.latent_frozen
        autoencoder.enable_gradient_checkpointing(self.settings.gradient_checkpointing)
        if clock.on and (stage.latent_frozen or not config.compile):  # a compiled graph has no blocks to watch
            watch_encoder(clock, autoencoder)
        if clock.on and not config.compile:
            watch_decoder(clock, autoencoder)
        self.model = self.train(autoencoder.decoder if stage.latent_frozen else autoencoder)
        self.critic = self.perceptual = None
        if loss.adversarial > 0:
            critic = PatchDiscriminator(config.data.channels, loss.discriminator_channels, loss.discriminator_layers)
            self.critic = self.modules["discriminator"] = critic.to(device, memory_format=self.layout)
            choose_kernels(critic, config.kernels)
            self.optimizers.append(build_optimizer(critic, self.settings, loss.discriminator_learning_rate))
        if loss.perceptual > 0:
            perceptual = PerceptualLoss.from_pretrained(loss.perceptual_weights) if pretrained else PerceptualLoss()
            self.perceptual = self.modules["perceptual"] = perceptual.to(device, memory_format=self.layout)
            choose_kernels(perceptual, config.kernels)

    def forward(self, images: Tensor) -> tuple[Tensor, Any]:
        """Sample in float32 and encoding."""
        compiled = self.config.compile
        if self.stage.latent_frozen:
            with torch.no_grad(), self.autocast():
                encoding = self.autoencoder.encode(images, sample_posterior=True)
            latents = self.clock.enter("decoder, compiled", encoding.latents) if compiled else encoding.latents
            with self.autocast():
                return self.model(latents).float(), encoding
        if compiled:
            self.clock.stamp("forward", "autoencoder, compiled")
        with self.autocast():
            output = self.model(images)
        return output.sample.float(), output.encoding

    def __call__(self) -> Tensor:
        """One optimiser step; returns the reconstruction loss of its last micro-batch."""
        clock, loss_config = self.clock, self.settings.loss
        for _ in range(self.settings.gradient_accumulation_steps):
            clock.stamp("data", "data")
            images = self.prepare(next(self.batches).to(self.device, non_blocking=True))
            images = images.contiguous(memory_format=self.layout)
            clock.stamp("forward", f"encoder {images.shape[-1]}x{images.shape[-1]}")
            sample, encoding = self.forward(images)
            sample = clock.enter("pixel loss", sample)
            reconstruction, last = reconstruction_loss(sample, images, loss_config), "pixel loss"
            if self.perceptual is not None:
                last = "perceptual loss"
                with self.autocast():
                    distance = self.perceptual(clock.enter(last, sample), images).mean()
                reconstruction = reconstruction + loss_config.perceptual * distance
            loss = reconstruction if self.stage.latent_frozen else reconstruction + encoding.loss
            if self.critic is not None:
                last = "discriminator's verdict"
                self.critic.requires_grad_(False)
                with self.autocast():
                    verdict = self.critic(clock.enter(last, sample)).float()
                adversarial = generator_loss(verdict)
                clock.stamp("forward", "adaptive weight")
                weight = adaptive_weight(reconstruction, adversarial, sample)
                loss = loss + loss_config.adversarial * weight * adversarial
                self.critic.requires_grad_(True)
            self.backward(loss, last)
            if self.critic is not None:
                clock.stamp("forward", "discriminator's training")
                with self.autocast():
                    real, fake = self.critic(images), self.critic(sample.detach())
                self.backward(discriminator_loss(real.float(), fake.float()), "discriminator's training")
            if self.learns_codebook:
                clock.stamp("update", "codebook")
                self.autoencoder.bottleneck.observe(encoding)
        self.update()
        if self.learns_codebook:
            clock.stamp("update", "codebook")
            self.autoencoder.bottleneck.update_codebook()
        self.average()
        clock.stamp("", "")
        return reconstruction.detach()


class PriorStep(TrainingStep):
    """A step of recipes/train_prior.py on random tokens."""

    def __init__(self, config: Config, sequence_length: int, num_classes: int, device: torch.device, clock: Clock):
        super().__init__(config, config.prior, device, clock)
        vocabulary = config.autoencoder.vq.codebook_size
        prior = ARPrior(config.prior, vocab_size=vocabulary, sequence_length=sequence_length, num_classes=num_classes)
        self.prior = self.modules["prior"] = prior.to(device).train()
        choose_kernels(prior, config.kernels)
        prior.gradient_checkpointing = config.prior.gradient_checkpointing
        if clock.on and not config.compile:
            watch_prior(clock, prior)
        self.model = self.train(prior)
        self.tokens = torch.randint(vocabulary, (config.prior.train_batch_size, sequence_length))
        self.labels = torch.randint(num_classes, (config.prior.train_batch_size,))

    def __call__(self) -> Tensor:
        """One optimiser step; returns the loss of its last micro-batch."""
        clock = self.clock
        for _ in range(self.settings.gradient_accumulation_steps):
            clock.stamp("data", "data")
            tokens, labels = self.tokens.to(self.device), self.labels.to(self.device)
            clock.stamp("forward", "prior, compiled" if self.config.compile else "embedding")
            with self.autocast():
                loss = self.model(self.prior.hide_classes(labels), self.prior.corrupt(tokens[:, :-1]), targets_BT=tokens)
            self.backward(loss.float(), clock.block)
        self.update()
        self.average()
        clock.stamp("", "")
        return loss.detach()
