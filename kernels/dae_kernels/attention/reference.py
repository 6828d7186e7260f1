"""Attention as its formula says, with the mask and the [Lq, Lk] weights spelled out: the definition."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor


def causal_mask(num_queries: int, num_keys: int, device: torch.device) -> Tensor:
    """[Lq, Lk] bool, True where query i may see key j: j <= i + Lk - Lq (aligned at the last query and the last key)."""
    query = torch.arange(num_queries, device=device)[:, None]
    key = torch.arange(num_keys, device=device)[None, :]
    return key <= query + (num_keys - num_queries)


def attention_reference(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> Tensor:
    """softmax(scale q k^T + mask) v, in float32 (float64 for float64 operands), returned in the dtype of `q`."""
    wide = torch.promote_types(q.dtype, torch.float32)
    groups = q.shape[1] // k.shape[1]
    known = torch.amp.is_autocast_available(q.device.type)  # not for meta tensors
    with torch.autocast(q.device.type, enabled=False) if known else nullcontext():
        k = k.to(wide).repeat_interleave(groups, dim=1)
        v = v.to(wide).repeat_interleave(groups, dim=1)
        scores_BHQK = scale * (q.to(wide) @ k.transpose(-2, -1))
        if causal:
            scores_BHQK = scores_BHQK.masked_fill(~causal_mask(q.shape[2], k.shape[2], q.device), -torch.inf)
        return (scores_BHQK.softmax(dim=-1) @ v).to(q.dtype)
