"""The discriminator of a stage: its network, its term of the decoder's loss, and its own loss."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dae.config import Config, LossConfig
from dae.hub import PretrainedModel
from dae.losses import (
    LeCam,
    adaptive_weight,
    differentiable_augmentation,
    discriminator_loss,
    generator_loss,
    gradient_penalty,
)
from dae.models import FeatureDiscriminator, PatchDiscriminator, choose_kernels
from dae.models.layers import GroupNorm
from dae.training.engine import Engine
from dae.training.initialization import load_discriminator


def build_discriminator(
    config: Config, loss: LossConfig, device: torch.device, layout: torch.memory_format = torch.contiguous_format
) -> PatchDiscriminator | FeatureDiscriminator:
    """The discriminator that `loss` describes, on its device, with the kernels of `config`.

    Raises:
        ImportError, FileNotFoundError, ValueError: the frozen network of `features`, or what `discriminator_init` names, is not
            there or does not fit.
    """
    discriminator: PatchDiscriminator | FeatureDiscriminator
    channels, spectral_norm = loss.discriminator_channels, loss.spectral_norm
    if loss.discriminator == "features":
        discriminator = FeatureDiscriminator(str(loss.discriminator_features), channels, loss.discriminator_heads, spectral_norm)
    else:
        discriminator = PatchDiscriminator(config.data.channels, channels, loss.discriminator_layers, spectral_norm)
    if loss.discriminator_init:
        load_discriminator(discriminator, loss.discriminator_init)
    discriminator.to(device=device, memory_format=layout)  # type: ignore[call-overload]
    choose_kernels(discriminator, config.kernels)  # which refuses kernels that cannot run on the device
    if loss.r1 > 0:  # the kernel has no second derivative
        for module in discriminator.modules():
            if isinstance(module, GroupNorm):
                module.impl = "reference"
    return discriminator


class Adversary:
    """What a discriminator adds to a training step.

    Both terms see the same real and generated images: those of the micro-step, augmented at random each time (`loss.augment`).

    Args:
        loss: weights and kinds of the losses.
        discriminator: on its device; what is frozen in it is no module of it.
        discriminate: it as prepared by `engine`, in mixed precision, with synchronised gradients.
    """

    def __init__(
        self, loss: LossConfig, discriminator: PretrainedModel, discriminate: Callable[[Tensor], Tensor], engine: Engine
    ):
        self.loss, self.discriminator, self.discriminate, self.engine = loss, discriminator, discriminate, engine
        self.lecam = LeCam().to(engine.device) if loss.lecam > 0 else None
        self.latest: dict[str, Tensor] = {}  # of the last micro-step, for `signals`

    def signals(self) -> dict[str, Tensor]:
        """Means of the last micro-step's logits, the discriminator's loss, and the adaptive weight once it is used."""
        return {name: value.float().mean() for name, value in self.latest.items()}

    def weight(self, number: int) -> float:
        """Of the adversarial loss at a step: 0 before `adversarial_start`, then rising over `adversarial_ramp` steps."""
        since = number - self.loss.adversarial_start + 1
        return 0.0 if since <= 0 else self.loss.adversarial * min(1.0, since / max(1, self.loss.adversarial_ramp))

    def penalised(self, number: int) -> bool:
        """Whether R1 is due: every `r1_every` steps, with as many times its weight (Karras et al. 2020, arXiv 1912.04958, B)."""
        return self.loss.r1 > 0 and number % self.loss.r1_every == 0

    def generator_term(
        self, reconstruction: Tensor, sample: Tensor, number: int, scaled: Callable[[Tensor], Tensor] = lambda loss: loss
    ) -> Tensor:
        """The weighted adversarial loss of the decoder.

        `scaled` multiplies a loss by the scale of the decoder's gradients: unscaled, those of fp16 would be 0.
        """
        self.discriminator.requires_grad_(False)
        with self.engine.autocast():
            logits = self.discriminator(differentiable_augmentation(sample, self.loss.augment))
        adversarial = generator_loss(logits.float(), self.loss.adversarial_loss)
        weight = self.latest["adaptive_weight"] = adaptive_weight(scaled(reconstruction), scaled(adversarial), sample)
        term = self.weight(number) * weight * adversarial
        self.discriminator.requires_grad_(True)
        return term

    def discriminator_term(self, images: Tensor, sample: Tensor, number: int) -> Tensor:
        """The discriminator's own loss."""
        images, sample = (differentiable_augmentation(x, self.loss.augment) for x in (images, sample.detach()))
        real, fake = self.discriminate(images), self.discriminate(sample)
        term = discriminator_loss(real, fake, self.loss.adversarial_loss)
        self.latest |= {"discriminator_loss": term.detach(), "real_logit": real.detach(), "fake_logit": fake.detach()}
        if self.lecam is not None:
            term = term + self.loss.lecam * self.lecam(real, fake)
        if self.penalised(number):
            penalty = gradient_penalty(self.discriminator, images)
            term = term + 0.5 * self.loss.r1 * self.loss.r1_every * penalty
        return term
