"""The knobs of the losses and of their discriminator, the section `loss` of each stage."""

from __future__ import annotations

from dataclasses import dataclass
from typing import List, Optional

from dae.config.knobs import knob


@dataclass
class LossConfig:
    """Weights of the reconstruction losses; the bottleneck adds its own term (commitment or KL)."""

    l1: float = knob(0.0, "weight of the mean absolute error", ge=0, weight=True)
    l2: float = knob(1.0, "weight of the mean squared error", ge=0, weight=True)
    charbonnier: float = knob(0.0, "weight of the mean of sqrt(error^2 + 1e-6)", ge=0, weight=True)
    perceptual: float = knob(0.0, "weight of LPIPS, the distance of VGG16's features; 0 loads no network", ge=0, weight=True)
    perceptual_weights: str = knob(
        "timm/vgg16.tv_in1k",
        "its weights by torchvision's names, and LPIPS's `lin0.weight` ... if there: a .safetensors file, a folder, a Hub id",
        path=True,
    )
    adversarial: float = knob(0.0, "weight of the loss of a discriminator; 0 trains none", ge=0, role="second stage", weight=True)
    adversarial_loss: str = knob(
        "hinge",
        "hinge, non_saturating or least_squares",
        choices=("hinge", "non_saturating", "least_squares"),
        role="second stage",
    )
    adversarial_start: int = knob(0, "step of the stage at which the adversarial loss is switched on", ge=0, role="second stage")
    adversarial_ramp: int = knob(0, "steps over which it rises to its weight", ge=0, role="second stage")
    lecam: float = knob(
        0.0, "weight of LeCam regularisation of the discriminator, for few images", ge=0, role="second stage", weight=True
    )
    r1: float = knob(
        0.0, "weight of the gradient penalty R1 of the discriminator, its gamma", ge=0, role="second stage", weight=True
    )
    r1_every: int = knob(16, "steps between two penalties, each with as many times its weight", ge=1, role="second stage")
    spectral_norm: bool = knob(False, "spectral normalisation of the discriminator's convolutions", role="second stage")
    augment: List[str] = knob(
        [],
        "differentiable augmentations, in this order, of all images that the discriminator sees: color, translation, cutout",
        choices=("color", "translation", "cutout"),
        role="second stage",
    )
    discriminator: str = knob(
        "patch",
        "patch: a convolutional network; features: heads on the feature maps of a frozen pretrained network",
        choices=("patch", "features"),
        role="second stage",
    )
    discriminator_features: Optional[str] = knob(
        None,
        "features: that network, by its name in timm or a folder with config.json and model.safetensors in timm's format",
        path=True,
        role="second stage",
    )
    discriminator_heads: int = knob(
        4, "features: layers of it that have a head, evenly spaced up to the last", ge=1, le=1000, role="second stage"
    )
    discriminator_init: Optional[str] = knob(
        None,
        "start from the weights of a discriminator saved by save_discriminator: its folder, that of its run, or a Hub id",
        path=True,
        role="second stage",
    )
    discriminator_channels: int = knob(
        64, "channels of the discriminator's first layer; features: of each head", ge=1, le=16384, role="second stage"
    )
    discriminator_layers: int = knob(2, "patch: strided layers of the discriminator", ge=0, le=14, role="second stage")
    discriminator_learning_rate: float = knob(1e-4, "learning rate of the discriminator", ge=0, le=1, role="second stage")
