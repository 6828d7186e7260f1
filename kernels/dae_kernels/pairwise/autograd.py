"""The three sums over pairs of two weighted clouds, differentiable in both clouds and both weights."""

from __future__ import annotations

import functools
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
    x_ND: Tensor, y_MD: Tensor, a_N: Tensor, b_M: Tensor, parameters: tuple[float, ...], impl: str
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
        impl: "reference" or POLYNOMIAL.
    """
    for_x, for_y = differentiated(x_ND, a_N), differentiated(y_MD, b_M)
    return apply(PairSums, x_ND, y_MD, a_N, b_M, parameters, impl, for_x, for_y)[:3]


@taken_whole
def pair_distance(
    x_ND: Tensor, y_MD: Tensor, a_N: Tensor | None, b_M: Tensor | None, bandwidths: tuple[float, ...], unbiased: bool
) -> Tensor:
    """`mmd` with bandwidths, `energy_distance` without, by the kernels; a float32 scalar.

    Args:
        x_ND, y_MD: the clouds.
        a_N, b_M: their weights, float64, of sum 1; None for equal ones.
        bandwidths: of Gaussians, or none for the distance.
        unbiased: of mmd.
    """
    by_weights = a_N is not None and differentiated(a_N), b_M is not None and differentiated(b_M)
    needs = differentiated(x_ND), differentiated(y_MD), *by_weights
    return apply(PairDistance, x_ND, y_MD, a_N, b_M, bandwidths, unbiased, needs)[0]


def rows_of(parameters: tuple[float, ...], impl: str) -> Rows:
    """The function that sums over rows: it takes q, s, the weights v of s, `same` and `gradient`, as `pair_rows_reference`."""
    if impl == POLYNOMIAL:
        degree, gamma, coef0 = parameters
        return lambda q, s, v, *flags: polynomial_rows(q, s, v, degree, gamma, coef0, *flags)
    return lambda q, s, v, *flags: pair_rows(q, s, v, parameters, *flags)


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
        for_x: bool,
        for_y: bool,
    ) -> tuple[Tensor, ...]:
        rows = rows_of(parameters, impl)
        within_x_N, slope_xx_ND = rows(x_ND, x_ND, a_N, True, for_x)
        within_y_M, slope_yy_MD = rows(y_MD, y_MD, b_M, True, for_y)
        made = []
        # Weights of a side multiply its rows, so the gradient to a weight is the row's sum (twice, within a cloud).
        if for_x or not for_y:
            across_x_N, slope_xy_ND = rows(x_ND, y_MD, b_M, False, for_x)
            across = (a_N * across_x_N).sum()
        if for_x:
            made += [within_x_N, across_x_N, slope_xx_ND, slope_xy_ND]
        if for_y:
            across_y_M, slope_yx_MD = rows(y_MD, x_ND, a_N, False, True)
            made += [within_y_M, across_y_M, slope_yy_MD, slope_yx_MD]
            if not for_x:
                across = (b_M * across_y_M).sum()
        return (a_N * within_x_N).sum(), across, (b_M * within_y_M).sum(), *made

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x_ND, y_MD, a_N, b_M, _, _, ctx.for_x, ctx.for_y = inputs
        ctx.dtypes = x_ND.dtype, y_MD.dtype
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(a_N, b_M, *output[3:])

    @staticmethod
    def backward(
        ctx: Any, d_within_x: Tensor | None, d_across: Tensor | None, d_within_y: Tensor | None, *d_made: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        refuse_second(d_made)
        a_N, b_M, *made = ctx.saved_tensors
        d_x = d_y = d_a = d_b = None
        if ctx.for_x:
            d_x, d_a = gradients_of_cloud(a_N, made[:4], d_within_x, d_across, ctx.dtypes[0])
        if ctx.for_y:
            d_y, d_b = gradients_of_cloud(b_M, made[-4:], d_within_y, d_across, ctx.dtypes[1])
        return d_x, d_y, d_a, d_b, None, None, None, None


def refuse_second(d_made: tuple[Tensor | None, ...]) -> None:
    if any(d is not None for d in d_made):
        raise RuntimeError("mmd and energy_distance have no second derivatives: their gradients are constants to autograd")


def gradients_of_cloud(
    weight_N: Tensor, made: list[Tensor], d_within: Tensor | None, d_across: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Gradients to the points [N, D] and weights [N] of one side; the gradient of an unused sum is None."""
    within_N, across_N, slope_within_ND, slope_across_ND = made
    within: Tensor | float = 0.0 if d_within is None else 2.0 * d_within
    across: Tensor | float = 0.0 if d_across is None else d_across
    d_point_ND = weight_N[:, None] * (within * slope_within_ND + across * slope_across_ND)
    return d_point_ND.to(dtype), within * within_N + across * across_N


class PairDistance(torch.autograd.Function):
    """`pair_distance`: value, and as outputs that raise in double backward the gradients that are needed.

    With S_x, S_xy and S_y the sums of `pair_sums` it is

        energy_distance   2 S_xy - S_x - S_y
        mmd               S_x / p_x + S_y / p_y - 2 S_xy,                     p_x = 1 - sum a_i^2, if unbiased, else
                          S_x + S_y - 2 S_xy + B (sum a_i^2 + sum b_j^2),     B bandwidths

    whose gradients are known but for one factor, so that the backward pass only multiplies.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x_ND: Tensor,
        y_MD: Tensor,
        a_N: Tensor | None,
        b_M: Tensor | None,
        bandwidths: tuple[float, ...],
        unbiased: bool,
        needs: tuple[bool, ...],
    ) -> tuple[Tensor, ...]:
        from dae_kernels.pairwise.fused import centred, pair_distance_triton, pair_rows_triton, rates

        if a_N is None and b_M is None:
            value, dx_ND, dy_MD = pair_distance_triton(x_ND, y_MD, bandwidths, unbiased, needs[0], needs[1])
            if needs[0]:
                return (value, dx_ND, dy_MD) if needs[1] else (value, dx_ND)
            return (value, dy_MD) if needs[1] else (value,)
        B, (need_x, need_y, need_a, need_b) = len(bandwidths), needs
        x_alone, x, y, y_alone = centred(x_ND, y_MD, a_N, b_M)
        scale = None
        if not B:  # float32 squared distances overflow above 1e19 and underflow below 1e-19
            scale = unit_scale(x_alone, x, y, y_alone)
            x_alone, x, y, y_alone = (cloud * scale for cloud in (x_alone, x, y, y_alone))
        rate_B = rates(bandwidths, x_ND.device)
        v_N, v_M = (
            cloud.new_full(cloud.shape[:1], 1 / cloud.shape[0]) if weights is None else weights.float()
            for cloud, weights in ((x, a_N), (y, b_M))
        )
        within_x_N, slope_xx_ND = pair_rows_triton(x_alone, x_alone, v_N, rate_B, B, True, need_x)
        within_y_M, slope_yy_MD = pair_rows_triton(y_alone, y_alone, v_M, rate_B, B, True, need_y)
        for_y = need_y or need_b
        if need_x or need_a or not for_y:
            across_N, slope_xy_ND = pair_rows_triton(x, y, v_M, rate_B, B, False, need_x)
            across = weighted(across_N, a_N)
        if for_y:
            across_M, slope_yx_MD = pair_rows_triton(y, x, v_N, rate_B, B, False, need_y)
            if not (need_x or need_a):
                across = weighted(across_M, b_M)
        within_x, within_y, twice = weighted(within_x_N, a_N), weighted(within_y_M, b_M), -2.0 if B else 2.0
        factor_x, own_x = factors(x, a_N, B, unbiased)
        factor_y, own_y = factors(y, b_M, B, unbiased)
        value = within_x * factor_x + within_y * factor_y + across * twice
        if B and not unbiased:
            value = value + B * (own_x + own_y)
        value = value if scale is None else value / scale
        made = []
        if need_x:
            made.append(by_point(a_N, slope_xx_ND, slope_xy_ND, factor_x, twice))
        if need_y:
            made.append(by_point(b_M, slope_yy_MD, slope_yx_MD, factor_y, twice))
        of_weights = functools.partial(by_weight, twice=twice, bandwidths=B, unbiased=unbiased, scale=scale)
        if need_a and a_N is not None:
            made.append(of_weights(a_N, within_x_N, across_N, within_x, factor_x))
        if need_b and b_M is not None:
            made.append(of_weights(b_M, within_y_M, across_M, within_y, factor_y))
        return value.float(), *made

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.dtypes, ctx.needs = (inputs[0].dtype, inputs[1].dtype, torch.float64, torch.float64), inputs[-1]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*output[1:])

    @staticmethod
    def backward(ctx: Any, d_value: Tensor | None, *d_made: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_second(d_made)
        if d_value is None:
            return (None,) * 7
        made, scaled = iter(ctx.saved_tensors), []
        for need, dtype in zip(ctx.needs, ctx.dtypes, strict=True):
            gradient = next(made) * d_value if need else None
            scaled.append(gradient if gradient is None or gradient.dtype == dtype else gradient.to(dtype))
        return *scaled, None, None, None


def weighted(rows_N: Tensor, weights_N: Tensor | None) -> Tensor:
    """The weighted sum of rows, float64."""
    return rows_N.sum(dtype=torch.float64) / rows_N.shape[0] if weights_N is None else (rows_N * weights_N).sum()


def factors(cloud_ND: Tensor, weights_N: Tensor | None, bandwidths: int, unbiased: bool) -> tuple[Any, Any]:
    """What the sum within a cloud is multiplied by, and the sum of its squared weights: numbers for equal ones."""
    if not bandwidths:
        return -1.0, None
    own = 1 / cloud_ND.shape[0] if weights_N is None else weights_N.square().sum()
    return 1 / (1 - own) if unbiased else 1.0, own


def by_point(weights_N: Tensor | None, within_ND: Tensor, across_ND: Tensor, factor: Any, twice: float) -> Tensor:
    """The gradient by the points, from the slopes of their rows."""
    if weights_N is None:
        N = within_ND.shape[0]
        return torch.add(within_ND * (2.0 * factor / N), across_ND, alpha=twice / N)
    return torch.add(within_ND * (2.0 * factor), across_ND, alpha=twice) * weights_N.to(within_ND.dtype)[:, None]


def by_weight(
    weights_N: Tensor, within_N: Tensor, across_N: Tensor, within: Tensor, factor: Any,
    twice: float, bandwidths: int, unbiased: bool, scale: Tensor | None,
) -> Tensor:  # fmt: skip
    """The gradient by the weights, float64: they multiply the rows, and mmd divides by p or adds the pairs i = j."""
    d_weight = within_N * (2.0 * factor) + across_N.double() * twice
    d_weight = d_weight if scale is None else d_weight / scale
    if not bandwidths:
        return d_weight
    return d_weight + weights_N * (2.0 * (within * factor.square() if unbiased else bandwidths))
