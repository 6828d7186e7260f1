"""`torch.nn.attention.flex_attention`, which skips fully masked blocks.

On CUDA it runs compiled, with or without a compiled caller. On CPUs torch has only the forward pass, which runs unfused here:
compilation would take seconds, and fails (torch 2.13, NoValidChoicesError) on a mask created in the same graph.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from dae_kernels.attention.checks import check_device_and_dtype, check_head_dimension, check_unbatched, recorded
from dae_kernels.attention.options import AttentionOptions, refuse
from dae_kernels.attention.packing import Packing, documents


def dense(q: Tensor, k: Tensor, v: Tensor, key_lengths: Tensor | None, bias: Tensor | None, options: AttentionOptions) -> Tensor:
    check(q, k, v, key_lengths, bias, dropout=options.dropout)
    B, H, num_queries, num_keys = *q.shape[:3], k.shape[2]
    seen = None
    # Tensors, not numbers: a number captured by the mask would be compiled in.
    if options.by_position:
        last = key_lengths if key_lengths is not None else torch.full((B,), num_keys, device=q.device)
        shift_B = last - num_queries
        if key_lengths is None or options.after == 0:  # the last query is at the last key, so no masked key precedes it
            seen = lambda b, h, i, j: options.sees(j - i - shift_B[b])  # noqa: E731
        else:
            seen = lambda b, h, i, j: options.sees(j - i - shift_B[b]) & (j < key_lengths[b])  # noqa: E731
    elif key_lengths is not None:
        seen = lambda b, h, i, j: j < key_lengths[b]  # noqa: E731
    return call(q, k, v, seen, None if bias is None else bias.expand(B, H, num_queries, num_keys), options)


def packed(q: Tensor, k: Tensor, v: Tensor, packing: Packing, options: AttentionOptions) -> Tensor:
    check(q, k, v, packing.cu_seqlens_q, packing.cu_seqlens_k, dropout=options.dropout)
    document_q, left_q = documents(packing.cu_seqlens_q, q.shape[0])
    document_k, left_k = documents(packing.cu_seqlens_k, k.shape[0])
    if options.by_position:
        seen = lambda b, h, i, j: (document_q[i] == document_k[j]) & options.sees(left_q[i] - left_k[j])  # noqa: E731
    else:
        seen = lambda b, h, i, j: document_q[i] == document_k[j]  # noqa: E731
    q_1HTD, k_1HTD, v_1HTD = (x.transpose(0, 1)[None] for x in (q, k, v))
    return call(q_1HTD, k_1HTD, v_1HTD, seen, None, options)[0].transpose(0, 1)


def score_change(bias_BHQK: Tensor | None, softcap: float) -> Callable | None:
    """The `score_mod` of flex_attention for a bias and a soft cap."""
    if bias_BHQK is None and not softcap:
        return None

    def change(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        if softcap:
            score = softcap * torch.tanh(score / softcap)
        return score if bias_BHQK is None else score + bias_BHQK[b, h, i, j]

    return change


def check(q: Tensor, k: Tensor, v: Tensor, *others: Tensor | None, dropout: float) -> None:
    refuse("flex", "sdpa", dropout=dropout)
    check_unbatched("flex", "tensors", q, k, v, *others)
    check_device_and_dtype("flex", q, (torch.float16, torch.bfloat16, torch.float32), ("cuda", "cpu"))
    if q.device.type == "cuda":
        check_head_dimension("flex", q.shape[-1], minimum=16)
    elif recorded(q, k, v, *(x for x in others if x is not None)):
        raise ValueError("impl='flex' has no backward pass on CPUs (torch has none); use torch.no_grad(), or impl='sdpa'")


def call(q: Tensor, k: Tensor, v: Tensor, seen: Callable | None, bias: Tensor | None, options: AttentionOptions) -> Tensor:
    if q.numel() == 0 or v.numel() == 0:
        return q.new_empty(*q.shape[:3], v.shape[3])
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention  # here, because it imports triton

    tracing = torch.compiler.is_compiling()
    if q.device.type == "cpu" and tracing and seen is not None:
        raise ValueError("impl='flex' with a mask does not compile on CPUs (torch's kernel there fails); use impl='sdpa'")
    if q.device.type == "cuda" and not tracing:
        create_block_mask, flex_attention = compiled(create_block_mask), compiled(flex_attention)
    block_mask = None
    if seen is not None:
        block_mask = create_block_mask(seen, q.shape[0], None, q.shape[2], k.shape[2], device=q.device)
    rule = {"block_mask": block_mask, "scale": options.scale, "enable_gqa": q.shape[1] != k.shape[1]}
    attend = functools.partial(flex_attention, score_mod=score_change(bias, options.softcap), **rule)
    if q.device.type == "cuda":
        return attend(q, k, v)
    q, k, v = q.detach(), k.detach(), v.detach()  # it refuses tensors that require a gradient even if none is recorded
    if tracing:
        return attend(q, k, v)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # about the unfused form
        return attend(q, k, v)


@functools.cache
def compiled(function: Callable) -> Callable:
    return torch.compile(function, fullgraph=True)
