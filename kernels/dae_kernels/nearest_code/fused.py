"""Nearest code in Triton: one pass over the scores, which never leave the chip.

Roofline (counts, with the measured floors of an H100: 3.0 TB/s, 798 TFLOP/s in bf16; the kernel itself is not yet measured).
- Flop: 2 N K D for the products. Bytes: (N + K) D b for operands of b bytes, and 12 N of results. With N >> K that is 2 K / b
  flop per byte from memory, more than the 266 of the chip for K > 270 in bf16: every real codebook is bound by arithmetic.
- Every program reads the whole codebook, K D b bytes for its BLOCK_N rows, but a codebook (16384 x 256 in bf16: 8 MB) stays
  in the L2 cache (50 MB). Out of L2 the intensity is 2 BLOCK_N / b flop per byte while the rows of x stay on the chip (128 for
  bf16 and BLOCK_N = 128), and 2 / b / (1 / BLOCK_N + 1 / BLOCK_K) where D is looped and they stream too (64; 16 in float32).
- Comparing costs a score about six float32 or integer instructions (scale, minimum, equality, select, minimum of the index).
  An SM does 128 of them a cycle, so 20 scores, while its tensor cores do 2048 bf16 multiply-adds: the comparison is the
  bound below D = 100 or so, the product above.
- So the tile is chosen for registers: BLOCK_N x BLOCK_K sums over 32 * num_warps threads, 64 a thread for a 16-bit product,
  32 for tf32 and tf32x3, whose operands take more; tf32x3 holds each twice, hence the steps of 32 and 16 in D (sm_80).
- D is padded to a power of two of at least 16, the least a tensor core takes. Above BLOCK_D it is looped and both operands
  stream; up to BLOCK_D the rows of x stay on the chip and only codes stream.
- N / BLOCK_N programs fill 132 SMs from N = 17000 (float32: 8500); below that, a split over K is still to be written.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dae_kernels.dispatch import launchable, register_triton_op


@triton.jit(do_not_specialize=["K"])
def code_norm_kernel(
    codebook_ptr,
    norm_ptr,
    K,
    D: tl.constexpr,
    COSINE: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """norm[k] = |c_k|^2, or 1 / |c_k| (0 for a zero code). Equal codes get equal bits, as a tie needs: one order of summation."""
    code = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    d = tl.arange(0, BLOCK_D)
    square = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    for d0 in range(0, D, BLOCK_D):
        inside = (code[:, None] < K) & (d0 + d[None, :] < D)
        c = tl.load(codebook_ptr + code.to(tl.int64)[:, None] * D + d0 + d[None, :], mask=inside, other=0.0).to(tl.float32)
        square += c * c
    norm = tl.sum(square, axis=1)
    if COSINE:
        norm = tl.where(norm > 0, 1.0 / tl.sqrt_rn(norm), 0.0)
    tl.store(norm_ptr + code, norm, mask=code < K)


@triton.jit(do_not_specialize=["N", "K", "d_end"])
def nearest_code_kernel(
    x_ptr,
    codebook_ptr,
    norm_ptr,
    index_ptr,
    distance_ptr,
    N,
    K,
    d_end,
    H: tl.constexpr,
    D: tl.constexpr,
    COSINE: tl.constexpr,
    UPCAST: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """A program owns BLOCK_N rows of x of one head, walks over all codes of this head and keeps the best score and its index.

    x is [N, H, D], the codebook [H, K, D]; results are [N, H].

    `d_end` is D once more, at run time: the compiler would unroll a loop over D of known length, and spill.
    """
    DOT_DTYPE: tl.constexpr = tl.float32 if UPCAST else x_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    if H > 1:  # offsets of 0 would still take registers
        head = tl.program_id(1).to(tl.int64)
        x_ptr += head * D
        codebook_ptr += head * K * D
        norm_ptr += head * K
        index_ptr += head
        distance_ptr += head
    x_ptrs = x_ptr + row[:, None] * (H * D) + d[None, :]
    best_score = tl.full([BLOCK_N], float("inf"), tl.float32)
    best_index = tl.zeros([BLOCK_N], tl.int32)
    if D <= BLOCK_D:
        x = tl.load(x_ptrs, mask=(row[:, None] < N) & (d[None, :] < D), other=0.0).to(DOT_DTYPE)

    for k0 in range(0, K, BLOCK_K):
        code = k0 + tl.arange(0, BLOCK_K)
        c_ptrs = codebook_ptr + code.to(tl.int64)[:, None] * D + d[None, :]
        dot = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
        if D <= BLOCK_D:
            c = tl.load(c_ptrs, mask=(code[:, None] < K) & (d[None, :] < D), other=0.0).to(DOT_DTYPE)
            dot = tl.dot(x, tl.trans(c), dot, input_precision=INPUT_PRECISION)
        else:
            for d0 in range(0, d_end, BLOCK_D):
                d_inside = d0 + d[None, :] < D
                x = tl.load(x_ptrs + d0, mask=(row[:, None] < N) & d_inside, other=0.0).to(DOT_DTYPE)
                c = tl.load(c_ptrs + d0, mask=(code[:, None] < K) & d_inside, other=0.0).to(DOT_DTYPE)
                dot = tl.dot(x, tl.trans(c), dot, input_precision=INPUT_PRECISION)

        if COSINE:
            norm = tl.load(norm_ptr + code, mask=code < K, other=0.0)
            score = tl.where(code[None, :] < K, -dot * norm[None, :], float("inf"))
        else:
            norm = tl.load(norm_ptr + code, mask=code < K, other=float("inf"))
            score = norm[None, :] - 2.0 * dot
        tile_score = tl.min(score, axis=1)
        tile_index = tl.min(tl.where(score == tile_score[:, None], code[None, :], 2147483647), axis=1)
        # Strictly less: an earlier code wins a tie. NaN is never less, so the index stays a code whatever x holds.
        better = tile_score < best_score
        best_index = tl.where(better, tile_index, best_index)
        best_score = tl.where(better, tile_score, best_score)

    # The score lacks |x|^2 and has cancelled; the distance is taken anew from the winner.
    e = tl.arange(0, BLOCK_E)
    x_ptrs = x_ptr + row[:, None] * (H * D) + e[None, :]
    c_ptrs = codebook_ptr + best_index.to(tl.int64)[:, None] * D + e[None, :]
    total = tl.zeros([BLOCK_N, BLOCK_E], tl.float32)
    total_xx = tl.zeros([BLOCK_N, BLOCK_E], tl.float32)
    for e0 in range(0, D, BLOCK_E):
        inside = (row[:, None] < N) & (e0 + e[None, :] < D)
        x_e = tl.load(x_ptrs + e0, mask=inside, other=0.0).to(tl.float32)
        c_e = tl.load(c_ptrs + e0, mask=inside, other=0.0).to(tl.float32)
        if COSINE:
            total += x_e * c_e
            total_xx += x_e * x_e
        else:
            total += (x_e - c_e) * (x_e - c_e)
    distance = tl.sum(total, axis=1)
    if COSINE:
        xx = tl.sum(total_xx, axis=1)
        x_norm = tl.where(xx > 0, 1.0 / tl.sqrt_rn(xx), 0.0)
        distance = 1.0 - distance * x_norm * tl.load(norm_ptr + best_index)
    tl.store(index_ptr + row * H, best_index.to(tl.int64), mask=row < N)
    tl.store(distance_ptr + row * H, distance, mask=row < N)


def padded(D: int) -> int:
    """The power of two, at least 16, that a tensor core takes for D."""
    return max(16, triton.next_power_of_2(D))


def norm_tile(D: int) -> dict[str, int]:
    """Tile sizes and launch options of the norm kernel."""
    return {"BLOCK_K": 32, "BLOCK_D": min(64, padded(D)), "num_warps": 4}


def tile(D: int, dot_dtype: torch.dtype, exact: bool) -> dict[str, int]:
    """Tile sizes and launch options of the main kernel."""
    if dot_dtype == torch.float32:
        block_d = 16 if exact else min(padded(D), 32)
        return {"BLOCK_N": 64, "BLOCK_K": 64, "BLOCK_D": block_d, "BLOCK_E": 32, "num_warps": 4, "num_stages": 2}
    return {"BLOCK_N": 128, "BLOCK_K": 128, "BLOCK_D": min(padded(D), 64), "BLOCK_E": 16, "num_warps": 8, "num_stages": 2}


def dot_dtype(x: torch.dtype, codebook: torch.dtype, exact: bool) -> torch.dtype:
    """The dtype in which operands are multiplied (sums are float32): the wider one, or that of `x` if it need not be exact."""
    return torch.promote_types(x, codebook) if exact else x


def launch(
    x_NHD: Tensor, codebook_HKD: Tensor, norm_HK: Tensor, index_NH: Tensor, distance_NH: Tensor, cosine: bool, exact: bool
) -> None:
    """Both kernels, into contiguous buffers: norm_HK and distance_NH float32, index_NH int64; N, H >= 1."""
    N, K = x_NHD.shape[0], codebook_HKD.shape[1]
    H, D = int(codebook_HKD.shape[0]), int(codebook_HKD.shape[2])  # constants of the kernel
    dtype = dot_dtype(x_NHD.dtype, codebook_HKD.dtype, exact)
    options = tile(D, dtype, exact)
    # AMD has no tf32x3; its float32 product is a float32 product.
    exact_precision = "ieee" if torch.version.hip else "tf32x3"
    norm_options = norm_tile(D)
    launchable(code_norm_kernel)[(triton.cdiv(H * K, norm_options["BLOCK_K"]),)](
        codebook_HKD, norm_HK, H * K, D=D, COSINE=cosine, **norm_options
    )
    launchable(nearest_code_kernel)[(triton.cdiv(N, options["BLOCK_N"]), H)](
        x_NHD,
        codebook_HKD,
        norm_HK,
        index_NH,
        distance_NH,
        N,
        K,
        D,
        H=H,
        D=D,
        COSINE=cosine,
        UPCAST=dtype != x_NHD.dtype,
        INPUT_PRECISION=exact_precision if exact else "tf32",
        **options,
    )


def nearest_code_empty(x_NHD: Tensor, codebook_HKD: Tensor, cosine: bool, exact: bool) -> tuple[Tensor, Tensor]:
    return x_NHD.new_empty(x_NHD.shape[:2], dtype=torch.int64), x_NHD.new_empty(x_NHD.shape[:2], dtype=torch.float32)


def nearest_code_launcher(x_NHD: Tensor, codebook_HKD: Tensor, cosine: bool, exact: bool) -> tuple[Tensor, Tensor]:
    index_NH, distance_NH = nearest_code_empty(x_NHD, codebook_HKD, cosine, exact)
    if x_NHD.shape[0]:
        norm_HK = codebook_HKD.new_empty(codebook_HKD.shape[:2], dtype=torch.float32)
        launch(x_NHD.contiguous(), codebook_HKD.contiguous(), norm_HK, index_NH, distance_NH, cosine, exact)
    return index_NH, distance_NH


nearest_code_triton = register_triton_op("dae_kernels::nearest_code", nearest_code_launcher, nearest_code_empty)
