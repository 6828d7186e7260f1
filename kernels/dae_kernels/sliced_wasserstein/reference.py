"""Wasserstein distances of clouds projected to lines: the definition."""

from __future__ import annotations

import torch
from torch import Tensor


def projected_cost(
    x_ND: Tensor, y_MD: Tensor, projections_DL: Tensor, p: float, wx_N: Tensor | None, wy_M: Tensor | None
) -> Tensor:
    """[L]: W_p^p of the clouds projected on each column.

    On a line the optimal plan pairs equal quantiles: the integral over levels q of |F_x^-1(q) - F_y^-1(q)|^p, whose
    integrand is constant between successive levels of either cloud.
    """
    x_LN, x_order_LN = (projections_DL.T @ x_ND.T).sort(dim=1)
    y_LM, y_order_LM = (projections_DL.T @ y_MD.T).sort(dim=1)
    if wx_N is None and wy_M is None:
        if x_LN.shape == y_LM.shape:
            return power(x_LN - y_LM, p).mean(dim=1)
        x_index, y_index, step = merge_equal_levels(x_LN.shape[1], y_LM.shape[1], x_LN.device)
        cost = power(x_LN[:, x_index] - y_LM[:, y_index], p)
        return cost @ step.to(cost.dtype)
    x_index, y_index, step = merge_levels(levels(wx_N, x_order_LN), levels(wy_M, y_order_LM))
    cost = power(x_LN.gather(1, x_index) - y_LM.gather(1, y_index), p)
    return (cost * step.to(cost.dtype)).sum(dim=1)


def power(difference: Tensor, p: float) -> Tensor:
    """|difference|^p, for p > 2 in float64: float32 underflows at 1e-7^6, and differences of that relative size occur."""
    return difference.square() if p == 2 else (difference.double() if p > 2 else difference).abs().pow(p)


def levels(weights_N: Tensor | None, order_LN: Tensor) -> Tensor:
    """[L, N] float64: cumulative weights in sorted order, divided by the last, which becomes exactly 1."""
    if weights_N is None:
        N = order_LN.shape[1]
        return (torch.arange(1, N + 1, device=order_LN.device, dtype=torch.float64) / N).expand(order_LN.shape)
    cumulated_LN = weights_N.double()[order_LN].cumsum(dim=1)
    return cumulated_LN / cumulated_LN[:, -1:]


def merge_levels(x_level: Tensor, y_level: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Per interval between successive levels [..., N + M]: its points of x and of y, and its length."""
    N, M = x_level.shape[-1], y_level.shape[-1]
    level, origin = torch.cat([x_level, y_level], dim=-1).sort(dim=-1)
    step = level.diff(dim=-1, prepend=torch.zeros_like(level[..., :1]))
    # An interval belongs to the first points that reach beyond its lower end: as many levels of their cloud lie before. Where
    # levels tie, that holds for the first interval of the tie, and the others have no length. So a point without
    # weight is met on intervals without length alone.
    from_x = (origin < N).long()
    before_x = from_x.cumsum(dim=-1) - from_x
    before_y = torch.arange(N + M, device=level.device) - before_x
    return before_x.clamp_max(N - 1), before_y.clamp_max(M - 1), step


def merge_equal_levels(N: int, M: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """`merge_levels` of equal weights, the same for all projections [N + M]: levels i / N and j / M, exactly, as i M and j N."""
    x_index, y_index, step = merge_levels(torch.arange(1, N + 1, device=device) * M, torch.arange(1, M + 1, device=device) * N)
    return x_index, y_index, step.double() / (N * M)
