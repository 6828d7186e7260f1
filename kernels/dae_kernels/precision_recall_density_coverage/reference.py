"""Neighbour distances and membership of balls, a bounded number of distances at a time.

Products find the distances fast, differences decide where rounding could: |x|^2 + |y|^2 - 2 x . y in float64 settles which
points may be nearest and which are clearly inside or outside a ball; only those left are measured by |x - y|^2.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from dae_kernels.clouds import middle, normalised, sampled

MAX_DISTANCES = 1 << 23  # numbers alive at once in an array: 64 MiB in float64
SPARE = 8  # candidates beyond the k nearest, whose order the products may have confused
EPS = torch.finfo(torch.float64).eps


def squared_distance_blocks(x_ND: Tensor, y_MD: Tensor, rows: int) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """(rows of x, their squared distances [n, M] by products, bound [n, M] of the error) of successive blocks."""
    # Distances do not change, but their error does: it grows with the distance from the origin.
    centre_D = middle(sampled(y_MD, normalised(None, y_MD, torch.float64)))
    x_ND, y_MD = x_ND - centre_D, y_MD - centre_D
    xx_N, yy_M = x_ND.square().sum(dim=1), y_MD.square().sum(dim=1)
    for start in range(0, x_ND.shape[0], rows):
        block = slice(start, min(start + rows, x_ND.shape[0]))
        size_nM = xx_N[block, None] + yy_M
        yield block, torch.addmm(size_nM, x_ND[block], y_MD.T, alpha=-2.0), 8 * (x_ND.shape[1] + 1) * EPS * size_nM


def k_nearest_squared(x_ND: Tensor, y_MD: Tensor, k: int, exclude_self: bool) -> Tensor:
    """[N, k], ascending, from differences."""
    M, D = y_MD.shape
    candidates = min(k + SPARE, M - exclude_self)
    nearest = []
    for block, square_nM, _ in squared_distance_blocks(x_ND, y_MD, max(1, MAX_DISTANCES // max(M, candidates * D))):
        if exclude_self:  # by index: a duplicate at distance 0 is a neighbour like any other
            square_nM.diagonal(block.start).fill_(float("inf"))
        index_nC = square_nM.topk(candidates, dim=1, largest=False).indices
        square_nC = (x_ND[block, None] - y_MD[index_nC]).square().sum(dim=2)
        nearest.append(square_nC.sort(dim=1).values[:, :k])
    return torch.cat(nearest)


def shares(real_ND: Tensor, fake_MD: Tensor, k: int) -> Tensor:
    """float64 [4]: precision, recall, density and coverage; one pass over the distances between the clouds."""
    N, M = real_ND.shape[0], fake_MD.shape[0]
    real_radius_N1 = k_nearest_squared(real_ND, real_ND, k, True)[:, -1:]
    fake_radius_1M = k_nearest_squared(fake_MD, fake_MD, k, True)[:, -1:].T
    balls_M = torch.zeros(M, dtype=torch.int64, device=real_ND.device)  # balls of real points around each fake point
    recalled = covered = torch.zeros((), dtype=torch.int64, device=real_ND.device)
    for block, square_nM, error_nM in squared_distance_blocks(real_ND, fake_MD, max(1, MAX_DISTANCES // M)):
        in_real_nM = inside(square_nM, error_nM, real_radius_N1[block], real_ND[block], fake_MD)
        balls_M += in_real_nM.sum(dim=0)
        covered = covered + in_real_nM.any(dim=1).sum()
        recalled = recalled + inside(square_nM, error_nM, fake_radius_1M, real_ND[block], fake_MD).any(dim=1).sum()
    counts = torch.stack([(balls_M > 0).sum(), recalled, balls_M.sum(), covered])
    return counts.double() / counts.new_tensor([M, N, k * M, N])


def inside(square_nM: Tensor, error_nM: Tensor, radius: Tensor, x_nD: Tensor, y_MD: Tensor) -> Tensor:
    """[n, M] bool: whether a distance is less than the radius, both squared; equal to rounding counts as equal."""
    D = y_MD.shape[1]
    radius_nM = radius.expand(square_nM.shape)
    inside_nM = square_nM < radius_nM
    doubtful = ((square_nM - radius_nM).abs() <= error_nM).nonzero()
    for row, column in (pairs.unbind(dim=1) for pairs in doubtful.split(max(1, MAX_DISTANCES // D))):
        square = (x_nD[row] - y_MD[column]).square().sum(dim=1)
        inside_nM[row, column] = square < radius_nM[row, column] * (1 - 2 * (D + 1) * EPS)
    return inside_nM
