"""The convolutional architecture of taming-transformers and latent diffusion (Esser et al. 2021, Rombach et al. 2022).

The structure of diffusers' AutoencoderKL and VQModel and of LlamaGen's tokenizer, whose weights `dae.models.diffusers_weights`
and `dae.models.legacy_weights` map: two residual blocks with attention between them at the coarsest resolution, downsampling
that pads at the right and the bottom alone, and 1 x 1 convolutions around the bottleneck.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from dae.config import AutoencoderConfig
from dae.models.architecture import LevelArchitecture, level_widths
from dae.models.layers import GroupNorm, LevelNetwork, ResidualBlock, SelfAttention2d, Upsample


class PaddedDownsample(nn.Conv2d):
    """Halve the resolution by a strided convolution of the map with a row and a column of zeros below and at the right."""

    def __init__(self, channels: int):
        super().__init__(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (0, 1, 0, 1)))


class LDMEncoder(LevelNetwork):
    """Images [B, C, H, W] to features [B, out_channels, H/f, W/f], f = 2^(levels - 1).

    Its last convolution has `ldm.z_channels` channels for each of the out_channels / latent_channels numbers that a bottleneck
    takes per channel of the latent (two for a Gaussian posterior); `quant_conv` makes out_channels of them.
    """

    def __init__(self, config: AutoencoderConfig, image_channels: int, resolution: int, out_channels: int):
        super().__init__()
        options, widths = config.ldm, level_widths(config)
        groups, channels = options.norm_num_groups, widths[0]
        z_channels = inner_channels(config, "quant_conv") * (out_channels // config.latent_channels)
        self.conv_in = nn.Conv2d(image_channels, channels, 3, padding=1)
        self.levels = nn.ModuleList()
        for level, width in enumerate(widths):
            layers: list[nn.Module] = []
            for _ in range(config.num_blocks):
                layers.append(ResidualBlock(channels, width, groups=groups))
                channels = width
                if resolution >> level in config.attention_resolutions:
                    layers.append(SelfAttention2d(channels, groups))
            if level < len(widths) - 1:
                layers.append(PaddedDownsample(channels))
            else:
                layers += middle(channels, options.mid_attention, groups)
            self.levels.append(nn.Sequential(*layers))
        self.norm_out = GroupNorm(channels, groups=groups)
        self.conv_out = nn.Conv2d(channels, z_channels, 3, padding=1)
        self.quant_conv = nn.Conv2d(z_channels, out_channels, 1) if options.quant_conv else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.quant_conv(super().forward(x))


class LDMDecoder(LevelNetwork):
    """Latents [B, latent_channels, h, w] to images; the arguments are those of `dae.models.conv.ConvDecoder`.

    Without residual blocks there is no middle either.
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
        options, widths = config.ldm, level_widths(config, width_factor)
        groups, channels, z_channels = options.norm_num_groups, widths[-1], inner_channels(config, "post_quant_conv")
        self.post_quant_conv = nn.Conv2d(config.latent_channels, z_channels, 1) if options.post_quant_conv else nn.Identity()
        self.conv_in = nn.Conv2d(z_channels, channels, 3, padding=1)
        self.levels = nn.ModuleList()
        for level in reversed(range(len(widths))):
            layers: list[nn.Module] = []
            if level == len(widths) - 1 and num_blocks > 0:
                layers += middle(channels, options.mid_attention, groups, dropout)
            if num_blocks == 0 and channels != widths[level]:
                layers.append(nn.Conv2d(channels, widths[level], 1))
                channels = widths[level]
            for _ in range(num_blocks):
                layers.append(ResidualBlock(channels, widths[level], dropout, groups))
                channels = widths[level]
                if resolution >> level in config.attention_resolutions:
                    layers.append(SelfAttention2d(channels, groups))
            if level > 0:
                layers.append(Upsample(channels))
            self.levels.append(nn.Sequential(*layers))
        self.norm_out = GroupNorm(channels, groups=groups)
        self.conv_out = nn.Conv2d(channels, image_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.post_quant_conv(x))


class LDM(LevelArchitecture):
    encoder = LDMEncoder
    decoder = LDMDecoder


def middle(channels: int, attention: bool, groups: int, dropout: float = 0.0) -> list[nn.Module]:
    """The blocks between encoder levels and bottleneck, and between bottleneck and decoder levels."""
    between = [SelfAttention2d(channels, groups)] if attention else []
    return [ResidualBlock(channels, channels, dropout, groups), *between, ResidualBlock(channels, channels, dropout, groups)]


def inner_channels(config: AutoencoderConfig, convolution: str) -> int:
    """Channels on the network's side of a 1 x 1 convolution. ValueError: others than the latent's, and no such convolution."""
    found = config.ldm.z_channels or config.latent_channels
    if found != config.latent_channels and not getattr(config.ldm, convolution):
        raise ValueError(
            f"autoencoder.ldm.z_channels={found} and autoencoder.latent_channels={config.latent_channels} differ: that needs "
            f"autoencoder.ldm.{convolution}=true"
        )
    return found
