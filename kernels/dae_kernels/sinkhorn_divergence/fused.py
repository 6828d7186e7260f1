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

import math

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


@triton.jit(do_not_specialize=["N", "M", "share", "d_end"])
def sinkhorn_update_kernel(
    x_ptr, y_ptr, log_b_ptr, g_ptr, average_ptr, f_ptr,
    N, M, share, d_end, scale,
    D: tl.constexpr, P: tl.constexpr, FLAT: tl.constexpr, AVERAGE: tl.constexpr, INPUT_PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """f = -log2(sum_j 2^score_j) / scale for BLOCK_N rows and `share` columns; scale = log2(e) / epsilon.

    If FLAT (see the solver), the sum of b_j (e^score_j - 1) in its place. f is [shares, N]. If AVERAGE, f is averaged with
    `average`, which is read only then.
    `d_end` is D once more, at run time: the compiler would unroll a loop over D of known length, and spill.
    """
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    x = tl.load(x_ptr + row[:, None] * D + d[None, :], mask=(row[:, None] < N) & (d[None, :] < D), other=0.0)
    top = tl.full([BLOCK_N], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_N], tl.float32)
    start = tl.program_id(1) * share
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
    f = total if FLAT else -(tl.log2(total) + top) / scale
    if AVERAGE:
        f = (f + tl.load(average_ptr + row, mask=row < N, other=0.0)) / 2
    tl.store(f_ptr + tl.program_id(1).to(tl.int64) * N + row, f, mask=row < N)


@triton.jit(do_not_specialize=["N", "M", "d_end"])
def sinkhorn_mean_kernel(
    x_ptr, y_ptr, v_ptr, log_b_ptr, g_ptr, f_ptr, out_ptr,
    N, M, E, d_end, scale,
    D: tl.constexpr, P: tl.constexpr, GRADIENT: tl.constexpr, INPUT_PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """sum_j P_ij v_j for BLOCK_N rows and BLOCK_E of the E columns of v; f makes the rows of the plan sum to 1.

    If GRADIENT, in its place sum_j P_ij d|x_i - y_j|^P / P / dx_i: for P = 2 that is x_i less the mean of v = y.
    """
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    e0 = tl.program_id(1) * BLOCK_E
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


def shares_to_fill(device: torch.device, N: int, M: int) -> int:
    """Number of programs that share the columns of a row, for two programs per SM."""
    if device.type != "cuda":  # the interpreter runs programs sequentially
        return 1
    return max(1, min(2 * processors(device) // cdiv(N, UPDATE_TILE[2]["BLOCK_N"]), M // MIN_SHARE))


class TritonUpdate(Update):
    """`ReferenceUpdate` by kernels, for contiguous float32 points; all tensors are contiguous.

    What its launches have in common is made once. Up to `shares` programs take the columns of a row; their results are joined in
    one order, so runs agree bit for bit.
    """

    def __init__(self, x_ND: Tensor, y_MD: Tensor, p: int, shares: int | None = None) -> None:
        super().__init__(x_ND, y_MD, p)
        (N, D), M = x_ND.shape, y_MD.shape[0]
        tile = UPDATE_TILE[p]
        shares = shares_to_fill(x_ND.device, N, M) if shares is None else shares
        share = cdiv(cdiv(M, tile["BLOCK_M"]), shares) * tile["BLOCK_M"]
        self.shares = cdiv(M, share)
        self.update = sinkhorn_update_kernel[cdiv(N, tile["BLOCK_N"]), self.shares]
        self.sizes = N, M, share, D
        # AMD has no tf32x3; its float32 product is a float32 product.
        self.constants: dict[str, int | str] = {"D": D, "P": p, "INPUT_PRECISION": "ieee" if torch.version.hip else "tf32x3"}
        self.options = {**self.constants, **tile}
        self.part_SN = x_ND.new_empty(self.shares, N) if self.shares > 1 else None

    def write(
        self, f_N: Tensor, made_NE: Tensor, log_b_M: Tensor, g_M: Tensor, epsilon: float, flat: bool,
        gradient: bool, values_ME: Tensor | None, average_N: Tensor | None,
    ) -> None:  # fmt: skip
        part_SN, scale = self.part_SN, LOG2_E / epsilon
        average = average_N is not None and part_SN is None and not flat  # by the kernel
        self.update(
            self.x_ND, self.y_MD, log_b_M, g_M, average_N if average else f_N, f_N if part_SN is None else part_SN,
            *self.sizes, scale, FLAT=flat, AVERAGE=average, **self.options,
        )  # fmt: skip
        if flat:
            total_N = f_N if part_SN is None else torch.sum(part_SN, dim=0, out=f_N)
            total_N.log1p_().mul_(-epsilon)
        elif part_SN is not None:
            torch.logsumexp(part_SN.div_(-epsilon), dim=0, out=f_N).mul_(-epsilon)
        if average_N is not None and not average:
            f_N.add_(average_N).div_(2)
        if gradient or values_ME is not None:
            self.write_mean(
                f_N, made_NE, log_b_M, g_M, scale, self.y_MD if gradient or values_ME is None else values_ME, gradient
            )

    def write_mean(
        self, f_N: Tensor, made_NE: Tensor, log_b_M: Tensor, g_M: Tensor, scale: float, values_ME: Tensor, gradient: bool
    ) -> None:
        """The derivative, or the mean of values, into made_NE."""
        N, M, _, D = self.sizes
        E, tile = made_NE.shape[1], mean_tile(self.p, D, gradient)
        sinkhorn_mean_kernel[cdiv(N, tile["BLOCK_N"]), cdiv(E, tile["BLOCK_E"])](
            self.x_ND, self.y_MD, values_ME.contiguous(), log_b_M, g_M, f_N, made_NE, N, M, E, D, scale,
            GRADIENT=gradient, **self.constants, **tile,
        )  # fmt: skip
