"""The interface of an architecture: how its encoder and its decoders are built, and what others need to know of their shape."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import nn

from dae.config import AutoencoderConfig


class Architecture(ABC):
    """One subclass per structure of encoder and decoder, in `dae.models.architectures.ARCHITECTURES` under its name.

    Its modules map [B, C, H, W] to [B, C', h, w] or back, have an attribute `gradient_checkpointing`, run the kernels that
    `dae.models.kernels` chooses, and take images of other sizes than trained, if the factor divides them.
    """

    @staticmethod
    @abstractmethod
    def factor(config: AutoencoderConfig) -> int:
        """By which number the encoder divides height and width."""

    @staticmethod
    @abstractmethod
    def says_factor(config: AutoencoderConfig) -> str:
        """The knob that sets the factor and its value, for an error."""

    @staticmethod
    @abstractmethod
    def check(config: AutoencoderConfig, resolution: int) -> None:
        """ValueError if a knob asks for something that the architecture, or images of this size, do not have."""

    @staticmethod
    @abstractmethod
    def encoder(config: AutoencoderConfig, image_channels: int, resolution: int, out_channels: int) -> nn.Module:
        """Images [B, image_channels, H, W] to features [B, out_channels, h, w]."""

    @staticmethod
    @abstractmethod
    def decoder_blocks(config: AutoencoderConfig) -> int:
        """Blocks of the full decoder: the most that a shallow one has."""

    @staticmethod
    @abstractmethod
    def decoder(
        config: AutoencoderConfig, image_channels: int, resolution: int, width_factor: float, num_blocks: int, dropout: float
    ) -> nn.Module:
        """Latents [B, latent_channels, h, w] to images [B, image_channels, H, W].

        Args:
            width_factor: scales the channels of the full decoder.
            num_blocks: of at most `decoder_blocks`.
            dropout: probability with which each block drops.
        """


class LevelArchitecture(Architecture):
    """Convolutions at several resolutions, each half of the one before: `channel_multipliers` has a number for each."""

    @staticmethod
    def factor(config: AutoencoderConfig) -> int:
        if not config.channel_multipliers:
            raise ValueError("autoencoder.channel_multipliers is empty: expected at least one level")
        return 1 << (len(config.channel_multipliers) - 1)

    @staticmethod
    def says_factor(config: AutoencoderConfig) -> str:
        return f"autoencoder.channel_multipliers has {len(config.channel_multipliers)} levels"

    @staticmethod
    def check(config: AutoencoderConfig, resolution: int) -> None:
        levels = [resolution >> level for level in range(len(config.channel_multipliers))]
        if unknown := sorted(set(config.attention_resolutions) - set(levels)):
            raise ValueError(f"autoencoder.attention_resolutions: no level has {unknown}; the feature maps' sizes are {levels}")

    @staticmethod
    def decoder_blocks(config: AutoencoderConfig) -> int:
        return config.num_blocks + 1


def level_widths(config: AutoencoderConfig, width_factor: float = 1.0) -> list[int]:
    """Channels of each level from the finest on, scaled; a scaled one has at least 4."""
    if width_factor == 1.0:
        return [config.base_channels * m for m in config.channel_multipliers]
    return [max(4, round(config.base_channels * m * width_factor)) for m in config.channel_multipliers]
