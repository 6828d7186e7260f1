"""`torch.nn.functional.scaled_dot_product_attention`."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from dae_kernels.attention.options import AttentionOptions, refuse
from dae_kernels.attention.packing import Packing
from dae_kernels.attention.reference import document_mask, length_mask, position_mask


def dense(q: Tensor, k: Tensor, v: Tensor, key_lengths: Tensor | None, bias: Tensor | None, options: AttentionOptions) -> Tensor:
    """SDPA; its `is_causal` is aligned top-left, so it is used only if Lq == Lk. A single query needs no causal mask.

    Otherwise the mask is a [Lq, Lk] bool tensor. torch's own bias class would avoid it in the flash kernel, but is a subclass of
    Tensor, which neither Dynamo nor a dispatch mode (fake tensors, counting, selective checkpointing) can build; for long keys
    on CUDA there is impl="flash_attn". Key lengths are a mask [B, 1, 1, Lk], or [B, 1, Lq, Lk] with a positional mask.
    """
    refuse("sdpa", "flex", soft_cap=options.softcap)
    num_queries, num_keys = q.shape[2], k.shape[2]
    if options.causal and options.before is None and num_queries == 1:
        options = replace(options, causal=False, window=None)
    mask, is_causal = None, False
    if key_lengths is not None:
        mask = length_mask(key_lengths, num_queries, num_keys, options)
    elif options.causal and options.before is None and num_queries == num_keys and bias is None:
        is_causal = True
    else:
        mask = position_mask(num_queries, num_keys, options, q.device)
    if bias is not None:
        mask = bias if mask is None else bias.masked_fill(~mask, -torch.inf)
    return call(q, k, v, mask, is_causal, options)


def call(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, options: AttentionOptions) -> Tensor:
    grouped = False
    if q.shape[1] != k.shape[1]:  # a branch, because a graph with dynamic shapes must resolve it
        grouped = True
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, dropout_p=options.dropout, is_causal=is_causal, scale=options.scale, enable_gqa=grouped
    )


def packed(q: Tensor, k: Tensor, v: Tensor, packing: Packing, options: AttentionOptions) -> Tensor:
    """One call per group of sequences with equal lengths; in a compiled graph one call with a [Tq, Tk] mask.

    On a CPU, 8 sequences of 32 to 512 (float32, H = 4, D = 64, causal, forward and backward) took 148 ms one by one, 376 ms
    padded to the longest and 931 ms with a [T, T] mask; 500 sequences of length 5 took 299, 102 and 1114 ms. Calls by length
    get the better of the first two. Nested tensors do not support a causal mask there.
    """
    if packing.lengths is None:
        refuse("sdpa", "flex", soft_cap=options.softcap)
        mask = document_mask(packing, q.shape[0], k.shape[0], options)
        q_1HTD, k_1HTD, v_1HTD = (x.transpose(0, 1)[None] for x in (q, k, v))
        return call(q_1HTD, k_1HTD, v_1HTD, mask, False, options)[0].transpose(0, 1)
    by_lengths: dict[tuple[int, int], list[tuple[int, int]]] = {}
    start_q = start_k = 0
    for num_queries, num_keys in packing.lengths:
        by_lengths.setdefault((num_queries, num_keys), []).append((start_q, start_k))
        start_q, start_k = start_q + num_queries, start_k + num_keys
    rows, pieces = [], [q.new_empty(0, q.shape[1], v.shape[2])]
    for (num_queries, num_keys), starts in by_lengths.items():
        starts_q, starts_k = torch.tensor(starts, device=q.device).unbind(1)
        rows_q = (starts_q[:, None] + torch.arange(num_queries, device=q.device)).flatten()
        rows_k = (starts_k[:, None] + torch.arange(num_keys, device=q.device)).flatten()
        q_BHLD = q.index_select(0, rows_q).unflatten(0, (len(starts), num_queries)).transpose(1, 2)
        k_BHLD, v_BHLD = (x.index_select(0, rows_k).unflatten(0, (len(starts), num_keys)).transpose(1, 2) for x in (k, v))
        out = dense(q_BHLD, k_BHLD, v_BHLD, None, None, options)
        rows.append(rows_q)
        pieces.append(out.transpose(1, 2).flatten(0, 1))
    if not rows:
        return pieces[0]
    order = torch.cat(rows).argsort()
    return torch.cat(pieces).index_select(0, order)
