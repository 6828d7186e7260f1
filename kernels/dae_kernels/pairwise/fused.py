"""Sums over pairs in Triton: one pass over the distances, which never leave the chip. Serves `mmd` and `energy_distance`.

Roofline, by counting (the kernel is not measured; H100: 3.0 TB/s, 67 TFLOP/s in float32, about half of 990 / 2 in tf32).
- Flop per pass over N M pairs: 2 N M D for the distances and, with the gradient, 2 N M D more for its sums; tf32x3 takes three
  products for one. Bytes: 4 (N + M) D in and 4 N D out, so with N = M = 16384, D = 64 thousands of flop per byte: bound by
  arithmetic. Every program reads all of s, M D 4 bytes, from L2 (4 MB there, of 50 MB).
- An SM does 16 exponentials or roots per cycle and, in tf32, 1024 multiply-adds. A pair takes one root for the energy distance
  and one exponential per bandwidth for mmd: B / 16 cycles against 3 D / 1024 (6 D / 1024 with the gradient). With B = 5 the
  exponentials are the bound below D = 107 (53 with the gradient), the products above.
- At N = M = 16384, D = 64, B = 5 that makes 0.36 ms for a pass over 2.7e8 pairs on 132 SMs at 1.76 GHz, and 0.43 ms with the
  gradient.
- Bandwidths that are powers of two of each other need one exponential and squarings; not taken, as a squaring doubles the
  relative error and nothing here could be timed.
- Tiles: BLOCK_N x BLOCK_M float32 values for each of distance, value and slope stand in registers, and the gradient's sums
  BLOCK_N x BLOCK_E besides: with the gradient, 64 x 32 over 128 threads takes 16 registers for each, and 32 for its sums.
  BLOCK_D = 16, as tf32x3 holds an operand twice. Beyond BLOCK_E = 64 dimensions the gradient is made in slices, each of which
  takes the distances again: D / 64 times their cost, for no limit on D and no spill (profiling/aot/pairwise.py).
- N / BLOCK_N programs (times slices) fill 132 SMs from N = 8500; below that, a split over M is still to be written.
"""

from __future__ import annotations

import functools
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from dae_kernels.clouds import middle, sampled
from dae_kernels.dispatch import register_op
from dae_kernels.tiles import cdiv, next_power_of_2
from dae_kernels.tracing import traced


@triton.jit(do_not_specialize=["N", "M", "d_end"])
def pair_rows_kernel(
    q_ptr, s_ptr, q_norm_ptr, s_norm_ptr, v_ptr, rate_ptr, sum_ptr, gradient_ptr,
    N, M, d_end,
    D: tl.constexpr, BANDWIDTHS: tl.constexpr, SAME: tl.constexpr, GRADIENT: tl.constexpr, INPUT_PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Sums over pairs: a program has BLOCK_N rows of q and BLOCK_E dimensions of their gradients, and loops over all of s.

    `d_end` is D once more, at run time: the compiler would unroll a loop over D of known length, and spill.
    """
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_inside = row < N
    d = tl.arange(0, BLOCK_D)
    e = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    q_norm = tl.load(q_norm_ptr + row, mask=row_inside, other=0.0)
    sums = tl.zeros([BLOCK_N], tl.float32)
    slopes = tl.zeros([BLOCK_N], tl.float32)
    pulls = tl.zeros([BLOCK_N, BLOCK_E], tl.float32)
    for m0 in range(0, M, BLOCK_M):
        column = m0 + tl.arange(0, BLOCK_M)
        column_inside = column < M
        dot = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
        for d0 in range(0, d_end, BLOCK_D):
            d_inside = d0 + d[None, :] < D
            q_ptrs = q_ptr + row[:, None] * D + d0 + d[None, :]
            s_ptrs = s_ptr + column.to(tl.int64)[:, None] * D + d0 + d[None, :]
            q = tl.load(q_ptrs, mask=row_inside[:, None] & d_inside, other=0.0)
            s = tl.load(s_ptrs, mask=column_inside[:, None] & d_inside, other=0.0)
            dot = tl.dot(q, tl.trans(s), dot, input_precision=INPUT_PRECISION)
        s_norm = tl.load(s_norm_ptr + column, mask=column_inside, other=0.0)
        v = tl.load(v_ptr + column, mask=column_inside, other=0.0)
        scale = q_norm[:, None] + s_norm[None, :]
        square = scale - 2.0 * dot
        if BANDWIDTHS > 0:
            square = tl.where(square < 0.0, 0.0, square)  # NaN stays
            value = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
            slope = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
            for b in range(BANDWIDTHS):
                rate = tl.load(rate_ptr + b)
                bump = tl.exp2(square * rate)
                value += bump
                slope += bump * (rate * 1.3862943611198906)  # 2 ln 2: the rate is -log2(e) / (2 s^2), the slope -1 / s^2
        else:
            # Below 1e-6 of the norms the difference is rounding: the points count as equal, with gradient 0. NaN stays.
            value = tl.sqrt(tl.where(square < 1e-6 * scale, 0.0, square))
            slope = tl.where(value == 0.0, 0.0, 1.0 / value)
        if SAME:
            other = row[:, None] != column[None, :]
            value = tl.where(other, value, 0.0)
            slope = tl.where(other, slope, 0.0)
        sums += tl.sum(value * v[None, :], axis=1)
        if GRADIENT:
            slope = slope * v[None, :]
            slopes += tl.sum(slope, axis=1)
            s_ptrs = s_ptr + column.to(tl.int64)[:, None] * D + e[None, :]
            s = tl.load(s_ptrs, mask=column_inside[:, None] & (e[None, :] < D), other=0.0)
            pulls = tl.dot(slope, s, pulls, input_precision=INPUT_PRECISION)
    if tl.program_id(1) == 0:
        tl.store(sum_ptr + row, sums, mask=row_inside)
    if GRADIENT:
        inside = row_inside[:, None] & (e[None, :] < D)
        q = tl.load(q_ptr + row[:, None] * D + e[None, :], mask=inside, other=0.0)
        tl.store(gradient_ptr + row[:, None] * D + e[None, :], q * slopes[:, None] - pulls, mask=inside)


def tile(D: int, bandwidths: int, same: bool, gradient: bool, amd: bool) -> dict[str, int]:
    """Tile sizes and launch options; a tensor core takes no fewer than 16 dimensions.

    AMD keeps a mask in scalar registers, and an element of a root's gradient among the same points has several: of 32 columns
    some spilled with triton 3.8.
    """
    block_e = max(16, min(64, next_power_of_2(D))) if gradient else 16
    block_m = (16 if amd and same and not bandwidths else 32) if gradient else 64
    return {"BLOCK_N": 64, "BLOCK_M": block_m, "BLOCK_D": 16, "BLOCK_E": block_e, "num_warps": 4, "num_stages": 2}


def centred(x_ND: Tensor, y_MD: Tensor, a_N: Tensor | None, b_M: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """float32 clouds centred to reduce cancellation in |x|^2 + |y|^2 - 2 x.y: x alone, x and y, y alone.

    The centres are medians, which outliers do not move; each cloud has its own for its own pairs, as it may be far from the
    other.
    """
    x_ND, y_MD = x_ND.float(), y_MD.float()
    x_SD, y_SD = sampled(x_ND, a_N), sampled(y_MD, b_M)
    x_D, common_D, y_D = (middle(points) for points in (x_SD, torch.cat([x_SD, y_SD]), y_SD))
    return x_ND - x_D, x_ND - common_D, y_MD - common_D, y_MD - y_D


def rates(bandwidths: tuple[float, ...], device: torch.device) -> Tensor:
    """[max(B, 1)] float32 rates: exp(-r^2 / (2 s^2)) = 2^(rate r^2); kept, as a GPU waits for numbers of the host."""
    return made_rates(bandwidths, device) if traced() else known_rates(bandwidths, device)


def made_rates(bandwidths: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor([-math.log2(math.e) / (2 * s * s) for s in bandwidths] or [0.0], dtype=torch.float32, device=device)


known_rates = functools.lru_cache(maxsize=256)(made_rates)


def launch(
    q_ND: Tensor,
    s_MD: Tensor,
    v_M: Tensor,
    rate_B: Tensor,
    sum_N: Tensor,
    gradient_ND: Tensor,
    bandwidths: int,
    same: bool,
    gradient: bool,
) -> None:
    """The kernel into contiguous float32 buffers; gradient_ND is not touched unless `gradient`."""
    N, M, D = q_ND.shape[0], s_MD.shape[0], int(q_ND.shape[1])
    amd = torch.version.hip is not None
    options = tile(D, bandwidths, same, gradient, amd)
    square_N = q_ND.square().sum(dim=1)
    grid = (cdiv(N, options["BLOCK_N"]), cdiv(D, options["BLOCK_E"]) if gradient else 1)
    pair_rows_kernel[grid](
        q_ND,
        s_MD,
        square_N,
        square_N if s_MD is q_ND else s_MD.square().sum(dim=1),
        v_M,
        rate_B,
        sum_N,
        gradient_ND,
        N,
        M,
        D,
        D=D,
        BANDWIDTHS=bandwidths,
        SAME=same,
        GRADIENT=gradient,
        INPUT_PRECISION="ieee" if amd else "tf32x3",  # AMD has no tf32x3; its float32 product is a float32 product
        **options,
    )


def pair_rows_empty(
    q_ND: Tensor, s_MD: Tensor, v_M: Tensor, rate_B: Tensor, bandwidths: int, same: bool, gradient: bool
) -> tuple[Tensor, Tensor]:
    return q_ND.new_empty(q_ND.shape[0]), q_ND.new_empty(q_ND.shape[0] if gradient else 0, q_ND.shape[1])


def pair_rows_launcher(
    q_ND: Tensor, s_MD: Tensor, v_M: Tensor, rate_B: Tensor, bandwidths: int, same: bool, gradient: bool
) -> tuple[Tensor, Tensor]:
    sum_N, gradient_ND = pair_rows_empty(q_ND, s_MD, v_M, rate_B, bandwidths, same, gradient)
    launch(q_ND.contiguous(), s_MD.contiguous(), v_M.contiguous(), rate_B, sum_N, gradient_ND, bandwidths, same, gradient)
    return sum_N, gradient_ND


pair_rows_triton = register_op("dae_kernels::pair_rows", pair_rows_launcher, pair_rows_empty)
