"""The decoder family: generators g: latent -> image, from one linear map to the full convolutional decoder.

The weak members are the auxiliary decoders of stage 1: the encoder must put into the latent what such a decoder can read.
"""

from __future__ import annotations

import dataclasses

from torch import nn

from dae.config import AutoencoderConfig, DecoderConfig
from dae.models.layers import GroupNorm, LevelNetwork, ResidualBlock, SelfAttention2d, Upsample


class LinearDecoder(nn.ConvTranspose2d):
    """One linear map from each latent vector to its f x f patch of pixels: the weakest generator that is local.

    x[:, :, f*i:f*(i+1), f*j:f*(j+1)] = A z[:, :, i, j] + b, with one A for all positions and one b a channel.
    """

    gradient_checkpointing = False  # nothing in it is worth recomputing

    def __init__(self, latent_channels: int, image_channels: int, factor: int):
        super().__init__(latent_channels, image_channels, kernel_size=factor, stride=factor)


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
        widths = [max(4, round(config.base_channels * m * width_factor)) for m in config.channel_multipliers]
        resolutions = [resolution >> level for level in range(len(widths))]
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
                if resolutions[level] in config.attention_resolutions:
                    layers.append(SelfAttention2d(channels))
            if level > 0:
                layers.append(Upsample(channels))
            self.levels.append(nn.Sequential(*layers))
        self.norm_out = GroupNorm(channels)
        self.conv_out = nn.Conv2d(channels, image_channels, 3, padding=1)


def build_decoder(config: AutoencoderConfig, image_channels: int, resolution: int) -> LinearDecoder | ConvDecoder:
    """Build the decoder that `config.decoder` names: [B, latent_channels, h, w] -> [B, image_channels, H, W].

    Raises:
        ValueError: an unknown family, or a capacity outside its range.
    """
    decoder = config.decoder
    width_factor, num_blocks, dropout = 1.0, config.num_blocks + 1, 0.0
    match decoder.family:
        case "full":
            pass
        case "linear":
            return LinearDecoder(config.latent_channels, image_channels, 1 << (len(config.channel_multipliers) - 1))
        case "narrow":
            width_factor = decoder.width_factor
            if not 0 < width_factor <= 1:
                raise ValueError(f"width_factor of a narrow decoder lies in (0, 1], got {width_factor}")
        case "shallow":
            if not 0 <= decoder.num_blocks <= num_blocks:
                raise ValueError(f"num_blocks of a shallow decoder lies in 0..{num_blocks}, got {decoder.num_blocks}")
            num_blocks = decoder.num_blocks
        case "dropout":
            dropout = decoder.dropout
        case other:
            families = next(f for f in dataclasses.fields(DecoderConfig) if f.name == "family").metadata["choices"]
            raise ValueError(f"decoder family: expected one of {families}, got {other!r}")
    return ConvDecoder(config, image_channels, resolution, width_factor, num_blocks, dropout)
