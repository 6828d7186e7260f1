"""GroupNorm + SiLU in Triton: three passes over the tensor forward, five backward, whatever its layout.

A group of at most 2^14 elements (16 channels of 32 x 32) fits into one program (fused_whole.py): two passes forward, three
backward. The gradients of the parameters take one small launch beside those.

Roofline (counts, with the measured floors of an H100: 3.0 TB/s of copy, 132 SMs; the kernels themselves are not yet measured).
- Bound by memory. Forward: x is read for the statistics, read again, y written: 3 n b bytes for n elements of b bytes.
  Backward: x and dy are read for the sums, read again, dx written: 5 n b. [8, 128, 256, 256] in bf16 is 134 MB: 0.13 and
  0.22 ms. What fits into L2 (50 MB) is read from memory once: 2 and 3 passes.
- Arithmetic: at 3.0 TB/s an SM meets 6.5 bf16 elements per cycle, at 128 float32 instructions: 20 per element. Forward takes
  about 10 for the statistics (Welford) and 10 with one exponential for the rest; backward about 15 and 20, with one exponential
  each; an SM does 16 exponentials per cycle. Little slack, so nothing is divided or reduced over threads inside a loop.
- A tile is [positions, channels] for both layouts, and the strides say which of the two is contiguous: BLOCK_P x BLOCK_C is
  long along that one. By rule 2048 elements over 128 threads, 16 per thread: two loads of 16 bytes in bf16. On an H100 with 128
  threads the normalisation of a channels_last map took 86 us instead of 148 with 256; `tiles.json` has
  what was measured.
- Statistics and sums are kept for each lane of the tile, merged over lanes once at the end, written once for each channel and
  chunk of positions, and merged over the chunks of a group by a small kernel: no atomics, one order of summation. A chunk has at
  most 16 tiles, and so few that 528 programs (4 per SM) run where the tensor has as many tiles; its two numbers per channel are
  at most 1/64 of what it read.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dae_kernels.dispatch import register_op
from dae_kernels.group_norm_silu.fused_tile import affine, d_activation, pointers, statistics
from dae_kernels.group_norm_silu.fused_whole import whole_group_gradient_kernel, whole_group_kernel
from dae_kernels.group_norm_silu.layout import contiguous, dense, densified, flags, pair_dtype, positions
from dae_kernels.tiles import cdiv

MERGE, MERGE_GRADIENTS, PARAMETERS = {"BLOCK": 256}, {"BLOCK_C": 16, "BLOCK_S": 32}, {"BLOCK_B": 16, "BLOCK_C": 32}


@triton.jit
def moments_kernel(
    x_ptr, part_ptr,
    x_stride_b, x_stride_c, x_stride_p,
    C, P, chunk,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """mean and M2 = sum (x - mean)^2 of each channel over a chunk of positions, into part [2, B, C, chunks].

    Grid (chunks, blocks of channels, B). Each lane runs Welford's update over its own positions; lanes are merged at the end.
    """
    start = tl.program_id(0) * chunk
    count = tl.minimum(P - start, chunk)
    c0, b = tl.program_id(1) * BLOCK_C, tl.program_id(2).to(tl.int64)
    lane, c = tl.arange(0, BLOCK_P), c0 + tl.arange(0, BLOCK_C)
    x_ptrs = pointers(x_ptr, b, start, c0, x_stride_b, x_stride_c, x_stride_p, BLOCK_P, BLOCK_C)
    # Differences from one value of the channel, so that a large mean costs no accuracy.
    base_ptrs = pointers(x_ptr, b, start, c0, x_stride_b, x_stride_c, x_stride_p, 1, BLOCK_C)
    base = tl.load(base_ptrs, mask=c[None, :] < C, other=0.0).to(tl.float32)
    mean = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    m2 = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for p0 in range(0, count, BLOCK_P):
        inside = (p0 + lane[:, None] < count) & (c[None, :] < C)
        x = tl.load(x_ptrs + p0 * x_stride_p, mask=inside, other=0.0).to(tl.float32) - base
        delta = tl.where(inside, x - mean, 0.0)
        mean += delta * (1.0 / (p0 // BLOCK_P + 1))
        m2 += delta * (x - mean)
    in_lane = ((count - lane + BLOCK_P - 1) // BLOCK_P).to(tl.float32)[:, None]  # 0 for lanes past the end
    merged = tl.sum(mean * in_lane, axis=0) / count
    away = mean - merged[None, :]
    spread = tl.sum(m2 + in_lane * away * away, axis=0)
    out = (b * C + c) * tl.num_programs(0) + tl.program_id(0)
    tl.store(part_ptr + out, tl.sum(base, axis=0) + merged, mask=c < C)
    second = tl.num_programs(2).to(tl.int64) * C * tl.num_programs(0)
    tl.store(part_ptr + second + out, spread, mask=c < C)


@triton.jit
def merge_moments_kernel(part_ptr, group_mean_ptr, group_rstd_ptr, channels, chunks, chunk, P, eps, BLOCK: tl.constexpr):
    """Mean and 1 / sqrt(variance + eps) of a group, from the moments of its channels' chunks. Grid (B * groups)."""
    group = tl.program_id(0).to(tl.int64)
    parts = channels * chunks
    i = tl.arange(0, BLOCK)
    n = (tl.cast(channels, tl.int64) * P).to(tl.float32)
    mean_ptr = part_ptr
    m2_ptr = part_ptr + tl.num_programs(0).to(tl.int64) * parts
    base = tl.load(mean_ptr + group * parts)  # as above
    total = tl.zeros([BLOCK], tl.float32)
    for i0 in range(0, parts, BLOCK):
        inside = i0 + i < parts
        count = tl.minimum(P - (i0 + i) % chunks * chunk, chunk).to(tl.float32)
        mean = tl.load(mean_ptr + group * parts + i0 + i, mask=inside, other=0.0)
        total += tl.where(inside, count * (mean - base), 0.0)
    offset = tl.sum(total, axis=0) / n
    spread = tl.zeros([BLOCK], tl.float32)
    for i0 in range(0, parts, BLOCK):
        inside = i0 + i < parts
        count = tl.minimum(P - (i0 + i) % chunks * chunk, chunk).to(tl.float32)
        away = tl.load(mean_ptr + group * parts + i0 + i, mask=inside, other=0.0) - base - offset
        m2 = tl.load(m2_ptr + group * parts + i0 + i, mask=inside, other=0.0)
        spread += tl.where(inside, m2 + count * away * away, 0.0)
    tl.store(group_mean_ptr + group, base + offset)
    tl.store(group_rstd_ptr + group, 1.0 / tl.sqrt_rn(tl.sum(spread, axis=0) / n + eps))


@triton.jit
def normalise_kernel(
    x_ptr, y_ptr, weight_ptr, bias_ptr, scale_ptr, shift_ptr, mean_ptr, rstd_ptr,
    stride_b, stride_c, stride_p,
    C, P, channels,
    WEIGHT: tl.constexpr, BIAS: tl.constexpr, ADAPTIVE: tl.constexpr, SILU: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """y = act((x - mean) rstd factor + term), one tile per program; y has the strides of x.

    Grid (tiles of positions, blocks of channels, B).
    """
    p0, c0, b = tl.program_id(0) * BLOCK_P, tl.program_id(1) * BLOCK_C, tl.program_id(2).to(tl.int64)
    p, c = p0 + tl.arange(0, BLOCK_P), c0 + tl.arange(0, BLOCK_C)
    inside = (p[:, None] < P) & (c[None, :] < C)
    mean, rstd, _ = statistics(mean_ptr, rstd_ptr, b, c, C, channels)
    factor, term = affine(weight_ptr, bias_ptr, scale_ptr, shift_ptr, b, c, C, WEIGHT, BIAS, ADAPTIVE)
    x_ptrs = pointers(x_ptr, b, p0, c0, stride_b, stride_c, stride_p, BLOCK_P, BLOCK_C)
    x = tl.load(x_ptrs, mask=inside, other=0.0).to(tl.float32)
    y = (x - mean[None, :]) * (rstd * factor)[None, :] + term[None, :]
    if SILU:
        y = y / (1.0 + tl.exp(-y))
    y_ptrs = pointers(y_ptr, b, p0, c0, stride_b, stride_c, stride_p, BLOCK_P, BLOCK_C)
    tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def gradient_sums_kernel(
    dy_ptr, x_ptr, weight_ptr, bias_ptr, scale_ptr, shift_ptr, mean_ptr, rstd_ptr, sum_ptr,
    dy_stride_b, dy_stride_c, dy_stride_p, x_stride_b, x_stride_c, x_stride_p,
    C, P, channels, chunk,
    WEIGHT: tl.constexpr, BIAS: tl.constexpr, ADAPTIVE: tl.constexpr, SILU: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Sums of dh and dh n of each channel over a chunk of positions, into part [2, B, C, chunks]. Grid as of the moments.

    sum, here and below, is [2, B, C] with group means [2, B, groups] and part behind it: one allocation.
    """
    start = tl.program_id(0) * chunk
    count = tl.minimum(P - start, chunk)
    c0, b = tl.program_id(1) * BLOCK_C, tl.program_id(2).to(tl.int64)
    lane, c = tl.arange(0, BLOCK_P), c0 + tl.arange(0, BLOCK_C)
    mean, rstd, _ = statistics(mean_ptr, rstd_ptr, b, c, C, channels)
    factor, term = affine(weight_ptr, bias_ptr, scale_ptr, shift_ptr, b, c, C, WEIGHT, BIAS, ADAPTIVE)
    x_ptrs = pointers(x_ptr, b, start, c0, x_stride_b, x_stride_c, x_stride_p, BLOCK_P, BLOCK_C)
    dy_ptrs = pointers(dy_ptr, b, start, c0, dy_stride_b, dy_stride_c, dy_stride_p, BLOCK_P, BLOCK_C)
    total = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    total_n = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for p0 in range(0, count, BLOCK_P):
        inside = (p0 + lane[:, None] < count) & (c[None, :] < C)
        x = tl.load(x_ptrs + p0 * x_stride_p, mask=inside, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptrs + p0 * dy_stride_p, mask=inside, other=0.0).to(tl.float32)
        n = (x - mean[None, :]) * rstd[None, :]
        dh = d_activation(n * factor[None, :] + term[None, :], dy, SILU)
        total += tl.where(inside, dh, 0.0)  # past the end n is arbitrary, and with SiLU 0 * inf may occur
        total_n += tl.where(inside, dh * n, 0.0)
    out = (b * C + c) * tl.num_programs(0) + tl.program_id(0)
    second = tl.num_programs(2).to(tl.int64) * C * tl.num_programs(0)
    part_ptr = sum_ptr + 2 * tl.num_programs(2).to(tl.int64) * (C + C // channels)
    tl.store(part_ptr + out, tl.sum(total, axis=0), mask=c < C)
    tl.store(part_ptr + second + out, tl.sum(total_n, axis=0), mask=c < C)


@triton.jit
def merge_gradient_sums_kernel(
    weight_ptr, scale_ptr, sum_ptr,
    C, P, channels, chunks,
    WEIGHT: tl.constexpr, ADAPTIVE: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Chunks' sums to sums per channel [2, B, C], and to means of d n and (d n) n over a group. Grid (groups, B)."""
    group_mean_ptr = sum_ptr + 2 * tl.num_programs(1).to(tl.int64) * C
    part_ptr = group_mean_ptr + 2 * tl.num_programs(1).to(tl.int64) * (C // channels)
    part_n_ptr = part_ptr + tl.num_programs(1).to(tl.int64) * C * chunks
    b, first = tl.program_id(1).to(tl.int64), tl.program_id(0) * channels
    i, s = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_S)
    group_total = tl.zeros([BLOCK_C], tl.float32)
    group_total_n = tl.zeros([BLOCK_C], tl.float32)
    for i0 in range(0, channels, BLOCK_C):
        c = first + i0 + i
        of_group = i0 + i < channels
        total = tl.zeros([BLOCK_C, BLOCK_S], tl.float32)
        total_n = tl.zeros([BLOCK_C, BLOCK_S], tl.float32)
        for s0 in range(0, chunks, BLOCK_S):
            part = (b * C + c[:, None]) * chunks + s0 + s[None, :]
            inside = of_group[:, None] & (s0 + s[None, :] < chunks)
            total += tl.load(part_ptr + part, mask=inside, other=0.0)
            total_n += tl.load(part_n_ptr + part, mask=inside, other=0.0)
        of_channel, of_channel_n = tl.sum(total, axis=1), tl.sum(total_n, axis=1)
        tl.store(sum_ptr + b * C + c, of_channel, mask=of_group)
        tl.store(sum_ptr + (tl.num_programs(1) + b) * C + c, of_channel_n, mask=of_group)
        factor = tl.full([BLOCK_C], 1.0, tl.float32)
        if WEIGHT:
            factor = tl.load(weight_ptr + c, mask=of_group, other=0.0).to(tl.float32)
        if ADAPTIVE:
            factor *= 1.0 + tl.load(scale_ptr + b * C + c, mask=of_group, other=0.0).to(tl.float32)
        group_total += of_channel * factor
        group_total_n += of_channel_n * factor
    n = (tl.cast(channels, tl.int64) * P).to(tl.float32)
    out = b * (C // channels) + tl.program_id(0)
    tl.store(group_mean_ptr + out, tl.sum(group_total, axis=0) / n)
    tl.store(group_mean_ptr + tl.num_programs(1) * tl.num_programs(0) + out, tl.sum(group_total_n, axis=0) / n)


@triton.jit
def gradient_kernel(
    dy_ptr, x_ptr, dx_ptr, weight_ptr, bias_ptr, scale_ptr, shift_ptr, mean_ptr, rstd_ptr, sum_ptr,
    dy_stride_b, dy_stride_c, dy_stride_p, stride_b, stride_c, stride_p,
    C, P, channels,
    WEIGHT: tl.constexpr, BIAS: tl.constexpr, ADAPTIVE: tl.constexpr, SILU: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dx = rstd (d n - mean(d n) - n mean(d n * n)) with d n = dh * factor; dx has the strides of x. Grid as of normalise."""
    p0, c0, b = tl.program_id(0) * BLOCK_P, tl.program_id(1) * BLOCK_C, tl.program_id(2).to(tl.int64)
    p, c = p0 + tl.arange(0, BLOCK_P), c0 + tl.arange(0, BLOCK_C)
    inside = (p[:, None] < P) & (c[None, :] < C)
    mean, rstd, group = statistics(mean_ptr, rstd_ptr, b, c, C, channels)
    groups = tl.num_programs(2) * (C // channels)
    group_mean_ptr = sum_ptr + 2 * tl.num_programs(2).to(tl.int64) * C
    group_mean = tl.load(group_mean_ptr + group, mask=c < C, other=0.0)
    group_mean_n = tl.load(group_mean_ptr + groups + group, mask=c < C, other=0.0)
    factor, term = affine(weight_ptr, bias_ptr, scale_ptr, shift_ptr, b, c, C, WEIGHT, BIAS, ADAPTIVE)
    x_ptrs = pointers(x_ptr, b, p0, c0, stride_b, stride_c, stride_p, BLOCK_P, BLOCK_C)
    dy_ptrs = pointers(dy_ptr, b, p0, c0, dy_stride_b, dy_stride_c, dy_stride_p, BLOCK_P, BLOCK_C)
    x = tl.load(x_ptrs, mask=inside, other=0.0).to(tl.float32)
    dy = tl.load(dy_ptrs, mask=inside, other=0.0).to(tl.float32)
    n = (x - mean[None, :]) * rstd[None, :]
    dn = d_activation(n * factor[None, :] + term[None, :], dy, SILU) * factor[None, :]
    dx = (dn - group_mean[None, :] - n * group_mean_n[None, :]) * rstd[None, :]
    dx_ptrs = pointers(dx_ptr, b, p0, c0, stride_b, stride_c, stride_p, BLOCK_P, BLOCK_C)
    tl.store(dx_ptrs, dx.to(dx_ptr.dtype.element_ty), mask=inside)


@triton.jit
def parameter_gradients_kernel(
    sum_ptr, weight_ptr, bias_ptr, scale_ptr, d_affine_ptr, d_adaptive_ptr,
    B, C,
    WEIGHT: tl.constexpr, BIAS: tl.constexpr, ADAPTIVE: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The sums [2, B, C] of dh and dh n to the gradients of weight and bias [2, C], and of scale and shift [2, B, C].

    Grid (blocks of channels): a program goes over the images in order.
    """
    c, i = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_B)
    second = tl.cast(B, tl.int64) * C
    weight = tl.full([BLOCK_C], 1.0, tl.float32)
    bias = tl.zeros([BLOCK_C], tl.float32)
    if ADAPTIVE:
        if WEIGHT:
            weight = tl.load(weight_ptr + c, mask=c < C, other=0.0).to(tl.float32)
        if BIAS:
            bias = tl.load(bias_ptr + c, mask=c < C, other=0.0).to(tl.float32)
    d_bias = tl.zeros([BLOCK_B, BLOCK_C], tl.float32)
    d_weight = tl.zeros([BLOCK_B, BLOCK_C], tl.float32)
    for b0 in range(0, B, BLOCK_B):
        place = (b0 + i[:, None]).to(tl.int64) * C + c[None, :]
        inside = (b0 + i[:, None] < B) & (c[None, :] < C)
        total = tl.load(sum_ptr + place, mask=inside, other=0.0)
        total_n = tl.load(sum_ptr + second + place, mask=inside, other=0.0)
        if ADAPTIVE:
            d_scale = total_n * weight[None, :] + total * bias[None, :]
            tl.store(d_adaptive_ptr + place, d_scale.to(d_adaptive_ptr.dtype.element_ty), mask=inside)
            tl.store(d_adaptive_ptr + second + place, total.to(d_adaptive_ptr.dtype.element_ty), mask=inside)
            scale = 1.0 + tl.load(scale_ptr + place, mask=inside, other=0.0).to(tl.float32)
            total, total_n = total * scale, total_n * scale
        d_bias += total
        d_weight += total_n
    if WEIGHT or BIAS:
        tl.store(d_affine_ptr + c, tl.sum(d_weight, axis=0).to(d_affine_ptr.dtype.element_ty), mask=c < C)
        tl.store(d_affine_ptr + C + c, tl.sum(d_bias, axis=0).to(d_affine_ptr.dtype.element_ty), mask=c < C)


def forward_empty(x: Tensor, *operands: Any) -> tuple[Tensor, Tensor, Tensor]:
    groups, device = (x.shape[0], operands[4]), x.device
    mean_BG = torch.empty(groups, dtype=torch.float32, device=device)
    return torch.empty_like(densified(x)), mean_BG, torch.empty(groups, dtype=torch.float32, device=device)


def forward_launcher(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    num_groups: int,
    eps: float,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """y in the layout of x, and mean and 1 / std [B, groups]."""
    x, layout = dense(x, num_groups)
    C, P, strides, moments, device = layout.C, layout.P, layout.strides, layout.moments, x.device
    y = torch.empty_like(x)
    mean_BG = torch.empty(layout.groups, dtype=torch.float32, device=device)
    rstd_BG = torch.empty_like(mean_BG)
    weight, bias, scale, shift = contiguous(weight), contiguous(bias), contiguous(scale), contiguous(shift)
    known = flags(weight is not None, bias is not None, scale is not None, silu)
    operands = (x, y, weight, bias, scale, shift, mean_BG, rstd_BG, *strides)  # y has the strides of x, as both are dense
    if layout.whole is not None:
        whole_group_kernel[(num_groups, layout.B)](*operands, C, P, layout.channels, eps, **known, **layout.whole)
        return y, mean_BG, rstd_BG
    part = torch.empty(moments.parts, dtype=torch.float32, device=device)
    moments_kernel[moments.grid](x, part, *strides, C, P, moments.chunk, **moments.options)
    merge_moments_kernel[(layout.B * num_groups,)](
        part, mean_BG, rstd_BG, layout.channels, moments.chunks, moments.chunk, P, eps, **MERGE
    )
    grid, options = layout.normalise
    normalise_kernel[grid](*operands, C, P, layout.channels, **known, **options)
    return y, mean_BG, rstd_BG


def gradients_empty(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, scale: Tensor | None, shift: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Memory for the gradients of weight and bias [2, C], and of scale and shift [2, B, C]; without elements for absent ones."""
    (B, C), affine, adaptive = x.shape[:2], pair_dtype(weight, bias), pair_dtype(scale, shift)
    return (
        x.new_empty(0 if affine is None else (2, C), dtype=affine),
        x.new_empty(0 if adaptive is None else (2, B, C), dtype=adaptive),
    )


def backward_empty(dy: Tensor, x: Tensor, *operands: Any) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(densified(x)), *gradients_empty(x, *operands[:4])


def backward_launcher(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    mean_BG: Tensor,
    rstd_BG: Tensor,
    num_groups: int,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """dx in the layout of x, and `gradients_empty` with the gradients of the parameters. dy may have any strides."""
    x, layout = dense(x, num_groups)
    B, C, P, channels, strides = layout.B, layout.C, layout.P, layout.channels, layout.strides
    dx = torch.empty_like(x)
    d_affine_2C, d_adaptive_2BC = gradients_empty(x, weight, bias, scale, shift)
    sums = mean_BG.new_empty(layout.scratch)
    weight, bias, scale, shift = contiguous(weight), contiguous(bias), contiguous(scale), contiguous(shift)
    dy_strides: tuple[int, ...] = strides
    if dy.stride() != x.stride():
        dy = positions(dy)
        if not layout.reaches(*dy.stride()[1:]):
            dy = torch.empty_like(positions(x), dtype=dy.dtype).copy_(dy)
        dy_strides = dy.stride()
    operands = (weight, bias, scale, shift, mean_BG.contiguous(), rstd_BG.contiguous())
    known, sizes = flags(weight is not None, bias is not None, scale is not None, silu), (C, P, channels)
    if layout.whole_gradient is not None:
        whole_group_gradient_kernel[(num_groups, B)](
            dy, x, dx, *operands, sums, *dy_strides, *strides, *sizes, **known, **layout.whole_gradient
        )
    else:
        grid, options, chunk, chunks = layout.sums[:4]
        gradient_sums_kernel[grid](dy, x, *operands, sums, *dy_strides, *strides, *sizes, chunk, **known, **options)
        merge_gradient_sums_kernel[(num_groups, B)](
            weight, scale, sums, *sizes, chunks, WEIGHT=known["WEIGHT"], ADAPTIVE=known["ADAPTIVE"], **MERGE_GRADIENTS
        )
        grid, options = layout.gradient
        gradient_kernel[grid](dy, x, dx, *operands, sums, *dy_strides, *strides, *sizes, **known, **options)
    if weight is not None or bias is not None or scale is not None:
        parameter_gradients_kernel[(cdiv(C, PARAMETERS["BLOCK_C"]),)](
            sums, weight, bias, scale, d_affine_2C, d_adaptive_2BC, B, C,
            WEIGHT=known["WEIGHT"], BIAS=known["BIAS"], ADAPTIVE=known["ADAPTIVE"], **PARAMETERS,
        )  # fmt: skip
    return dx, d_affine_2C, d_adaptive_2BC


group_norm_silu_forward = register_op("dae_kernels::group_norm_silu_forward", forward_launcher, forward_empty)
group_norm_silu_backward = register_op("dae_kernels::group_norm_silu_backward", backward_launcher, backward_empty)
