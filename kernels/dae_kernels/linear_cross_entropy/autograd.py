"""The gradients of the chunked implementations, as Functions: `register_autograd` does not support torch.func.

Gradients made in a forward pass are outputs too, so that double backward reaches them and raises.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from dae_kernels.dispatch import apply, taken_whole
from dae_kernels.linear_cross_entropy.chunked import chunked_losses
from dae_kernels.linear_cross_entropy.reference import NOT_COUNTED
from dae_kernels.tracing import differentiated, traced, valueless


def scaled(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """gradient * factor, multiplied in the wider dtype and rounded once to `dtype`."""
    if torch.is_grad_enabled() or traced() or valueless(gradient):  # none of them takes `out`
        return (gradient * factor).to(dtype)
    return torch.mul(gradient, factor, out=gradient.new_empty(gradient.shape, dtype=dtype))  # without a wide copy on a GPU


class SumOfLosses(torch.autograd.Function):
    """Sum of the losses over `divisor`, NaN without a gradient if `empty`; its gradients are computed in the forward pass."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        hidden_ND,
        linear_weight_VD,
        bias_V,
        weight_V,
        target_N,
        z_loss,
        divisor,
        empty,
        label_smoothing,
        softcap,
        dtype,
        needs,
        kernel,
        chunk,
    ):
        tensors = hidden_ND, linear_weight_VD, bias_V, weight_V, target_N, z_loss, None
        loss_N, *gradients = chunked_losses(*tensors, label_smoothing, softcap, dtype, *needs, kernel, chunk)
        value = loss_N.sum() / divisor
        return value if empty is None else value.masked_fill(empty, math.nan), *gradients

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.dtypes, ctx.needs = [None if t is None else t.dtype for t in inputs[:3]], inputs[11]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*output[1:], *inputs[6:8])

    @staticmethod
    def backward(ctx: Any, d_sum: Tensor | None, *d_gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_second(d_gradients)
        if d_sum is None:
            return (None,) * 14
        *gradients, divisor, empty = ctx.saved_tensors
        d_sum = (d_sum if empty is None else d_sum.masked_fill(empty, 0.0)) / divisor
        made: list[Tensor | None] = [None, None, None]
        for i in (1, 0, 2):  # the weight's first: its product in float32 is the largest tensor here
            if ctx.needs[i]:
                made[i] = scaled(gradients[i], d_sum, ctx.dtypes[i])
        return *made, *[None] * 11


class Losses(torch.autograd.Function):
    """[N] losses; their gradients are computed in the backward pass, when each row's factor is known."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        hidden_ND, linear_weight_VD, bias_V, weight_V, target_N, z_loss, label_smoothing, softcap, dtype, needs, kernel, chunk
    ):
        tensors = hidden_ND, linear_weight_VD, bias_V, weight_V, target_N, z_loss, None
        return chunked_losses(*tensors, label_smoothing, softcap, dtype, False, False, False, kernel, chunk)[0]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:6])
        ctx.options = inputs[6:]

    @staticmethod
    def backward(ctx: Any, d_loss_N: Tensor) -> tuple[Tensor | None, ...]:
        gradients = apply(GradientsOfLosses, *ctx.saved_tensors, d_loss_N, *ctx.options)
        needs = ctx.options[3]
        return *(gradient if need else None for gradient, need in zip(gradients, needs, strict=True)), *[None] * 9


class GradientsOfLosses(torch.autograd.Function):
    """The gradients of `Losses`; a second derivative raises."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        hidden_ND,
        linear_weight_VD,
        bias_V,
        weight_V,
        target_N,
        z_loss,
        d_loss_N,
        label_smoothing,
        softcap,
        dtype,
        needs,
        kernel,
        chunk,
    ):
        d_loss_N = d_loss_N.masked_fill(target_N == NOT_COUNTED, 0.0)
        # Divided by a power of two, factors are at most 1, which 16 bits can represent.
        scale = torch.exp2(torch.frexp(d_loss_N.abs().amax() if len(d_loss_N) else d_loss_N.new_ones(())).exponent)
        scale = scale.to(d_loss_N.dtype)
        tensors = hidden_ND, linear_weight_VD, bias_V, weight_V, target_N, z_loss, d_loss_N / scale
        _, d_hidden_ND, d_weight_VD, d_bias_V = chunked_losses(*tensors, label_smoothing, softcap, dtype, *needs, kernel, chunk)
        if needs[0]:
            d_hidden_ND = d_hidden_ND * d_loss_N.unsqueeze(1)
        d_weight_VD, d_bias_V = d_weight_VD * scale, d_bias_V * scale
        dtypes = hidden_ND.dtype, linear_weight_VD.dtype, None if bias_V is None else bias_V.dtype
        return tuple(t.to(d) for t, d in zip((d_hidden_ND, d_weight_VD, d_bias_V), dtypes, strict=True))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *d_gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_second(d_gradients)
        return (None,) * 13


def refuse_second(d_gradients: tuple[Tensor | None, ...]) -> None:
    if any(d is not None for d in d_gradients):
        raise RuntimeError("linear_cross_entropy by chunks has no second derivatives: use impl='reference'")


@taken_whole
def chunked_cross_entropy(
    hidden_ND: Tensor, linear_weight_VD: Tensor, bias_V: Tensor | None, weight_V: Tensor | None, target_N: Tensor,
    z_loss: Tensor | None, label_smoothing: float, softcap: float | None, dtype: torch.dtype, kernel: bool, chunk: int | None,
    divisor: Tensor, empty: Tensor | None, summed: bool,
) -> Tensor:  # fmt: skip
    """The [N] losses, or their sum if `summed`, over `divisor`; the sum is NaN without a gradient if `empty`."""
    needs = differentiated(hidden_ND), differentiated(linear_weight_VD), bias_V is not None and differentiated(bias_V)
    tensors = hidden_ND, linear_weight_VD, bias_V, weight_V, target_N, z_loss
    options = label_smoothing, softcap, dtype, needs, kernel, chunk
    if summed:
        return apply(SumOfLosses, *tensors, divisor, empty, *options)[0]
    return apply(Losses, *tensors, *options) / divisor
