"""Codebook statistics in eager torch: the definition."""

from __future__ import annotations

import torch
from torch import Tensor

from dae_kernels.dispatch import register_op

MAX_SORTED = 1 << 22  # elements of x sorted at once: 32 MiB in float64


def counts_and_sums(x_ND: Tensor, indices_N: Tensor, K: int) -> tuple[Tensor, Tensor]:
    """Counts [K] int64 and sums [K, D] float32 (float64 for a float64 `x_ND`) of the rows of each code.

    Sums are accumulated in float64 and rounded once: in float32, sums of many rows would drift.
    """
    if indices_N.device.type == "cpu":  # checked here, since inside an operator values can be read under any transform
        check_range(indices_N, K)
    if x_ND.device.type == "cpu":  # on a CPU additions are ordered without sorting
        sums_KD = x_ND.new_zeros(K, x_ND.shape[1], dtype=torch.float64).index_add_(0, indices_N.long(), x_ND.double())
        return torch.bincount(indices_N, minlength=K), sums_KD.to(torch.promote_types(x_ND.dtype, torch.float32))
    return segment_statistics(x_ND, indices_N, K)


def segment_statistics(x_ND: Tensor, indices_N: Tensor, K: int) -> tuple[Tensor, Tensor]:
    """`counts_and_sums` by sorting the rows by code: a GPU adds in a fixed order only within a segment."""
    N, D = x_ND.shape
    sorted_N, order_N = torch.sort(indices_N.long(), stable=True)
    # Not bincount: on a GPU it uses atomics and synchronises for the largest index.
    edges = torch.searchsorted(sorted_N, torch.arange(K + 1, device=x_ND.device))
    sums_KD = x_ND.new_empty(K, D, dtype=torch.promote_types(x_ND.dtype, torch.float32))
    columns = max(1, MAX_SORTED // max(1, N))
    for d in range(0, D, columns):
        x_Nd = x_ND[order_N, d : d + columns].double()
        # unsafe=True: rows before the first and after the last edge belong to no code, which its checks would reject.
        sums_KD[:, d : d + columns] = torch.segment_reduce(x_Nd, "sum", offsets=edges, unsafe=True, initial=0.0)
    return edges.diff(), sums_KD


def check_range(indices: Tensor, K: int) -> None:
    """ValueError unless all indices lie in [0, K); reads them."""
    if indices.numel() == 0:
        return
    minimum, maximum = torch.stack(torch.aminmax(indices)).tolist()
    if minimum < 0 or maximum >= K:
        raise ValueError(f"codebook_statistics needs indices in [0, {K}), got {minimum if minimum < 0 else maximum}")


def statistics_empty(x_ND: Tensor, indices_N: Tensor, K: int) -> tuple[Tensor, Tensor]:
    sums_dtype = torch.promote_types(x_ND.dtype, torch.float32)
    return x_ND.new_empty(K, dtype=torch.int64), x_ND.new_empty(K, x_ND.shape[1], dtype=sums_dtype)


codebook_statistics_reference = register_op("dae_kernels::codebook_statistics", counts_and_sums, statistics_empty)
