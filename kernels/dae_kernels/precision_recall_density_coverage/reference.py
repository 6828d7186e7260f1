"""Neighbour distances and membership of balls, a bounded number of distances at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

MAX_DISTANCES = 1 << 23  # distances alive at once: 64 MiB in float64


def distance_blocks(x_ND: Tensor, y_MD: Tensor) -> Iterator[tuple[int, Tensor]]:
    """(first row, distances [n, M]) of successive rows of x, from differences: coinciding points are at distance 0."""
    rows = max(1, MAX_DISTANCES // y_MD.shape[0])
    for start in range(0, x_ND.shape[0], rows):
        yield start, torch.cdist(x_ND[start : start + rows], y_MD, compute_mode="donot_use_mm_for_euclid_dist")


def k_nearest_distances_reference(x_ND: Tensor, y_MD: Tensor, k: int, exclude_self: bool) -> Tensor:
    """[N, k], ascending."""
    nearest = []
    for start, distance_nM in distance_blocks(x_ND, y_MD):
        if exclude_self:  # by index: a duplicate at distance 0 is a neighbour like any other
            distance_nM.diagonal(start).fill_(float("inf"))
        nearest.append(distance_nM.topk(k, dim=1, largest=False, sorted=True).values)
    return torch.cat(nearest)


def shares(real_ND: Tensor, fake_MD: Tensor, k: int) -> Tensor:
    """float64 [4]: precision, recall, density and coverage; one pass over the distances between the clouds."""
    N, M = real_ND.shape[0], fake_MD.shape[0]
    real_radius_N = k_nearest_distances_reference(real_ND, real_ND, k, True)[:, -1]
    fake_radius_M = k_nearest_distances_reference(fake_MD, fake_MD, k, True)[:, -1]
    balls_M = torch.zeros(M, dtype=torch.int64, device=real_ND.device)  # balls of real points around each fake point
    recalled = covered = torch.zeros((), dtype=torch.int64, device=real_ND.device)
    for start, distance_nM in distance_blocks(real_ND, fake_MD):
        in_real_nM = distance_nM < real_radius_N[start : start + len(distance_nM), None]
        balls_M += in_real_nM.sum(dim=0)
        covered = covered + in_real_nM.any(dim=1).sum()
        recalled = recalled + (distance_nM < fake_radius_M).any(dim=1).sum()
    counts = torch.stack([(balls_M > 0).sum(), recalled, balls_M.sum(), covered])
    return counts.double() / counts.new_tensor([M, N, k * M, N])
