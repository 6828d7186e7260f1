"""The three sums over pairs of two weighted clouds, differentiable in both clouds and both weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dae_kernels.pairwise.reference import pair_rows_reference


def pair_sums(
    x_ND: Tensor, y_MD: Tensor, a_N: Tensor, b_M: Tensor, bandwidths: tuple[float, ...], impl: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Sums of f(|.|) over the pairs within x, across, and within y, pairs of a point with itself left out; float64 scalars.

        sum_{i != j} a_i a_j f(|x_i - x_j|),  sum_{ij} a_i b_j f(|x_i - y_j|),  sum_{i != j} b_i b_j f(|y_i - y_j|)

    f is a sum of Gaussians of the `bandwidths`, or the distance itself where there are none. As the results are scalars,
    their gradients are made in the forward pass, where the distances are at hand, and only for the side that needs them;
    the backward pass scales them. A pass over pairs a needed gradient or sum: 3 in all if one side needs gradients, else 4.

    Args:
        x_ND, y_MD: the clouds.
        a_N, b_M: their weights, float64.
        impl: "reference" or "triton".
    """
    recording = torch.is_grad_enabled()
    for_x = recording and (x_ND.requires_grad or a_N.requires_grad)
    for_y = recording and (y_MD.requires_grad or b_M.requires_grad)
    return PairSums.apply(x_ND, y_MD, a_N, b_M, bandwidths, impl, for_x, for_y)


class PairSums(torch.autograd.Function):
    """`pair_sums`, told which sides need gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        x_ND: Tensor,
        y_MD: Tensor,
        a_N: Tensor,
        b_M: Tensor,
        bandwidths: tuple[float, ...],
        impl: str,
        for_x: bool,
        for_y: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        if impl == "triton":
            from dae_kernels.pairwise.fused import centred, pair_rows_triton, rates

            x, y = centred(x_ND, y_MD)
            coefficients_B = rates(bandwidths, x.device)

            def rows(q: Tensor, s: Tensor, v: Tensor, same: bool, gradient: bool) -> tuple[Tensor, Tensor]:
                p, g = pair_rows_triton(q, s, v.float(), coefficients_B, len(bandwidths), same, gradient)
                return p.double(), g
        else:
            x, y = x_ND, y_MD

            def rows(q: Tensor, s: Tensor, v: Tensor, same: bool, gradient: bool) -> tuple[Tensor, Tensor]:
                return pair_rows_reference(q, s, v, bandwidths, same, gradient)

        within_x_N, slope_xx_ND = rows(x, x, a_N, True, for_x)
        within_y_M, slope_yy_MD = rows(y, y, b_M, True, for_y)
        across_x_N, slope_xy_ND = rows(x, y, b_M, False, for_x) if for_x or not for_y else (None, None)
        across_y_M, slope_yx_MD = rows(y, x, a_N, False, for_y) if for_y else (None, None)
        # Weights of a side multiply its rows, so the gradient to a weight is the row's sum (twice, within a cloud).
        saved = [a_N, within_x_N, across_x_N, slope_xx_ND, slope_xy_ND] if for_x else [None] * 5
        saved += [b_M, within_y_M, across_y_M, slope_yy_MD, slope_yx_MD] if for_y else [None] * 5
        ctx.save_for_backward(*saved)
        ctx.dtypes = x_ND.dtype, y_MD.dtype
        across = (b_M * across_y_M).sum() if across_x_N is None else (a_N * across_x_N).sum()
        return (a_N * within_x_N).sum(), across, (b_M * within_y_M).sum()

    @staticmethod
    def backward(ctx: Any, d_within_x: Tensor, d_across: Tensor, d_within_y: Tensor) -> tuple[Tensor | None, ...]:
        # The saved gradients are constants to autograd: create_graph=True would silently miss terms.
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError("mmd and energy_distance have no second derivatives: call backward without create_graph=True")
        gradients = []
        for saved, d_within, dtype in zip(
            (ctx.saved_tensors[:5], ctx.saved_tensors[5:]), (d_within_x, d_within_y), ctx.dtypes, strict=True
        ):
            weight_N, within_N, across_N, slope_within_ND, slope_across_ND = saved
            if weight_N is None:
                gradients.append((None, None))
                continue
            d_weight_N = 2.0 * d_within * within_N + d_across * across_N
            d_point_ND = weight_N[:, None] * (2.0 * d_within * slope_within_ND + d_across * slope_across_ND)
            gradients.append((d_point_ND.to(dtype), d_weight_N))
        (d_x, d_a), (d_y, d_b) = gradients
        return d_x, d_y, d_a, d_b, None, None, None, None
