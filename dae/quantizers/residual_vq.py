"""Residual vector quantization (Lee et al. 2022, "RQ-VAE Transformer", arXiv 2203.01941, section 3.1)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Self

import torch
from torch import Tensor

from dae.config import AutoencoderConfig
from dae.precision import wide
from dae.quantizers.bottleneck import Encoding
from dae.quantizers.composite import CompositeQuantizer, encoded
from dae.quantizers.vq import VectorQuantizer


class ResidualQuantizer(CompositeQuantizer):
    """Each quantizer codes what those before it left: r_0 = z, r_(q+1) = r_q - sg(code_q), latents = sum_q code_q.

    loss = sum_q commitment_weight * mean |r_q - sg(code_q)|^2; the latent's gradient passes through to z. The quantizers are
    coarse to fine, and so are the digits of the index.
    """

    @classmethod
    def build(cls, config: AutoencoderConfig) -> Self:
        if (config.vq.metric, config.vq.gradient) != ("l2", "ste"):
            raise ValueError(
                "autoencoder.bottleneck=rvq takes autoencoder.vq.metric=l2 and autoencoder.vq.gradient=ste, got "
                f"{config.vq.metric} and {config.vq.gradient}: what a code leaves has another length than it"
            )
        quantizers = [VectorQuantizer(config.vq, config.latent_channels) for _ in range(config.rvq.num_quantizers)]
        return cls(quantizers, config.latent_channels, f"autoencoder.rvq.num_quantizers={config.rvq.num_quantizers}")

    def encodings(self, features: Tensor, indices_Bhw: Tensor | None = None) -> Iterator[tuple[VectorQuantizer, Encoding]]:
        residual = features.to(wide(features.dtype))
        for quantizer, digit in zip(self.each(), self.digits(indices_Bhw), strict=True):
            part = encoded(quantizer, residual, digit)
            yield quantizer, part
            residual = residual - part.latents.detach()

    def forward(self, features: Tensor, sample_posterior: bool = False) -> Encoding:
        encoding = super().forward(features, sample_posterior)
        # Each part passes its gradient on to the features: together they would have it as many times.
        encoding.latents = encoding.latents.detach().to(features.dtype) + (features - features.detach())
        return encoding

    def assembled(self, codes: list[Tensor]) -> Tensor:
        return torch.stack(codes).sum(0)

    @staticmethod
    def count(config: AutoencoderConfig) -> int:
        return config.rvq.num_quantizers
