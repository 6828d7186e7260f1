"""Codebook usage and perplexity."""

from __future__ import annotations

import torch
from torch import Tensor

from dae.distributed import sum_over_processes
from dae.metrics.validation import check_integers


class CodebookUsage:
    """Counts codes over a stream of indices; gives usage and perplexity.

        usage = #{k: n_k > 0} / K,    perplexity = exp(-sum_k p_k log p_k),  p_k = n_k / sum_j n_j

    The entropy is computed from the summed counts; a mean over batches would be too low, as a batch has few codes.

    Args:
        codebook_size: number of codes K. ValueError below 1.

    Source of the perplexity: van den Oord, Vinyals and Kavukcuoglu, "Neural Discrete Representation Learning", NeurIPS 2017
    (arXiv 1711.00937).
    """

    def __init__(self, codebook_size: int) -> None:
        if codebook_size < 1:
            raise ValueError(f"codebook_size: expected at least 1 code, got {codebook_size}")
        self.counts = torch.zeros(codebook_size, dtype=torch.int64, device="cpu")

    def update(self, indices: Tensor) -> CodebookUsage:
        """Add integer indices of any shape (possibly empty); returns itself.

        TypeError: indices that are not integers. ValueError: an index outside 0..K-1; then none are counted.
        """
        check_integers("indices", indices, "pass the codes, not the latents")
        size = len(self.counts)
        if indices.numel():
            low, high = (bound.item() for bound in indices.aminmax())
            if low < 0 or high >= size:
                raise ValueError(f"indices: expected 0 to {size - 1}, got {low} to {high}; was the codebook_size another one?")
        self.counts = self.counts.to(indices.device) + torch.bincount(indices.flatten().long(), minlength=size)
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
        total = self.counts.sum()
        if total == 0:
            raise ValueError("expected indices for a perplexity, got none; call update first")
        return torch.special.entr(self.counts.double() / total).sum().exp().item()
