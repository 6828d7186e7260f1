"""Clouds about their medians for the passes over pairs, in Triton: float32, with their squared norms, scaled for distances.

Each kernel reads the points in their own dtype and strides, once: bound by memory, and small beside one pass over the pairs. With
torch's operators they were 30 launches.
"""

from __future__ import annotations

import triton
import triton.language as tl

BLOCK = {"BLOCK_N": 32, "BLOCK_D": 32, "num_warps": 4}


@triton.jit
def middle_kernel(
    x_ptr, y_ptr, medians_ptr,
    N, M, D, x_stride_n, x_stride_d, y_stride_n, y_stride_d,
    SAMPLES: tl.constexpr,
):  # fmt: skip
    """`clouds.middle` of `clouds.sampled` of x, of both, and of y, with equal weights, into medians [3, D]; a 0 after them.

    Grid (D). The lower median of both is the greatest of the smaller half: of the least of the n-th and the n-th last.
    """
    d = tl.program_id(0).to(tl.int64)
    s = tl.arange(0, SAMPLES)
    step = 2 * s.to(tl.int64) + 1
    x_ptrs = x_ptr + (step * N // (2 * SAMPLES)) * x_stride_n + d * x_stride_d
    y_ptrs = y_ptr + (step * M // (2 * SAMPLES)) * y_stride_n + d * y_stride_d
    x = tl.sort(tl.load(x_ptrs).to(tl.float32))
    y = tl.sort(tl.load(y_ptrs).to(tl.float32), descending=True)
    of_x = tl.sum(tl.where(s == (SAMPLES - 1) // 2, x, 0.0), axis=0)
    of_y = tl.sum(tl.where(s == SAMPLES // 2, y, 0.0), axis=0)
    of_both = tl.max(tl.minimum(x, y), axis=0)
    tl.store(medians_ptr + d, of_x)
    tl.store(medians_ptr + D + d, of_both)
    tl.store(medians_ptr + 2 * D + d, of_y)
    if d == 0:
        tl.store(medians_ptr + 3 * D, 0.0)


@triton.jit
def about_medians(x_ptr, medians_ptr, row, d, N, D, stride_n, stride_d, own):
    """A tile of a cloud about its own medians, number `own`, and about those of both; 0 outside."""
    inside = (row[:, None] < N) & (d[None, :] < D)
    x_ptrs = x_ptr + row[:, None] * stride_n + d[None, :].to(tl.int64) * stride_d
    x = tl.load(x_ptrs, mask=inside, other=0.0).to(tl.float32)
    alone = x - tl.load(medians_ptr + own * D + d, mask=d < D, other=0.0)[None, :]
    common = x - tl.load(medians_ptr + D + d, mask=d < D, other=0.0)[None, :]
    return tl.where(inside, alone, 0.0), tl.where(inside, common, 0.0), inside


@triton.jit
def largest_kernel(
    x_ptr, medians_ptr,
    N, D, stride_n, stride_d, own,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The largest absolute number of a cloud about both medians, unless what is at medians [3 D] is larger. Grid (rows)."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    largest = tl.zeros([BLOCK_N], tl.float32)
    for d0 in range(0, D, BLOCK_D):
        d = d0 + tl.arange(0, BLOCK_D)
        alone, common, _ = about_medians(x_ptr, medians_ptr, row, d, N, D, stride_n, stride_d, own)
        largest = tl.maximum(largest, tl.max(tl.maximum(tl.abs(alone), tl.abs(common)), axis=1))
    tl.atomic_max(medians_ptr + 3 * D, tl.max(largest, axis=0))


@triton.jit
def centre_kernel(
    x_ptr, medians_ptr, alone_ptr, common_ptr,
    N, D, stride_n, stride_d, own, alone_start, common_start,
    SCALED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A cloud about its own medians and about those of both, [N, D], and its squared norms [N] from two places after the medians.

    If SCALED, times `clouds.unit_scale` of the largest number, which is stored at medians [3 D + 1]. Grid (rows).
    """
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    scale = 1.0
    if SCALED:  # 2^-e of a number from 2^e on; NaN and infinity stay what they are
        exponent = (tl.load(medians_ptr + 3 * D).to(tl.int32, bitcast=True) >> 23) & 255
        scale = (tl.minimum(tl.maximum(254 - exponent, 1), 253) << 23).to(tl.float32, bitcast=True)
        tl.store(medians_ptr + 3 * D + 1, scale)
    norm_alone = tl.zeros([BLOCK_N], tl.float32)
    norm_common = tl.zeros([BLOCK_N], tl.float32)
    for d0 in range(0, D, BLOCK_D):
        d = d0 + tl.arange(0, BLOCK_D)
        alone, common, inside = about_medians(x_ptr, medians_ptr, row, d, N, D, stride_n, stride_d, own)
        alone *= scale
        common *= scale
        norm_alone += tl.sum(alone * alone, axis=1)
        norm_common += tl.sum(common * common, axis=1)
        place = row[:, None] * D + d[None, :]
        tl.store(alone_ptr + place, alone, mask=inside)
        tl.store(common_ptr + place, common, mask=inside)
    tl.store(medians_ptr + alone_start + row, norm_alone, mask=row < N)
    tl.store(medians_ptr + common_start + row, norm_common, mask=row < N)
