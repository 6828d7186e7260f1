"""Kernels of `group_norm_silu` for small maps: a group, of at most 2^14 elements, is read once and stays in registers.

Forward reads x and writes y, 2 n b bytes instead of 3; backward reads x and dy and writes dx, 3 n b instead of 5, in one launch
instead of three. A thread holds 32 elements of x, or of x and dy. Two tensors of more than 2^13 elements spilled: such a group
goes through in tiles, and the second reading of x and dy (64 KiB in bfloat16) comes from the L1 or L2 cache.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dae_kernels.group_norm_silu.fused_tile import affine, d_activation, pointers


@triton.jit
def whole_group_kernel(
    x_ptr, y_ptr, weight_ptr, bias_ptr, scale_ptr, shift_ptr, mean_ptr, rstd_ptr,
    stride_b, stride_c, stride_p,
    C, P, channels, eps,
    WEIGHT: tl.constexpr, BIAS: tl.constexpr, ADAPTIVE: tl.constexpr, SILU: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Statistics and y of a group in one, for groups of at most BLOCK_P positions and BLOCK_C channels. Grid (groups, B)."""
    b, c0 = tl.program_id(1).to(tl.int64), tl.program_id(0) * channels
    p, i = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_C)
    inside = (p[:, None] < P) & (i[None, :] < channels)
    x_ptrs = pointers(x_ptr, b, 0, c0, stride_b, stride_c, stride_p, BLOCK_P, BLOCK_C)
    base = tl.load(x_ptr + b * stride_b + c0.to(tl.int64) * stride_c).to(tl.float32)  # a large mean then costs the sum nothing
    x = tl.load(x_ptrs, mask=inside, other=0.0).to(tl.float32) - base
    n = (tl.cast(channels, tl.int64) * P).to(tl.float32)
    mean = tl.sum(tl.sum(tl.where(inside, x, 0.0), axis=0), axis=0) / n
    away = tl.where(inside, x - mean, 0.0)
    rstd = 1.0 / tl.sqrt_rn(tl.sum(tl.sum(away * away, axis=0), axis=0) / n + eps)
    group = b * tl.num_programs(0) + tl.program_id(0)
    tl.store(mean_ptr + group, base + mean)
    tl.store(rstd_ptr + group, rstd)
    c = tl.where(i < channels, c0 + i, C)
    factor, term = affine(weight_ptr, bias_ptr, scale_ptr, shift_ptr, b, c, C, WEIGHT, BIAS, ADAPTIVE)
    y = away * (rstd * factor)[None, :] + term[None, :]
    if SILU:
        y = y / (1.0 + tl.exp(-y))
    y_ptrs = pointers(y_ptr, b, 0, c0, stride_b, stride_c, stride_p, BLOCK_P, BLOCK_C)
    tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def n_and_dh(
    x_ptr, dy_ptr, b, p0, c0, stride_b, stride_c, stride_p, dy_stride_b, dy_stride_c, dy_stride_p,
    P, channels, mean, rstd, factor, term,
    SILU: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """n and dh of a tile of a group, 0 outside of it, and where it is inside."""
    inside = (p0 + tl.arange(0, BLOCK_P)[:, None] < P) & (tl.arange(0, BLOCK_C)[None, :] < channels)
    x_ptrs = pointers(x_ptr, b, p0, c0, stride_b, stride_c, stride_p, BLOCK_P, BLOCK_C)
    dy_ptrs = pointers(dy_ptr, b, p0, c0, dy_stride_b, dy_stride_c, dy_stride_p, BLOCK_P, BLOCK_C)
    n = (tl.load(x_ptrs, mask=inside, other=0.0).to(tl.float32) - mean) * rstd
    n = tl.where(inside, n, 0.0)  # so that dh is 0, too, as dy is, and not 0 * inf
    dy = tl.load(dy_ptrs, mask=inside, other=0.0).to(tl.float32)
    return n, d_activation(n * factor[None, :] + term[None, :], dy, SILU), inside


@triton.jit
def whole_group_gradient_kernel(
    dy_ptr, x_ptr, dx_ptr, weight_ptr, bias_ptr, scale_ptr, shift_ptr, mean_ptr, rstd_ptr, sum_ptr,
    dy_stride_b, dy_stride_c, dy_stride_p, stride_b, stride_c, stride_p,
    C, P, channels,
    WEIGHT: tl.constexpr, BIAS: tl.constexpr, ADAPTIVE: tl.constexpr, SILU: tl.constexpr,
    HELD: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dx of a group as `gradient_kernel` has it, and the sums of dh and dh n of its channels, into sum [2, B, C].

    Grid (groups, B). HELD: BLOCK_P positions are all, and stay in registers. dx has the strides of x.
    """
    b, c0 = tl.program_id(1).to(tl.int64), tl.program_id(0) * channels
    i = tl.arange(0, BLOCK_C)
    c = tl.where(i < channels, c0 + i, C)
    group = b * tl.num_programs(0) + tl.program_id(0)
    mean, rstd = tl.load(mean_ptr + group), tl.load(rstd_ptr + group)
    factor, term = affine(weight_ptr, bias_ptr, scale_ptr, shift_ptr, b, c, C, WEIGHT, BIAS, ADAPTIVE)
    if HELD:
        n, dh, inside = n_and_dh(
            x_ptr, dy_ptr, b, 0, c0, stride_b, stride_c, stride_p, dy_stride_b, dy_stride_c, dy_stride_p,
            P, channels, mean, rstd, factor, term, SILU, BLOCK_P, BLOCK_C,
        )  # fmt: skip
        total, total_n = tl.sum(dh, axis=0), tl.sum(dh * n, axis=0)
    else:
        lanes = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
        lanes_n = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
        for p0 in range(0, P, BLOCK_P):
            n, dh, _ = n_and_dh(
                x_ptr, dy_ptr, b, p0, c0, stride_b, stride_c, stride_p, dy_stride_b, dy_stride_c, dy_stride_p,
                P, channels, mean, rstd, factor, term, SILU, BLOCK_P, BLOCK_C,
            )  # fmt: skip
            lanes += dh
            lanes_n += dh * n
        total, total_n = tl.sum(lanes, axis=0), tl.sum(lanes_n, axis=0)
    out = b * C + c
    tl.store(sum_ptr + out, total, mask=c < C)
    tl.store(sum_ptr + tl.num_programs(1).to(tl.int64) * C + out, total_n, mask=c < C)
    count = (tl.cast(channels, tl.int64) * P).to(tl.float32)
    group_mean = tl.sum(total * factor, axis=0) / count
    group_mean_n = tl.sum(total_n * factor, axis=0) / count
    if HELD:
        dx = (dh * factor[None, :] - group_mean - n * group_mean_n) * rstd
        dx_ptrs = pointers(dx_ptr, b, 0, c0, stride_b, stride_c, stride_p, BLOCK_P, BLOCK_C)
        tl.store(dx_ptrs, dx.to(dx_ptr.dtype.element_ty), mask=inside)
    else:
        for p0 in range(0, P, BLOCK_P):
            n, dh, inside = n_and_dh(
                x_ptr, dy_ptr, b, p0, c0, stride_b, stride_c, stride_p, dy_stride_b, dy_stride_c, dy_stride_p,
                P, channels, mean, rstd, factor, term, SILU, BLOCK_P, BLOCK_C,
            )  # fmt: skip
            dx = (dh * factor[None, :] - group_mean - n * group_mean_n) * rstd
            dx_ptrs = pointers(dx_ptr, b, p0, c0, stride_b, stride_c, stride_p, BLOCK_P, BLOCK_C)
            tl.store(dx_ptrs, dx.to(dx_ptr.dtype.element_ty), mask=inside)
