"""The fused back-ends, brought to one layout and one causal convention. Third-party packages are imported where they run."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dae_kernels.attention.reference import causal_mask

FUSED_DEVICES = ("cuda",)  # where flash-attn and xformers run; the tests of their adapters add "cpu"


def sdpa(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> Tensor:
    """`torch.nn.functional.scaled_dot_product_attention`.

    Its `is_causal` is aligned top-left, so it serves only where Lq == Lk. A single query sees every key and needs no mask.
    Otherwise the bias class of torch carries the alignment to the flash and the memory-efficient kernel; Dynamo cannot
    build that class inside a graph, so under torch.compile the mask is a [Lq, Lk] bool tensor.
    """
    num_queries, num_keys = q.shape[2], k.shape[2]
    mask, is_causal = None, False
    if causal and num_queries == num_keys:
        is_causal = True
    elif causal and num_queries != 1:
        if torch.compiler.is_compiling():
            mask = causal_mask(num_queries, num_keys, q.device)
        else:
            from torch.nn.attention.bias import causal_lower_right  # here, because this module of torch imports triton

            mask = causal_lower_right(num_queries, num_keys)
    grouped = False
    if q.shape[1] != k.shape[1]:  # a branch, because a graph of dynamic shapes must settle it
        grouped = True
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal, scale=scale, enable_gqa=grouped)


def flash_attn(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> Tensor:
    """flash-attn 2 (>= 2.1, whose causal mask is aligned bottom-right); takes grouped heads as they are."""
    check_operands("flash_attn", q, (torch.float16, torch.bfloat16))
    if q.shape[3] > 256:
        raise ValueError(f"impl='flash_attn' takes head dimensions up to 256, got {q.shape[3]}; use impl='sdpa'")
    try:
        from flash_attn import flash_attn_func
    except ImportError as error:
        raise ImportError(missing("flash_attn", "flash-attn")) from error
    out_BLHD = flash_attn_func(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), softmax_scale=scale, causal=causal)
    return out_BLHD.transpose(1, 2)


def xformers(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> Tensor:
    """`xformers.ops.memory_efficient_attention`.

    Grouped keys and values are repeated: its own grouped layout has no backward in every kernel.
    """
    check_operands("xformers", q, (torch.float16, torch.bfloat16, torch.float32))
    try:
        from xformers.ops import memory_efficient_attention
        from xformers.ops.fmha.attn_bias import LowerTriangularFromBottomRightMask, LowerTriangularMask
    except ImportError as error:
        raise ImportError(missing("xformers", "xformers with its fused attention")) from error
    groups = q.shape[1] // k.shape[1]
    q_BLHD = q.transpose(1, 2)
    k_BLHD = k.transpose(1, 2).repeat_interleave(groups, dim=2)
    v_BLHD = v.transpose(1, 2).repeat_interleave(groups, dim=2)
    bias = None
    if causal:
        bias = LowerTriangularMask() if q.shape[2] == k.shape[2] else LowerTriangularFromBottomRightMask()
    return memory_efficient_attention(q_BLHD, k_BLHD, v_BLHD, attn_bias=bias, scale=scale).transpose(1, 2)


def check_operands(impl: str, q: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    """ValueError if the package behind `impl` does not take the device or the dtype of `q`."""
    if q.device.type not in FUSED_DEVICES:
        raise ValueError(f"impl={impl!r} needs CUDA tensors, got {q.device}; use impl='auto'")
    if q.dtype not in dtypes:
        raise ValueError(f"impl={impl!r} takes {', '.join(map(str, dtypes))}, got {q.dtype}; cast, or use impl='auto'")


def missing(impl: str, package: str) -> str:
    return f"impl={impl!r} needs {package}: pip install \"decoupled-autoencoder[gpu]\", or use impl='auto'"
