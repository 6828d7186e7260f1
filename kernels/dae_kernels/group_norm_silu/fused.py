"""GroupNorm + SiLU in Triton: three passes over the tensor forward, five backward, whatever its layout.

Roofline (counts, with the measured floors of an H100: 3.0 TB/s of copy, 132 SMs; the kernels themselves are not yet measured).
- Bound by memory. Forward: x is read for the statistics, read again, y written: 3 n b bytes for n elements of b bytes.
  Backward: x and dy are read for the sums, read again, dx written: 5 n b. [8, 128, 256, 256] in bf16 is 134 MB: 0.13 and
  0.22 ms. What fits into L2 (50 MB) is read from memory once: 2 and 3 passes.
- Arithmetic: at 3.0 TB/s an SM meets 6.5 bf16 elements per cycle, at 128 float32 instructions: 20 per element. Forward takes
  about 10 for the statistics (Welford) and 10 with one exponential for the rest; backward about 15 and 20, with one exponential
  each; an SM does 16 exponentials per cycle. Little slack, so nothing is divided or reduced over threads inside a loop.
- A tile is [positions, channels] for both layouts, and the strides say which of the two is contiguous: BLOCK_P x BLOCK_C is
  long along that one. 2048 elements over 256 threads are 8 per thread: one load of 16 bytes in bf16. With 128 threads the sums of
  the gradient took 243 registers on sm_90, and 127 with 256: either way two blocks fit on an SM, but one of 16 warps hides more.
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

from dae_kernels.dispatch import launchable, register_triton_op

# Enough programs to keep 132 SMs busy, several per SM.
PROGRAMS, TILES_PER_CHUNK, TILE = 528, 16, 2048
MERGE, MERGE_GRADIENTS = {"BLOCK": 256}, {"BLOCK_C": 16, "BLOCK_S": 32}


@triton.jit
def pointers(ptr, b, p0, c0, stride_b, stride_c, stride_p, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """Pointers to the tile [BLOCK_P, BLOCK_C] that begins at position p0 and channel c0 of image b."""
    ptr += b.to(tl.int64) * stride_b + p0.to(tl.int64) * stride_p + c0.to(tl.int64) * stride_c
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


@triton.jit
def moments_kernel(
    x_ptr, mean_ptr, m2_ptr,
    x_stride_b, x_stride_c, x_stride_p,
    C, P, chunk,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """mean and M2 = sum (x - mean)^2 of each channel over a chunk of positions, into [B, C, chunks].

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
    tl.store(mean_ptr + out, tl.sum(base, axis=0) + merged, mask=c < C)
    tl.store(m2_ptr + out, spread, mask=c < C)


@triton.jit
def merge_moments_kernel(mean_ptr, m2_ptr, group_mean_ptr, group_rstd_ptr, channels, chunks, chunk, P, eps, BLOCK: tl.constexpr):
    """Mean and 1 / sqrt(variance + eps) of a group, from the moments of its channels' chunks. Grid (B * groups)."""
    group = tl.program_id(0).to(tl.int64)
    parts = channels * chunks
    i = tl.arange(0, BLOCK)
    n = (tl.cast(channels, tl.int64) * P).to(tl.float32)
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
    x_stride_b, x_stride_c, x_stride_p, y_stride_b, y_stride_c, y_stride_p,
    C, P, channels,
    WEIGHT: tl.constexpr, BIAS: tl.constexpr, ADAPTIVE: tl.constexpr, SILU: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """y = act((x - mean) rstd factor + term), one tile per program. Grid (tiles of positions, blocks of channels, B)."""
    p0, c0, b = tl.program_id(0) * BLOCK_P, tl.program_id(1) * BLOCK_C, tl.program_id(2).to(tl.int64)
    p, c = p0 + tl.arange(0, BLOCK_P), c0 + tl.arange(0, BLOCK_C)
    inside = (p[:, None] < P) & (c[None, :] < C)
    mean, rstd, _ = statistics(mean_ptr, rstd_ptr, b, c, C, channels)
    factor, term = affine(weight_ptr, bias_ptr, scale_ptr, shift_ptr, b, c, C, WEIGHT, BIAS, ADAPTIVE)
    x_ptrs = pointers(x_ptr, b, p0, c0, x_stride_b, x_stride_c, x_stride_p, BLOCK_P, BLOCK_C)
    x = tl.load(x_ptrs, mask=inside, other=0.0).to(tl.float32)
    y = (x - mean[None, :]) * (rstd * factor)[None, :] + term[None, :]
    if SILU:
        y = y / (1.0 + tl.exp(-y))
    y_ptrs = pointers(y_ptr, b, p0, c0, y_stride_b, y_stride_c, y_stride_p, BLOCK_P, BLOCK_C)
    tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def gradient_sums_kernel(
    dy_ptr, x_ptr, weight_ptr, bias_ptr, scale_ptr, shift_ptr, mean_ptr, rstd_ptr, sum_ptr, sum_n_ptr,
    dy_stride_b, dy_stride_c, dy_stride_p, x_stride_b, x_stride_c, x_stride_p,
    C, P, channels, chunk,
    WEIGHT: tl.constexpr, BIAS: tl.constexpr, ADAPTIVE: tl.constexpr, SILU: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Sums of dh and dh n of each channel over a chunk of positions, into [B, C, chunks]. The grid is that of the moments."""
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
    tl.store(sum_ptr + out, tl.sum(total, axis=0), mask=c < C)
    tl.store(sum_n_ptr + out, tl.sum(total_n, axis=0), mask=c < C)


@triton.jit
def merge_gradient_sums_kernel(
    part_ptr, part_n_ptr, weight_ptr, scale_ptr, sum_ptr, sum_n_ptr, group_mean_ptr, group_mean_n_ptr,
    C, P, channels, chunks,
    WEIGHT: tl.constexpr, ADAPTIVE: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Chunks' sums to sums per channel [B, C], and to means of d n and (d n) n over a group [B, groups]. Grid (groups, B)."""
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
        tl.store(sum_n_ptr + b * C + c, of_channel_n, mask=of_group)
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
    tl.store(group_mean_n_ptr + out, tl.sum(group_total_n, axis=0) / n)


@triton.jit
def gradient_kernel(
    dy_ptr, x_ptr, dx_ptr, weight_ptr, bias_ptr, scale_ptr, shift_ptr, mean_ptr, rstd_ptr, group_mean_ptr, group_mean_n_ptr,
    dy_stride_b, dy_stride_c, dy_stride_p, x_stride_b, x_stride_c, x_stride_p, dx_stride_b, dx_stride_c, dx_stride_p,
    C, P, channels,
    WEIGHT: tl.constexpr, BIAS: tl.constexpr, ADAPTIVE: tl.constexpr, SILU: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dx = rstd (d n - mean(d n) - n mean(d n * n)) with d n = dh * factor. The grid is that of normalise_kernel."""
    p0, c0, b = tl.program_id(0) * BLOCK_P, tl.program_id(1) * BLOCK_C, tl.program_id(2).to(tl.int64)
    p, c = p0 + tl.arange(0, BLOCK_P), c0 + tl.arange(0, BLOCK_C)
    inside = (p[:, None] < P) & (c[None, :] < C)
    mean, rstd, group = statistics(mean_ptr, rstd_ptr, b, c, C, channels)
    group_mean = tl.load(group_mean_ptr + group, mask=c < C, other=0.0)
    group_mean_n = tl.load(group_mean_n_ptr + group, mask=c < C, other=0.0)
    factor, term = affine(weight_ptr, bias_ptr, scale_ptr, shift_ptr, b, c, C, WEIGHT, BIAS, ADAPTIVE)
    x_ptrs = pointers(x_ptr, b, p0, c0, x_stride_b, x_stride_c, x_stride_p, BLOCK_P, BLOCK_C)
    dy_ptrs = pointers(dy_ptr, b, p0, c0, dy_stride_b, dy_stride_c, dy_stride_p, BLOCK_P, BLOCK_C)
    x = tl.load(x_ptrs, mask=inside, other=0.0).to(tl.float32)
    dy = tl.load(dy_ptrs, mask=inside, other=0.0).to(tl.float32)
    n = (x - mean[None, :]) * rstd[None, :]
    dn = d_activation(n * factor[None, :] + term[None, :], dy, SILU) * factor[None, :]
    dx = (dn - group_mean[None, :] - n * group_mean_n[None, :]) * rstd[None, :]
    dx_ptrs = pointers(dx_ptr, b, p0, c0, dx_stride_b, dx_stride_c, dx_stride_p, BLOCK_P, BLOCK_C)
    tl.store(dx_ptrs, dx.to(dx_ptr.dtype.element_ty), mask=inside)


def tile(C: int, P: int, channels_last: bool) -> dict[str, int]:
    """Tile sizes, at most TILE elements, long along the contiguous dimension."""
    if channels_last:
        block_c = min(triton.next_power_of_2(C), 128)
        return {"BLOCK_P": min(triton.next_power_of_2(P), TILE // block_c), "BLOCK_C": block_c, "num_warps": 8}
    block_p = min(triton.next_power_of_2(P), TILE)
    return {"BLOCK_P": block_p, "BLOCK_C": min(triton.next_power_of_2(C), TILE // block_p), "num_warps": 8}


class MapLayout:
    """Launch parameters: sizes, strides of [B, C, P] views, tile, grids and the split of positions into chunks."""

    def __init__(self, x_BCP: Tensor, num_groups: int):
        self.B, self.C, self.P = x_BCP.shape
        self.channels = self.C // num_groups
        self.options = tile(self.C, self.P, channels_last=x_BCP.stride(1) == 1 and self.C > 1 and self.P > 1)
        blocks = triton.cdiv(self.C, self.options["BLOCK_C"])
        tiles = triton.cdiv(self.P, self.options["BLOCK_P"])
        tiles_per_chunk = max(1, min(TILES_PER_CHUNK, tiles * blocks * self.B // PROGRAMS))
        self.chunk = tiles_per_chunk * self.options["BLOCK_P"]
        self.chunks = triton.cdiv(self.P, self.chunk)
        self.chunk_grid, self.tile_grid = (self.chunks, blocks, self.B), (tiles, blocks, self.B)

    def reaches(self, dy_BCP: Tensor) -> bool:
        """Whether the offsets within a chunk and a block of channels are int32, as the kernels compute them.

        Dense tensors fit: a chunk is at most 2^15 positions, and along the other dimension a tile is short.
        """
        return self.chunk * dy_BCP.stride(2) + self.options["BLOCK_C"] * dy_BCP.stride(1) < 2**31


def densified(x: Tensor) -> Tensor:
    """`x` if it is contiguous or channels_last, else a copy that is."""
    layout = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim(), torch.contiguous_format)
    if x.is_contiguous() or x.is_contiguous(memory_format=layout):
        return x
    return x.contiguous(memory_format=layout) if x.stride(1) == 1 else x.contiguous()


def positions(x: Tensor) -> Tensor:
    """[B, C, *positions] as [B, C, P]: a view if dense, else possibly a copy."""
    return x.flatten(2) if x.dim() > 2 else x[..., None]


def flags(weight: Tensor | None, bias: Tensor | None, scale: Tensor | None) -> dict[str, bool]:
    return {"WEIGHT": weight is not None, "BIAS": bias is not None, "ADAPTIVE": scale is not None}


def contiguous(*parameters: Tensor | None) -> tuple[Tensor | None, ...]:
    return tuple(None if parameter is None else parameter.contiguous() for parameter in parameters)


def forward_empty(x: Tensor, *operands: Any) -> tuple[Tensor, Tensor, Tensor]:
    num_groups = operands[4]
    mean_BG = x.new_empty(x.shape[0], num_groups, dtype=torch.float32)
    return torch.empty_like(densified(x)), mean_BG, torch.empty_like(mean_BG)


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
    x = densified(x)
    y, mean_BG, rstd_BG = forward_empty(x, weight, bias, scale, shift, num_groups, eps, silu)
    x_BCP, y_BCP = positions(x), positions(y)
    weight, bias, scale, shift = contiguous(weight, bias, scale, shift)
    layout = MapLayout(x_BCP, num_groups)
    part_mean = x.new_empty(layout.B, layout.C, layout.chunks, dtype=torch.float32)
    part_m2 = torch.empty_like(part_mean)
    launchable(moments_kernel)[layout.chunk_grid](
        x_BCP, part_mean, part_m2, *x_BCP.stride(), layout.C, layout.P, layout.chunk, **layout.options
    )
    launchable(merge_moments_kernel)[(layout.B * num_groups,)](
        part_mean, part_m2, mean_BG, rstd_BG, layout.channels, layout.chunks, layout.chunk, layout.P, eps, **MERGE
    )
    launchable(normalise_kernel)[layout.tile_grid](
        x_BCP, y_BCP, weight, bias, scale, shift, mean_BG, rstd_BG, *x_BCP.stride(), *y_BCP.stride(),
        layout.C, layout.P, layout.channels, **flags(weight, bias, scale), SILU=silu, **layout.options,
    )  # fmt: skip
    return y, mean_BG, rstd_BG


def backward_empty(dy: Tensor, x: Tensor, *operands: Any) -> tuple[Tensor, Tensor, Tensor]:
    sum_BC = x.new_empty(x.shape[:2], dtype=torch.float32)
    return torch.empty_like(densified(x)), sum_BC, torch.empty_like(sum_BC)


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
    """dx in the layout of x, and the sums of dh and dh n over positions, [B, C] float32. dy may have any strides."""
    x = densified(x)
    dx, sum_BC, sum_n_BC = backward_empty(dy, x)
    dy_BCP, x_BCP, dx_BCP = positions(dy), positions(x), positions(dx)
    weight, bias, scale, shift = contiguous(weight, bias, scale, shift)
    layout = MapLayout(x_BCP, num_groups)
    part = x.new_empty(layout.B, layout.C, layout.chunks, dtype=torch.float32)
    part_n = torch.empty_like(part)
    mean_dn_BG, mean_dn_n_BG = torch.empty_like(mean_BG), torch.empty_like(mean_BG)
    if not layout.reaches(dy_BCP):
        dy_BCP = torch.empty_like(x_BCP, dtype=dy.dtype).copy_(dy_BCP)
    operands = (weight, bias, scale, shift, mean_BG.contiguous(), rstd_BG.contiguous())
    known = flags(weight, bias, scale)
    launchable(gradient_sums_kernel)[layout.chunk_grid](
        dy_BCP, x_BCP, *operands, part, part_n, *dy_BCP.stride(), *x_BCP.stride(),
        layout.C, layout.P, layout.channels, layout.chunk, **known, SILU=silu, **layout.options,
    )  # fmt: skip
    launchable(merge_gradient_sums_kernel)[(num_groups, layout.B)](
        part, part_n, weight, scale, sum_BC, sum_n_BC, mean_dn_BG, mean_dn_n_BG, layout.C, layout.P, layout.channels,
        layout.chunks, WEIGHT=known["WEIGHT"], ADAPTIVE=known["ADAPTIVE"], **MERGE_GRADIENTS,
    )  # fmt: skip
    launchable(gradient_kernel)[layout.tile_grid](
        dy_BCP, x_BCP, dx_BCP, *operands, mean_dn_BG, mean_dn_n_BG, *dy_BCP.stride(), *x_BCP.stride(), *dx_BCP.stride(),
        layout.C, layout.P, layout.channels, **known, SILU=silu, **layout.options,
    )  # fmt: skip
    return dx, sum_BC, sum_n_BC


group_norm_silu_forward = register_triton_op("dae_kernels::group_norm_silu_forward", forward_launcher, forward_empty)
group_norm_silu_backward = register_triton_op("dae_kernels::group_norm_silu_backward", backward_launcher, backward_empty)
