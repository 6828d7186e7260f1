"""The gradient of the fused kernels of `lpips`."""

from __future__ import annotations

import torch
from torch import Tensor

from dae_kernels.dispatch import apply, taken_whole


@taken_whole
def lpips_fused(a: Tensor, b: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    return apply(LPIPS, a, b, weight, eps)


class LPIPS(torch.autograd.Function):
    """The kernels with their gradient; `register_autograd` does not support torch.func."""

    generate_vmap_rule = True

    @staticmethod
    def forward(a, b, weight, eps):
        from dae_kernels.lpips.fused import lpips_forward

        return lpips_forward(a, b, weight, eps)

    @staticmethod
    def setup_context(ctx, inputs, output):
        a, b, weight, ctx.eps = inputs
        ctx.save_for_backward(a, b, weight)

    @staticmethod
    def backward(ctx, d_out):
        wants = ctx.needs_input_grad[:3]
        a, b, weight = ctx.saved_tensors
        gradients = apply(LPIPSBackward, d_out, a, b, weight, ctx.eps, *wants)
        da, db, d_weight = (gradient if wanted else None for gradient, wanted in zip(gradients, wants, strict=True))
        return da, db, None if d_weight is None else d_weight.to(weight.dtype), None


class LPIPSBackward(torch.autograd.Function):
    """The backward kernel; a second derivative raises."""

    generate_vmap_rule = True

    @staticmethod
    def forward(d_out, a, b, weight, eps, wants_a, wants_b, wants_weight):
        from dae_kernels.lpips.fused import lpips_backward

        return lpips_backward(d_out, a, b, weight, eps, wants_a, wants_b, wants_weight)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError("lpips's kernels have no second derivatives: use impl='reference'")
