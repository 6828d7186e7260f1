"""GroupNorm and SiLU in eager torch: the definition."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dae_kernels.group_norm_silu.autograd import input_in_graph
from dae_kernels.tracing import without_autocast


def group_norm_silu_reference(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    silu: bool,
    scale_BC: Tensor | None,
    shift_BC: Tensor | None,
) -> Tensor:
    """act(group_norm(x) * (1 + scale) + shift) in float32 (float64 for float64 `x`), in the dtype and layout of `x`."""
    wide = torch.promote_types(x.dtype, torch.float32)
    with without_autocast(x.device):
        weight, bias = (None if parameter is None else parameter.to(wide) for parameter in (weight, bias))
        if weight is None and bias is not None:  # torch has no backward for a bias alone if x is empty
            weight = torch.ones_like(bias, requires_grad=False)
        x_ = x.to(wide)
        if x.device.type == "cpu" and not x_.is_contiguous():
            x_ = input_in_graph(x_, weight, bias)
        if x.numel():
            y = F.group_norm(x_, num_groups, weight, bias, eps)
        else:  # torch 2.14 refuses images without pixels; there is no value, but the parameters' gradients are 0
            y = x_ if weight is None else x_ * weight.view(-1, *[1] * (x.dim() - 2))
            y = y if bias is None else y + bias.view(-1, *[1] * (x.dim() - 2))
        if scale_BC is not None and shift_BC is not None:
            per_channel = (*scale_BC.shape, *[1] * (x.dim() - 2))
            y = y * (1 + scale_BC.to(wide).view(per_channel)) + shift_BC.to(wide).view(per_channel)
        y = F.silu(y) if silu else y
        y = y.to(x.dtype)
    # CUDA's GroupNorm returns a contiguous tensor for every input layout.
    return y if y.stride() == x.stride() else torch.empty_like(x).copy_(y)
