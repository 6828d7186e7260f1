"""No bottleneck: the features of the encoder are the latent."""

from __future__ import annotations

from typing import ClassVar, Self

import torch
from torch import Tensor

from dae.config import AutoencoderConfig
from dae.precision import wide
from dae.quantizers.bottleneck import Encoding, check_feature_map
from dae.quantizers.kl import LEAST_LOG_VARIANCE, GaussianBottleneck


class IdentityBottleneck(GaussianBottleneck):
    """z = features: a Gaussian posterior of the least variance, e^-30, and no loss.

    Its deviation of 3e-7 is about the rounding of a float32 number near 1, so a rate or bits per image count the digits down to
    there; they compare with other latents of this bottleneck, not with those of `kl`.
    """

    keeps_features: ClassVar[bool] = True
    features_per_latent: ClassVar[int] = 1
    rate_knob, rate_plural, rate_setting = "autoencoder.latent_channels", "channels of the latent", "{:.0f} channels"

    @classmethod
    def build(cls, config: AutoencoderConfig) -> Self:
        return cls(config.kl)

    def forward(self, features: Tensor, sample_posterior: bool = False) -> Encoding:
        """Features [B, D, h, w] to latents that are the same; `sample_posterior` draws nothing."""
        check_feature_map("IdentityBottleneck", features, features.shape[1] if features.ndim == 4 else 1)
        loss = features.new_zeros((), dtype=wide(features.dtype))
        return Encoding(features, loss, features, log_variance=torch.full_like(features, LEAST_LOG_VARIANCE))

    @staticmethod
    def rate(config: AutoencoderConfig) -> float:
        return float(config.latent_channels)

    @staticmethod
    def check_rates(rates: list[float]) -> None:
        if any(rate < 1 or rate != int(rate) for rate in rates):
            raise ValueError(f"compare.rates: expected whole numbers of channels for the identity bottleneck, got {rates}")
