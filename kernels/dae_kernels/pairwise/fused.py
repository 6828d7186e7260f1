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
- With equal weights nothing but these passes, one sum of their rows and the small kernels of fused_centre.py is launched: the
  passes multiply by what the weights come to, and the pass across adds its gradients to those of the pass within.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dae_kernels.clouds import SAMPLES, middle, sampled
from dae_kernels.dispatch import register_op
from dae_kernels.pairwise.fused_centre import BLOCK, centre_kernel, largest_kernel, middle_kernel
from dae_kernels.tiles import cdiv, next_power_of_2
from dae_kernels.tracing import traced


@triton.jit(do_not_specialize=["N", "M", "d_end", "q_start", "s_start", "sum_start"])
def pair_rows_kernel(
    q_ptr, s_ptr, q_norm_ptr, s_norm_ptr, v_ptr, rate_ptr, sum_ptr, gradient_ptr,
    N, M, d_end, q_start, s_start, sum_start, factor, slope_factor,
    D: tl.constexpr, BANDWIDTHS: tl.constexpr, SAME: tl.constexpr, GRADIENT: tl.constexpr, WEIGHTED: tl.constexpr,
    ADD: tl.constexpr, INPUT_PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Sums over pairs: a program has BLOCK_N rows of q and BLOCK_E dimensions of their gradients, and loops over all of s.

    Row i of the sums and gradients is factor sum_j v_j f(|q_i - s_j|) and slope_factor times its derivative; unless WEIGHTED v is
    1 and v_ptr is not read. With ADD the gradient is added to what is there. The starts are those of the norms and of the sums.
    `d_end` is D once more, at run time: the compiler would unroll a loop over D of known length, and spill.
    """
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_inside = row < N
    d = tl.arange(0, BLOCK_D)
    e = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    q_norm = tl.load(q_norm_ptr + q_start + row, mask=row_inside, other=0.0)
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
        s_norm = tl.load(s_norm_ptr + s_start + column, mask=column_inside, other=0.0)
        v = tl.where(column_inside, 1.0, 0.0)
        if WEIGHTED:
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
        tl.store(sum_ptr + sum_start + row, sums * factor, mask=row_inside)
    if GRADIENT:
        inside = row_inside[:, None] & (e[None, :] < D)
        q = tl.load(q_ptr + row[:, None] * D + e[None, :], mask=inside, other=0.0)
        gradient = (q * slopes[:, None] - pulls) * slope_factor
        gradient_ptrs = gradient_ptr + row[:, None] * D + e[None, :]
        if ADD:
            gradient += tl.load(gradient_ptrs, mask=inside, other=0.0)
        tl.store(gradient_ptrs, gradient, mask=inside)


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
    """[max(B, 1)] float32 rates: exp(-r^2 / (2 s^2)) = 2^(rate r^2); kept, as a GPU waits for numbers of the host.

    While a CUDA graph is captured they are filled in on the device: what is made there has its values from a replay on, and the
    graph would outlive what is kept.
    """
    if traced():
        return torch.tensor(rate_numbers(bandwidths), dtype=torch.float32, device=device)
    return kept_rates(bandwidths, device)


def kept_rates(bandwidths: tuple[float, ...], device: torch.device) -> Tensor:
    """`rates` where nothing traces, as in the body of an operator."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return torch.cat([torch.full((1,), rate, device=device) for rate in rate_numbers(bandwidths)])
    return known_rates(bandwidths, device)


def rate_numbers(bandwidths: tuple[float, ...]) -> list[float]:
    return [-math.log2(math.e) / (2 * s * s) for s in bandwidths] or [0.0]


@functools.lru_cache(maxsize=256)
def known_rates(bandwidths: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor(rate_numbers(bandwidths), dtype=torch.float32, device=device)


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
    square_N = q_ND.square().sum(dim=1)
    square_M = square_N if s_MD is q_ND else s_MD.square().sum(dim=1)
    run, options = launcher(N, D, bandwidths, same, gradient)
    run(
        q_ND, s_MD, square_N, square_M, v_M, rate_B, sum_N, gradient_ND, N, M, D, 0, 0, 0, 1.0, 1.0,
        WEIGHTED=True, ADD=False, **options,
    )  # fmt: skip


@functools.lru_cache(maxsize=1024)
def launcher(N: int, D: int, bandwidths: int, same: bool, gradient: bool) -> tuple[Callable, dict[str, Any]]:
    """The kernel on its grid, and its constants but WEIGHTED and ADD."""
    amd = torch.version.hip is not None
    options: dict[str, Any] = {**tile(D, bandwidths, same, gradient, amd)}
    grid = (cdiv(N, options["BLOCK_N"]), cdiv(D, options["BLOCK_E"]) if gradient else 1)
    options |= {"D": D, "BANDWIDTHS": bandwidths, "SAME": same, "GRADIENT": gradient}
    # AMD has no tf32x3; its float32 product is a float32 product.
    return pair_rows_kernel[grid], options | {"INPUT_PRECISION": "ieee" if amd else "tf32x3"}


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


def distance_empty(
    x_ND: Tensor, y_MD: Tensor, bandwidths: Sequence[float], unbiased: bool, need_x: bool, need_y: bool
) -> tuple[Tensor, Tensor, Tensor]:
    (N, D), M = x_ND.shape, y_MD.shape[0]
    return (
        x_ND.new_empty((), dtype=torch.float32),
        x_ND.new_empty((N if need_x else 0, D), dtype=torch.float32),
        x_ND.new_empty((M if need_y else 0, D), dtype=torch.float32),
    )


class Pass(NamedTuple):
    """A launch of the kernel over one kind of pairs; q, s and the gradient are numbers of buffers."""

    run: Callable
    q: int
    s: int
    gradient: int
    numbers: tuple[float, ...]
    options: dict[str, Any]


class Passes:
    """The launches of a distance between clouds of equal weights, made once per sizes and kind.

    `medians` has two numbers after the medians, then the norms of x and y about their own medians, then about those of both.
    """

    def __init__(self, N: int, M: int, D: int, bandwidths: int, unbiased: bool, need_x: bool, need_y: bool) -> None:
        by_x = need_x or not need_y
        self.norms = 3 * D + 2
        x_alone, y_alone, x_common, y_common = (self.norms + start for start in (0, N, N + M, N + M + N))
        self.scratch, self.sums = self.norms + 2 * (N + M), N + M + (N if by_x else 0) + (M if need_y else 0)
        self.scale = 3 * D + 1
        self.dx, self.dy = (N if need_x else 0, D), (M if need_y else 0, D)
        grid_x, grid_y = (cdiv(N, BLOCK["BLOCK_N"]),), (cdiv(M, BLOCK["BLOCK_N"]),)
        self.middle = middle_kernel[(D,)]
        self.largest = None if bandwidths else (largest_kernel[grid_x], largest_kernel[grid_y])
        self.centre = centre_kernel[grid_x], centre_kernel[grid_y]
        self.centred = {"SCALED": bandwidths == 0, **BLOCK}
        self.starts_x, self.starts_y = (0, x_alone, x_common), (2, y_alone, y_common)
        # What the sums over the pairs within x, within y and across are multiplied by, and the pairs of a point with itself.
        self.own = bandwidths * (1 / N + 1 / M) if bandwidths and not unbiased else 0.0
        within_x, within_y = (
            (1 / (n * n - n) if unbiased else 1 / (n * n) for n in (N, M)) if bandwidths else (-1 / N**2, -1 / M**2)
        )
        across = (-2.0 if bandwidths else 2.0) / (N * M)
        once = across / 2 if need_x and need_y else across  # the sum is made twice

        def one(q, s, gradient, rows, columns, q_norm, s_norm, start, factor, slope, same, needed):  # type: ignore[no-untyped-def]
            run, options = launcher(rows, D, bandwidths, same, needed)
            numbers = (rows, columns, D, q_norm, s_norm, start, factor, slope)
            return Pass(run, q, s, gradient, numbers, options | {"WEIGHTED": False, "ADD": needed and not same})

        self.passes = [
            one(0, 0, 0, N, N, x_alone, x_alone, 0, within_x, 2 * within_x, True, need_x),
            one(1, 1, 1, M, M, y_alone, y_alone, N, within_y, 2 * within_y, True, need_y),
        ]
        if by_x:
            self.passes.append(one(2, 3, 0, N, M, x_common, y_common, N + M, once, across, False, need_x))
        if need_y:
            self.passes.append(one(3, 2, 1, M, N, y_common, x_common, self.sums - M, once, across, False, True))


known_passes = functools.lru_cache(maxsize=1024)(Passes)


def distance_launcher(
    x_ND: Tensor, y_MD: Tensor, bandwidths: Sequence[float], unbiased: bool, need_x: bool, need_y: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """`mmd` with bandwidths, `energy_distance` without, of equal weights; and the gradients by x and y, float32."""
    (N, D), M, B = x_ND.shape, y_MD.shape[0], len(bandwidths)
    plan = known_passes(N, M, D, B, unbiased, need_x, need_y)
    x_operands, y_operands = (N, D, *x_ND.stride()), (M, D, *y_MD.stride())
    medians = torch.empty(plan.scratch, dtype=torch.float32, device=x_ND.device)
    x_alone, y_alone, sums = medians.new_empty((N, D)), medians.new_empty((M, D)), medians.new_empty(plan.sums)
    clouds = x_alone, y_alone, torch.empty_like(x_alone), torch.empty_like(y_alone)
    gradients = medians.new_empty(plan.dx), medians.new_empty(plan.dy)
    plan.middle(x_ND, y_MD, medians, N, M, D, *x_operands[2:], *y_operands[2:], SAMPLES=SAMPLES, num_warps=4)
    if plan.largest is not None:  # float32 squared distances overflow above 1e19 and underflow below 1e-19
        plan.largest[0](x_ND, medians, *x_operands, 0, **BLOCK)
        plan.largest[1](y_MD, medians, *y_operands, 2, **BLOCK)
    plan.centre[0](x_ND, medians, x_alone, clouds[2], *x_operands, *plan.starts_x, **plan.centred)
    plan.centre[1](y_MD, medians, y_alone, clouds[3], *y_operands, *plan.starts_y, **plan.centred)
    rate_B = kept_rates(tuple(bandwidths), x_ND.device)
    for run, q, s, gradient, numbers, options in plan.passes:
        run(clouds[q], clouds[s], medians, medians, medians, rate_B, sums, gradients[gradient], *numbers, **options)
    value = sums.sum(dtype=torch.float64)
    if plan.largest is not None:
        value = value / medians[plan.scale]
    elif plan.own:
        value = value + plan.own
    return value.float(), *gradients


pair_rows_triton = register_op("dae_kernels::pair_rows", pair_rows_launcher, pair_rows_empty)
pair_distance_triton = register_op("dae_kernels::pair_distance", distance_launcher, distance_empty)
