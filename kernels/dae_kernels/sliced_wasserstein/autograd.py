"""Costs over many projections, in blocks of bounded size, forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dae_kernels.sliced_wasserstein.reference import projected_cost

MAX_PROJECTED = 1 << 22  # projected points of both clouds in memory at once; a handful of such arrays coexist


def mean_cost(x_ND: Tensor, y_MD: Tensor, projections_DL: Tensor, p: float, wx_N: Tensor | None, wy_M: Tensor | None) -> Tensor:
    """Mean over projections of W_p^p.

    If gradients are recorded and there are several blocks, a block is recomputed in the backward pass instead of being saved,
    so that memory is bounded there too.
    """
    total = x_ND.new_zeros(())
    blocks = projection_blocks(x_ND, y_MD, projections_DL)
    for block_Dl in blocks:
        arguments = (x_ND, y_MD, block_Dl, p, wx_N, wy_M)
        if len(blocks) == 1 or not torch.is_grad_enabled():
            cost_l = projected_cost(*arguments)
        elif torch.compiler.is_compiling():  # which would deduplicate the recomputation of `Recomputed` and save it
            # Nothing in a block is random, so there is no random state to restore.
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
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x_ND, y_MD, projections_DL, ctx.p, wx_N, wy_M = inputs
        ctx.save_for_backward(x_ND, y_MD, projections_DL, wx_N, wy_M)

    @staticmethod
    def backward(ctx: Any, d_cost_L: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # read once: torch.utils.checkpoint unpacks a tensor only once
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
    """Maximum over projections of W_p^p. The search records no gradient: only the recomputed winner has one."""
    with torch.no_grad():
        blocks = projection_blocks(x_ND, y_MD, projections_DL)
        winner = torch.cat([projected_cost(x_ND, y_MD, block_Dl, p, wx_N, wy_M) for block_Dl in blocks]).argmax()
    return projected_cost(x_ND, y_MD, projections_DL.index_select(1, winner.view(1)), p, wx_N, wy_M).sum()


def projection_blocks(x_ND: Tensor, y_MD: Tensor, projections_DL: Tensor) -> tuple[Tensor, ...]:
    return projections_DL.split(max(1, MAX_PROJECTED // (x_ND.shape[0] + y_MD.shape[0])), dim=1)
