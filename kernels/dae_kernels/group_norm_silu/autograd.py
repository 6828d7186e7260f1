"""The gradient of the fused kernels of `group_norm_silu`, and a workaround for torch's on CPUs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dae_kernels.dispatch import apply, taken_whole


@taken_whole
def group_norm_silu_fused(x: Tensor, *parameters: Any) -> Tensor:
    """`group_norm_silu` by the kernels; parameters are weight, bias, scale, shift (or None), num_groups, eps and silu."""
    return apply(GroupNormSiLU, x, *parameters)[0]


class GroupNormSiLU(torch.autograd.Function):
    """The kernels with their gradient; `register_autograd` does not support torch.func."""

    generate_vmap_rule = True
    used = 1

    @staticmethod
    def forward(x, weight, bias, scale, shift, num_groups, eps, silu):
        from dae_kernels.group_norm_silu.fused import group_norm_silu_forward

        return group_norm_silu_forward(x, weight, bias, scale, shift, num_groups, eps, silu)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, bias, scale, shift, ctx.num_groups, _, ctx.silu = inputs
        _, mean_BG, rstd_BG = output
        ctx.mark_non_differentiable(mean_BG, rstd_BG)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight, bias, scale, shift, mean_BG, rstd_BG)

    @staticmethod
    def backward(ctx, dy, *_):
        saved = ctx.saved_tensors  # read once: torch.utils.checkpoint unpacks a tensor only once
        _, weight, bias, scale, shift, _, _ = saved
        dx, d_affine_2C, d_adaptive_2BC = apply(GroupNormSiLUBackward, dy, *saved, ctx.num_groups, ctx.silu)
        d_weight = d_bias = d_scale = d_shift = None
        if weight is not None or bias is not None:
            d_weight, d_bias = of_dtypes(d_affine_2C, weight, bias)
        if scale is not None:
            d_scale, d_shift = of_dtypes(d_adaptive_2BC, scale, shift)
        return dx, d_weight, d_bias, d_scale, d_shift, None, None, None


def of_dtypes(gradients: Tensor, one: Tensor | None, two: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """The two gradients along the first axis, each in its parameter's dtype; None for what is not there."""
    d_one, d_two = gradients.unbind()
    if one is not None and one.dtype != d_one.dtype:
        d_one = d_one.to(one.dtype)
    if two is not None and two.dtype != d_two.dtype:
        d_two = d_two.to(two.dtype)
    return None if one is None else d_one, None if two is None else d_two


class GroupNormSiLUBackward(torch.autograd.Function):
    """The backward kernels; a second derivative raises."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*operands):
        from dae_kernels.group_norm_silu.fused import group_norm_silu_backward

        return group_norm_silu_backward(*operands)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *cotangents):
        raise RuntimeError("group_norm_silu's kernels have no second derivative: use impl='reference'")


@taken_whole
def input_in_graph(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    return apply(InputInGraph, x, weight, bias)


class InputInGraph(torch.autograd.Function):
    """x, made to require a gradient if x, weight or bias does.

    On a CPU torch writes the gradient of a channels_last x even if it was not requested, which is a segmentation fault if only a
    parameter requires one (native_group_norm_backward, torch 2.13). This Function always requests it.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor | None, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor, None, None]:
        return dx, None, None
