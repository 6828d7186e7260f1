"""The three sums over pairs of two weighted clouds, differentiable in both clouds and both weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dae_kernels.clouds import unit_scale
from dae_kernels.dispatch import apply, taken_whole
from dae_kernels.pairwise.reference import pair_rows, polynomial_rows
from dae_kernels.tracing import differentiated

POLYNOMIAL = "polynomial"  # used as `impl` for the kernel (gamma x.y + coef0)^degree
Rows = Callable[[Tensor, Tensor, Tensor, bool, bool], tuple[Tensor, Tensor]]


@taken_whole
def pair_sums(
    x_ND: Tensor,
    y_MD: Tensor,
    a_N: Tensor,
    b_M: Tensor,
    parameters: tuple[float, ...],
    impl: str,
    equal: tuple[bool, bool] = (False, False),
) -> tuple[Tensor, Tensor, Tensor]:
    """Sums of k over the pairs within x, across, and within y, without pairs of a point with itself; float64 scalars.

        sum_{i != j} a_i a_j k(x_i, x_j),  sum_{ij} a_i b_j k(x_i, y_j),  sum_{i != j} b_i b_j k(y_i, y_j)

    k is a sum of Gaussians with the parameters as bandwidths, the distance without parameters, or for impl=POLYNOMIAL the
    polynomial with the parameters degree, gamma and coef0. As the results are scalars, their gradients are computed in the
    forward pass, which has the distances, and only for the side that needs them; the backward pass scales them. One pass over
    pairs per needed gradient or sum: 3 in all if one side needs gradients, else 4.

    Args:
        x_ND, y_MD: the clouds.
        a_N, b_M: their weights, float64.
        impl: "reference", "triton" or POLYNOMIAL.
        equal: whether the weights of x, and of y, are known to be equal, which saves launches.
    """
    for_x, for_y = differentiated(x_ND, a_N), differentiated(y_MD, b_M)
    return apply(PairSums, x_ND, y_MD, a_N, b_M, parameters, impl, equal, for_x, for_y)[:3]


def prepared(
    x_ND: Tensor, y_MD: Tensor, a_N: Tensor, b_M: Tensor, parameters: tuple[float, ...], impl: str, equal: tuple[bool, bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Rows]:
    """x for its own pairs, x and y for those across, y for its own pairs, and the function that sums over their rows.

    It takes q, s, the weights v of s, `same` and `gradient`, and returns the same as `pair_rows_reference`.
    """
    if impl == POLYNOMIAL:
        degree, gamma, coef0 = parameters
        return x_ND, x_ND, y_MD, y_MD, lambda q, s, v, *flags: polynomial_rows(q, s, v, degree, gamma, coef0, *flags)
    if impl == "reference":
        return x_ND, x_ND, y_MD, y_MD, lambda q, s, v, *flags: pair_rows(q, s, v, parameters, *flags)
    from dae_kernels.pairwise.fused import centred, pair_rows_triton, rates

    x_alone, x, y, y_alone = centred(x_ND, y_MD, *(None if known else w for w, known in zip((a_N, b_M), equal, strict=True)))
    rate_B = rates(parameters, x_ND.device)
    scale: Tensor | None = None
    if not parameters:  # float32 squared distances overflow above 1e19 and underflow below 1e-19
        scale = unit_scale(x_alone, x, y, y_alone)
        x_alone, x, y, y_alone = (cloud * scale for cloud in (x_alone, x, y, y_alone))

    def rows(q: Tensor, s: Tensor, v: Tensor, same: bool, gradient: bool) -> tuple[Tensor, Tensor]:
        p, g = pair_rows_triton(q, s, v.float(), rate_B, len(parameters), same, gradient)
        return p.double() if scale is None else p.double() / scale, g  # the gradient of a distance has no unit

    return x_alone, x, y, y_alone, rows


class PairSums(torch.autograd.Function):
    """`pair_sums`, with the sides that need gradients as arguments.

    The sums and slopes behind the gradients are also outputs, so that double backward reaches them and raises.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x_ND: Tensor,
        y_MD: Tensor,
        a_N: Tensor,
        b_M: Tensor,
        parameters: tuple[float, ...],
        impl: str,
        equal: tuple[bool, bool],
        for_x: bool,
        for_y: bool,
    ) -> tuple[Tensor, ...]:
        x_alone, x, y, y_alone, rows = prepared(x_ND, y_MD, a_N, b_M, parameters, impl, equal)
        within_x_N, slope_xx_ND = rows(x_alone, x_alone, a_N, True, for_x)
        within_y_M, slope_yy_MD = rows(y_alone, y_alone, b_M, True, for_y)
        made = []
        # Weights of a side multiply its rows, so the gradient to a weight is the row's sum (twice, within a cloud).
        if for_x or not for_y:
            across_x_N, slope_xy_ND = rows(x, y, b_M, False, for_x)
            across = (a_N * across_x_N).sum()
        if for_x:
            made += [within_x_N, across_x_N, slope_xx_ND, slope_xy_ND]
        if for_y:
            across_y_M, slope_yx_MD = rows(y, x, a_N, False, True)
            made += [within_y_M, across_y_M, slope_yy_MD, slope_yx_MD]
            if not for_x:
                across = (b_M * across_y_M).sum()
        return (a_N * within_x_N).sum(), across, (b_M * within_y_M).sum(), *made

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x_ND, y_MD, a_N, b_M, _, _, _, ctx.for_x, ctx.for_y = inputs
        ctx.dtypes = x_ND.dtype, y_MD.dtype
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(a_N, b_M, *output[3:])

    @staticmethod
    def backward(
        ctx: Any, d_within_x: Tensor | None, d_across: Tensor | None, d_within_y: Tensor | None, *d_made: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        if any(d is not None for d in d_made):
            raise RuntimeError("mmd and energy_distance have no second derivatives: their gradients are constants to autograd")
        a_N, b_M, *made = ctx.saved_tensors
        d_x = d_y = d_a = d_b = None
        if ctx.for_x:
            d_x, d_a = gradients_of_cloud(a_N, made[:4], d_within_x, d_across, ctx.dtypes[0])
        if ctx.for_y:
            d_y, d_b = gradients_of_cloud(b_M, made[-4:], d_within_y, d_across, ctx.dtypes[1])
        return d_x, d_y, d_a, d_b, None, None, None, None, None


def gradients_of_cloud(
    weight_N: Tensor, made: list[Tensor], d_within: Tensor | None, d_across: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Gradients to the points [N, D] and weights [N] of one side; the gradient of an unused sum is None."""
    within_N, across_N, slope_within_ND, slope_across_ND = made
    within: Tensor | float = 0.0 if d_within is None else 2.0 * d_within
    across: Tensor | float = 0.0 if d_across is None else d_across
    d_point_ND = weight_N[:, None] * (within * slope_within_ND + across * slope_across_ND)
    return d_point_ND.to(dtype), within * within_N + across * across_N
