"""Settlement of nearest_code in Triton: the splits of the search are joined, and float64 decides what float32 scores cannot.

- `settle_kernel` reads a row of x and a code that lies anywhere, 2 N D b bytes, with three float64 operations per coordinate;
  "exact" 3 N D b and twice the operations. A coordinate of the search is K bf16 multiply-adds, 32 of which take as long as one
  float64 operation: settling is a few percent from K = 5000 on, and as long as the search at K = 200.
- A row that it cannot decide goes to a list: one atomic addition for a program that has any. The order of the list is by chance,
  the results are not, as each row is settled by itself.
- `walk_kernel` reads the codebook, K D b bytes, from L2 for each listed row, and costs two float64 operations ("cosine": two
  multiply-adds) and two conversions for each of K D coordinates. An SM does 64 such operations per cycle (sm_80: 32) where its
  tensor cores do 2048 bf16 multiply-adds: if all rows walk, that takes 64 to 128 times as long as the bf16 product at least.
  Few rows are split over the codes, so that rows x shares fill the programs: a row alone takes as long as K / programs codes.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def insert(best, index, second, second_index, rest, score, code, others):
    """Add a candidate to the two best, and a bound below the scores of `others` to that of the rest. The earlier wins a tie."""
    rest = tl.minimum(tl.minimum(rest, others), tl.maximum(second, score))
    second_index = tl.where(score < best, index, tl.where(score < second, code, second_index))
    second = tl.where(score < best, best, tl.minimum(second, score))
    # Strictly less: NaN never is, so the index stays a code whatever x holds.
    index = tl.where(score < best, code, index)
    best = tl.where(score < best, score, best)
    return best, index, second, second_index, rest


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
    x_ptr, codebook_ptr, reach_ptr, score_ptr, candidate_ptr, index_ptr, distance_ptr, count_ptr, list_ptr,
    N, K, S, D,
    H: tl.constexpr, COSINE: tl.constexpr, EXACT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Index and distance [N, H] of BLOCK_N rows of one head from the candidates of the S splits; `reach` [H] is for the bound.

    EXACT: rows that it cannot decide are appended, as n H + h, to `list`, and counted in `count`, which is 0 before.
    """
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
        # Nothing is nearest to a row that is not finite, and everything to a zero row by its cosine.
        crowded = inside & (sure == 0) & (x_square < float("inf")) & (x_square > (0.0 if COSINE else -1.0))
        nearer = enlarged(second_distance, D, COSINE) < distance
        swap = nearer | ((second_index < index) & (second_distance <= enlarged(distance, D, COSINE)))
        index = tl.where(swap, second_index, index)
        distance = tl.where(swap, second_distance, distance)

        number = tl.sum(crowded.to(tl.int32), axis=0)
        if number > 0:  # in any order: each row is settled by itself
            place = tl.atomic_add(count_ptr, number) + tl.cumsum(crowded.to(tl.int32), axis=0) - 1
            tl.store(list_ptr + place, slot.to(list_ptr.dtype.element_ty), mask=crowded)
    tl.store(index_ptr + slot, index.to(tl.int64), mask=inside)
    tl.store(distance_ptr + slot, distance.to(tl.float32), mask=inside)


@triton.jit
def lowest(minimum, minimum_code, K, D, COSINE: tl.constexpr):
    """The lowest of some codes whose distance is the smallest, up to rounding, and this distance."""
    limit = enlarged(tl.min(minimum, axis=0), D, COSINE)
    index = tl.min(tl.where(minimum <= limit, minimum_code, K - 1), axis=0)
    return tl.min(tl.where(minimum_code == index, minimum, float("inf")), axis=0), index


@triton.jit
def walk_shares(count, K, programs, BLOCK_K: tl.constexpr):
    """Into how many shares the codes of each listed row are split, and the codes of a share: rows x shares fill the programs."""
    tiles = tl.cdiv(K, BLOCK_K)
    shares = tl.maximum(1, tl.minimum(tiles, programs // tl.maximum(count, 1)))
    return shares, tl.cdiv(tiles, shares) * BLOCK_K


@triton.jit(do_not_specialize=["K", "D", "programs"])
def walk_kernel(
    x_ptr, codebook_ptr, count_ptr, list_ptr, part_distance_ptr, part_code_ptr, index_ptr, distance_ptr,
    K, D, programs,
    H: tl.constexpr, COSINE: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Compare each listed row with every code in float64: (row, share of its codes) is a piece of work. Grid (programs).

    One share: the result goes to index and distance. More: to the part row * shares + share, of which there are `programs`.
    """
    count = tl.load(count_ptr)
    shares, codes_per_share = walk_shares(count, K, programs, BLOCK_K)
    lane = tl.arange(0, BLOCK_K)
    for piece in range(tl.program_id(0), count * shares, programs):
        slot = tl.load(list_ptr + piece // shares).to(tl.int64)
        first = (piece % shares) * codes_per_share
        codes_ptr = codebook_ptr + (slot % H) * K * D
        minimum = tl.full([BLOCK_K], float("inf"), tl.float64)
        minimum_code = tl.zeros([BLOCK_K], tl.int32)
        for k0 in range(first, tl.minimum(K, first + codes_per_share), BLOCK_K):
            code = k0 + lane
            code_ptrs = codes_ptr + code.to(tl.int64) * D
            distance, _ = true_distance(x_ptr + slot * D + lane * 0, code_ptrs, code < K, D, COSINE, BLOCK_K, BLOCK_E)
            better = (code < K) & (enlarged(distance, D, COSINE) < minimum)  # false for NaN
            minimum = tl.where(better, distance, minimum)
            minimum_code = tl.where(better, code, minimum_code)
        distance, index = lowest(minimum, minimum_code, K, D, COSINE)
        if shares == 1:
            tl.store(index_ptr + slot, index.to(tl.int64))
            tl.store(distance_ptr + slot, distance.to(tl.float32))
        else:
            tl.store(part_distance_ptr + piece, distance)
            tl.store(part_code_ptr + piece, index)


@triton.jit(do_not_specialize=["K", "D", "programs"])
def join_kernel(
    count_ptr, list_ptr, part_distance_ptr, part_code_ptr, index_ptr, distance_ptr,
    K, D, programs,
    COSINE: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """The result of each listed row from its shares, at most BLOCK_S, if it has several. Grid (programs / 2)."""
    count = tl.load(count_ptr)
    shares, _ = walk_shares(count, K, programs, BLOCK_K)
    row = tl.program_id(0)
    if (shares > 1) & (row < count):
        slot = tl.load(list_ptr + row).to(tl.int64)
        share = tl.arange(0, BLOCK_S)
        minimum = tl.load(part_distance_ptr + row * shares + share, mask=share < shares, other=float("inf"))
        minimum_code = tl.load(part_code_ptr + row * shares + share, mask=share < shares, other=K - 1)
        distance, index = lowest(minimum, minimum_code, K, D, COSINE)
        tl.store(index_ptr + slot, index.to(tl.int64))
        tl.store(distance_ptr + slot, distance.to(tl.float32))
