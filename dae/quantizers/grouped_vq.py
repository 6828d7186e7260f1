"""Grouped vector quantization (Jegou et al. 2011, "Product Quantization for Nearest Neighbor Search")."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Self

import torch
from torch import Tensor

from dae.config import AutoencoderConfig
from dae.quantizers.bottleneck import Encoding
from dae.quantizers.composite import CompositeQuantizer, encoded
from dae.quantizers.vq import VectorQuantizer


class GroupedQuantizer(CompositeQuantizer):
    """The channels are cut into groups, each with a codebook of its own: latents = (code_0, code_1, ...), K^groups of them.

    loss = sum_g commitment_weight * mean |z_g - sg(code_g)|^2.
    """

    @classmethod
    def build(cls, config: AutoencoderConfig) -> Self:
        groups, channels = config.gvq.groups, config.latent_channels
        if channels % groups:
            raise ValueError(f"autoencoder.gvq.groups={groups} does not divide autoencoder.latent_channels={channels}")
        quantizers = [VectorQuantizer(config.vq, channels // groups) for _ in range(groups)]
        return cls(quantizers, channels, f"autoencoder.gvq.groups={groups}")

    def encodings(self, features: Tensor, indices_Bhw: Tensor | None = None) -> Iterator[tuple[VectorQuantizer, Encoding]]:
        groups = features.chunk(len(self.quantizers), dim=1)
        for quantizer, part, digit in zip(self.each(), groups, self.digits(indices_Bhw), strict=True):
            yield quantizer, encoded(quantizer, part, digit)

    def assembled(self, codes: list[Tensor]) -> Tensor:
        return torch.cat(codes, dim=1)

    @staticmethod
    def count(config: AutoencoderConfig) -> int:
        return config.gvq.groups
