"""Quantizers made of several: their codes are the digits of one index."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from dae.config import AutoencoderConfig
from dae.distributed import from_first_process
from dae.quantizers.bottleneck import Encoding, check_feature_map
from dae.quantizers.tokens import TokenBottleneck, digits_of, index_dtype, number_of
from dae.quantizers.vq import VectorQuantizer


class CompositeQuantizer(TokenBottleneck):
    """Several `VectorQuantizer`s of K codes each; index = sum_q digit_q K^q.

    Each has its own averages and dead codes. Subclasses say what each of them sees, and how their codes make the latent.
    """

    learns_codebook, statistics = True, VectorQuantizer.statistics
    rate_knob = "autoencoder.vq.codebook_size"
    rate_plural, rate_setting = "codebook sizes", "codebooks of {:,.0f} codes"

    def __init__(self, quantizers: list[VectorQuantizer], channels: int, knob: str):
        super().__init__()
        self.channels, self.size = channels, len(quantizers[0].average_counts)
        self.packed = index_dtype(self.size ** len(quantizers), f"{knob} of autoencoder.vq.codebook_size={self.size}")
        self.quantizers = nn.ModuleList(quantizers)

    @property
    def radix(self) -> list[int]:
        return [self.size] * len(self.quantizers)

    def each(self) -> Iterator[VectorQuantizer]:
        return (cast(VectorQuantizer, quantizer) for quantizer in self.quantizers)

    def digits(self, indices_Bhw: Tensor | None) -> Sequence[Tensor | None]:
        """The indices of each quantizer; None for each if there are none."""
        return [None] * len(self.quantizers) if indices_Bhw is None else digits_of(indices_Bhw, self.radix).unbind(-1)

    @abstractmethod
    def encodings(self, features: Tensor, indices_Bhw: Tensor | None = None) -> Iterator[tuple[VectorQuantizer, Encoding]]:
        """Each quantizer with its own encoding of the features; with given indices of all, with those."""

    @abstractmethod
    def assembled(self, codes: list[Tensor]) -> Tensor:
        """The latents [B, D, h, w] of the codes of each quantizer."""

    def forward(self, features: Tensor, sample_posterior: bool = False) -> Encoding:
        """Features [B, D, h, w] to latents of the same shape and dtype and indices [B, h, w]; a code is never sampled."""
        check_feature_map(type(self).__name__, features, self.channels)
        parts = [encoding for _, encoding in self.encodings(features)]
        indices = number_of(torch.stack([cast(Tensor, part.indices) for part in parts], dim=-1), self.radix)
        loss = torch.stack([part.loss for part in parts]).sum()
        return Encoding(self.assembled([part.latents for part in parts]), loss, features, indices)

    def lookup(self, indices_Bhw: Tensor) -> Tensor:
        """Latents [B, D, h, w] of indices [B, h, w], in float32."""
        digits = digits_of(indices_Bhw, self.radix).unbind(-1)
        return self.assembled([quantizer.lookup(digit) for quantizer, digit in zip(self.each(), digits, strict=True)])

    @staticmethod
    @abstractmethod
    def count(config: AutoencoderConfig) -> int:
        """How many quantizers."""

    @classmethod
    def num_codes(cls, config: AutoencoderConfig) -> int:
        return math.prod(cls.factors(config))

    @classmethod
    def factors(cls, config: AutoencoderConfig) -> tuple[int, ...]:
        return (config.vq.codebook_size,) * cls.count(config)

    @torch.no_grad()
    def observe(self, encoding: Encoding) -> None:
        self._refuse_if_frozen()
        for quantizer, part in self.encodings(encoding.features.detach(), encoding.indices):
            quantizer.observe(part)

    def update_codebook(self) -> None:
        self._refuse_if_frozen()
        for quantizer in self.each():
            quantizer.update_codebook()

    @torch.no_grad()
    def initialize_codebook(self, features_NDhw: Tensor, generator: torch.Generator) -> None:
        """k-means for each quantizer, on what it sees once those before it are placed."""
        self._refuse_if_frozen()
        generator.set_state(from_first_process(generator.get_state()))
        for number, quantizer in enumerate(self.each()):
            seen = [part.features for _, part in self.encodings(features_NDhw)][number]
            quantizer.initialize_codebook(seen, generator)

    def _refuse_if_frozen(self) -> None:
        if self.frozen:
            raise RuntimeError("the latent is frozen: its codebooks take no updates")

    @staticmethod
    def rate(config: AutoencoderConfig) -> float:
        return float(config.vq.codebook_size)

    @staticmethod
    def check_rates(rates: list[float]) -> None:
        VectorQuantizer.check_rates(rates)


def encoded(quantizer: VectorQuantizer, features: Tensor, digit: Tensor | None) -> Encoding:
    """The quantizer's encoding of its features, or the one with given indices."""
    if digit is None:
        return quantizer(features)
    return Encoding(quantizer.lookup(digit).to(features.dtype), features.new_zeros(()), features, digit)
