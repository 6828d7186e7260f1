"""What the kernels of `group_norm_silu` share: pointers of a tile, statistics and affine factors of its channels."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def pointers(ptr, b, p0, c0, stride_b, stride_c, stride_p, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """Pointers to the tile [BLOCK_P, BLOCK_C] that begins at position p0 and channel c0 of image b."""
    ptr += b.to(tl.int64) * stride_b + tl.cast(p0, tl.int64) * stride_p + c0.to(tl.int64) * stride_c
    return ptr + tl.arange(0, BLOCK_P)[:, None] * stride_p + tl.arange(0, BLOCK_C)[None, :] * stride_c


@triton.jit
def statistics(mean_ptr, rstd_ptr, b, c, C, channels):
    """Mean and 1 / std of the group of each channel, and the index of that group in [B, groups]."""
    group = b * (C // channels) + c // channels
    mean = tl.load(mean_ptr + group, mask=c < C, other=0.0)
    rstd = tl.load(rstd_ptr + group, mask=c < C, other=0.0)
    return mean, rstd, group


@triton.jit
def affine(weight_ptr, bias_ptr, scale_ptr, shift_ptr, b, c, C, WEIGHT: tl.constexpr, BIAS: tl.constexpr, ADAPTIVE: tl.constexpr):
    """The factor and the term of each channel: h = n * factor + term."""
    factor = tl.full(c.shape, 1.0, tl.float32)
    term = tl.zeros(c.shape, tl.float32)
    if WEIGHT:
        factor = tl.load(weight_ptr + c, mask=c < C, other=0.0).to(tl.float32)
    if BIAS:
        term = tl.load(bias_ptr + c, mask=c < C, other=0.0).to(tl.float32)
    if ADAPTIVE:
        scale = 1.0 + tl.load(scale_ptr + b * C + c, mask=c < C, other=0.0).to(tl.float32)
        shift = tl.load(shift_ptr + b * C + c, mask=c < C, other=0.0).to(tl.float32)
        factor, term = factor * scale, term * scale + shift
    return factor, term


@triton.jit
def d_activation(h, dy, SILU: tl.constexpr):
    """dy times the derivative of the activation at h."""
    if SILU:
        sigmoid = 1.0 / (1.0 + tl.exp(-h))
        dy = dy * sigmoid * (1.0 + h * (1.0 - sigmoid))
    return dy
