"""A Sinkhorn update in Triton: an online log-sum-exp over blocks of points, whose scores never leave the chip.

Roofline of one update (counts, with the floors measured on an H100: 3.0 TB/s; the kernels themselves are not yet measured).
- p = 2: a score is x.y / epsilon + u_j, so 2 N M D flop in the product, three times that in tf32x3. Bytes: 4 (N + M) D and
  20 (N + M) of vectors, against which N M D is always large: bound by the chip, not by memory. A divergence of K steps in its
  schedule (9 for a diameter of 6 and the defaults) takes 4 (K + 2) updates with debias, 2 (K + 2) without.
- A score costs one exp2, of which an SM does 16 per cycle, and some six float32 instructions (128 per cycle): about 0.11 cycles.
  The product costs 3 D multiply-adds in tf32x3 at 1024 per cycle: 0.19 cycles for D = 64. So exponentials are the bound
  below D = 40 or so, the product above. 16-bit clouds take the same path, as centring makes them float32.
- The tile is chosen for registers as in nearest_code: 64 x 64 sums over 128 threads are 32 per thread; tf32x3 holds its operands
  twice, hence the steps of 16 in D. Rows of x stay on the chip for D <= 16; above, both operands stream out of L2.
- p = 1 takes distances from differences, 2 N M D float32 instructions without tensor cores (1 cycle per score for D = 64), as
  the root of |x|^2 - 2 x.y + |y|^2 is wrong for near points by the root of the rounding.
- The derivative, or a mean of values under the plan, is one more pass: the plan is recomputed for each BLOCK_E columns and
  multiplied by y or the values (the derivative for p = 1: by differences, without tensor cores).
- N / BLOCK_N programs fill 132 SMs from N = 8500. Below that the columns are shared out, as long as a share stays at
  MIN_SHARE of them: 64 x 2048 scores take an SM 26,000 cycles or 15 us at the bounds above, as much as the launches that join
  the shares.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from dae_kernels.sinkhorn_divergence.reference import Update
from dae_kernels.tiles import cdiv, processors


@triton.jit
def log2_weights(log_b_ptr, col, M):
    """Logarithms to base 2 of the weights, -inf beyond the last point."""
    return tl.load(log_b_ptr + col, mask=col < M, other=float("-inf")) * 1.4426950408889634


@triton.jit
def expm1(x):
    """exp(x) - 1 to a rounding of it, for |x| < 1.5: its series to x^12."""
    series = 1.0 + x * (1.0 / 12.0)
    for n in tl.static_range(11, 1, -1):
        series = 1.0 + series * (x * (1.0 / n))
    return series * x


@triton.jit
def scores(
    x,
    x_ptr, y_ptr, log_b_ptr, g_ptr,
    row, col, N, M, d_end, scale,
    D: tl.constexpr, P: tl.constexpr, FLAT: tl.constexpr, INPUT_PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Scores to base 2 of a tile, and its distances (products for P = 2). A score is -inf where the weight is 0.

    If FLAT, scores are without their weights.
    """
    tile = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    if P == 1:
        for d0 in range(0, d_end):
            x_d = tl.load(x_ptr + row * D + d0, mask=row < N, other=0.0)
            y_d = tl.load(y_ptr + col.to(tl.int64) * D + d0, mask=col < M, other=0.0)
            difference = x_d[:, None] - y_d[None, :]
            tile += difference * difference
        tile = tl.sqrt_rn(tile)
    else:
        d = tl.arange(0, BLOCK_D)
        y_ptrs = y_ptr + col.to(tl.int64)[:, None] * D + d[None, :]
        if D <= BLOCK_D:
            y = tl.load(y_ptrs, mask=(col[:, None] < M) & (d[None, :] < D), other=0.0)
            tile = tl.dot(x, tl.trans(y), tile, input_precision=INPUT_PRECISION)
        else:
            x_ptrs = x_ptr + row[:, None] * D + d[None, :]
            for d0 in range(0, d_end, BLOCK_D):
                d_inside = d0 + d[None, :] < D
                x_d = tl.load(x_ptrs + d0, mask=(row[:, None] < N) & d_inside, other=0.0)
                y_d = tl.load(y_ptrs + d0, mask=(col[:, None] < M) & d_inside, other=0.0)
                tile = tl.dot(x_d, tl.trans(y_d), tile, input_precision=INPUT_PRECISION)
    u = tl.load(g_ptr + col, mask=col < M, other=0.0) * scale
    if not FLAT:
        u += log2_weights(log_b_ptr, col, M)
    sign: tl.constexpr = 1.0 if P == 2 else -1.0
    return tile * (sign * scale) + u[None, :], tile


@triton.jit
def new_potential(
    x_ptr, y_ptr, log_b_ptr, g_ptr,
    row, start, share, N, M, d_end, scale,
    D: tl.constexpr, P: tl.constexpr, FLAT: tl.constexpr, INPUT_PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """f = -log2(sum_j 2^score_j) / scale for BLOCK_N rows and `share` columns from `start` on; scale = log2(e) / epsilon.

    If FLAT (see the solver), the sum of b_j (e^score_j - 1) in its place.
    """
    d = tl.arange(0, BLOCK_D)
    x = tl.load(x_ptr + row[:, None] * D + d[None, :], mask=(row[:, None] < N) & (d[None, :] < D), other=0.0)
    top = tl.full([BLOCK_N], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_N], tl.float32)
    for m0 in range(start, tl.minimum(start + share, M), BLOCK_M):
        col = m0 + tl.arange(0, BLOCK_M)
        score, _ = scores(
            x, x_ptr, y_ptr, log_b_ptr, g_ptr, row, col, N, M, d_end, scale,
            D, P, FLAT, INPUT_PRECISION, BLOCK_N, BLOCK_M, BLOCK_D,
        )  # fmt: skip
        if FLAT:
            b = tl.exp2(log2_weights(log_b_ptr, col, M))
            total += tl.sum(b[None, :] * expm1(score * 0.6931471805599453), axis=1)
        else:
            new_top = tl.maximum(top, tl.max(score, axis=1))
            # While all weights are 0 the maximum is -inf, and -inf - (-inf) is NaN.
            finite_top = tl.where(new_top == float("-inf"), 0.0, new_top)
            total = total * tl.exp2(top - finite_top) + tl.sum(tl.exp2(score - finite_top[:, None]), axis=1)
            top = new_top
    return total if FLAT else -(tl.log2(total) + top) / scale


@triton.jit
def log1p(x):
    """log(1 + x) to a few roundings of it: the rounding of 1 + x is divided out."""
    whole = 1.0 + x
    return tl.where(whole == 1.0, x, tl.log(whole) * x / tl.where(whole == 1.0, 1.0, whole - 1.0))


@triton.jit
def whole_potential(f, old_ptrs, inside, scale, FLAT: tl.constexpr, AVERAGE: tl.constexpr):
    """The potential from what `new_potential` has of all columns, averaged with the old one if AVERAGE."""
    if FLAT:
        f = -log1p(f) / (scale * 0.6931471805599453)
    if AVERAGE:
        f = (f + tl.load(old_ptrs, mask=inside, other=0.0)) / 2
    return f


@triton.jit(do_not_specialize=["shares", "size"])
def sinkhorn_join_kernel(
    part_ptr, old_ptr, new_ptr,
    shares, size, scale,
    FLAT: tl.constexpr, AVERAGE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The potentials of [shares, size] parts, joined in order. Grid (size)."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < size
    top = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for n in range(0, shares):
        part = tl.load(part_ptr + tl.cast(n, tl.int64) * size + place, mask=inside, other=0.0)
        if FLAT:
            total += part
        else:
            score = -part * scale  # to base 2
            new_top = tl.maximum(top, score)
            finite_top = tl.where(new_top == float("-inf"), 0.0, new_top)
            total = total * tl.exp2(top - finite_top) + tl.exp2(score - finite_top)
            top = new_top
    f = total if FLAT else -(tl.log2(total) + top) / scale
    tl.store(new_ptr + place, whole_potential(f, old_ptr + place, inside, scale, FLAT, AVERAGE), mask=inside)


@triton.jit(do_not_specialize=["N", "M", "share", "d_end"])
def sinkhorn_update_kernel(
    x_ptr, y_ptr, log_b_ptr, g_ptr, average_ptr, f_ptr,
    N, M, share, d_end, scale,
    D: tl.constexpr, P: tl.constexpr, FLAT: tl.constexpr, AVERAGE: tl.constexpr, WHOLE: tl.constexpr,
    INPUT_PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The new potential, averaged with `average` if AVERAGE; unless WHOLE, `new_potential` of each share, [shares, N].

    `d_end` is D once more, at run time: the compiler would unroll a loop over D of known length, and spill.
    """
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    f = new_potential(
        x_ptr, y_ptr, log_b_ptr, g_ptr, row, tl.program_id(1) * share, share, N, M, d_end, scale,
        D, P, FLAT, INPUT_PRECISION, BLOCK_N, BLOCK_M, BLOCK_D,
    )  # fmt: skip
    if WHOLE:
        f = whole_potential(f, average_ptr + row, row < N, scale, FLAT, AVERAGE)
    tl.store(f_ptr + tl.program_id(1).to(tl.int64) * N + row, f, mask=row < N)


@triton.jit
def write_means(
    x_ptr, y_ptr, v_ptr, log_b_ptr, g_ptr, f_ptr, out_ptr,
    row, e0, N, M, E, d_end, scale,
    D: tl.constexpr, P: tl.constexpr, GRADIENT: tl.constexpr, INPUT_PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """sum_j P_ij v_j for BLOCK_N rows and BLOCK_E of the E columns of v; f makes the rows of the plan sum to 1.

    If GRADIENT, in its place sum_j P_ij d|x_i - y_j|^P / P / dx_i: for P = 2 that is x_i less the mean of v = y.
    """
    d = tl.arange(0, BLOCK_D)
    e = e0 + tl.arange(0, BLOCK_E)
    x = tl.load(x_ptr + row[:, None] * D + d[None, :], mask=(row[:, None] < N) & (d[None, :] < D), other=0.0)
    f = tl.load(f_ptr + row, mask=row < N, other=0.0)
    total = tl.zeros([BLOCK_N], tl.float32)
    sums = tl.zeros([BLOCK_N, BLOCK_E], tl.float32)
    for m0 in range(0, M, BLOCK_M):
        col = m0 + tl.arange(0, BLOCK_M)
        score, distance = scores(
            x, x_ptr, y_ptr, log_b_ptr, g_ptr, row, col, N, M, d_end, scale,
            D, P, False, INPUT_PRECISION, BLOCK_N, BLOCK_M, BLOCK_D,
        )  # fmt: skip
        plan = tl.exp2(score + (f * scale)[:, None])
        total += tl.sum(plan, axis=1)
        if GRADIENT and P == 1:
            # From differences, as for distances: near points have large weights. A point's own distance counts as 0.
            weight = tl.where(distance > 0, plan / distance, 0.0)
            for k in range(0, tl.minimum(BLOCK_E, d_end - e0)):
                x_k = tl.load(x_ptr + row * D + e0 + k, mask=row < N, other=0.0)
                y_k = tl.load(y_ptr + col.to(tl.int64) * D + e0 + k, mask=col < M, other=0.0)
                sums_k = tl.sum(weight * (x_k[:, None] - y_k[None, :]), axis=1)
                sums += tl.where(tl.arange(0, BLOCK_E)[None, :] == k, sums_k[:, None], 0.0)
        else:
            v_ptrs = v_ptr + col.to(tl.int64)[:, None] * E + e[None, :]
            v = tl.load(v_ptrs, mask=(col[:, None] < M) & (e[None, :] < E), other=0.0)
            sums = tl.dot(plan, v, sums, input_precision=INPUT_PRECISION)
    inside = (row[:, None] < N) & (e[None, :] < E)
    out = sums / total[:, None]
    if GRADIENT and P == 2:
        out = tl.load(x_ptr + row[:, None] * D + e[None, :], mask=inside, other=0.0) - out
    tl.store(out_ptr + row[:, None] * E + e[None, :], out, mask=inside)


@triton.jit(do_not_specialize=["N", "M", "d_end"])
def sinkhorn_mean_kernel(
    x_ptr, y_ptr, v_ptr, log_b_ptr, g_ptr, f_ptr, out_ptr,
    N, M, E, d_end, scale,
    D: tl.constexpr, P: tl.constexpr, GRADIENT: tl.constexpr, INPUT_PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """`write_means`. Grid (rows, columns of v)."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    write_means(
        x_ptr, y_ptr, v_ptr, log_b_ptr, g_ptr, f_ptr, out_ptr, row, tl.program_id(1) * BLOCK_E, N, M, E, d_end, scale,
        D, P, GRADIENT, INPUT_PRECISION, BLOCK_N, BLOCK_M, BLOCK_D, BLOCK_E,
    )  # fmt: skip


# By p: without a product the compiler gives a row to a thread or two, and 64 columns spill on sm_90.
UPDATE_TILE = {
    1: {"BLOCK_N": 64, "BLOCK_M": 32, "BLOCK_D": 16, "num_warps": 4, "num_stages": 2},
    2: {"BLOCK_N": 64, "BLOCK_M": 64, "BLOCK_D": 16, "num_warps": 4, "num_stages": 2},
}
MEAN_TILE = {"BLOCK_N": 128, "BLOCK_M": 32, "BLOCK_D": 16, "BLOCK_E": 16, "num_warps": 8, "num_stages": 2}
HALF_MEAN_TILE = MEAN_TILE | {"BLOCK_N": 64}
MIN_SHARE = 2048
LOG2_E = math.log2(math.e)


def mean_tile(p: int, D: int, gradient: bool) -> dict[str, int]:
    """Half the rows where 128 of them spilled on sm_80 with triton 3.8: means for p = 1, derivatives in steps of D for p = 2."""
    half = not gradient if p == 1 else gradient and MEAN_TILE["BLOCK_D"] < D
    return HALF_MEAN_TILE if half else MEAN_TILE


JOIN = {"BLOCK": 128, "num_warps": 4}


def precision() -> str:
    """AMD has no tf32x3; its float32 product is a float32 product."""
    return "ieee" if torch.version.hip else "tf32x3"


def shares_to_fill(device: torch.device, programs: int, columns: int) -> int:
    """Number of programs that share the columns of a row, for two programs per SM."""
    if device.type != "cuda":  # the interpreter runs programs sequentially
        return 1
    return max(1, min(2 * processors(device) // programs, columns // MIN_SHARE))


def join(part: Tensor, old: Tensor, new: Tensor, shares: int, size: int, scale: float, flat: bool, average: bool) -> None:
    sinkhorn_join_kernel[(cdiv(size, JOIN["BLOCK"]),)](part, old, new, shares, size, scale, FLAT=flat, AVERAGE=average, **JOIN)


class TritonUpdate(Update):
    """`ReferenceUpdate` by kernels, for contiguous float32 points; all tensors are contiguous.

    Up to `shares` programs take the columns of a row; their results are joined in one order, so runs agree bit for bit.
    """

    def __init__(self, x_ND: Tensor, y_MD: Tensor, p: int, shares: int | None = None) -> None:
        super().__init__(x_ND, y_MD, p)
        self.given_shares = shares
        self.constants: dict[str, int | str] = {"D": x_ND.shape[1], "P": p, "INPUT_PRECISION": precision()}

    @functools.cached_property
    def launch(self) -> tuple[Callable, tuple[int, ...], Tensor | None]:
        """What all launches have in common: the kernel on its grid, the sizes, and memory for shares if there are several."""
        (N, D), M, tile = self.x_ND.shape, self.y_MD.shape[0], UPDATE_TILE[self.p]
        blocks = cdiv(N, tile["BLOCK_N"])
        shares = shares_to_fill(self.x_ND.device, blocks, M) if self.given_shares is None else self.given_shares
        share = cdiv(cdiv(M, tile["BLOCK_M"]), shares) * tile["BLOCK_M"]
        shares = cdiv(M, share)
        part_SN = self.x_ND.new_empty(shares, N) if shares > 1 else None
        return sinkhorn_update_kernel[blocks, shares], (N, M, share, D), part_SN

    def write(
        self, f_N: Tensor, made_NE: Tensor, log_b_M: Tensor, g_M: Tensor, epsilon: float, flat: bool,
        gradient: bool, values_ME: Tensor | None, average_N: Tensor | None,
    ) -> None:  # fmt: skip
        (run, sizes, part_SN), scale, average = self.launch, LOG2_E / epsilon, average_N is not None
        old_N, out = f_N if average_N is None else average_N, f_N if part_SN is None else part_SN
        run(
            self.x_ND, self.y_MD, log_b_M, g_M, old_N, out, *sizes, scale,
            FLAT=flat, AVERAGE=average, WHOLE=part_SN is None, **self.constants, **UPDATE_TILE[self.p],
        )  # fmt: skip
        if part_SN is not None:
            join(part_SN, old_N, f_N, len(part_SN), len(f_N), scale, flat, average)
        if gradient or values_ME is not None:
            values_ME = self.y_MD if gradient or values_ME is None else values_ME
            (N, M, _, D), E, tile = sizes, made_NE.shape[1], mean_tile(self.p, sizes[3], gradient)
            sinkhorn_mean_kernel[cdiv(N, tile["BLOCK_N"]), cdiv(E, tile["BLOCK_E"])](
                self.x_ND, self.y_MD, values_ME.contiguous(), log_b_M, g_M, f_N, made_NE, N, M, E, D, scale,
                GRADIENT=gradient, **self.constants, **tile,
            )  # fmt: skip
