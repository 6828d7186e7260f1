"""`attention` and `attention_varlen`: checks and dispatch."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dae_kernels.attention import flash, flex, memory_efficient, reference, sdpa
from dae_kernels.attention.checks import (
    autocast,
    check_integers,
    check_key_lengths,
    check_tensors,
    check_types,
    sequence_lengths,
)
from dae_kernels.attention.packing import Packing
from dae_kernels.dispatch import check_choice

BACKENDS = {
    "auto": sdpa,
    "sdpa": sdpa,
    "flash_attn": flash,
    "xformers": memory_efficient,
    "flex": flex,
    "reference": reference,
}


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    key_lengths: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """Softmax attention, with grouped queries and a causal mask that suits key-value caches.

        out[b, h, i] = sum_j softmax_j(scale * q[b, h, i] . k[b, g, j] + mask[b, i, j]) v[b, g, j],   g = h // (H / Hkv)

    The causal mask is aligned bottom-right on every back-end: query i sees the keys j <= i + Lk - Lq, so the last query
    sees all of them, as when Lq new tokens are appended to a cache. With `key_lengths` the keys at and beyond the length are
    hidden, and the last query sits at the last key before it: j <= i + key_lengths[b] - Lq. Under autocast the operands are
    first cast to autocast's dtype on every back-end, as torch does for its own.

    Args:
        q: [B, H, Lq, D], floating.
        k: [B, Hkv, Lk, D] with Lk >= 1; Hkv divides H.
        v: [B, Hkv, Lk, D].
        causal: hide the keys after the query; needs Lq <= Lk, and Lq <= key_lengths.
        scale: factor of the scores, 1 / sqrt(D) if None.
        key_lengths: [B] int32 or int64 from 1 to Lk, of a static cache or a right-padded batch; hidden keys and values must be
            finite. The range is checked by reading them, which on a GPU waits for it; not in a compiled graph nor where
            torch.vmap batches them, which "auto", "sdpa" and "reference" take and the others refuse.
        impl: "auto" is "sdpa" for now, on every device; "sdpa" and "flex" (torch), "flash_attn"
            (generation 4, 3 or 2, the newest that is installed for the device) and "xformers" (both CUDA only) and
            "reference" (plain float32 math, [Lq, Lk] memory) are obeyed or refused. "flex" refuses operands that torch.vmap
            batches, and on CPUs has no backward and refuses `causal` and `key_lengths` in a graph of torch.compile. "sdpa" on
            CPUs may lose a NaN: torch's kernel there makes finite numbers of a query with NaN over few keys without a mask
            (seen below 16 in float32, torch 2.13), where "reference" and "flex" return NaN.

    Returns:
        [B, H, Lq, D] in the dtype of the operands; differentiable with respect to q, k and v.

    Raises:
        ValueError: shapes, dtypes or devices disagree; causal with Lq > Lk; lengths out of range; `impl` is unknown or does
            not take these operands.
        TypeError: the operands are no floating point tensors, the lengths no integers, causal no bool or scale no number.
        ImportError: the package that `impl` names is not installed.

    Source: Vaswani et al. 2017, arXiv 1706.03762, section 3.2.1; grouped queries: Ainslie et al. 2023, arXiv 2305.13245.
    """
    check_choice("impl", impl, tuple(BACKENDS))
    check_types("attention", q, k, v, causal, scale)
    q, k, v = (autocast(t) for t in (q, k, v))
    check_tensors("attention", "B, H, Lq, D", "B, Hkv, Lk, D", q, k, v)
    if causal and q.shape[2] > k.shape[2]:
        raise ValueError(f"causal attention needs Lq <= Lk (the first queries would see no key), got {q.shape[2]} > {k.shape[2]}")
    if key_lengths is not None:
        check_key_lengths(key_lengths, q, k, causal)
    if scale is None:
        scale = 1.0 / math.sqrt(q.shape[3])
    return BACKENDS[impl].dense(q, k, v, key_lengths, causal, scale)


def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    impl: str = "auto",
) -> Tensor:
    """`attention` of N sequences that lie behind one another, each to itself.

        out[s_n : s_(n+1)] = attention(q[s_n : s_(n+1)], k[t_n : t_(n+1)], v[t_n : t_(n+1)]),   s = cu_seqlens_q, t = cu_seqlens_k

    The borders are read on the host (on a GPU this waits for it), except in a graph of torch.compile, which holds for all
    lengths: there they are not checked, "sdpa" and "reference" take a [Tq, Tk] mask, and "xformers" is refused. So it is where
    torch.vmap batches the borders, which the packages and "flex" refuse.

    Args:
        q: [Tq, H, D], floating.
        k: [Tk, Hkv, D]; Hkv divides H.
        v: [Tk, Hkv, D].
        cu_seqlens_q: [N + 1] int32 or int64, the borders of the sequences in q: from 0 to Tq, not falling.
        cu_seqlens_k: [N + 1] in k: from 0 to Tk. A sequence with queries needs keys, and with a causal mask as many.
        causal: hide the keys after the query, aligned at the last query and the last key of each sequence.
        scale: factor of the scores, 1 / sqrt(D) if None.
        impl: as in `attention`; "flex" by a mask of sequences, "flash_attn" by its own function, "xformers" by its
            block-diagonal bias, "sdpa" by one call for all sequences of equal lengths, "reference" by one for each.

    Returns:
        [Tq, H, D] in the dtype of the operands; differentiable with respect to q, k and v.

    Raises:
        As `attention`; ValueError also for borders that are not as above.

    Source: as `attention`; the names and the layout are flash-attn's.
    """
    check_choice("impl", impl, tuple(BACKENDS))
    check_types("attention_varlen", q, k, v, causal, scale)
    q, k, v = (autocast(t) for t in (q, k, v))
    check_tensors("attention_varlen", "Tq, H, D", "Tk, Hkv, D", q, k, v)
    check_integers("cu_seqlens_q", cu_seqlens_q, None, q.device)
    check_integers("cu_seqlens_k", cu_seqlens_k, cu_seqlens_q.shape[0], q.device)
    lengths = sequence_lengths(cu_seqlens_q, cu_seqlens_k, q.shape[0], k.shape[0], causal)
    if lengths is None:
        most_q, most_k = q.shape[0], k.shape[0]
    else:
        most_q, most_k = (max((pair[side] for pair in lengths), default=0) for side in (0, 1))
    packing = Packing(cu_seqlens_q.to(torch.int32), cu_seqlens_k.to(torch.int32), lengths, most_q, most_k)
    if scale is None:
        scale = 1.0 / math.sqrt(q.shape[2])
    return BACKENDS[impl].packed(q, k, v, packing, causal, scale)
