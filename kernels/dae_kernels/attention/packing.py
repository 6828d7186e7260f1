"""Packed sequences of several lengths, and what several back-ends need for them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dae_kernels.attention.checks import readable


@dataclass(frozen=True)
class Packing:
    """Where N sequences lie in q [Tq, H, D] and k, v [Tk, Hkv, D].

    Args:
        cu_seqlens_q, cu_seqlens_k: [N + 1] int32, the borders, from 0 to Tq and Tk.
        lengths: numbers of queries and of keys of each sequence, or None where the borders are not known on the host,
            which is where they are traced.
        max_seqlen_q, max_seqlen_k: upper bounds of the lengths; the greatest ones where they are known.
    """

    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    lengths: tuple[tuple[int, int], ...] | None
    max_seqlen_q: int
    max_seqlen_k: int


def documents(cu_seqlens: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """Of each of `total` rows: the sequence that it lies in, and how many rows of that sequence follow it, plus one."""
    row = torch.arange(total, device=cu_seqlens.device)
    document = torch.searchsorted(cu_seqlens[1:], row.to(cu_seqlens.dtype), right=True)
    return document, cu_seqlens[1:][document] - row


def whole_lengths(batch: int, num_queries: int, device: torch.device) -> Tensor:
    """[B + 1] int32 borders of B sequences of one length."""
    return torch.arange(batch + 1, device=device, dtype=torch.int32) * num_queries


def pack_keys(q_BLHD: Tensor, k_BLHD: Tensor, v_BLHD: Tensor, key_lengths_B: Tensor) -> tuple[Tensor, Tensor, Tensor, Packing]:
    """A right-padded batch as packed sequences without the padding; the gradient of what is left out is 0."""
    B, num_queries, num_keys = *q_BLHD.shape[:2], k_BLHD.shape[1]
    valid = torch.arange(num_keys, device=k_BLHD.device) < key_lengths_B[:, None]
    borders_k = F.pad(key_lengths_B.cumsum(0), (1, 0)).to(torch.int32)
    lengths = None
    if readable(key_lengths_B):
        lengths = tuple((num_queries, length) for length in key_lengths_B.tolist())
    packing = Packing(whole_lengths(B, num_queries, q_BLHD.device), borders_k, lengths, num_queries, num_keys)
    return q_BLHD.flatten(0, 1), k_BLHD[valid], v_BLHD[valid], packing


def padded_heads(x: Tensor, size: int) -> Tensor:
    """`x` [..., D] with zeros up to `size` entries per head, which change no score, and with its entries side by side."""
    if x.shape[-1] != size:
        return F.pad(x, (0, size - x.shape[-1]))
    return x if x.stride(-1) == 1 else x.contiguous()
