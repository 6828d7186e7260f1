"""The autoencoder: encoder, bottleneck, and a decoder from the decoder family."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from dae.config import AutoencoderConfig, DecoderConfig, from_dict
from dae.hub import PretrainedModel
from dae.models.architectures import build_encoder, downsampling_factor, latent_size
from dae.models.decoders import build_decoder
from dae.quantizers import Encoding, bottleneck_class


@dataclass
class Decoding:
    sample: Tensor  # [B, C, H, W]


@dataclass
class Reconstruction:
    sample: Tensor  # [B, C, H, W]
    encoding: Encoding


class Autoencoder(PretrainedModel):
    """Encoder, bottleneck and decoder; the unit that is trained, saved and loaded.

    Args:
        config: architecture.
        image_channels: channels of the images, which are in [-1, 1].
        resolution: height and width of the images.

    Raises:
        ValueError: the resolution is not divisible by the encoder's factor, or a part of `config` is out of range.
    """

    encoder: Any  # modules with an attribute `gradient_checkpointing`
    decoder: Any

    def __init__(self, config: AutoencoderConfig, image_channels: int, resolution: int):
        super().__init__()
        self.config, self.image_channels, self.resolution = config, image_channels, resolution
        self.latent_frozen = False
        self.factor = downsampling_factor(config)
        self.latent_size = latent_size(config, resolution)  # height and width of the latent
        self.bottleneck = bottleneck_class(config).build(config)
        features = config.latent_channels * self.bottleneck.features_per_latent
        self.encoder = build_encoder(config, image_channels, resolution, features)
        self.decoder = build_decoder(config, image_channels, resolution)

    def encode(self, images: Tensor, *, sample_posterior: bool = False) -> Encoding:
        """Images [B, C, H, W] in [-1, 1] to `.latents` [B, D, h, w], and for VQ `.indices` [B, h, w].

        Both have the model's dtype; under autocast the images may have another. A KL bottleneck returns the posterior's mean, or
        a sample of it with `sample_posterior`.

        Raises:
            ValueError: another number of channels, or a size that the encoder's factor does not divide.
        """
        if images.ndim != 4 or images.shape[1] != self.image_channels:
            raise ValueError(f"expected images [B, {self.image_channels}, H, W], got {list(images.shape)}")
        if images.shape[2] % self.factor or images.shape[3] % self.factor:
            raise ValueError(f"height and width must be divisible by {self.factor}, got {list(images.shape[2:])}")
        features = self.encoder(images).to(next(self.encoder.parameters()).dtype)  # autocast returns narrower ones
        return self.bottleneck(features, sample_posterior)

    def decode(self, latents: Tensor) -> Decoding:
        """Latents [B, D, h, w] to `.sample` [B, C, H, W], images in about [-1, 1] (not clipped)."""
        return Decoding(self.decoder(latents))

    def decode_indices(self, indices: Tensor) -> Decoding:
        """Codebook indices [B, h, w], or [B, h * w] in raster order, to `.sample` [B, C, H, W].

        Raises:
            ValueError: the bottleneck has no codebook, an index lies outside it, or a raster of another length.
        """
        if not self.bottleneck.discrete:
            raise ValueError(
                f"autoencoder.bottleneck={self.config.bottleneck} has no indices, its latent is continuous: use .decode(latents)"
            )
        codes = self.bottleneck.num_codes(self.config)
        if indices.numel() and not (indices.min() >= 0 and indices.max() < codes):
            raise ValueError(f"indices must lie in 0..{codes - 1}, got {int(indices.min())}..{int(indices.max())}")
        if indices.ndim == 2:
            if indices.shape[1] != self.latent_size**2:
                raise ValueError(f"expected {self.latent_size**2} indices an image in raster order, got {indices.shape[1]}")
            indices = indices.unflatten(1, (self.latent_size, self.latent_size))
        return self.decode(self.bottleneck.lookup(indices).to(self.dtype))

    def forward(self, images: Tensor) -> Reconstruction:
        encoding = self.encode(images, sample_posterior=self.training)
        return Reconstruction(self.decoder(encoding.latents), encoding)

    def freeze_latent(self) -> None:
        """Freeze encoder and bottleneck for good: no gradients, no codebook update, evaluation mode even after `.train()`."""
        self.latent_frozen = True
        self.bottleneck.frozen = True
        self.encoder.requires_grad_(False)
        self.bottleneck.requires_grad_(False)
        self.train(self.training)

    def train(self, mode: bool = True) -> Autoencoder:
        super().train(mode)
        if self.latent_frozen:
            self.encoder.eval()
            self.bottleneck.eval()
        return self

    def replace_decoder(self, decoder: DecoderConfig) -> None:
        """Replace the decoder by a freshly initialised one (the switch from stage 1 to stage 2)."""
        self.config = dataclasses.replace(self.config, decoder=decoder)
        new = build_decoder(self.config, self.image_channels, self.resolution)
        self.decoder = new.to(self.device, self.dtype).train(self.training)
        self.decoder.gradient_checkpointing = self.encoder.gradient_checkpointing

    def enable_gradient_checkpointing(self, enabled: bool = True) -> None:
        self.encoder.gradient_checkpointing = self.decoder.gradient_checkpointing = enabled

    def refuse_other_data(self, image_channels: int, resolution: int) -> None:
        """ValueError unless the autoencoder was made for images of this size and number of channels."""
        if (self.image_channels, self.resolution) != (image_channels, resolution):
            raise ValueError(
                f"this autoencoder was trained on {self.image_channels}-channel images of {self.resolution} pixels, "
                f"data.channels={image_channels} and data.resolution={resolution} are asked for"
            )

    def to_config(self) -> dict:
        return {
            "image_channels": self.image_channels,
            "resolution": self.resolution,
            "autoencoder": dataclasses.asdict(self.config),
        }

    @classmethod
    def from_config(cls, config: dict) -> Autoencoder:
        return cls(from_dict(AutoencoderConfig, config["autoencoder"]), config["image_channels"], config["resolution"])
