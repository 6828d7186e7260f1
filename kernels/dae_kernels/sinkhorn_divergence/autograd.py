"""The operators of entropic transport, and the Functions that carry their gradients: of the envelope, and of a plan's product."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dae_kernels.dispatch import register_op, taken_whole
from dae_kernels.sinkhorn_divergence.reference import ReferenceUpdate
from dae_kernels.sinkhorn_divergence.solver import Options, Sinkhorn
from dae_kernels.tracing import without_autocast


def sinkhorn(x_ND: Tensor, y_MD: Tensor, a_N: Tensor, b_M: Tensor, options: Options, debias: bool, triton: bool) -> Sinkhorn:
    """The problems to be solved, by the reference or the kernels."""
    if triton:
        from dae_kernels.sinkhorn_divergence.fused import TritonUpdate as prepare
    else:
        prepare = ReferenceUpdate
    return Sinkhorn(prepare, x_ND, y_MD, a_N, b_M, options, debias)


def solve_divergence(
    x_ND: Tensor,
    y_MD: Tensor,
    a_N: Tensor,
    b_M: Tensor,
    p: int,
    blur: float,
    scaling: float,
    diameter: float | None,
    reach: float | None,
    max_iter: int | None,
    tolerance: float | None,
    debias: bool,
    potentials: bool,
    triton: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`Sinkhorn.divergence` of the solved problems."""
    options = Options(p, blur, scaling, diameter, reach, max_iter, tolerance)
    with without_autocast(x_ND.device):
        return sinkhorn(x_ND, y_MD, a_N, b_M, options, debias, triton).solve().divergence(potentials)


def empty_divergence(x_ND: Tensor, y_MD: Tensor, a_N: Tensor, b_M: Tensor, *options: Any) -> tuple[Tensor, ...]:
    vectors = (torch.empty_like(t) for t in (a_N, b_M, a_N, b_M))
    return a_N.new_empty(()), *vectors, x_ND.new_empty(x_ND.shape), y_MD.new_empty(y_MD.shape)


def solve_means(
    x_ND: Tensor,
    y_MD: Tensor,
    a_N: Tensor,
    b_M: Tensor,
    values_ME: Tensor | None,
    p: int,
    blur: float,
    scaling: float,
    diameter: float | None,
    reach: float | None,
    max_iter: int | None,
    tolerance: float | None,
    triton: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`Sinkhorn.means` of the solved problem."""
    options = Options(p, blur, scaling, diameter, reach, max_iter, tolerance)
    with without_autocast(x_ND.device):
        return sinkhorn(x_ND, y_MD, a_N, b_M, options, False, triton).solve().means(values_ME)


def empty_means(
    x_ND: Tensor, y_MD: Tensor, a_N: Tensor, b_M: Tensor, values_ME: Tensor | None, *options: Any
) -> tuple[Tensor, ...]:
    means_NE = x_ND.new_empty(len(x_ND), (y_MD if values_ME is None else values_ME).shape[1])
    return means_NE, *(torch.empty_like(t) for t in (a_N, a_N, b_M))


def transposed_means(
    x_ND: Tensor,
    y_MD: Tensor,
    a_N: Tensor,
    b_M: Tensor,
    f_N: Tensor,
    g_M: Tensor,
    d_means_NE: Tensor,
    p: int,
    blur: float,
    scaling: float,
    diameter: float | None,
    reach: float | None,
    triton: bool,
) -> Tensor:
    """The gradient of `solve_means` by its values."""
    options = Options(p, blur, scaling, diameter, reach, None, None)
    with without_autocast(x_ND.device):
        return sinkhorn(x_ND, y_MD, a_N, b_M, options, False, triton).sums_over_rows(f_N, g_M, d_means_NE)


def empty_transposed(
    x_ND: Tensor, y_MD: Tensor, a_N: Tensor, b_M: Tensor, f_N: Tensor, g_M: Tensor, d_means_NE: Tensor, *options: Any
) -> Tensor:
    return y_MD.new_empty(len(y_MD), d_means_NE.shape[1])


# Opaque to torch.compile with Triton too, unlike the other operators of this package: the number of updates depends on the data.
sinkhorn_potentials = register_op("dae_kernels::sinkhorn_potentials", solve_divergence, empty_divergence)
sinkhorn_means = register_op("dae_kernels::sinkhorn_means", solve_means, empty_means)
sinkhorn_transposed = register_op("dae_kernels::sinkhorn_transposed", transposed_means, empty_transposed)


def envelope(*arguments) -> tuple[Tensor, Tensor, Tensor]:
    """The divergence [] and, with `potentials`, f [N] and g [M] by the operator above, with their gradients."""
    if torch.compiler.is_compiling():
        import dae_kernels.whole  # noqa: F401
    return apply_envelope(*arguments)


@taken_whole
def apply_envelope(*arguments) -> tuple[Tensor, Tensor, Tensor]:
    return Envelope.apply(*arguments)[:3]


class Envelope(torch.autograd.Function):
    """A Function, as `register_autograd` does not support torch.func.

    What makes the gradients is an output too: so differentiating the gradients reaches it, and is refused.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x_ND: Tensor, y_MD: Tensor, a_N: Tensor, b_M: Tensor, *options) -> tuple[Tensor, ...]:
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
        d_x_ND, d_a_N = side_gradients(a_N, du_N, dx_ND, d_value, d_u_N)
        d_y_MD, d_b_M = side_gradients(b_M, dv_M, dy_MD, d_value, d_v_M)
        return d_x_ND, d_y_MD, d_a_N, d_b_M, *[None] * 10


def side_gradients(
    a_N: Tensor, du_N: Tensor, dx_ND: Tensor, d_value: Tensor | None, d_u_N: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients to the points [N, D] and the weights [N] of one side; a potential takes none to the weights."""
    by_row_N = [d for d in (None if d_value is None else d_value * a_N, d_u_N) if d is not None]
    return sum(by_row_N)[:, None] * dx_ND if by_row_N else None, None if d_value is None else d_value * du_N


def plan_means(*arguments) -> tuple[Tensor, Tensor]:
    """Means [N, E] of values under the rows of the plan, and the rows' sums [N]; differentiable by the values."""
    if torch.compiler.is_compiling():
        import dae_kernels.whole  # noqa: F401
    return apply_plan_means(*arguments)


@taken_whole
def apply_plan_means(*arguments) -> tuple[Tensor, Tensor]:
    return PlanMeans.apply(*arguments)[:2]


class PlanMeans(torch.autograd.Function):
    """Linear in the values; the plan is held constant."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x_ND: Tensor, y_MD: Tensor, a_N: Tensor, b_M: Tensor, values_ME: Tensor | None, *options) -> tuple[Tensor, ...]:
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
        d_values_ME = None if d_means_NE is None else TransposedMeans.apply(*saved, d_means_NE, *ctx.options)
        return None, None, None, None, d_values_ME, *[None] * 8


class TransposedMeans(torch.autograd.Function):
    """The gradient of `PlanMeans`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*arguments) -> Tensor:
        return sinkhorn_transposed(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, d_values_ME: Tensor) -> tuple[None, ...]:
        raise RuntimeError("sinkhorn_transport has no second derivative: its gradient holds the transport plan constant")
