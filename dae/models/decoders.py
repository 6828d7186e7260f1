"""The decoder family: generators g: latent -> image, from one linear map to the full decoder of the architecture.

The weak members are the auxiliary decoders of stage 1: the encoder must put into the latent what such a decoder can read.
"""

from __future__ import annotations

import dataclasses

from torch import nn

from dae.config import AutoencoderConfig, DecoderConfig
from dae.models.architectures import architecture_of
from dae.models.corruption import LatentCorruption
from dae.models.projection import ProjectionDecoder


class LinearDecoder(nn.ConvTranspose2d):
    """One linear map from each latent vector to its f x f patch of pixels: the weakest generator that is local.

    x[:, :, f*i:f*(i+1), f*j:f*(j+1)] = A z[:, :, i, j] + b, with one A for all positions and one b a channel.
    """

    gradient_checkpointing = False  # nothing in it is worth recomputing

    def __init__(self, latent_channels: int, image_channels: int, factor: int):
        super().__init__(latent_channels, image_channels, kernel_size=factor, stride=factor)


class OverlapDecoder(nn.ConvTranspose2d):
    """One linear map from each latent vector to 3f x 3f pixels about its patch: each pixel is a sum over 3 x 3 latents.

    x = sum_ij A z[:, :, i, j], placed at rows f (i - 1) to f (i + 2) and columns alike, + b a channel: no seams between patches,
    and nine times the parameters of `LinearDecoder`.
    """

    gradient_checkpointing = False

    def __init__(self, latent_channels: int, image_channels: int, factor: int):
        super().__init__(latent_channels, image_channels, kernel_size=3 * factor, stride=factor, padding=factor)


def build_decoder(config: AutoencoderConfig, image_channels: int, resolution: int) -> nn.Module:
    """Build the decoder that `config.decoder` names: [B, latent_channels, h, w] -> [B, image_channels, H, W].

    Raises:
        ValueError: an unknown family, or a capacity outside its range.
    """
    decoder, module = config.decoder, _of_family(config, image_channels, resolution)
    if decoder.latent_noise > 0 or decoder.latent_mask > 0:
        module.register_forward_pre_hook(LatentCorruption(decoder.latent_noise, decoder.latent_mask))
    return module


def _of_family(config: AutoencoderConfig, image_channels: int, resolution: int) -> nn.Module:
    decoder, architecture = config.decoder, architecture_of(config)
    width_factor, num_blocks, dropout = 1.0, architecture.decoder_blocks(config), 0.0
    match decoder.family:
        case "full":
            pass
        case "linear":
            return LinearDecoder(config.latent_channels, image_channels, architecture.factor(config))
        case "overlap":
            return OverlapDecoder(config.latent_channels, image_channels, architecture.factor(config))
        case "projection":
            return ProjectionDecoder(config.latent_channels, image_channels, architecture.factor(config), decoder.ridge)
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
    return architecture.decoder(config, image_channels, resolution, width_factor, num_blocks, dropout)
