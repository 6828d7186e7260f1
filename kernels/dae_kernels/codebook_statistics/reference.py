"""Codebook statistics in eager torch: the definition."""

from __future__ import annotations

import torch
from torch import Tensor

MAX_SORTED = 1 << 22  # elements of x sorted at once: 32 MiB in float64


def codebook_statistics_reference(x_ND: Tensor, indices_N: Tensor, K: int) -> tuple[Tensor, Tensor]:
    """Counts [K] int64 and sums [K, D] float32 (float64 for a float64 `x_ND`) of the rows of each code.

    Sums are float64 before they are rounded to the result: many rows of one code would drift in float32.
    """
    if x_ND.device.type == "cpu":  # there additions have an order without sorting
        sums_KD = x_ND.new_zeros(K, x_ND.shape[1], dtype=torch.float64).index_add_(0, indices_N.long(), x_ND.double())
        return torch.bincount(indices_N, minlength=K), sums_KD.to(torch.promote_types(x_ND.dtype, torch.float32))
    return segment_statistics(x_ND, indices_N, K)


def segment_statistics(x_ND: Tensor, indices_N: Tensor, K: int) -> tuple[Tensor, Tensor]:
    """`codebook_statistics_reference` by sorting the rows by code: a GPU adds in a fixed order only within a segment."""
    N, D = x_ND.shape
    sorted_N, order_N = torch.sort(indices_N.long(), stable=True)
    # Not bincount: on a GPU it adds with atomics and waits for the greatest index.
    edges = torch.searchsorted(sorted_N, torch.arange(K + 1, device=x_ND.device))
    sums_KD = x_ND.new_empty(K, D, dtype=torch.promote_types(x_ND.dtype, torch.float32))
    columns = max(1, MAX_SORTED // max(1, N))
    for d in range(0, D, columns):
        x_Nd = x_ND[order_N, d : d + columns].double()
        # Unsafe: rows before the first edge and after the last belong to no code, which its checks would call an error.
        sums_KD[:, d : d + columns] = torch.segment_reduce(x_Nd, "sum", offsets=edges, unsafe=True, initial=0.0)
    return edges.diff(), sums_KD
