"""`attention` and `attention_varlen`: checks and dispatch."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from dae_kernels.attention import flash, flex, memory_efficient, reference, sdpa
from dae_kernels.attention.checks import (
    autocast,
    check_integers,
    check_key_lengths,
    check_shapes,
    check_types,
    sequence_lengths,
)
from dae_kernels.attention.options import AttentionOptions, as_options, check_bias
from dae_kernels.attention.packing import Packing
from dae_kernels.checks import check_choice

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
    bias: Tensor | None = None,
    window: tuple[int, int] | None = None,
    softcap: float = 0.0,
    dropout: float = 0.0,
    impl: str = "auto",
) -> Tensor:
    """Softmax attention with grouped queries and a causal mask for key-value caches.

        out[b, h, i] = sum_j dropout(softmax_j(s[b, h, i, j] + bias[b, h, i, j] + mask[b, i, j])) v[b, g, j],   g = h // (H / Hkv)
        s[b, h, i, j] = scale * q[b, h, i] . k[b, g, j], and with a soft cap softcap * tanh(that / softcap)

    The causal mask is aligned bottom-right on every back-end: query i attends to keys j <= i + Lk - Lq, so the last query attends
    to all of them, as when Lq new tokens are appended to a cache. With `key_lengths` the keys at and beyond the length are
    masked, and the last query is aligned with the last key before it: j <= i + key_lengths[b] - Lq. A window is aligned likewise:
    query i attends to keys i + Lk - Lq - window[0] to i + Lk - Lq + window[1]. Under autocast the operands are first cast to
    autocast's dtype on every back-end, as torch does for its own.

    | | bias | window | softcap | dropout | v of another head dimension |
    |---|---|---|---|---|---|
    | reference | yes | yes | yes | yes | yes |
    | sdpa | yes | as a mask | no | yes | yes |
    | flex | yes | yes | yes | no | yes |
    | flash_attn | no | yes | yes | generation 2 | no |
    | xformers | without key_lengths | without key_lengths | no | yes | no |

    Args:
        q: [B, H, Lq, D], floating.
        k: [B, Hkv, Lk, D] with Lk >= 1; Hkv divides H.
        v: [B, Hkv, Lk, Dv]; Dv is D on most back-ends.
        causal: mask the keys after the query; needs Lq <= Lk, and Lq <= key_lengths.
        scale: factor of the scores, 1 / sqrt(D) if None.
        key_lengths: [B] int32 or int64 from 1 to Lk, of a static cache or a right-padded batch; masked keys and values must be
            finite. Checking their range synchronises with a GPU; it is skipped in a compiled graph and under torch.vmap,
            which "auto", "sdpa" and "reference" support and the others refuse.
        bias: added to the scores after the cap, in the dtype of q, broadcast to [B, H, Lq, Lk]; -inf hides a key. Differentiable.
        window: numbers of keys attended to (before, after) the query's position, -1 for all of a side; needs Lq <= Lk as
            `causal`, which is a window of (-1, 0); with both, the narrower applies.
        softcap: bound of the scores (Gemma 2 has 50); 0 for none.
        dropout: probability that a weight is zeroed, in [0, 1); pass 0 in evaluation.
        impl: "auto" is "sdpa" on every device, but with a softcap "flex" on CUDA if it can run, else "reference".
            "sdpa" and "flex" (torch), "flash_attn" (generation 4, 3 or 2, the newest installed for the device) and "xformers"
            (both CUDA only) and "reference" (plain float32 math, [Lq, Lk] memory) are obeyed or refused. "flex" refuses
            operands under torch.vmap, and on CPUs has no backward and refuses masks in a graph of torch.compile.
            "sdpa" on CPUs may lose a NaN: torch's kernel returns finite numbers for a query with NaN over few keys without a
            mask (below 16 in float32, torch 2.13), while "reference" and "flex" return NaN.

    Returns:
        [B, H, Lq, Dv] in the dtype of the operands; differentiable with respect to q, k, v and bias.

    Raises:
        ValueError: shapes, dtypes or devices disagree; causal or a window with Lq > Lk; lengths, softcap or dropout out of range;
            `impl` is unknown or does not take these operands or options.
        TypeError: operands are not floating point tensors, lengths not integers, causal not a bool or scale not a number.
        ImportError: the package that `impl` names is not installed.

    Source: Vaswani et al. 2017, arXiv 1706.03762, section 3.2.1; grouped queries: Ainslie et al. 2023, arXiv 2305.13245; windows:
    Beltagy et al. 2020, arXiv 2004.05150; soft cap: Gemma Team 2024, arXiv 2408.00118.
    """
    check_choice("impl", impl, tuple(BACKENDS))
    check_types("attention", q, k, v)
    q, k, v = (autocast(t) for t in (q, k, v))
    check_shapes("attention", "B, H, Lq, D", "B, Hkv, Lk, D", q, k, v)
    if bias is not None:
        bias = autocast(bias) if isinstance(bias, Tensor) else bias
        check_bias(bias, q, k)
        bias = torch.atleast_2d(bias)  # torch's kernel requires the last two dimensions
    options = as_options("attention", q.shape[3], causal, scale, window, softcap, dropout)
    if options.by_position and q.shape[2] > k.shape[2]:
        what = f"{options.kind} attention needs Lq <= Lk (the first queries would see no key)"
        raise ValueError(f"{what}, got {q.shape[2]} > {k.shape[2]}")
    if key_lengths is not None:
        check_key_lengths(key_lengths, q, k, options.kind)
    return backend(impl, q, options).dense(q, k, v, key_lengths, bias, options)


def backend(impl: str, q: Tensor, options: AttentionOptions) -> ModuleType:
    """The module behind `impl`; "auto" is torch's kernel, which has no soft cap."""
    if impl != "auto" or not options.softcap:
        return BACKENDS[impl]
    fits = q.is_cuda and q.shape[-1] >= 16 and q.dtype != torch.float64 and not options.dropout
    return flex if fits else reference


def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    window: tuple[int, int] | None = None,
    softcap: float = 0.0,
    dropout: float = 0.0,
    impl: str = "auto",
) -> Tensor:
    """`attention` within each of N packed sequences.

        out[s_n : s_(n+1)] = attention(q[s_n : s_(n+1)], k[t_n : t_(n+1)], v[t_n : t_(n+1)]),   s = cu_seqlens_q, t = cu_seqlens_k

    The boundaries are read on the host (which synchronises with a GPU), except in a graph of torch.compile, which is valid for
    all lengths: there they are not checked, "sdpa" and "reference" use a [Tq, Tk] mask, and "xformers" is refused. The same
    holds if torch.vmap batches the boundaries, which the packages and "flex" refuse.

    Args:
        q: [Tq, H, D], floating.
        k: [Tk, Hkv, D]; Hkv divides H.
        v: [Tk, Hkv, Dv].
        cu_seqlens_q: [N + 1] int32 or int64, boundaries of the sequences in q: from 0 to Tq, non-decreasing.
        cu_seqlens_k: [N + 1], likewise in k: from 0 to Tk. A sequence with queries needs keys, at least as many if causal.
        causal: mask the keys after the query, aligned at the last query and the last key of each sequence.
        scale: factor of the scores, 1 / sqrt(D) if None.
        window, softcap, dropout: as in `attention`; "xformers" has no window here.
        impl: as in `attention`; "flex" by a mask of sequences, "flash_attn" by its own function, "xformers" by its
            block-diagonal bias, "sdpa" by one call for all sequences of equal lengths, "reference" by one for each.

    Returns:
        [Tq, H, Dv] in the dtype of the operands; differentiable with respect to q, k and v.

    Raises:
        As `attention`; ValueError also for invalid boundaries.

    Source: as `attention`; the names and the layout are flash-attn's.
    """
    check_choice("impl", impl, tuple(BACKENDS))
    check_types("attention_varlen", q, k, v)
    q, k, v = (autocast(t) for t in (q, k, v))
    check_shapes("attention_varlen", "Tq, H, D", "Tk, Hkv, D", q, k, v)
    check_integers("cu_seqlens_q", cu_seqlens_q, None, q.device)
    check_integers("cu_seqlens_k", cu_seqlens_k, cu_seqlens_q.shape[0], q.device)
    options = as_options("attention_varlen", q.shape[2], causal, scale, window, softcap, dropout)
    lengths = sequence_lengths(cu_seqlens_q, cu_seqlens_k, q.shape[0], k.shape[0], options.kind)
    if lengths is None:
        max_q, max_k = q.shape[0], k.shape[0]
    else:
        max_q, max_k = (max((pair[side] for pair in lengths), default=0) for side in (0, 1))
    packing = Packing(cu_seqlens_q.to(torch.int32), cu_seqlens_k.to(torch.int32), lengths, max_q, max_k)
    return backend(impl, q, options).packed(q, k, v, packing, options)
