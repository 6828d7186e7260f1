"""The small convolutional architecture of this project: residual blocks at each resolution, attention where it is asked for."""

from __future__ import annotations

from torch import nn

from dae.config import AutoencoderConfig
from dae.models.architecture import LevelArchitecture, level_widths
from dae.models.layers import Downsample, GroupNorm, LevelNetwork, ResidualBlock, SelfAttention2d, Upsample


class ConvEncoder(LevelNetwork):
    """Images [B, C, H, W] to features [B, out_channels, H/f, W/f], f = 2^(levels - 1)."""

    def __init__(self, config: AutoencoderConfig, image_channels: int, resolution: int, out_channels: int):
        super().__init__()
        widths = level_widths(config)
        channels = widths[0]
        self.conv_in = nn.Conv2d(image_channels, channels, 3, padding=1)
        self.levels = nn.ModuleList()
        for level, width in enumerate(widths):
            layers: list[nn.Module] = [Downsample(channels)] if level > 0 else []
            for _ in range(config.num_blocks):
                layers.append(ResidualBlock(channels, width))
                channels = width
                if resolution >> level in config.attention_resolutions:
                    layers.append(SelfAttention2d(channels))
            self.levels.append(nn.Sequential(*layers))
        self.norm_out = GroupNorm(channels)
        self.conv_out = nn.Conv2d(channels, out_channels, 3, padding=1)


class ConvDecoder(LevelNetwork):
    """Residual blocks at each level from the coarsest to the finest, with upsampling between them.

    Args:
        config: widths, levels and attention of the autoencoder, mirrored from its encoder.
        image_channels, resolution: of the images.
        width_factor: scales the channels of every level (at least 4 channels are left).
        num_blocks: residual blocks per level.
        dropout: probability of channel dropout after each residual block.
    """

    def __init__(
        self,
        config: AutoencoderConfig,
        image_channels: int,
        resolution: int,
        width_factor: float,
        num_blocks: int,
        dropout: float,
    ):
        super().__init__()
        widths = [max(4, width) for width in level_widths(config, width_factor)]
        channels = widths[-1]
        self.conv_in = nn.Conv2d(config.latent_channels, channels, 3, padding=1)
        self.levels = nn.ModuleList()
        for level in reversed(range(len(widths))):
            layers: list[nn.Module] = []
            if num_blocks == 0 and channels != widths[level]:
                layers.append(nn.Conv2d(channels, widths[level], 1))
                channels = widths[level]
            for _ in range(num_blocks):
                layers.append(ResidualBlock(channels, widths[level], dropout))
                channels = widths[level]
                if resolution >> level in config.attention_resolutions:
                    layers.append(SelfAttention2d(channels))
            if level > 0:
                layers.append(Upsample(channels))
            self.levels.append(nn.Sequential(*layers))
        self.norm_out = GroupNorm(channels)
        self.conv_out = nn.Conv2d(channels, image_channels, 3, padding=1)


class Conv(LevelArchitecture):
    encoder = ConvEncoder
    decoder = ConvDecoder
