"""Shared by distances between point clouds: conventions, normalised weights, centres and scales."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

SAMPLES = 512  # points of a cloud from which its centre is estimated


@dataclass(frozen=True)
class Convention:
    """Convention of a distance, available as `some_distance.convention`.

    Args:
        value: "squared" or "root": whether the result is a squared distance or its root; "share" for shares of points.
        cost: the cost between two points, with its factor.
        bias: expected error of the estimate from samples.
    """

    value: str
    cost: str
    bias: str


def convention(value: str, cost: str, bias: str) -> Callable[[Callable], Callable]:
    """Decorator that attaches a `Convention` to a public distance."""

    def attach(function: Any) -> Callable:
        function.convention = Convention(value, cost, bias)
        return function

    return attach


def normalised(weights: Tensor | None, cloud: Tensor, dtype: torch.dtype) -> Tensor:
    """Weights [N] of a cloud [N, D] in `dtype` that sum to 1; None for equal ones."""
    if weights is None:
        return cloud.new_full(cloud.shape[:1], 1 / cloud.shape[0], dtype=dtype)
    weights = weights.to(dtype)
    return weights / weights.sum()


def unit_scale(*tensors: Tensor) -> Tensor:
    """A power of 2, [] in float64 and without gradient, that scales the largest of the numbers into 1/2..4.

    Powers of the scaled values then neither overflow nor underflow, and scaling does not round.
    """
    largest = torch.stack([t.detach().abs().amax() for t in tensors]).amax()
    return torch.exp2(-largest.clamp_min(torch.finfo(largest.dtype).tiny).double().log2().floor())


def sampled(cloud_ND: Tensor, weights_N: Tensor | None) -> Tensor:
    """SAMPLES points at equal steps of the cumulative weights, which sum to 1; none of weight 0; without gradient.

    None: equal weights, whose steps are known (three operators instead of eleven, the same points).
    """
    if weights_N is None:
        odd_S = torch.arange(1, 2 * SAMPLES, 2, device=cloud_ND.device)
        return cloud_ND.detach()[odd_S * cloud_ND.shape[0] // (2 * SAMPLES)]
    # Integers, whose cumulative sum on a GPU is exact in any order; 2^52 times 2 SAMPLES is still an int64.
    cumulated_N = (weights_N.detach().double() * 2**52).round().long().cumsum(dim=0)
    level_S = (2 * torch.arange(SAMPLES, device=cloud_ND.device) + 1) * cumulated_N[-1] // (2 * SAMPLES)
    # right=True: the first point whose cumulative weight exceeds the level, never one of weight 0
    index_S = torch.searchsorted(cumulated_N, level_S, right=True).clamp_max(cloud_ND.shape[0] - 1)
    return cloud_ND.detach()[index_S]


def middle(points_SD: Tensor) -> Tensor:
    """[D]: the lower median of every coordinate, which unlike the mean is robust to outliers.

    By sorting, as torch.median raises on a GPU under torch.use_deterministic_algorithms.
    """
    return points_SD.sort(dim=0).values[(points_SD.shape[0] - 1) // 2]


def power_of_two(size: Tensor) -> Tensor:
    """2^-e for a float64 size in [2^(e-1), 2^e); 1 for 0."""
    size = torch.where(size > 0, size, 0.5).clamp_min(torch.finfo(torch.float64).tiny)
    return size.frexp().mantissa / size
