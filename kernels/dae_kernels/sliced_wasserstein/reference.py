"""Wasserstein distances of clouds projected to lines, a bounded number of projected points at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.utils.checkpoint import checkpoint

MAX_PROJECTED = 1 << 22  # projected points of both clouds alive at once; a handful of arrays of that length exist together


def mean_cost(x_ND: Tensor, y_MD: Tensor, projections_DL: Tensor, p: float, wx_N: Tensor | None, wy_M: Tensor | None) -> Tensor:
    """Mean over projections of W_p^p.

    Where gradients are recorded and one block does not hold everything, a block is computed anew in the backward pass
    instead of being kept, so that memory is bounded there too.
    """
    total = x_ND.new_zeros(())
    blocks = projection_blocks(x_ND, y_MD, projections_DL)
    for block_Dl in blocks:
        arguments = (x_ND, y_MD, block_Dl, p, wx_N, wy_M)
        if len(blocks) == 1 or not torch.is_grad_enabled():
            cost_l = projected_cost(*arguments)
        elif torch.compiler.is_compiling():  # which would find that `Recomputed` does the same twice, and keep it
            # Nothing in a block is random, so there is no random state to put back.
            cost_l = checkpoint(projected_cost, *arguments, use_reentrant=False, preserve_rng_state=False)
        else:
            cost_l = Recomputed.apply(*arguments)
        total = total + cost_l.sum()
    return total / projections_DL.shape[1]


class Recomputed(torch.autograd.Function):
    """`projected_cost`, of which only the operands are saved; torch's `checkpoint` does not support torch.func."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x_ND: Tensor, y_MD: Tensor, projections_DL: Tensor, p: float, wx_N: Tensor | None, wy_M: Tensor | None) -> Tensor:
        return projected_cost(x_ND, y_MD, projections_DL, p, wx_N, wy_M)

    @staticmethod
    def setup_context(ctx: FunctionCtx, inputs: tuple[Any, ...], output: Tensor) -> None:
        x_ND, y_MD, projections_DL, ctx.p, wx_N, wy_M = inputs
        ctx.save_for_backward(x_ND, y_MD, projections_DL, wx_N, wy_M)

    @staticmethod
    def backward(ctx: FunctionCtx, d_cost_L: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # read once: torch.utils.checkpoint unpacks a tensor no second time
        needs = [need for i, need in enumerate(ctx.needs_input_grad) if i != 3]  # without p
        positions = [i for i, need in enumerate(needs) if need]

        def cost(*given: Tensor) -> Tensor:
            operands = [*saved]
            for i, operand in zip(positions, given, strict=True):
                operands[i] = operand
            x_ND, y_MD, projections_DL, wx_N, wy_M = operands
            return projected_cost(x_ND, y_MD, projections_DL, ctx.p, wx_N, wy_M)

        gradients: list[Tensor | None] = [None] * 5
        for i, gradient in zip(positions, pull_back(cost, [saved[i] for i in positions], d_cost_L), strict=True):
            gradients[i] = gradient
        return *gradients[:3], None, *gradients[3:]


def pull_back(function: Callable[..., Tensor], operands: list[Tensor], cotangent: Tensor) -> tuple[Tensor, ...]:
    """The gradients of `function` by its operands for a cotangent of its result; differentiable if gradients are recorded."""
    if torch._C._are_functorch_transforms_active():
        return torch.func.vjp(function, *operands)[1](cotangent)
    # torch.func refuses to work under hooks of saved tensors, such as those of save_on_cpu around a backward pass.
    twice = torch.is_grad_enabled()
    with torch.enable_grad():
        given = [operand.view_as(operand) if twice else operand.detach().requires_grad_() for operand in operands]
        return torch.autograd.grad(function(*given), given, cotangent, create_graph=twice)


def greatest_cost(
    x_ND: Tensor, y_MD: Tensor, projections_DL: Tensor, p: float, wx_N: Tensor | None, wy_M: Tensor | None
) -> Tensor:
    """Maximum over projections of W_p^p. The search records nothing: only the winner, computed again, has a gradient."""
    with torch.no_grad():
        blocks = projection_blocks(x_ND, y_MD, projections_DL)
        winner = torch.cat([projected_cost(x_ND, y_MD, block_Dl, p, wx_N, wy_M) for block_Dl in blocks]).argmax()
    return projected_cost(x_ND, y_MD, projections_DL.index_select(1, winner.view(1)), p, wx_N, wy_M).sum()


def projection_blocks(x_ND: Tensor, y_MD: Tensor, projections_DL: Tensor) -> tuple[Tensor, ...]:
    return projections_DL.split(max(1, MAX_PROJECTED // (x_ND.shape[0] + y_MD.shape[0])), dim=1)


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
    """|difference|^p, for p > 2 in float64: float32 has no 1e-7^6, and differences of that share of the clouds' size occur."""
    return difference.square() if p == 2 else (difference.double() if p > 2 else difference).abs().pow(p)


def levels(weights_N: Tensor | None, order_LN: Tensor) -> Tensor:
    """[L, N] float64: cumulated weights in sorted order, divided by their last, so that the last is 1 exactly."""
    if weights_N is None:
        N = order_LN.shape[1]
        return (torch.arange(1, N + 1, device=order_LN.device, dtype=torch.float64) / N).expand(order_LN.shape)
    cumulated_LN = weights_N.double()[order_LN].cumsum(dim=1)
    return cumulated_LN / cumulated_LN[:, -1:]


def merge_levels(x_level: Tensor, y_level: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """For each interval between successive levels [..., N + M]: the points of x and of y that it belongs to, and its length."""
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
