"""Nearest code in Triton: one pass over the scores, which never leave the chip, and float64 where their rounding could decide.

`code_norm_kernel` takes |c|^2 of every code. `search_kernel` walks over the codes, or over a share of them, and keeps the best
score of each row with its index. `settle_kernel` (fused_settle.py) joins the shares and takes the distance from the winner.

"exact" is exact by construction. The search then keeps the two best codes (of different tiles, or lanes of a tile) and a bound
`rest` below the scores of all others. `settle_kernel` compares the two by float64 distances. Where `rest` is within the error
that rounding can leave in two scores (`rounding_error`), three or more codes may be nearest, or two of one tile or lane, and the
row walks: `settle_kernel` puts it on a list in the GPU's memory, `walk_kernel` compares the listed rows with every code in
float64, rows x shares of the codes over the whole chip, and `join_kernel` joins the shares. The host never reads the list. By
this bound and torch's float32 scores no row of 2048 walks in the three families of profiling/exactness.py, and 4 do for normal
operands at K = 8192, D = 256. Every row does where float32 cannot tell codes apart: three copies of each code, data far off the
origin, D = 1 with many codes.

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
- Comparing takes about five float32 or integer instructions per score (scale, minimum, equality, select, minimum of the
  index), and "exact" three more for the second score of the tile. An SM does 128 of them per cycle, so 25 or 16 scores, while
  its tensor cores do 2048 bf16 multiply-adds: the comparison is the bound below D = 100 or so (bf16, "fast"), the product above.
- Where registers allow it (`layout.by_lane`) each lane of the tile keeps its own minimum over all tiles, four instructions per
  score ("exact" six, with a bound below the lane's other scores), and threads reduce once at the end. "exact" then cannot tell
  two codes of one lane apart: a row whose nearest code has a copy a multiple of BLOCK_K codes away walks.
- All instructions of the loop per score, as compiled by triton 3.7.1 for sm_90 (bf16; counts, not times), with a reduction and
  masks in each tile, and now: D = 256 "fast", tile 64 x 64, 16.2 and 9.2; D = 256 "exact", 128 x 64, 18.2 and 11.7. No mask
  is made where D fills the blocks and K the tiles.
- So the tile is chosen for registers: BLOCK_N x BLOCK_K sums over 32 * num_warps threads, 64 per thread for a 16-bit product
  (32 in "exact", which spilled on sm_100 with 64), 32 for tf32 and tf32x3, whose operands take more; tf32x3 holds each twice,
  hence the steps of 32 and 16 in D (sm_80).
- No persistent programs: 512 programs of 64 rows (N = 32768), two per SM, are 1.94 waves, so 3 % are idle at the end, and a
  program's start is 64 rows of x beside all codes. No TMA descriptors: they would save about 70 of the 295 instructions per
  thread and tile (D = 256, "fast"), but no traffic out of L2, and need rows of a multiple of 16 bytes and host time per call;
  whether that pays is for a GPU to say.
- D is padded to a power of two of at least 16, the minimum of a tensor core. Above BLOCK_D it is looped and both operands
  stream; up to BLOCK_D the rows of x stay on the chip and only codes stream.
- N / BLOCK_N programs fill 132 SMs from N = 17000 (float32: 8500). Below that the codes are split into S shares, so that
  S N / BLOCK_N programs do; they cost 8 S N bytes ("exact" 20 S N), written and read once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dae_kernels.dispatch import register_op
from dae_kernels.nearest_code.fused_settle import insert, join_kernel, settle_kernel, walk_kernel
from dae_kernels.nearest_code.layout import SearchLayout, search_layout


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
def load_vectors(ptrs, inside, d0, D: tl.constexpr, RAGGED: tl.constexpr, BLOCK_D: tl.constexpr):
    """Values d0 to d0 + BLOCK_D of some vectors, 0 beyond D and, if RAGGED, in those not `inside`; masks where needed."""
    if RAGGED or D % BLOCK_D != 0:
        mask = d0 + tl.arange(0, BLOCK_D)[None, :] < D
        return tl.load(ptrs + d0, mask=mask & inside[:, None] if RAGGED else mask, other=0.0)
    return tl.load(ptrs + d0)


@triton.jit
def tile_scores(
    x, x_ptrs, row_inside, codebook_ptr, norm_ptr,
    k0, K, d_end,
    D: tl.constexpr, COSINE: tl.constexpr, RAGGED: tl.constexpr, INPUT_PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Scores of the codes from k0 on; RAGGED: infinite beyond K, else all of them exist. `x` are the rows, unless D is looped."""
    code = k0 + tl.arange(0, BLOCK_K)
    inside = code < K
    c_ptrs = codebook_ptr + code.to(tl.int64)[:, None] * D + tl.arange(0, BLOCK_D)[None, :]
    dot = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    if D <= BLOCK_D:
        c = load_vectors(c_ptrs, inside, 0, D, RAGGED, BLOCK_D).to(x.dtype)
        dot = tl.dot(x, tl.trans(c), dot, input_precision=INPUT_PRECISION)
    else:
        for d0 in range(0, d_end, BLOCK_D):
            x_d = load_vectors(x_ptrs, row_inside, d0, D, RAGGED, BLOCK_D).to(x.dtype)
            c = load_vectors(c_ptrs, inside, d0, D, RAGGED, BLOCK_D).to(x.dtype)
            dot = tl.dot(x_d, tl.trans(c), dot, input_precision=INPUT_PRECISION)
    # After the product: before it, norms would take the registers of a second program per SM (sm_80).
    norm = tl.load(norm_ptr + code, mask=inside, other=float("inf")) if RAGGED else tl.load(norm_ptr + code)
    if COSINE:
        score = -dot * norm[None, :]
        return tl.where(inside[None, :], score, float("inf")) if RAGGED else score
    return norm[None, :] - 2.0 * dot


@triton.jit
def keep_best(
    best, index, second, second_index, rest, score, k0,
    EXACT: tl.constexpr, BY_LANE: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """What a row keeps, after the scores of one more tile; BY_LANE: what a lane keeps, with the tile k0 for the index."""
    if BY_LANE:  # strictly less: an earlier code wins a tie, and NaN never is
        less = score < best
        if EXACT:
            rest = tl.minimum(rest, tl.where(less, best, score))
        index = tl.where(less, k0, index)
        best = tl.minimum(best, score)
    else:
        code = k0 + tl.arange(0, BLOCK_K)
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
    return best, index, second, second_index, rest


@triton.jit
def lowest_lane(lane_best, lane_code):
    """The least value of each row with the lowest code that has it, and the values without that code."""
    best = tl.min(lane_best, axis=1)
    index = tl.min(tl.where(lane_best == best[:, None], lane_code, 2147483647), axis=1)
    return best, index, tl.where(lane_code == index[:, None], float("inf"), lane_best)


@triton.jit(do_not_specialize=["N", "K", "codes_per_split", "d_end"])
def search_kernel(
    x_ptr, codebook_ptr, norm_ptr, score_ptr, candidate_ptr,
    N, K, codes_per_split, d_end,
    H: tl.constexpr, D: tl.constexpr, COSINE: tl.constexpr, EXACT: tl.constexpr, UPCAST: tl.constexpr,
    INPUT_PRECISION: tl.constexpr, BY_LANE: tl.constexpr, RAGGED: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Search: a program has BLOCK_N rows of x of one head and loops over one split of the codes; scores are |c|^2 - 2 x . c.

    x is [N, H, D], the codebook [H, K, D]; scores are [1, S, N, H], candidates too. EXACT: scores [3, S, N, H] (best, second,
    rest) and candidates [2, S, N, H].

    `d_end` is D once more, at run time: the compiler would unroll a loop over D of known length, and spill.
    """
    DOT_DTYPE: tl.constexpr = tl.float32 if UPCAST else x_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(2)
    if H > 1:  # offsets of 0 would still use registers
        head = tl.program_id(1).to(tl.int64)
        x_ptr += head * D
        codebook_ptr += head * K * D
        norm_ptr += head * K
        score_ptr += head
        candidate_ptr += head
    # Without masks, rows beyond N repeat the last one; they are not stored. With RAGGED that spilled on sm_100 (float32).
    x_row = row if RAGGED else tl.minimum(row, N - 1)
    x_ptrs = x_ptr + x_row[:, None] * (H * D) + tl.arange(0, BLOCK_D)[None, :]
    x = load_vectors(x_ptrs, row < N, 0, D, RAGGED, BLOCK_D).to(DOT_DTYPE)
    best = tl.full([BLOCK_N, BLOCK_K] if BY_LANE else [BLOCK_N], float("inf"), tl.float32)
    index = tl.zeros([BLOCK_N, BLOCK_K] if BY_LANE else [BLOCK_N], tl.int32)
    second, second_index, rest = best, index, best

    for k0 in range(split * codes_per_split, tl.minimum(K, (split + 1) * codes_per_split), BLOCK_K):
        score = tile_scores(
            x, x_ptrs, row < N, codebook_ptr, norm_ptr, k0, K, d_end,
            D, COSINE, RAGGED, INPUT_PRECISION, BLOCK_N, BLOCK_K, BLOCK_D,
        )  # fmt: skip
        best, index, second, second_index, rest = keep_best(
            best, index, second, second_index, rest, score, k0, EXACT, BY_LANE, BLOCK_K
        )
    if BY_LANE:
        lane_code = index + tl.arange(0, BLOCK_K)[None, :]
        lane_rest = rest
        best, index, lane_best = lowest_lane(best, lane_code)
        if EXACT:
            second, second_index, lane_best = lowest_lane(lane_best, lane_code)
            rest = tl.min(tl.minimum(lane_rest, lane_best), axis=1)

    plane = tl.cast(N, tl.int64) * H
    ranks = tl.num_programs(2) * plane
    slot = split * plane + row * H
    tl.store(score_ptr + slot, best, mask=row < N)
    tl.store(candidate_ptr + slot, index, mask=row < N)
    if EXACT:
        tl.store(score_ptr + ranks + slot, second, mask=row < N)
        tl.store(candidate_ptr + ranks + slot, second_index, mask=row < N)
        tl.store(score_ptr + 2 * ranks + slot, rest, mask=row < N)


def launch(
    layout: SearchLayout,
    x: Tensor,
    codebook: Tensor,
    norm_HK: Tensor,
    score: Tensor,
    candidate: Tensor,
    index: Tensor,
    distance: Tensor,
) -> None:
    """All kernels, on contiguous tensors: index int64, candidate int32, the results and buffers otherwise float32; N, H >= 1."""
    kernel = code_norm_kernel[layout.norm_grid]
    kernel(codebook, norm_HK, *layout.norm_sizes, **layout.norm_options)
    kernel = search_kernel[layout.search_grid]
    kernel(x, codebook, norm_HK, score, candidate, *layout.search_sizes, **layout.search_options)
    reach, count, rows = norm_HK, norm_HK, norm_HK  # of no use unless exact
    if layout.exact:
        if layout.cosine:  # a zero code has no length to care for; a long one may overflow, a short one underflow
            reach = torch.maximum(norm_HK, (1.0 / norm_HK).where(norm_HK > 0, 0.0))
        reach = reach.amax(dim=1)
        count = index.new_zeros(1, dtype=torch.int32)
        rows = index.new_empty(index.numel(), dtype=layout.list_dtype)
    kernel = settle_kernel[layout.settle_grid]
    kernel(
        x, codebook, reach, score, candidate, index, distance, count, rows, *layout.settle_sizes, **layout.settle_options
    )  # fmt: skip
    if layout.exact:  # the host does not learn how many rows there are: nothing waits
        P = layout.programs
        parts = index.new_empty(P, dtype=torch.float64), index.new_empty(P, dtype=torch.int32)
        kernel = walk_kernel[layout.walk_grid]
        kernel(x, codebook, count, rows, *parts, index, distance, *layout.walk_sizes, **layout.walk_options)
        kernel = join_kernel[layout.join_grid]
        kernel(count, rows, *parts, index, distance, *layout.walk_sizes, **layout.join_options)


def nearest_code_empty(x: Tensor, codebook: Tensor, cosine: bool, exact: bool) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[:-1], dtype=torch.int64), x.new_empty(x.shape[:-1], dtype=torch.float32)


def nearest_code_launcher(x: Tensor, codebook: Tensor, cosine: bool, exact: bool) -> tuple[Tensor, Tensor]:
    """Index and distance [N] of x [N, D] with codebook [K, D], or [N, H] of x [N, H, D] with [H, K, D]."""
    *rows, D = x.shape
    *heads, K, _ = codebook.shape
    index, distance = x.new_empty(*rows, dtype=torch.int64), x.new_empty(*rows, dtype=torch.float32)
    if N := rows[0]:
        H = heads[0] if heads else 1
        layout = search_layout(N, H, K, D, x.dtype, codebook.dtype, cosine, exact, x.device)
        norm_HK = x.new_empty(H, K, dtype=torch.float32)
        score, candidate = x.new_empty(layout.scores, dtype=torch.float32), x.new_empty(layout.candidates, dtype=torch.int32)
        launch(layout, x.contiguous(), codebook.contiguous(), norm_HK, score, candidate, index, distance)
    return index, distance


nearest_code_triton = register_op("dae_kernels::nearest_code", nearest_code_launcher, nearest_code_empty)
