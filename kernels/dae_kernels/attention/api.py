"""`attention`: checks and dispatch."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dae_kernels.attention import backends
from dae_kernels.attention.reference import attention_reference
from dae_kernels.dispatch import check_choice

IMPLS = {
    "auto": backends.sdpa,
    "sdpa": backends.sdpa,
    "flash_attn": backends.flash_attn,
    "xformers": backends.xformers,
    "reference": attention_reference,
}


def attention(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, scale: float | None = None, impl: str = "auto") -> Tensor:
    """Softmax attention, with grouped queries and a causal mask that suits key-value caches.

        out[b, h, i] = sum_j softmax_j(scale * q[b, h, i] . k[b, g, j] + mask[i, j]) v[b, g, j],   g = h // (H / Hkv)

    The causal mask is aligned bottom-right on every back-end: query i sees the keys j <= i + Lk - Lq, so the last query
    sees all of them, as when Lq new tokens are appended to a cache. Under autocast the operands are first cast to
    autocast's dtype on every back-end, as torch does for its own.

    Args:
        q: [B, H, Lq, D], floating.
        k: [B, Hkv, Lk, D] with Lk >= 1; Hkv divides H.
        v: [B, Hkv, Lk, D].
        causal: hide the keys after the query; needs Lq <= Lk.
        scale: factor of the scores, 1 / sqrt(D) if None.
        impl: "auto" is "sdpa" for now, on every device; "sdpa" (torch), "flash_attn", "xformers" (both CUDA only, extra `gpu`)
            and "reference" (plain float32 math, [Lq, Lk] memory) are obeyed or refused.

    Returns:
        [B, H, Lq, D] in the dtype of the operands; differentiable with respect to q, k and v.

    Raises:
        ValueError: shapes, dtypes or devices disagree; causal with Lq > Lk; `impl` is unknown or does not take these operands.
        TypeError: the operands are not floating point.
        ImportError: the package that `impl` names is not installed.

    Source: Vaswani et al. 2017, arXiv 1706.03762, section 3.2.1; grouped queries: Ainslie et al. 2023, arXiv 2305.13245.
    """
    check_choice("impl", impl, tuple(IMPLS))
    q, k, v = (autocast(t) for t in (q, k, v))
    check_tensors(q, k, v)
    if causal and q.shape[2] > k.shape[2]:
        raise ValueError(f"causal attention needs Lq <= Lk (the first queries would see no key), got {q.shape[2]} > {k.shape[2]}")
    if scale is None:
        scale = 1.0 / math.sqrt(q.shape[3])
    return IMPLS[impl](q, k, v, causal, scale)


def autocast(x: Tensor) -> Tensor:
    """`x` as autocast would hand it to an operation of its low-precision list."""
    device = x.device.type
    active = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    if active and x.is_floating_point() and x.dtype != torch.float64:
        return x.to(torch.get_autocast_dtype(device))
    return x


def check_tensors(q: Tensor, k: Tensor, v: Tensor) -> None:
    shapes = f"got q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}"
    if q.dim() != 4 or k.dim() != 4 or v.dim() != 4:
        raise ValueError(f"attention needs q [B, H, Lq, D] and k, v [B, Hkv, Lk, D], {shapes}")
    if k.shape != v.shape:
        raise ValueError(f"k and v must have one shape [B, Hkv, Lk, D], {shapes}")
    if q.shape[0] != k.shape[0]:
        raise ValueError(f"q and k must have one batch size, {shapes}")
    if q.shape[3] != k.shape[3] or q.shape[3] == 0:
        raise ValueError(f"q and k must have one head dimension, at least 1, {shapes}")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(f"the heads of k and v (Hkv) must divide the heads of q (H), {shapes}")
    if k.shape[2] == 0:
        raise ValueError(f"attention over no keys is undefined: Lk must be at least 1, {shapes}")
    if not q.is_floating_point():
        raise TypeError(f"attention needs floating point tensors, got {q.dtype}")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k and v must have one dtype, got {q.dtype}, {k.dtype}, {v.dtype}; cast them to one")
    if not q.device == k.device == v.device:
        raise ValueError(f"q, k and v must be on one device, got {q.device}, {k.device}, {v.device}")
