"""Nearest code in Triton: one pass over the scores, which never leave the chip, and float64 where their rounding could decide.

`code_norm_kernel` takes |c|^2 of every code. `search_kernel` walks over the codes, or over a share of them, and keeps the best
score of each row with its index. `settle_kernel` (fused_settle.py) joins the shares and takes the distance from the winner.

"exact" is exact by construction. The search then keeps the two best codes (of different tiles) and a bound `rest` below the
scores of all others. `settle_kernel` compares the two by float64 distances. Where `rest` is within the error that rounding can
leave in two scores (`rounding_error`), three or more codes may be nearest, or two of one tile, and the row walks:
`settle_kernel` puts it on a list in the GPU's memory, `walk_kernel` compares the listed rows with every code in float64, rows x
shares of the codes over the whole chip, and `join_kernel` joins the shares. The host never reads the list. By this bound and
torch's float32 scores no row of 2048 walks in the three families of profiling/exactness.py, and 4 do for normal operands at
K = 8192, D = 256. Every row does where float32 cannot tell codes apart: three copies of each code, data far off the origin, D = 1
with many codes.

What each kernel costs by count, with b bytes per element, S splits, W rows that walk; in brackets bf16 "exact" with N = 32768,
K = 16384, D = 256, S = 1, W = 64, at 3.0 TB/s, 798 TFLOP/s in bf16, 64 float64 operations per SM and cycle (1.7 GHz):

    kernel   programs              bytes from memory            arithmetic
    norm     H K / 32              K D b + 4 K                  K D float64                    [   8 MB: 3 us]
    search   N / BLOCK_N x H x S   (N + K) D b + 20 S N         2 N K D tensor core            [ 275 GFLOP: 344 us]
    settle   N / 32 x H            3 N D b + 20 S N + 12 N      6 N D float64                  [  51 MB: 17 us]
    walk     8 per SM              W D b; K D b from L2 a row   2 to 6 W K D float64           [ 0.5 G: 40 us]
    join     4 per SM              12 per share                 nothing                        [ a launch]

Roofline (counts, with the measured floors of an H100: 3.0 TB/s, 798 TFLOP/s in bf16; the kernels themselves are not measured).
- Flop: 2 N K D for the products. Bytes: (N + K) D b for operands of b bytes, and 12 N of results. With N >> K that is 2 K / b
  flop per byte from memory, more than the 266 of the chip for K > 270 in bf16: every real codebook is bound by arithmetic.
- Every program reads its codes, K D b bytes for its BLOCK_N rows, but a codebook (16384 x 256 in bf16: 8 MB) stays
  in the L2 cache (50 MB). Out of L2 the intensity is 2 BLOCK_N / b flop per byte while the rows of x stay on the chip (128 for
  bf16 and BLOCK_N = 128), and 2 / b / (1 / BLOCK_N + 1 / BLOCK_K) where D is looped and they stream too (64; 16 in float32).
- Comparing takes about six float32 or integer instructions per score (scale, minimum, equality, select, minimum of the
  index), and "exact" three more for the second score of the tile. An SM does 128 of them per cycle, so 20 or 14 scores, while its
  tensor cores do 2048 bf16 multiply-adds: the comparison is the bound below D = 100 or so (bf16, "fast"), the product above.
  "fast" with tiles of at most 64 x 64 keeps a minimum per lane over all tiles: four instructions per score, one reduction over
  threads at the end. Larger tiles have no registers for it (128 x 64 spilled on sm_80).
- So the tile is chosen for registers: BLOCK_N x BLOCK_K sums over 32 * num_warps threads, 64 per thread for a 16-bit product
  (32 in "exact", which spilled on sm_100 with 64), 32 for tf32 and tf32x3,
  whose operands take more; tf32x3 holds each twice, hence the steps of 32 and 16 in D (sm_80).
- D is padded to a power of two of at least 16, the minimum of a tensor core. Above BLOCK_D it is looped and both operands
  stream; up to BLOCK_D the rows of x stay on the chip and only codes stream.
- N / BLOCK_N programs fill 132 SMs from N = 17000 (float32: 8500). Below that the codes are split into S shares, so that
  S N / BLOCK_N programs do; they cost 8 S N bytes ("exact" 20 S N), written and read once.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from dae_kernels.dispatch import register_op
from dae_kernels.nearest_code.fused_settle import insert, join_kernel, settle_kernel, walk_kernel
from dae_kernels.tiles import cdiv, generation, measured_tile, next_power_of_2, processors


@triton.jit(do_not_specialize=["K"])
def code_norm_kernel(
    codebook_ptr, norm_ptr,
    K,
    D: tl.constexpr, COSINE: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """norm[k] = |c_k|^2, or 1 / |c_k| (0 for a zero code), rounded once from float64."""
    code = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    d = tl.arange(0, BLOCK_D)
    square = tl.zeros([BLOCK_K, BLOCK_D], tl.float64)
    for d0 in range(0, D, BLOCK_D):
        inside = (code[:, None] < K) & (d0 + d[None, :] < D)
        c = tl.load(codebook_ptr + code.to(tl.int64)[:, None] * D + d0 + d[None, :], mask=inside, other=0.0).to(tl.float64)
        square += c * c
    norm = tl.sum(square, axis=1)
    if COSINE:
        norm = tl.where(norm > 0, 1.0 / tl.sqrt(norm), 0.0)
    tl.store(norm_ptr + code, norm.to(tl.float32), mask=code < K)


@triton.jit(do_not_specialize=["N", "K", "codes_per_split", "d_end"])
def search_kernel(
    x_ptr, codebook_ptr, norm_ptr, score_ptr, candidate_ptr,
    N, K, codes_per_split, d_end,
    H: tl.constexpr, D: tl.constexpr, COSINE: tl.constexpr, EXACT: tl.constexpr, UPCAST: tl.constexpr,
    INPUT_PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Search: a program has BLOCK_N rows of x of one head and loops over one split of the codes; scores are |c|^2 - 2 x . c.

    x is [N, H, D], the codebook [H, K, D]; scores are [1, S, N, H], candidates too. EXACT: scores [3, S, N, H] (best, second,
    rest) and candidates [2, S, N, H].

    `d_end` is D once more, at run time: the compiler would unroll a loop over D of known length, and spill.
    """
    DOT_DTYPE: tl.constexpr = tl.float32 if UPCAST else x_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(2)
    d = tl.arange(0, BLOCK_D)
    if H > 1:  # offsets of 0 would still use registers
        head = tl.program_id(1).to(tl.int64)
        x_ptr += head * D
        codebook_ptr += head * K * D
        norm_ptr += head * K
        score_ptr += head
        candidate_ptr += head
    x_ptrs = x_ptr + row[:, None] * (H * D) + d[None, :]
    best = tl.full([BLOCK_N], float("inf"), tl.float32)
    index = tl.zeros([BLOCK_N], tl.int32)
    second, second_index, rest = best, index, best
    # A minimum for each lane of the tile, reduced once at the end.
    BY_LANE: tl.constexpr = not EXACT and BLOCK_N * BLOCK_K <= 4096
    if BY_LANE:
        lane_best = tl.full([BLOCK_N, BLOCK_K], float("inf"), tl.float32)
        lane_tile = tl.zeros([BLOCK_N, BLOCK_K], tl.int32)
    if D <= BLOCK_D:
        x = tl.load(x_ptrs, mask=(row[:, None] < N) & (d[None, :] < D), other=0.0).to(DOT_DTYPE)

    for k0 in range(split * codes_per_split, tl.minimum(K, (split + 1) * codes_per_split), BLOCK_K):
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
        if BY_LANE:  # strictly less: an earlier code wins a tie, and NaN never is
            lane_tile = tl.where(score < lane_best, k0, lane_tile)
            lane_best = tl.where(score < lane_best, score, lane_best)
        else:
            tile_best = tl.min(score, axis=1)
            tile_index = tl.min(tl.where(score == tile_best[:, None], code[None, :], 2147483647), axis=1)
            if EXACT:
                others = tl.min(tl.where(code[None, :] == tile_index[:, None], float("inf"), score), axis=1)
                best, index, second, second_index, rest = insert(
                    best, index, second, second_index, rest, tile_best, tile_index, others
                )
            else:
                index = tl.where(tile_best < best, tile_index, index)
                best = tl.where(tile_best < best, tile_best, best)
    if BY_LANE:
        best = tl.min(lane_best, axis=1)
        lane_code = lane_tile + tl.arange(0, BLOCK_K)[None, :]
        index = tl.min(tl.where(lane_best == best[:, None], lane_code, 2147483647), axis=1)

    plane = tl.cast(N, tl.int64) * H
    ranks = tl.num_programs(2) * plane
    slot = split * plane + row * H
    tl.store(score_ptr + slot, best, mask=row < N)
    tl.store(candidate_ptr + slot, index, mask=row < N)
    if EXACT:
        tl.store(score_ptr + ranks + slot, second, mask=row < N)
        tl.store(candidate_ptr + ranks + slot, second_index, mask=row < N)
        tl.store(score_ptr + 2 * ranks + slot, rest, mask=row < N)


def padded(D: int) -> int:
    """The power of two, at least 16, that a tensor core takes for D."""
    return max(16, next_power_of_2(D))


def norm_tile(D: int) -> dict[str, int]:
    """Tile sizes and launch options of the norm kernel."""
    return {"BLOCK_K": 32, "BLOCK_D": min(32, padded(D)), "num_warps": 4}


@functools.lru_cache(maxsize=1024)
def search_tile(D: int, dot_dtype: torch.dtype, exact: bool, gpu: str | None = None) -> dict[str, int]:
    """Tile sizes and launch options of the search: those measured on the GPU generation at the nearest D, else by rule.

    D is padded and larger ones come first in the table, so a tile that keeps whole rows of x is not taken for longer ones: such a
    tile may spill where it loops over D.
    """
    when = {"bits": 8 * dot_dtype.itemsize, "exact": exact}
    if found := measured_tile("nearest_code", gpu, "search", when, {"D": padded(D)}):
        return found | {"BLOCK_D": min(found["BLOCK_D"], padded(D))}
    if dot_dtype == torch.float32:
        block_d = 16 if exact else min(padded(D), 32)
        return {"BLOCK_N": 64, "BLOCK_K": 64, "BLOCK_D": block_d, "num_warps": 4, "num_stages": 2}
    block_k = 64 if exact else 128
    return {"BLOCK_N": 128, "BLOCK_K": block_k, "BLOCK_D": min(padded(D), 64), "num_warps": 8, "num_stages": 2}


def settle_tile(cosine: bool) -> dict[str, int]:
    """Tile sizes and launch options of the settlement, with which no target spills: four coordinates per thread, or two."""
    return {"BLOCK_N": 32, "BLOCK_E": 16 if cosine else 8, "num_warps": 4}


def walk_tile(cosine: bool) -> dict[str, int]:
    """Tile sizes and launch options of the walk."""
    return {"BLOCK_K": 32, "BLOCK_E": 16 if cosine else 8, "num_warps": 4}


def walk_programs(device: torch.device) -> int:
    """Programs of the walk: eight per multiprocessor; the interpreter, which runs one after the other, has few."""
    return 8 * processors(device) if device.type == "cuda" else 8


def dot_dtype(x: torch.dtype, codebook: torch.dtype, exact: bool) -> torch.dtype:
    """The dtype in which operands are multiplied (sums are float32): the wider one, or that of `x` if it need not be exact."""
    return torch.promote_types(x, codebook) if exact else x


def split_count(N: int, H: int, K: int, tile: dict[str, int], device: torch.device) -> int:
    """The number of splits of the codes: two programs per SM, and at least four tiles per program."""
    programs = cdiv(N, tile["BLOCK_N"]) * H
    return max(1, min(K // (4 * tile["BLOCK_K"]), 2 * processors(device) // programs))


def launch(
    x_NHD: Tensor,
    codebook_HKD: Tensor,
    norm_HK: Tensor,
    score_RSNH: Tensor,
    candidate_RSNH: Tensor,
    index_NH: Tensor,
    distance_NH: Tensor,
    cosine: bool,
    exact: bool,
) -> None:
    """All kernels, into contiguous buffers: index_NH int64, candidate_RSNH int32, the others float32; N, H >= 1.

    R is 3 for scores and 2 for candidates if `exact`, else 1; S is the number of splits.
    """
    N, K, S = x_NHD.shape[0], codebook_HKD.shape[1], score_RSNH.shape[1]
    H, D = codebook_HKD.shape[0], codebook_HKD.shape[2]  # constants of the kernels
    dtype = dot_dtype(x_NHD.dtype, codebook_HKD.dtype, exact)
    search_options = search_tile(D, dtype, exact, generation(x_NHD.device))
    norm_options, settle_options = norm_tile(D), settle_tile(cosine)
    constants = {"H": H, "COSINE": cosine, "EXACT": exact}
    # AMD has no tf32x3; its float32 product is a float32 product.
    exact_precision = "ieee" if torch.version.hip else "tf32x3"
    code_norm_kernel[(cdiv(H * K, norm_options["BLOCK_K"]),)](codebook_HKD, norm_HK, H * K, D=D, COSINE=cosine, **norm_options)
    # A zero code has no length to care for; a long one may overflow, a short one underflow.
    reach_HK = torch.maximum(norm_HK, (1.0 / norm_HK).where(norm_HK > 0, 0.0)) if cosine else norm_HK
    block_k = search_options["BLOCK_K"]
    search_kernel[(cdiv(N, search_options["BLOCK_N"]), H, S)](
        x_NHD, codebook_HKD, norm_HK, score_RSNH, candidate_RSNH, N, K, cdiv(cdiv(K, block_k), S) * block_k, D,
        UPCAST=dtype != x_NHD.dtype, INPUT_PRECISION=exact_precision if exact else "tf32", **constants, D=D, **search_options,
    )  # fmt: skip
    results, count, rows = (index_NH, distance_NH), norm_HK, norm_HK
    if exact:
        count = index_NH.new_zeros(1, dtype=torch.int32)
        rows = index_NH.new_empty(N * H, dtype=torch.int32 if N * H < 1 << 31 else torch.int64)
    settle_kernel[(cdiv(N, settle_options["BLOCK_N"]), H)](
        x_NHD, codebook_HKD, reach_HK.amax(dim=1) if exact else norm_HK, score_RSNH, candidate_RSNH, *results, count, rows,
        N, K, S, D, **constants, **settle_options,
    )  # fmt: skip
    if exact:  # the host does not learn how many rows there are: nothing waits
        P, walk_options = walk_programs(x_NHD.device), walk_tile(cosine)
        parts = index_NH.new_empty(P, dtype=torch.float64), index_NH.new_empty(P, dtype=torch.int32)
        walk_kernel[(P,)](
            x_NHD, codebook_HKD, count, rows, *parts, *results, K, D, P, H=H, COSINE=cosine, **walk_options
        )  # fmt: skip
        join_kernel[(max(1, P // 2),)](
            count, rows, *parts, *results, K, D, P,
            COSINE=cosine, BLOCK_K=walk_options["BLOCK_K"], BLOCK_S=next_power_of_2(P), num_warps=4,
        )  # fmt: skip


def nearest_code_empty(x_NHD: Tensor, codebook_HKD: Tensor, cosine: bool, exact: bool) -> tuple[Tensor, Tensor]:
    return x_NHD.new_empty(x_NHD.shape[:2], dtype=torch.int64), x_NHD.new_empty(x_NHD.shape[:2], dtype=torch.float32)


def nearest_code_launcher(x_NHD: Tensor, codebook_HKD: Tensor, cosine: bool, exact: bool) -> tuple[Tensor, Tensor]:
    N, H, D = x_NHD.shape
    device = x_NHD.device
    index_NH = torch.empty((N, H), dtype=torch.int64, device=device)
    distance_NH = torch.empty((N, H), dtype=torch.float32, device=device)
    if N:
        K = codebook_HKD.shape[1]
        tile = search_tile(D, dot_dtype(x_NHD.dtype, codebook_HKD.dtype, exact), exact, generation(device))
        S = split_count(N, H, K, tile, device)
        norm_HK = torch.empty((H, K), dtype=torch.float32, device=device)
        score_RSNH = torch.empty((3 if exact else 1, S, N, H), dtype=torch.float32, device=device)
        candidate_RSNH = torch.empty((2 if exact else 1, S, N, H), dtype=torch.int32, device=device)
        x_NHD, codebook_HKD = x_NHD.contiguous(), codebook_HKD.contiguous()
        launch(x_NHD, codebook_HKD, norm_HK, score_RSNH, candidate_RSNH, index_NH, distance_NH, cosine, exact)
    return index_NH, distance_NH


nearest_code_triton = register_op("dae_kernels::nearest_code", nearest_code_launcher, nearest_code_empty)
