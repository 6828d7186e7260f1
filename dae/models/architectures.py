"""The architectures by name, and what depends on the chosen one."""

from __future__ import annotations

from torch import nn

from dae.config import AutoencoderConfig
from dae.models.architecture import Architecture
from dae.models.conv import Conv
from dae.models.ldm import LDM
from dae.models.vit import ViT

ARCHITECTURES: dict[str, type[Architecture]] = {"conv": Conv, "ldm": LDM, "vit": ViT}


def architecture_of(config: AutoencoderConfig) -> type[Architecture]:
    """The class that `config.architecture` names. ValueError: there is none of that name."""
    if config.architecture not in ARCHITECTURES:
        names = " or ".join(map(repr, ARCHITECTURES))
        raise ValueError(f"autoencoder.architecture: expected {names}, got {config.architecture!r}")
    return ARCHITECTURES[config.architecture]


def downsampling_factor(config: AutoencoderConfig) -> int:
    """By which number the encoder divides height and width of the images."""
    return architecture_of(config).factor(config)


def latent_size(config: AutoencoderConfig, resolution: int) -> int:
    """Height and width of the latent of images of `resolution` pixels. ValueError: the factor does not divide them."""
    architecture = architecture_of(config)
    factor = architecture.factor(config)
    if resolution % factor:
        nearest = sorted({resolution // factor * factor, -(-resolution // factor) * factor} - {0})
        raise ValueError(
            f"{architecture.says_factor(config)}: the encoder divides the resolution by {factor}; data.resolution={resolution} "
            f"is not divisible. The nearest that are: {', '.join(map(str, nearest))}"
        )
    return resolution // factor


def build_encoder(config: AutoencoderConfig, image_channels: int, resolution: int, out_channels: int) -> nn.Module:
    """Build the encoder: [B, image_channels, H, W] -> [B, out_channels, h, w]. ValueError: a knob out of its range."""
    return architecture_of(config).encoder(config, image_channels, resolution, out_channels)
