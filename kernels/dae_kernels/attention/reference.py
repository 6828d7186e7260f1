"""Attention by its formula, with an explicit mask and [Lq, Lk] weights: the definition."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dae_kernels.attention.options import AttentionOptions
from dae_kernels.attention.packing import Packing, documents
from dae_kernels.tracing import without_autocast


def position_mask(num_queries: int, num_keys: int, options: AttentionOptions, device: torch.device) -> Tensor | None:
    """[Lq, Lk] bool, True where query i attends to key j, at distance j - (i + Lk - Lq); None if nothing is masked."""
    if not options.by_position:
        return None
    query = torch.arange(num_queries, device=device)[:, None]
    key = torch.arange(num_keys, device=device)[None, :]
    return options.sees(key - query - (num_keys - num_queries))


def length_mask(key_lengths_B: Tensor, num_queries: int, num_keys: int, options: AttentionOptions) -> Tensor:
    """[B, 1, Lq or 1, Lk] bool: key j is attended to if j < length; its distance is j - (i + length - Lq)."""
    key = torch.arange(num_keys, device=key_lengths_B.device)
    length = key_lengths_B[:, None, None, None]
    mask = key < length
    if not options.by_position:
        return mask
    query = torch.arange(num_queries, device=key_lengths_B.device)[:, None]
    return mask & options.sees(key - query - (length - num_queries))


def document_mask(packing: Packing, num_queries: int, num_keys: int, options: AttentionOptions) -> Tensor:
    """[Tq, Tk] bool: queries attend to keys of their own sequence, with positions aligned at the ends of both."""
    document_q, left_q = documents(packing.cu_seqlens_q, num_queries)
    document_k, left_k = documents(packing.cu_seqlens_k, num_keys)
    mask = document_q[:, None] == document_k
    return mask & options.sees(left_q[:, None] - left_k) if options.by_position else mask


def masked_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, bias: Tensor | None, options: AttentionOptions
) -> Tensor:
    """dropout(softmax(cap(scale q k^T) + bias, over the keys of the mask)) v in float32 or float64, returned as `q`'s dtype."""
    wide = torch.promote_types(q.dtype, torch.float32)
    groups = q.shape[1] // k.shape[1]
    with without_autocast(q.device):
        k = k.to(wide).repeat_interleave(groups, dim=1)
        v = v.to(wide).repeat_interleave(groups, dim=1)
        scores_BHQK = options.scale * (q.to(wide) @ k.transpose(-2, -1))
        if options.softcap:
            scores_BHQK = options.softcap * torch.tanh(scores_BHQK / options.softcap)
        if bias is not None:
            scores_BHQK = scores_BHQK + bias.to(wide)
        if mask is not None:
            scores_BHQK = scores_BHQK.masked_fill(~mask, -torch.inf)
        weights_BHQK = scores_BHQK.softmax(dim=-1)
        if options.dropout:
            weights_BHQK = F.dropout(weights_BHQK, options.dropout)
        return (weights_BHQK @ v).to(q.dtype)


def dense(q: Tensor, k: Tensor, v: Tensor, key_lengths: Tensor | None, bias: Tensor | None, options: AttentionOptions) -> Tensor:
    mask: Tensor | None
    if key_lengths is not None:
        mask = length_mask(key_lengths, q.shape[2], k.shape[2], options)
    else:
        mask = position_mask(q.shape[2], k.shape[2], options, q.device)
    return masked_attention(q, k, v, mask, bias, options)


def packed(q: Tensor, k: Tensor, v: Tensor, packing: Packing, options: AttentionOptions) -> Tensor:
    """Attention per sequence; in a compiled graph, which must not depend on lengths, all at once with one mask."""
    q_1HTD, k_1HTD, v_1HTD = (x.transpose(0, 1)[None] for x in (q, k, v))
    if packing.lengths is None:
        mask = document_mask(packing, q.shape[0], k.shape[0], options)
        return masked_attention(q_1HTD, k_1HTD, v_1HTD, mask, None, options)[0].transpose(0, 1)
    pieces, start_q, start_k = [q_1HTD.new_empty(1, q.shape[1], 0, v.shape[2])], 0, 0
    for num_queries, num_keys in packing.lengths:
        q_i = q_1HTD[:, :, start_q : start_q + num_queries]
        k_i, v_i = (x[:, :, start_k : start_k + num_keys] for x in (k_1HTD, v_1HTD))
        pieces.append(dense(q_i, k_i, v_i, None, None, options))
        start_q, start_k = start_q + num_queries, start_k + num_keys
    return torch.cat(pieces, dim=2)[0].transpose(0, 1)
