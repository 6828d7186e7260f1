"""Nearest code in Triton: one pass over the scores, which never leave the chip, and float64 where their rounding could decide.

Three kernels. `code_norm_kernel` takes |c|^2 of every code. `search_kernel` walks over the codes, or over a share of them, and
keeps the best score of each row with its index. `settle_kernel` joins the shares and takes the distance from the winner itself.

"exact" is exact by construction. The search then keeps the two best codes (of different tiles) and a bound `rest` below the
scores of all others. `settle_kernel` compares the two by float64 distances. Where `rest` is within the error that rounding can
leave in two scores (`rounding_error`), three or more codes may be nearest, or two of one tile, and the row walks: it is
compared with every code in float64. By this bound and torch's float32 scores no row of 2048 walks in
the three families of profiling/exactness.py, and 4 do for normal operands at K = 8192, D = 256. Every row does where float32
cannot tell codes apart: three copies of each code, data far off the origin, D = 1 with many codes.

Roofline (counts, with the measured floors of an H100: 3.0 TB/s, 798 TFLOP/s in bf16; the kernels themselves are not measured).
- Flop: 2 N K D for the products. Bytes: (N + K) D b for operands of b bytes, and 12 N of results. With N >> K that is 2 K / b
  flop per byte from memory, more than the 266 of the chip for K > 270 in bf16: every real codebook is bound by arithmetic.
- Every program reads its codes, K D b bytes for its BLOCK_N rows, but a codebook (16384 x 256 in bf16: 8 MB) stays
  in the L2 cache (50 MB). Out of L2 the intensity is 2 BLOCK_N / b flop per byte while the rows of x stay on the chip (128 for
  bf16 and BLOCK_N = 128), and 2 / b / (1 / BLOCK_N + 1 / BLOCK_K) where D is looped and they stream too (64; 16 in float32).
- Comparing takes about six float32 or integer instructions per score (scale, minimum, equality, select, minimum of the
  index), and "exact" three more for the second score of the tile. An SM does 128 of them per cycle, so 20 or 14 scores, while its
  tensor cores do 2048 bf16 multiply-adds: the comparison is the bound below D = 100 or so (bf16, "fast"), the product above.
- So the tile is chosen for registers: BLOCK_N x BLOCK_K sums over 32 * num_warps threads, 64 per thread for a 16-bit product
  (32 in "exact", which spilled on sm_100 with 64), 32 for tf32 and tf32x3,
  whose operands take more; tf32x3 holds each twice, hence the steps of 32 and 16 in D (sm_80).
- D is padded to a power of two of at least 16, the minimum of a tensor core. Above BLOCK_D it is looped and both operands
  stream; up to BLOCK_D the rows of x stay on the chip and only codes stream.
- N / BLOCK_N programs fill 132 SMs from N = 17000 (float32: 8500). Below that the codes are split into S shares, so that
  S N / BLOCK_N programs do; they cost 8 S N bytes ("exact" 20 S N), written and read once.
- Settling reads a row of x and a code that lies anywhere, 2 N D b bytes, with three float64 operations per coordinate; "exact"
  twice that. A coordinate of the search is K bf16 multiply-adds, 32 of which take as long as one float64 operation: settling
  is a few percent from K = 5000 on, and as long as the search at K = 200.
- A row that walks reads the codebook, K D b bytes, from L2, and costs two float64 operations ("cosine": two multiply-adds) and
  two conversions for each of K D coordinates; the 32 rows of a program walk one after the other. An SM does 64 such operations
  per cycle (sm_80: 32) where its tensor cores do 2048 bf16 multiply-adds: if all rows walk, that takes 64 to 128 times as long
  as the bf16 product at least.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dae_kernels.dispatch import launchable, register_triton_op


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


@triton.jit
def insert(best, index, second, second_index, rest, score, code, others):
    """Insert a candidate into the two best, and a lower bound of the other scores into `rest`. The earlier wins a tie."""
    rest = tl.minimum(tl.minimum(rest, others), tl.maximum(second, score))
    second_index = tl.where(score < best, index, tl.where(score < second, code, second_index))
    second = tl.where(score < best, best, tl.minimum(second, score))
    # Strictly less, which NaN never is, so the index is always a code.
    index = tl.where(score < best, code, index)
    best = tl.where(score < best, score, best)
    return best, index, second, second_index, rest


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

    plane = tl.cast(N, tl.int64) * H
    ranks = tl.num_programs(2) * plane
    slot = split * plane + row * H
    tl.store(score_ptr + slot, best, mask=row < N)
    tl.store(candidate_ptr + slot, index, mask=row < N)
    if EXACT:
        tl.store(score_ptr + ranks + slot, second, mask=row < N)
        tl.store(candidate_ptr + ranks + slot, second_index, mask=row < N)
        tl.store(score_ptr + 2 * ranks + slot, rest, mask=row < N)


@triton.jit
def true_distance(x_ptrs, code_ptrs, inside, D, COSINE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr):
    """Distances of BLOCK_N pairs of rows in float64, and |x|^2: no cancellation, and equal codes get equal bits."""
    e = tl.arange(0, BLOCK_E)
    main = tl.zeros([BLOCK_N, BLOCK_E], tl.float64)
    xx = tl.zeros([BLOCK_N, BLOCK_E], tl.float64)
    cc = tl.zeros([BLOCK_N, BLOCK_E], tl.float64)
    for e0 in range(0, D, BLOCK_E):
        mask = inside[:, None] & (e0 + e[None, :] < D)
        x = tl.load(x_ptrs[:, None] + e0 + e[None, :], mask=mask, other=0.0).to(tl.float64)
        c = tl.load(code_ptrs[:, None] + e0 + e[None, :], mask=mask, other=0.0).to(tl.float64)
        xx += x * x
        if COSINE:
            main += x * c
            cc += c * c
        else:
            main += (x - c) * (x - c)
    distance = tl.sum(main, axis=1)
    square = tl.sum(xx, axis=1)
    if COSINE:
        lengths = tl.sqrt(square * tl.sum(cc, axis=1))  # sqrt(t * t) is t exactly: codes of D = 1 tie
        distance = 1.0 - tl.where(lengths == 0, 0.0, distance / lengths)  # NaN stays
    return distance, square


@triton.jit
def enlarged(distance, D, COSINE: tl.constexpr):
    """A float64 distance plus the rounding error of two: another distance up to there may be equal to it."""
    rounding = (D + 4) * 4.440892098500626e-16  # 2^-51
    return distance + rounding * (1.0 if COSINE else distance)


@triton.jit
def nearest_of_all(x_ptr, codebook_ptr, K, D, COSINE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr):
    """The float64 distance of one row of x to the nearest of K codes, and its index, BLOCK_N codes at a time."""
    lane = tl.arange(0, BLOCK_N)
    minimum = tl.full([BLOCK_N], float("inf"), tl.float64)
    minimum_code = tl.zeros([BLOCK_N], tl.int32)
    for k0 in range(0, K, BLOCK_N):
        code = k0 + lane
        code_ptrs = codebook_ptr + code.to(tl.int64) * D
        distance, _ = true_distance(x_ptr + lane * 0, code_ptrs, code < K, D, COSINE, BLOCK_N, BLOCK_E)
        better = (code < K) & (enlarged(distance, D, COSINE) < minimum)
        minimum = tl.where(better, distance, minimum)
        minimum_code = tl.where(better, code, minimum_code)
    limit = enlarged(tl.min(minimum, axis=0), D, COSINE)
    index = tl.min(tl.where(minimum <= limit, minimum_code, K - 1), axis=0)
    return tl.min(tl.where(minimum_code == index, minimum, float("inf")), axis=0), index


@triton.jit
def rounding_error(x_square, distance, reach, D, COSINE: tl.constexpr):
    """Bound of the error of a float32 score, for any code that is at most `distance` away; inf where it may overflow.

    With R >= |c| the score consists of terms that sum to R^2 + 2 |x| R at most, or |x| for the cosine. Three tf32 products
    of D terms, truncated at each addition as tensor cores do (2^-23), drop less than (3.75 D + 36) 2^-23 of it (Fasi et al.
    2021, on tensor cores; Higham 2002, section 3.1); 16-bit products and float32 ones less. What underflows is below 2^-100.
    """
    x_length = tl.sqrt(x_square)
    if COSINE:  # reach = the greatest |c| or 1 / |c|
        size = tl.where(x_length * reach < 1e37, x_length + 7.9e-31 * (1.0 + x_length) * reach, float("inf"))
    else:  # reach = max |c|^2; a code that is at most `distance` away is no longer than |x| + |x - c|
        longest = tl.minimum(tl.sqrt(reach), x_length + tl.sqrt(distance))
        size = longest * (longest + 2.0 * x_length) + 7.9e-31 * (1.0 + x_length + longest)
    return tl.where(size < 1e37, (D + 16) * 4.76837158203125e-07 * size, float("inf"))  # 2^-21


@triton.jit(do_not_specialize=["N", "K", "S", "D"])
def settle_kernel(
    x_ptr, codebook_ptr, reach_ptr, score_ptr, candidate_ptr, index_ptr, distance_ptr,
    N, K, S, D,
    H: tl.constexpr, COSINE: tl.constexpr, EXACT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Index and distance [N, H] of BLOCK_N rows of one head from the candidates of the S splits; `reach` [H] is for the bound."""
    head = tl.program_id(1).to(tl.int64)
    n = tl.arange(0, BLOCK_N)
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + n
    inside = row < N
    slot = row * H + head
    x_ptrs = x_ptr + slot * D
    codebook_ptr += head * K * D
    plane = tl.cast(N, tl.int64) * H
    best = tl.full([BLOCK_N], float("inf"), tl.float32)
    index = tl.zeros([BLOCK_N], tl.int32)
    second, second_index, rest = best, index, best
    for split in range(0, S):  # in the order of the codes: an earlier one wins a tie
        at = split * plane + slot
        score = tl.load(score_ptr + at, mask=inside, other=float("inf"))
        code = tl.load(candidate_ptr + at, mask=inside, other=0)
        if EXACT:
            best, index, second, second_index, rest = insert(best, index, second, second_index, rest, score, code, float("inf"))
            score = tl.load(score_ptr + S * plane + at, mask=inside, other=float("inf"))
            code = tl.load(candidate_ptr + S * plane + at, mask=inside, other=0)
            others = tl.load(score_ptr + 2 * S * plane + at, mask=inside, other=float("inf"))
            best, index, second, second_index, rest = insert(best, index, second, second_index, rest, score, code, others)
        else:
            index = tl.where(score < best, code, index)
            best = tl.where(score < best, score, best)

    # A score lacks |x|^2 and has cancelled; the distance is taken anew from the code.
    code_ptrs = codebook_ptr + index.to(tl.int64) * D
    distance, x_square = true_distance(x_ptrs, code_ptrs, inside, D, COSINE, BLOCK_N, BLOCK_E)
    index = tl.where(x_square < float("inf"), index, 0)  # nothing is nearest to a row that is not finite
    if EXACT:
        code_ptrs = codebook_ptr + second_index.to(tl.int64) * D
        second_distance, _ = true_distance(x_ptrs, code_ptrs, inside, D, COSINE, BLOCK_N, BLOCK_E)
        error = rounding_error(x_square.to(tl.float32), distance.to(tl.float32), tl.load(reach_ptr + head), D, COSINE)
        sure = rest - best > 2.0 * error  # false for NaN
        # No code is nearest to a row that is not finite, and all are to a zero row in cosine.
        crowded = inside & (sure == 0) & (x_square < float("inf")) & (x_square > (0.0 if COSINE else -1.0))
        nearer = enlarged(second_distance, D, COSINE) < distance
        swap = nearer | ((second_index < index) & (second_distance <= enlarged(distance, D, COSINE)))
        index = tl.where(swap, second_index, index)
        distance = tl.where(swap, second_distance, distance)

        while tl.max(crowded.to(tl.int32), axis=0) > 0:
            r = tl.min(tl.where(crowded, n, BLOCK_N), axis=0)
            x_r_ptr = x_ptr + ((tl.program_id(0).to(tl.int64) * BLOCK_N + r) * H + head) * D
            distance_r, index_r = nearest_of_all(x_r_ptr, codebook_ptr, K, D, COSINE, BLOCK_N, BLOCK_E)
            distance = tl.where(n == r, distance_r, distance)
            index = tl.where(n == r, index_r, index)
            crowded = crowded & (n != r)
    tl.store(index_ptr + slot, index.to(tl.int64), mask=inside)
    tl.store(distance_ptr + slot, distance.to(tl.float32), mask=inside)


def padded(D: int) -> int:
    """D padded to a power of two of at least 16, for tensor cores."""
    return max(16, triton.next_power_of_2(D))


def norm_tile(D: int) -> dict[str, int]:
    """Tile sizes and launch options of the norm kernel."""
    return {"BLOCK_K": 32, "BLOCK_D": min(32, padded(D)), "num_warps": 4}


def search_tile(D: int, dot_dtype: torch.dtype, exact: bool) -> dict[str, int]:
    """Tile sizes and launch options of the search."""
    if dot_dtype == torch.float32:
        block_d = 16 if exact else min(padded(D), 32)
        return {"BLOCK_N": 64, "BLOCK_K": 64, "BLOCK_D": block_d, "num_warps": 4, "num_stages": 2}
    block_k = 64 if exact else 128
    return {"BLOCK_N": 128, "BLOCK_K": block_k, "BLOCK_D": min(padded(D), 64), "num_warps": 8, "num_stages": 2}


def settle_tile(cosine: bool) -> dict[str, int]:
    """Tile sizes and launch options of the settlement, with which no target spills: four coordinates per thread, or two."""
    return {"BLOCK_N": 32, "BLOCK_E": 16 if cosine else 8, "num_warps": 4}


def dot_dtype(x: torch.dtype, codebook: torch.dtype, exact: bool) -> torch.dtype:
    """The dtype in which operands are multiplied (sums are float32): the wider one, or that of `x` if it need not be exact."""
    return torch.promote_types(x, codebook) if exact else x


def split_count(N: int, H: int, K: int, tile: dict[str, int], device: torch.device) -> int:
    """The number of splits of the codes: two programs per SM, and at least four tiles per program."""
    processors = 132  # of an H100, for tracing and tests without a GPU
    if device.type == "cuda" and torch.cuda.is_available():
        processors = torch.cuda.get_device_properties(device).multi_processor_count
    programs = triton.cdiv(N, tile["BLOCK_N"]) * H
    # sym_max and sym_min: torch.compile keeps one graph for all N.
    return torch.sym_max(1, torch.sym_min(K // (4 * tile["BLOCK_K"]), 2 * processors // programs))


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
    H, D = int(codebook_HKD.shape[0]), int(codebook_HKD.shape[2])  # constants of the kernels
    dtype = dot_dtype(x_NHD.dtype, codebook_HKD.dtype, exact)
    norm_options, search_options, settle_options = norm_tile(D), search_tile(D, dtype, exact), settle_tile(cosine)
    constants = {"H": H, "COSINE": cosine, "EXACT": exact}
    # AMD has no tf32x3; its float32 product is a float32 product.
    exact_precision = "ieee" if torch.version.hip else "tf32x3"
    launchable(code_norm_kernel)[(triton.cdiv(H * K, norm_options["BLOCK_K"]),)](
        codebook_HKD, norm_HK, H * K, D=D, COSINE=cosine, **norm_options
    )
    # A zero code has no length; a long one may overflow, a short one underflow.
    reach_HK = torch.maximum(norm_HK, (1.0 / norm_HK).where(norm_HK > 0, 0.0)) if cosine else norm_HK
    block_k = search_options["BLOCK_K"]
    launchable(search_kernel)[(triton.cdiv(N, search_options["BLOCK_N"]), H, S)](
        x_NHD, codebook_HKD, norm_HK, score_RSNH, candidate_RSNH, N, K, triton.cdiv(triton.cdiv(K, block_k), S) * block_k, D,
        UPCAST=dtype != x_NHD.dtype, INPUT_PRECISION=exact_precision if exact else "tf32", **constants, D=D, **search_options,
    )  # fmt: skip
    launchable(settle_kernel)[(triton.cdiv(N, settle_options["BLOCK_N"]), H)](
        x_NHD, codebook_HKD, reach_HK.amax(dim=1) if exact else norm_HK, score_RSNH, candidate_RSNH, index_NH, distance_NH,
        N, K, S, D, **constants, **settle_options,
    )  # fmt: skip


def nearest_code_empty(x_NHD: Tensor, codebook_HKD: Tensor, cosine: bool, exact: bool) -> tuple[Tensor, Tensor]:
    return x_NHD.new_empty(x_NHD.shape[:2], dtype=torch.int64), x_NHD.new_empty(x_NHD.shape[:2], dtype=torch.float32)


def nearest_code_launcher(x_NHD: Tensor, codebook_HKD: Tensor, cosine: bool, exact: bool) -> tuple[Tensor, Tensor]:
    index_NH, distance_NH = nearest_code_empty(x_NHD, codebook_HKD, cosine, exact)
    N, H, D = x_NHD.shape
    if N:
        K = codebook_HKD.shape[1]
        tile = search_tile(int(D), dot_dtype(x_NHD.dtype, codebook_HKD.dtype, exact), exact)
        S = split_count(N, int(H), K, tile, x_NHD.device)
        norm_HK = codebook_HKD.new_empty((H, K), dtype=torch.float32)
        score_RSNH = x_NHD.new_empty((3 if exact else 1, S, N, H), dtype=torch.float32)
        candidate_RSNH = x_NHD.new_empty((2 if exact else 1, S, N, H), dtype=torch.int32)
        x_NHD, codebook_HKD = x_NHD.contiguous(), codebook_HKD.contiguous()
        launch(x_NHD, codebook_HKD, norm_HK, score_RSNH, candidate_RSNH, index_NH, distance_NH, cosine, exact)
    return index_NH, distance_NH


nearest_code_triton = register_triton_op("dae_kernels::nearest_code", nearest_code_launcher, nearest_code_empty)
