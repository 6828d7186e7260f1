"""Packed sequences of several lengths, and helpers shared by back-ends."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dae_kernels.tracing import values_readable


@dataclass(frozen=True)
class Packing:
    """Boundaries of N sequences in q [Tq, H, D] and k, v [Tk, Hkv, D].

    Args:
        cu_seqlens_q, cu_seqlens_k: [N + 1] int32 boundaries, from 0 to Tq and Tk.
        lengths: numbers of queries and keys per sequence, or None if the boundaries are traced and so unknown on the host.
        max_seqlen_q, max_seqlen_k: upper bounds of the lengths; the maxima if known.
    """

    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    lengths: tuple[tuple[int, int], ...] | None
    max_seqlen_q: int
    max_seqlen_k: int


def documents(cu_seqlens: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """Per row of `total`: the index of its sequence, and the number of rows to that sequence's end, itself included."""
    row = torch.arange(total, device=cu_seqlens.device)
    document = torch.searchsorted(cu_seqlens[1:], row.to(cu_seqlens.dtype), right=True)
    return document, cu_seqlens[1:][document] - row


def whole_lengths(batch: int, num_queries: int, device: torch.device) -> Tensor:
    """[B + 1] int32 boundaries of B sequences of equal length."""
    return torch.arange(batch + 1, device=device, dtype=torch.int32) * num_queries


def pack_keys(q_BLHD: Tensor, k_BLHD: Tensor, v_BLHD: Tensor, key_lengths_B: Tensor) -> tuple[Tensor, Tensor, Tensor, Packing]:
    """A right-padded batch as packed sequences without the padding, whose gradient is 0."""
    B, num_queries, num_keys = *q_BLHD.shape[:2], k_BLHD.shape[1]
    valid = torch.arange(num_keys, device=k_BLHD.device) < key_lengths_B[:, None]
    borders_k = F.pad(key_lengths_B.cumsum(0), (1, 0)).to(torch.int32)
    lengths = None
    if values_readable(key_lengths_B):
        lengths = tuple((num_queries, length) for length in key_lengths_B.tolist())
    packing = Packing(whole_lengths(B, num_queries, q_BLHD.device), borders_k, lengths, num_queries, num_keys)
    return q_BLHD.flatten(0, 1), k_BLHD[valid], v_BLHD[valid], packing


def padded_heads(x: Tensor, size: int) -> Tensor:
    """`x` [..., D] zero-padded to `size` entries per head, which changes no score, and contiguous in the last dimension."""
    if x.shape[-1] != size:
        return F.pad(x, (0, size - x.shape[-1]))
    return x if x.stride(-1) == 1 else x.contiguous()
