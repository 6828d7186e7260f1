"""Neighbour distances and membership of balls, in blocks of bounded size.

Products are fast and decide what their error bound allows; differences decide the rest. If many points are too close together
for the products, products in a frame about these points decide first.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dae_kernels.dispatch import register_op
from dae_kernels.precision_recall_density_coverage.distances import (
    EPS,
    Frame,
    blocks,
    comparable,
    distances,
    regions,
    rows_of,
)

SPARE = 8  # extra candidates, as products may misorder near-ties


def k_nearest(x_ND: Tensor, y_MD: Tensor, k: int, exclude_self: bool) -> Tensor:
    """[N, k] distances, ascending."""
    x_ND, y_MD, scale = comparable(x_ND, y_MD)
    own_N = torch.arange(len(x_ND), device=x_ND.device) if exclude_self else None
    return nearest(x_ND, y_MD, k, own_N) / scale


def nearest(x_ND: Tensor, y_MD: Tensor, k: int, own_N: Tensor | None) -> Tensor:
    """[N, k] distances, ascending; own_N is the row of y that is left out for each row of x."""
    (N, D), M = x_ND.shape, len(y_MD)
    frame = Frame(x_ND, y_MD)
    available = M - (own_N is not None)
    candidates = min(k + SPARE, available)
    nearest_Nk, unsure_N = x_ND.new_empty(N, k), torch.zeros(N, dtype=torch.bool, device=x_ND.device)
    for block in blocks(N, max(M, candidates * D)):
        # Lower bounds of the squares, by the error of the products.
        lower_nM = frame.partial_squares(block, frame.relative)
        if own_N is not None:  # by index: a duplicate at distance 0 is a neighbour
            lower_nM.scatter_(1, own_N[block, None], float("inf"))
        lower_nC, index_nC = lower_nM.topk(candidates, dim=1, largest=False)
        distance_nC = distances(x_ND[block, None], y_MD[index_nC])[:, 0]
        nearest_Nk[block] = distance_nC.sort(dim=1).values[:, :k]
        if candidates < available:
            farthest_n = nearest_Nk[block, -1]
            others_n = lower_nC[:, -1] + frame.aa_N[block] * (1 - frame.relative) - frame.underflow
            unsure_N[block] = ~(others_n >= frame.squares(farthest_n)) & (farthest_n != 0)
    rows_U = unsure_N.nonzero()[:, 0]
    for rows, columns in regions(frame, x_ND, y_MD, rows_U, nearest_Nk[rows_U, -1]):
        own = None if own_N is None else own_N[rows]
        if columns is None:
            distance_nM = distances(x_ND[rows], y_MD)
            if own is not None:
                distance_nM.scatter_(1, own[:, None], float("inf"))
            nearest_Nk[rows] = distance_nM.topk(k, dim=1, largest=False).values
        else:
            own = None if own is None else torch.searchsorted(columns, own)
            nearest_Nk[rows] = nearest(x_ND[rows], y_MD[columns], k, own)
    return nearest_Nk


def shares(real_ND: Tensor, fake_MD: Tensor, k: int) -> Tensor:
    """float64 [4]: precision, recall, density and coverage."""
    real_ND, fake_MD, _ = comparable(real_ND, fake_MD)
    N, M = len(real_ND), len(fake_MD)
    radius_N, radius_M = (nearest(x, x, k, torch.arange(len(x), device=x.device))[:, -1] for x in (real_ND, fake_MD))
    balls_M, covered_N = balls(real_ND, radius_N, fake_MD)
    recalled_N, _ = balls(fake_MD, radius_M, real_ND)
    counts = torch.stack([(balls_M > 0).sum(), (recalled_N > 0).sum(), balls_M.sum(), covered_N.sum()])
    return counts.double() / counts.new_tensor([M, N, k * M, N])


def balls(x_ND: Tensor, radius_N: Tensor, y_MD: Tensor) -> tuple[Tensor, Tensor]:
    """Number of open balls about x that contain each point of y, int64 [M], and whether each ball contains any, bool [N].

    A distance equal to the radius up to rounding counts as equal: the point is outside.
    """
    (N, D), M = x_ND.shape, len(y_MD)
    frame = Frame(x_ND, y_MD)
    error = 8 * frame.relative  # at least the tolerance for equality
    within_N = radius_N * (1 - (D + 1) * EPS)
    count_M = torch.zeros(M, dtype=torch.int64, device=x_ND.device)
    filled_N, unsure_N = torch.zeros(2, N, dtype=torch.bool, device=x_ND.device)
    for block in blocks(N, M):
        # A square less the row's |a|^2, at least and then at most, against the radius with the row's part of the error.
        square_nM, square_n1 = frame.partial_squares(block, error), frame.squares(radius_N[block, None])
        aa_n1 = frame.aa_N[block, None]
        doubtful_nM = square_nM <= square_n1 - aa_n1 * (1 - error) + frame.underflow
        square_nM += frame.bb_M * (2 * error)
        inside_nM = square_nM < square_n1 - aa_n1 * (1 + error) - frame.underflow
        doubtful_nM &= ~inside_nM
        doubtful_nM &= radius_N[block, None] > 0  # an empty ball contains nothing
        unsure_n = doubtful_nM.sum(dim=1) > M // 16
        unsure_N[block] = unsure_n
        doubtful_nM[unsure_n] = inside_nM[unsure_n] = False
        for pairs in doubtful_nM.nonzero().split(rows_of(8 * D)):
            row, column = pairs.unbind(dim=1)
            distance_P11 = distances(x_ND[block][row, None], y_MD[column, None])
            inside_nM[row, column] = distance_P11[:, 0, 0] < within_N[block][row]
        count_M += inside_nM.sum(dim=0)
        filled_N[block] = inside_nM.any(dim=1)
    rows_U = unsure_N.nonzero()[:, 0]
    for rows, columns in regions(frame, x_ND, y_MD, rows_U, radius_N[rows_U]):
        if columns is None:
            inside_nM = distances(x_ND[rows], y_MD) < within_N[rows, None]
            count_M += inside_nM.sum(dim=0)
            filled_N[rows] = inside_nM.any(dim=1)
        else:
            count_S, filled_N[rows] = balls(x_ND[rows], radius_N[rows], y_MD[columns])
            count_M[columns] += count_S
    return count_M, filled_N


# Operators, as their control flow depends on values (the number of doubtful distances), which torch.compile cannot trace.
k_nearest_reference = register_op(
    "dae_kernels::k_nearest", k_nearest, lambda x_ND, y_MD, k, exclude_self: x_ND.new_empty(x_ND.shape[0], k)
)
shares_reference = register_op("dae_kernels::prdc_shares", shares, lambda real_ND, fake_MD, k: real_ND.new_empty(4))
