"""Codebook usage, perplexity and entropy."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from dae.distributed import sum_over_processes
from dae.metrics.validation import check_integers
from dae.quantizers.tokens import digits_of

LARGEST_TABLE = 2**24


class CodebookUsage:
    """Counts codes over a stream of indices; gives usage, perplexity and entropy.

        usage = #{k: n_k > 0} / K,    perplexity = exp(-sum_k p_k log p_k),  p_k = n_k / sum_j n_j

    The entropy is computed from the summed counts; a mean over batches would be too low, as a batch has few codes.

    More than 2^24 codes are counted digit by digit, as residual and grouped quantizers have a codebook for each digit: usage is
    then the share of all values of all digits, and the entropy the sum of those of the digits, an upper bound of the codes' own.

    Args:
        codebook_size: number of codes K. ValueError below 1.
        factors: sizes of the digits of a code, the lowest first, with the product K; needed above 2^24 codes.

    Source of the perplexity: van den Oord, Vinyals and Kavukcuoglu, "Neural Discrete Representation Learning", NeurIPS 2017
    (arXiv 1711.00937).
    """

    def __init__(self, codebook_size: int, factors: Sequence[int] | None = None) -> None:
        if codebook_size < 1:
            raise ValueError(f"codebook_size: expected at least 1 code, got {codebook_size}")
        self.codebook_size = codebook_size
        self.sizes = [codebook_size] if codebook_size <= LARGEST_TABLE else list(factors or [])
        if math.prod(self.sizes) != codebook_size or sum(self.sizes) > LARGEST_TABLE:
            raise ValueError(
                f"codebook_size: {codebook_size:,} codes are too many for a table; expected factors whose product they are, "
                f"got {factors}"
            )
        self.counts = torch.zeros(sum(self.sizes), dtype=torch.int64, device="cpu")  # of all digits, one after the other

    def update(self, indices: Tensor) -> CodebookUsage:
        """Add integer indices of any shape (possibly empty); returns itself.

        TypeError: indices that are not integers. ValueError: an index outside 0..K-1; then none are counted.
        """
        check_integers("indices", indices, "pass the codes, not the latents")
        if indices.numel():
            low, high = (bound.item() for bound in indices.aminmax())
            if low < 0 or high >= self.codebook_size:
                last = self.codebook_size - 1
                raise ValueError(f"indices: expected 0 to {last}, got {low} to {high}; was the codebook_size another one?")
        digits = digits_of(indices.flatten().long(), self.sizes).unbind(-1)
        found = [torch.bincount(digit, minlength=size) for digit, size in zip(digits, self.sizes, strict=True)]
        self.counts = self.counts.to(indices.device) + torch.cat(found)
        return self

    def all_reduce(self) -> CodebookUsage:
        """Sum the counts over all processes; returns itself. Every process must call it, once."""
        self.counts = sum_over_processes(self.counts.clone())
        return self

    @property
    def usage(self) -> float:
        """Share of the codes that occurred, in [0, 1]; 0 before any index."""
        return (self.counts > 0).double().mean().item()

    @property
    def perplexity(self) -> float:
        """Effective number of codes, in [1, K]: K if all are equally frequent. ValueError: no indices yet."""
        total = self.counts[: self.sizes[0]].sum()
        if total == 0:
            raise ValueError("expected indices for a perplexity, got none; call update first")
        return torch.special.entr(self.counts.double() / total).sum().exp().item()

    @property
    def entropy(self) -> float:
        """log2 of the perplexity: bits per code. ValueError: no indices yet."""
        return math.log2(self.perplexity)
