"""Attention as its formula says, with the mask and the [Lq, Lk] weights spelled out: the definition."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor

from dae_kernels.attention.packing import Packing, documents


def causal_mask(num_queries: int, num_keys: int, device: torch.device) -> Tensor:
    """[Lq, Lk] bool, True where query i may see key j: j <= i + Lk - Lq (aligned at the last query and the last key)."""
    query = torch.arange(num_queries, device=device)[:, None]
    key = torch.arange(num_keys, device=device)[None, :]
    return key <= query + (num_keys - num_queries)


def length_mask(key_lengths_B: Tensor, num_queries: int, num_keys: int, causal: bool) -> Tensor:
    """[B, 1, Lq or 1, Lk] bool: key j is seen if j < length, and by query i if also j <= i + length - Lq."""
    key = torch.arange(num_keys, device=key_lengths_B.device)
    length = key_lengths_B[:, None, None, None]
    if not causal:
        return key < length
    query = torch.arange(num_queries, device=key_lengths_B.device)[:, None]
    return key <= query + (length - num_queries)  # which is below the length, as query < Lq


def document_mask(packing: Packing, num_queries: int, num_keys: int, causal: bool) -> Tensor:
    """[Tq, Tk] bool: a query sees the keys of its own sequence, the causal mask aligned at the ends of both."""
    document_q, left_q = documents(packing.cu_seqlens_q, num_queries)
    document_k, left_k = documents(packing.cu_seqlens_k, num_keys)
    mask = document_q[:, None] == document_k
    return mask & (left_k >= left_q[:, None]) if causal else mask


def masked_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """softmax(scale q k^T + mask) v, in float32 (float64 for float64 operands), returned in the dtype of `q`."""
    wide = torch.promote_types(q.dtype, torch.float32)
    groups = q.shape[1] // k.shape[1]
    known = torch.amp.is_autocast_available(q.device.type)  # not for meta tensors
    with torch.autocast(q.device.type, enabled=False) if known else nullcontext():
        k = k.to(wide).repeat_interleave(groups, dim=1)
        v = v.to(wide).repeat_interleave(groups, dim=1)
        scores_BHQK = scale * (q.to(wide) @ k.transpose(-2, -1))
        if mask is not None:
            scores_BHQK = scores_BHQK.masked_fill(~mask, -torch.inf)
        return (scores_BHQK.softmax(dim=-1) @ v).to(q.dtype)


def dense(q: Tensor, k: Tensor, v: Tensor, key_lengths: Tensor | None, causal: bool, scale: float) -> Tensor:
    mask = None
    if key_lengths is not None:
        mask = length_mask(key_lengths, q.shape[2], k.shape[2], causal)
    elif causal:
        mask = causal_mask(q.shape[2], k.shape[2], q.device)
    return masked_attention(q, k, v, mask, scale)


def packed(q: Tensor, k: Tensor, v: Tensor, packing: Packing, causal: bool, scale: float) -> Tensor:
    """One sequence after another; in a compiled graph, which must not depend on lengths, all at once under one mask."""
    q_1HTD, k_1HTD, v_1HTD = (x.transpose(0, 1)[None] for x in (q, k, v))
    if packing.lengths is None:
        mask = document_mask(packing, q.shape[0], k.shape[0], causal)
        return masked_attention(q_1HTD, k_1HTD, v_1HTD, mask, scale)[0].transpose(0, 1)
    pieces, start_q, start_k = [q_1HTD[:, :, :0]], 0, 0
    for num_queries, num_keys in packing.lengths:
        q_i = q_1HTD[:, :, start_q : start_q + num_queries]
        k_i, v_i = (x[:, :, start_k : start_k + num_keys] for x in (k_1HTD, v_1HTD))
        pieces.append(dense(q_i, k_i, v_i, None, causal, scale))
        start_q, start_k = start_q + num_queries, start_k + num_keys
    return torch.cat(pieces, dim=2)[0].transpose(0, 1)
