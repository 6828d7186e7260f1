"""Lookup-free quantization (Yu et al. 2023, "Language Model Beats Diffusion", arXiv 2310.05737): the signs of the channels."""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor

from dae.config import AutoencoderConfig, LFQConfig
from dae.precision import wide
from dae.quantizers.bottleneck import Encoding, check_feature_map
from dae.quantizers.tokens import TokenBottleneck, digits_of, entropy_loss, grouped, index_dtype, number_of


class BinaryBottleneck(TokenBottleneck):
    """A code is a sign for each channel, K = 2^D; bit d of its index is 1 where channel d is positive."""

    rate_knob, rate_plural, rate_setting = "autoencoder.latent_channels", "bits a latent", "{:.0f} bits a latent"

    def __init__(self, channels: int):
        super().__init__()
        self.packed = index_dtype(2**channels, "autoencoder.latent_channels")
        self.channels = channels

    def code_size(self) -> float:
        """Absolute value of each channel of a code."""
        return 1.0

    def lookup(self, indices_Bhw: Tensor) -> Tensor:
        """Codes [B, D, h, w] of indices [B, h, w], in float32."""
        signs_BhwD = 2 * digits_of(indices_Bhw, [2] * self.channels).float() - 1
        return (signs_BhwD * self.code_size()).movedim(-1, 1)

    def quantize(self, z_BhwD: Tensor) -> tuple[Tensor, Tensor]:
        """The nearest codes, and their indices."""
        positive = z_BhwD > 0
        size = self.code_size()
        return torch.where(positive, size, -size).to(z_BhwD.dtype), number_of(positive.long(), [2] * self.channels)

    @staticmethod
    def rate(config: AutoencoderConfig) -> float:
        return float(config.latent_channels)

    @staticmethod
    def check_rates(rates: list[float]) -> None:
        if any(not 1 <= r <= 62 or r != int(r) for r in rates):
            raise ValueError(f"compare.rates: expected bits (whole numbers from 1 to 62) for binary codes, got {rates}")

    @classmethod
    def num_codes(cls, config: AutoencoderConfig) -> int:
        return 2**config.latent_channels

    @classmethod
    def factors(cls, config: AutoencoderConfig) -> tuple[int, ...]:
        return grouped([2] * config.latent_channels)


class LookupFreeQuantizer(BinaryBottleneck):
    """code = sign(z), straight-through gradient, commitment, and entropies of a soft assignment.

        p(code | z) ~ exp(-inverse_temperature |z - code|^2),  so  P(bit d = 1 | z) = sigmoid(4 inverse_temperature z_d)
        loss = entropy_weight * (mean H(code | z) - diversity * H(code)) + commitment_weight * mean |z - sg(code)|^2

    in nats, see `dae.quantizers.tokens.entropy_loss`.
    """

    def __init__(self, config: LFQConfig, channels: int):
        super().__init__(channels)
        self.config = config

    @classmethod
    def build(cls, config: AutoencoderConfig) -> Self:
        return cls(config.lfq, config.latent_channels)

    def forward(self, features: Tensor, sample_posterior: bool = False) -> Encoding:
        """Features [B, D, h, w] to latents of the same shape and dtype and indices [B, h, w]; a code is never sampled."""
        check_feature_map("LookupFreeQuantizer", features, self.channels)
        z_BhwD, config = features.to(wide(features.dtype)).movedim(1, -1), self.config
        codes_BhwD, indices = self.quantize(z_BhwD)
        loss = config.commitment_weight * (z_BhwD - codes_BhwD).square().sum() / max(1, z_BhwD.numel())
        if config.entropy_weight:
            loss = loss + config.entropy_weight * entropy_loss(4 * config.inverse_temperature * z_BhwD, config.diversity)
        latents = z_BhwD + (codes_BhwD - z_BhwD).detach()
        return Encoding(latents.movedim(-1, 1).to(features.dtype), loss, features, indices)
