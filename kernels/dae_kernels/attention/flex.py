"""`torch.nn.attention.flex_attention`, which skips the blocks that a mask hides.

On CUDA it runs compiled, with or without a compiled caller. On CPUs torch has its forward pass only, which runs in its unfused
form: compilation would take seconds, and fails (torch 2.13, NoValidChoicesError) on a mask that is made in the same graph.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from dae_kernels.attention.checks import check_head_dimension, check_operands, check_unbatched, recorded
from dae_kernels.attention.packing import Packing, documents


def dense(q: Tensor, k: Tensor, v: Tensor, key_lengths: Tensor | None, causal: bool, scale: float) -> Tensor:
    check(q, k, v, key_lengths)
    num_queries, num_keys = q.shape[2], k.shape[2]
    seen = None
    # Tensors, not numbers: a number captured by the mask would be compiled in.
    if causal:
        last = key_lengths if key_lengths is not None else torch.full(q.shape[:1], num_keys, device=q.device)
        shift_B = last - num_queries
        seen = lambda b, h, i, j: j <= i + shift_B[b]  # noqa: E731
    elif key_lengths is not None:
        seen = lambda b, h, i, j: j < key_lengths[b]  # noqa: E731
    return call(q, k, v, seen, scale)


def packed(q: Tensor, k: Tensor, v: Tensor, packing: Packing, causal: bool, scale: float) -> Tensor:
    check(q, k, v, packing.cu_seqlens_q, packing.cu_seqlens_k)
    document_q, left_q = documents(packing.cu_seqlens_q, q.shape[0])
    document_k, left_k = documents(packing.cu_seqlens_k, k.shape[0])
    if causal:
        seen = lambda b, h, i, j: (document_q[i] == document_k[j]) & (left_k[j] >= left_q[i])  # noqa: E731
    else:
        seen = lambda b, h, i, j: document_q[i] == document_k[j]  # noqa: E731
    out = call(*(x.transpose(0, 1)[None] for x in (q, k, v)), seen, scale)
    return out[0].transpose(0, 1)


def check(q: Tensor, k: Tensor, v: Tensor, *lengths: Tensor | None) -> None:
    check_unbatched("flex", "tensors", q, k, v, *lengths)
    check_operands("flex", q, (torch.float16, torch.bfloat16, torch.float32), ("cuda", "cpu"))
    if q.device.type == "cuda":
        check_head_dimension("flex", q.shape[-1], least=16)
    elif recorded(q, k, v):
        raise ValueError("impl='flex' has no backward pass on CPUs (torch has none); use torch.no_grad(), or impl='sdpa'")


def call(q: Tensor, k: Tensor, v: Tensor, seen: Callable | None, scale: float) -> Tensor:
    if q.numel() == 0:
        return q.clone()
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention  # here, because it imports triton

    tracing = torch.compiler.is_compiling()
    if q.device.type == "cpu" and tracing and seen is not None:
        raise ValueError("impl='flex' with a mask does not compile on CPUs (torch's kernel there fails); use impl='sdpa'")
    if q.device.type == "cuda" and not tracing:
        create_block_mask, flex_attention = compiled(create_block_mask), compiled(flex_attention)
    block_mask = None
    if seen is not None:
        block_mask = create_block_mask(seen, q.shape[0], None, q.shape[2], k.shape[2], device=q.device)
    attend = functools.partial(flex_attention, block_mask=block_mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    if q.device.type == "cuda":
        return attend(q, k, v)
    q, k, v = q.detach(), k.detach(), v.detach()  # it refuses what requires a gradient even where none is recorded
    if tracing:
        return attend(q, k, v)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that this is the unfused form
        return attend(q, k, v)


@functools.cache
def compiled(function: Callable) -> Callable:
    return torch.compile(function, fullgraph=True)
