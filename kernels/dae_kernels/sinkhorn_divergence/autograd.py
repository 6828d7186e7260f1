"""The gradients of entropic transport: of the divergence by the envelope theorem, and of a plan's product by its values."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dae_kernels.dispatch import apply, taken_whole
from dae_kernels.sinkhorn_divergence.operators import sinkhorn_means, sinkhorn_potentials, sinkhorn_transposed


@taken_whole
def envelope(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The divergence [] and, with `potentials`, f [N] and g [M] by the operator `sinkhorn_potentials`, with their gradients."""
    return apply(Envelope, *arguments)[:3]


class Envelope(torch.autograd.Function):
    """A Function, as `register_autograd` does not support torch.func.

    The tensors behind the gradients are outputs too, so that double backward reaches them and raises.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x_ND: Tensor, y_MD: Tensor, a_N: Tensor, b_M: Tensor, *options: Any) -> tuple[Tensor, ...]:
        return sinkhorn_potentials(x_ND, y_MD, a_N, b_M, *options)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[2:4], *output[3:])

    @staticmethod
    def backward(
        ctx: Any, d_value: Tensor | None, d_u_N: Tensor | None, d_v_M: Tensor | None, *d_made: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        if any(d is not None for d in d_made):
            raise RuntimeError("sinkhorn_divergence has no second derivative: its gradient holds the transport plan constant")
        a_N, b_M, du_N, dv_M, dx_ND, dy_MD = ctx.saved_tensors
        by_x, by_y, by_a, by_b = ctx.needs_input_grad[:4]
        d_x_ND, d_a_N = envelope_gradients(a_N, du_N, dx_ND, d_value, d_u_N, by_x, by_a)
        d_y_MD, d_b_M = envelope_gradients(b_M, dv_M, dy_MD, d_value, d_v_M, by_y, by_b)
        return d_x_ND, d_y_MD, d_a_N, d_b_M, *[None] * 11


def envelope_gradients(
    a_N: Tensor, du_N: Tensor, dx_ND: Tensor, d_value: Tensor | None, d_u_N: Tensor | None, by_point: bool, by_weight: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients to the points [N, D] and the weights [N] of one side; potentials have none to the weights."""
    d_a_N = None if d_value is None or not by_weight else d_value * du_N
    if not by_point:
        return None, d_a_N
    by_row_N = None if d_value is None else d_value * a_N
    if d_u_N is not None:
        by_row_N = d_u_N if by_row_N is None else by_row_N + d_u_N
    return None if by_row_N is None else by_row_N[:, None] * dx_ND, d_a_N


@taken_whole
def plan_means(*arguments: Any) -> tuple[Tensor, Tensor]:
    """Means [N, E] of values under the rows of the plan, and the rows' sums [N]; differentiable by the values."""
    return apply(PlanMeans, *arguments)[:2]


class PlanMeans(torch.autograd.Function):
    """Linear in the values; the plan is held constant."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x_ND: Tensor, y_MD: Tensor, a_N: Tensor, b_M: Tensor, values_ME: Tensor | None, *options: Any
    ) -> tuple[Tensor, ...]:
        return sinkhorn_means(x_ND, y_MD, a_N, b_M, values_ME, *options)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*output[1:])
        *options, _, _, triton = inputs[5:]
        ctx.options = (*options, triton)
        ctx.save_for_backward(*inputs[:4], *output[2:])

    @staticmethod
    def backward(ctx: Any, d_means_NE: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        d_values_ME = None if d_means_NE is None else apply(TransposedMeans, *saved, d_means_NE, *ctx.options)
        return None, None, None, None, d_values_ME, *[None] * 8


class TransposedMeans(torch.autograd.Function):
    """The gradient of `PlanMeans`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*arguments: Any) -> Tensor:
        return sinkhorn_transposed(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, d_values_ME: Tensor) -> tuple[None, ...]:
        raise RuntimeError("sinkhorn_transport has no second derivative: its gradient holds the transport plan constant")
