"""Sums over pairs in eager torch, in blocks of bounded size: the definition."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dae_kernels.dispatch import register_op

MAX_PAIRS = 1 << 20  # pairs in memory at once: 8 MiB for each of the few float64 matrices


def pair_rows_reference(
    q_ND: Tensor, s_MD: Tensor, v_M: Tensor, bandwidths: Sequence[float], same: bool, gradient: bool
) -> tuple[Tensor, Tensor]:
    """Per row of q the sum over the weighted rows of s, and the sum's gradient with respect to the row.

        p_i = sum_j v_j f(|q_i - s_j|),  g_i = d p_i / d q_i

    with f(r) = sum_b exp(-r^2 / (2 b^2)) over `bandwidths`, or f(r) = r without bandwidths; `same` leaves i = j out. The
    gradient of r at r = 0 is 0. All arithmetic is float64, and distances are norms of differences, so nothing cancels.

    Returns:
        p_N and g_ND, float64; g_ND is [0, D] unless `gradient`.
    """
    q_ND, s_MD, v_M = q_ND.double(), s_MD.double(), v_M.double()
    N, M = q_ND.shape[0], s_MD.shape[0]
    rows = max(1, MAX_PAIRS // M)
    # The plain tuple, not a split into one, so that a graph compiled for one chunk is valid for every N up to `rows`.
    chunks = (q_ND,) if rows >= N else q_ND.split(rows)
    # Allocated before the large blocks, against fragmentation.
    sum_N, gradient_ND = q_ND.new_empty(N), q_ND.new_empty(N if gradient else 0, q_ND.shape[1])
    for chunk, q_nD in enumerate(chunks):
        here = slice(chunk * rows, chunk * rows + q_nD.shape[0])
        value_nM = torch.cdist(q_nD, s_MD, compute_mode="donot_use_mm_for_euclid_dist")
        # slope is f'(r) / r, so the gradient is the sum of v slope (q - s).
        if bandwidths:
            # A point at infinity would have kernel value 0 with all others, and the result would look valid.
            square_nM = value_nM.square_()
            square_nM.masked_fill_(square_nM.isinf(), float("nan"))
            value_nM, slope_nM = torch.zeros_like(square_nM), torch.zeros_like(square_nM)
            for bandwidth in bandwidths:
                bump_nM = (square_nM * (-0.5 / bandwidth**2)).exp_()
                value_nM += bump_nM
                slope_nM -= bump_nM.div_(bandwidth**2)
        else:
            slope_nM = torch.where(value_nM == 0, 0.0, value_nM.reciprocal())
        if same:
            value_nM.diagonal(chunk * rows).zero_()
            slope_nM.diagonal(chunk * rows).zero_()
        sum_N[here] = value_nM @ v_M
        if gradient:
            slope_nM *= v_M
            gradient_ND[here] = q_nD * slope_nM.sum(dim=1, keepdim=True) - slope_nM @ s_MD
    return sum_N, gradient_ND


def polynomial_rows_reference(
    q_ND: Tensor, s_MD: Tensor, v_M: Tensor, degree: int, gamma: float, coef0: float, same: bool, gradient: bool
) -> tuple[Tensor, Tensor]:
    """`pair_rows_reference` with k(q, s) = (gamma q.s + coef0)^degree for f(|q - s|)."""
    q_ND, s_MD, v_M = q_ND.double(), s_MD.double(), v_M.double()
    sum_N, gradient_ND = polynomial_rows_empty(q_ND, s_MD, v_M, degree, gamma, coef0, same, gradient)
    rows = max(1, MAX_PAIRS // s_MD.shape[0])
    for start in range(0, q_ND.shape[0], rows):
        here = slice(start, start + rows)
        base_nM = (q_ND[here] @ s_MD.T).mul_(gamma).add_(coef0)
        slope_nM = base_nM.pow(degree - 1)
        value_nM = base_nM.mul_(slope_nM)
        if same:
            value_nM.diagonal(start).zero_()
            slope_nM.diagonal(start).zero_()
        sum_N[here] = value_nM @ v_M
        if gradient:
            gradient_ND[here] = slope_nM.mul_(degree * gamma * v_M) @ s_MD
    return sum_N, gradient_ND


def polynomial_rows_empty(
    q_ND: Tensor, s_MD: Tensor, v_M: Tensor, degree: int, gamma: float, coef0: float, same: bool, gradient: bool
) -> tuple[Tensor, Tensor]:
    return pair_rows_empty(q_ND, s_MD, v_M, (), same, gradient)


def pair_rows_empty(
    q_ND: Tensor, s_MD: Tensor, v_M: Tensor, bandwidths: Sequence[float], same: bool, gradient: bool
) -> tuple[Tensor, Tensor]:
    N, D = q_ND.shape
    return q_ND.new_empty(N, dtype=torch.float64), q_ND.new_empty(N if gradient else 0, D, dtype=torch.float64)


pair_rows = register_op("dae_kernels::pair_rows_reference", pair_rows_reference, pair_rows_empty)
polynomial_rows = register_op("dae_kernels::polynomial_rows", polynomial_rows_reference, polynomial_rows_empty)
