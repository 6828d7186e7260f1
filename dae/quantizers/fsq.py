"""Finite scalar quantization (Mentzer et al. 2023, arXiv 2309.15505): each channel is rounded to a few levels."""

from __future__ import annotations

import math
from typing import Self

import torch
from torch import Tensor

from dae.config import AutoencoderConfig, FSQConfig
from dae.precision import wide
from dae.quantizers.bottleneck import Encoding, check_feature_map
from dae.quantizers.tokens import TokenBottleneck, digits_of, grouped, index_dtype, number_of

EPSILON = 1e-3  # of the bound, so that no rounding reaches a level beyond the last


class FiniteScalarQuantizer(TokenBottleneck):
    """Channel d takes L_d values, spread evenly over [-1, 1]; a code is a point of the grid, K = prod_d L_d.

        bounded_d = (L_d - 1)(1 + epsilon) / 2 * tanh(z_d + shift_d) - offset_d,   latents_d = round(bounded_d) / floor(L_d / 2)

    offset_d is 1/2 for an even L_d and 0 for an odd one, and shift_d = artanh(2 offset_d / ((L_d - 1)(1 + epsilon))), so that
    z = 0 is bounded to 0. Rounding has the gradient of the identity. There is no codebook, no loss and nothing to update. The
    index of a code has its levels as digits in a mixed radix, channel 0 the lowest.
    """

    rate_knob, rate_plural, rate_setting = "autoencoder.fsq.levels", "levels", "{:,.0f} codes"
    levels_D: Tensor

    def __init__(self, config: FSQConfig, channels: int):
        super().__init__()
        if len(config.levels) != channels:
            raise ValueError(
                f"autoencoder.fsq.levels has {len(config.levels)} entries, one for each channel of the latent: expected "
                f"{channels} (autoencoder.latent_channels)"
            )
        if min(config.levels) < 2:
            raise ValueError(f"autoencoder.fsq.levels: expected at least 2 levels a channel, got {config.levels}")
        self.packed = index_dtype(math.prod(config.levels), "autoencoder.fsq.levels")
        self.levels = tuple(config.levels)
        self.register_buffer("levels_D", torch.tensor(self.levels), persistent=False)

    @classmethod
    def build(cls, config: AutoencoderConfig) -> Self:
        return cls(config.fsq, config.latent_channels)

    def forward(self, features: Tensor, sample_posterior: bool = False) -> Encoding:
        """Features [B, D, h, w] to latents of the same shape and dtype and indices [B, h, w]; a code is never sampled."""
        check_feature_map("FiniteScalarQuantizer", features, len(self.levels))
        z_BhwD = features.to(wide(features.dtype)).movedim(1, -1)
        levels_D = self.levels_D.to(z_BhwD.dtype)
        half_D = (levels_D - 1) * (1 + EPSILON) / 2
        offset_D = 0.5 * (1 - levels_D % 2)
        bounded_BhwD = half_D * torch.tanh(z_BhwD + torch.atanh(offset_D / half_D)) - offset_D
        rounded_BhwD = bounded_BhwD.round()
        middle_D = levels_D.div(2, rounding_mode="floor")
        indices = number_of((rounded_BhwD + middle_D).long(), self.levels)
        latents = (bounded_BhwD + (rounded_BhwD - bounded_BhwD).detach()) / middle_D
        return Encoding(latents.movedim(-1, 1).to(features.dtype), latents.new_zeros(()), features, indices)

    def lookup(self, indices_Bhw: Tensor) -> Tensor:
        """Codes [B, D, h, w] of indices [B, h, w], in float32."""
        middle_D = self.levels_D // 2
        return ((digits_of(indices_Bhw, self.levels) - middle_D) / middle_D).movedim(-1, 1)

    @staticmethod
    def rate(config: AutoencoderConfig) -> float:
        return float(math.prod(config.fsq.levels))

    @staticmethod
    def check_rates(rates: list[float]) -> None:
        raise ValueError("compare.rates: the levels of fsq are a list and cannot be swept by one number; give arms of your own")

    @classmethod
    def num_codes(cls, config: AutoencoderConfig) -> int:
        return math.prod(config.fsq.levels)

    @classmethod
    def factors(cls, config: AutoencoderConfig) -> tuple[int, ...]:
        return grouped(config.fsq.levels)
