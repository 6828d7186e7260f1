"""Nearest code in eager torch, in blocks of bounded size: the definition."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from dae_kernels.clouds import power_of_two
from dae_kernels.dispatch import register_op
from dae_kernels.tracing import without_autocast

MAX_CODES = 1 << 18  # coordinates of codes in memory at once: 2 MiB in float64
MAX_SCORES = {"cpu": 1 << 19, "gpu": 1 << 23}  # alive at once; on a CPU 2 MiB of float32, which are read again from its cache
CLASSES = 64  # of codes, by their index modulo the number of columns, in `search`
CENTRE_SAMPLE = 64


def reference(x: Tensor, codebook: Tensor, metric: str) -> tuple[Tensor, Tensor]:
    """Indices [N] int64 and distances [N] float32 of the nearest rows of a codebook [K, D] to x [N, D].

    With a codebook [H, K, D] x is [N, H, D] and the results are [N, H].

    Scores |c|^2 - 2 x . c decide where their rounding provably cannot matter: float32 scores first, if float32 products are exact
    float32 (torch's "high" and "medium" lower them), then float64 scores. Float64 distances decide the rest.
    """
    if codebook.dim() == 3:
        heads = [reference(x_ND, c_KD, metric) for x_ND, c_KD in zip(x.unbind(1), codebook.unbind(0), strict=True)]
        indices, distances = zip(*heads, strict=True)
        return torch.stack(indices, dim=1), torch.stack(distances, dim=1)
    scale: Tensor | float = 1.0
    view: Callable[[Tensor], Tensor] = unit_rows
    if metric == "l2":
        centre_D, power = frame(codebook)
        view, scale = lambda rows: (rows.double() - centre_D) * power, power
    index_N = torch.zeros(len(x), dtype=torch.int64, device=x.device)
    unsure = torch.arange(len(x), device=x.device)
    with without_autocast(x.device):
        for dtype in (torch.float32, torch.float64) if float32_products(x, codebook) else (torch.float64,):
            index_N[unsure], sure, limit = search(x[unsure], codebook, metric, view, dtype)
            unsure, limit = unsure[~sure], limit[~sure]
            if not unsure.numel():
                break
        else:
            index_N[unsure] = settle(x[unsure], codebook, limit, metric, view, scale)
    parts = chunks(max(1, MAX_CODES // x.shape[1]), x, index_N)
    return index_N, torch.cat([pair_distance(x_nD, codebook[index_n], metric).float() for x_nD, index_n in parts])


def search(
    x_ND: Tensor, codebook_KD: Tensor, metric: str, view: Callable[[Tensor], Tensor], dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """The best code of each row by scores in `dtype`, computed of `view(rows)`, a map [*, D] -> [*, D] to float64.

    Returns:
        The code of the lowest score [N]; whether it is certain despite rounding [N]; and a bound [N] that the score of the
        nearest code cannot exceed, however it is computed in `dtype`.

    A score of D products and a bias, in any order of summation, is off by at most (D + 3) u (|bias| + 2 |x| |c|) with u half
    the eps of `dtype` (Higham 2002, section 3.1), rounding the operands adds three u, and each underflow less than its smallest
    normal number; D + 8 leaves room for the square of D u. The winner is certain if it leads by more than two such errors:
    exact ties never are.

    torch's argmin reads a score ten times slower than amin, so a block of scores is laid out as [CLASSES, columns]: amin finds
    the best of each column, and argmin reads only the columns and one column's codes.
    """
    (N, D), K = x_ND.shape, len(codebook_KD)
    best_N, second_N = x_ND.new_full((2, N), float("inf"), dtype=dtype)
    index_N = torch.zeros(N, dtype=torch.int64, device=x_ND.device)
    length_N, reach = x_ND.new_zeros(N, dtype=torch.float64), x_ND.new_zeros((), dtype=torch.float64)
    rows, buffer = 0, x_ND.new_empty(0, dtype=dtype)
    first = torch.full((), K, device=x_ND.device)  # of the codes that are finite
    for start, codes_kD in code_blocks(codebook_KD):
        codes_kD, square_k, bias_k, finite_k = scored(codes_kD, metric, view)
        first = torch.where(first == K, torch.where(finite_k.any(), start + finite_k.int().argmax(), K), first)
        reach = torch.maximum(reach, square_k.max())
        codes_kD, bias_k = codes_kD.to(dtype), bias_k.to(dtype)
        columns = -(-len(codes_kD) // CLASSES)
        if not rows:
            rows = score_rows(x_ND, CLASSES * columns)
            buffer = x_ND.new_empty((min(rows, N), CLASSES * columns), dtype=dtype)
        for x_nD, best_n, second_n, index_n, length_n in chunks(rows, x_ND, best_N, second_N, index_N, length_N):
            x_nD = view(x_nD)
            torch.linalg.vector_norm(x_nD, dim=1, out=length_n)
            score = buffer[: len(x_nD), : CLASSES * columns]
            score[:, len(codes_kD) :] = float("inf")
            torch.addmm(bias_k, x_nD.to(dtype), codes_kD.T, alpha=-2.0, out=score[:, : len(codes_kD)])
            score_nCk = score.unflatten(1, (CLASSES, columns))
            best_nk = score_nCk.amin(dim=1)
            column_n1 = best_nk.argmin(dim=1, keepdim=True)
            score_nC = score_nCk.gather(2, column_n1[:, None].expand(-1, CLASSES, 1))[:, :, 0]
            class_n1 = score_nC.argmin(dim=1, keepdim=True)
            here_n = score_nC.gather(1, class_n1)[:, 0]
            inside_n = score_nC.scatter_(1, class_n1, float("inf")).amin(dim=1)
            outside_n = best_nk.scatter_(1, column_n1, float("inf")).amin(dim=1)
            found_n = (start + class_n1 * columns + column_n1)[:, 0].clamp(max=K - 1)
            index_n.copy_(torch.where(here_n < best_n, found_n, index_n))
            second_n.copy_(torch.stack([second_n, inside_n, outside_n, torch.maximum(here_n, best_n)]).amin(dim=0))
            best_n.copy_(torch.minimum(here_n, best_n))
    number = torch.finfo(dtype)
    size_N = reach + 2.0 * reach.sqrt() * length_N
    limit_N = best_N.double() + 2.0 * (D + 8) * (number.eps / 2 * size_N + 8 * number.tiny)
    # Also false for NaN, and if a sum may have overflowed.
    sure_N = (second_N.double() > limit_N) & (size_N < number.max**0.75)
    # No code is nearest to a non-finite row, nor if no code is finite; all finite codes are to a zero row in cosine.
    nothing_N = ~x_ND.isfinite().all(dim=1) | (first == K)
    zero_N = (length_N == 0) & (metric == "cosine") & ~nothing_N
    index_N = torch.where(zero_N, first, index_N.masked_fill(nothing_N, 0))
    return index_N, sure_N | nothing_N | zero_N, limit_N


def settle(
    x_ND: Tensor, codebook_KD: Tensor, limit_N: Tensor, metric: str, view: Callable[[Tensor], Tensor], scale: Tensor | float
) -> Tensor:
    """The first code [N] at the smallest distance, up to its rounding, among those whose score is within `limit_N`."""
    minimum_N = limit_N.new_full((len(x_ND),), float("inf"))
    index_N = torch.zeros(len(x_ND), dtype=torch.int64, device=x_ND.device)
    relative = (x_ND.shape[1] + 4) * 2.0**-51  # relative error of two float64 distances
    rounding = lambda distance: relative * (distance if metric == "l2" else 1.0)  # noqa: E731
    for start, codes_kD in code_blocks(codebook_KD):
        shown_kD, _, bias_k, finite_k = scored(codes_kD, metric, view)
        repeats_k = torch.nn.functional.pad((codes_kD[1:] == codes_kD[:-1]).all(dim=1), (1, 0))  # never the first of a tie
        for x_nD, limit_n, minimum_n, index_n in chunks(score_rows(x_ND, len(codes_kD)), x_ND, limit_N, minimum_N, index_N):
            score_nk = torch.addmm(bias_k, view(x_nD), shown_kD.T, alpha=-2.0)
            row_P, code_P = (~(score_nk > limit_n[:, None]) & finite_k & ~repeats_k).nonzero(as_tuple=True)
            pairs = chunks(max(1, MAX_CODES // x_ND.shape[1]), row_P, code_P)
            distance_P = torch.cat([pair_distance(x_nD[row], codes_kD[code], metric, scale) for row, code in pairs])
            here_n = torch.full_like(minimum_n, float("inf")).scatter_reduce(0, row_P, distance_P, "amin")
            first_P = distance_P <= (here_n + rounding(here_n))[row_P]
            code_n = torch.full_like(index_n, len(codebook_KD) - 1)
            code_n = code_n.scatter_reduce(0, row_P[first_P], start + code_P[first_P], "amin")
            better_n = here_n + rounding(here_n) < minimum_n
            index_n.copy_(torch.where(better_n, code_n, index_n))
            minimum_n.copy_(torch.where(better_n, here_n, minimum_n))
    return index_N


def scored(codes_kD: Tensor, metric: str, view: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes under `view`, their squared lengths [k], their part of the score [k], and whether they are finite [k].

    A code that is not finite becomes zeros with a score of infinity.
    """
    shown_kD = view(codes_kD)
    square_k = shown_kD.square().sum(dim=1)
    finite_k = square_k.isfinite()
    if not finite_k.all():  # the square of a finite code may overflow
        finite_k = codes_kD.isfinite().all(dim=1)
        shown_kD = shown_kD.where(finite_k[:, None], 0.0)
        square_k = square_k.where(finite_k, 0.0)
    return shown_kD, square_k, (square_k * (metric == "l2")).where(finite_k, float("inf")), finite_k


def pair_distance(x_PD: Tensor, code_PD: Tensor, metric: str, scale: Tensor | float = 1.0) -> Tensor:
    """Distances [P] of pairs of rows in float64, without cancellation; for l2 of rows multiplied by `scale`."""
    if metric == "cosine":
        return 1.0 - (unit_rows(x_PD) * unit_rows(code_PD)).sum(dim=1)
    return ((x_PD.double() - code_PD.double()) * scale).square().sum(dim=1)


def frame(codebook_KD: Tensor) -> tuple[Tensor, Tensor]:
    """A central point [D] of the codes and a power of two, to reduce cancellation and overflow in (rows - point) * power.

    Medians of some codes, robust to outliers. Every row is transformed alike, so equal codes stay equal.
    """
    sample_kD = codebook_KD[:: -(-len(codebook_KD) // CENTRE_SAMPLE)].double()
    centre_D = sample_kD.nanmedian(dim=0).values.nan_to_num(0.0, 0.0, 0.0)
    return centre_D, power_of_two((sample_kD - centre_D).abs().amax(dim=1).nanmedian()).nan_to_num(1.0)


def unit_rows(x_ND: Tensor) -> Tensor:
    """Rows of length 1 in float64; a zero row stays, so its cosine with anything is 0."""
    x_ND = x_ND.double()
    x_ND = x_ND * power_of_two(x_ND.abs().amax(dim=1, keepdim=True))
    norm_N1 = x_ND.norm(dim=1, keepdim=True)
    return x_ND / torch.where(norm_N1 > 0, norm_N1, 1.0)


def float32_products(x: Tensor, codebook: Tensor) -> bool:
    """Whether float32 scores may decide: products are computed in full float32, and no operand is wider."""
    if x.device.type != "cpu" or torch.promote_types(x.dtype, codebook.dtype) == torch.float64:
        return False
    mkldnn: Any = torch.backends.mkldnn
    settings = (torch.backends, mkldnn, mkldnn.matmul)
    return all(setting.fp32_precision in ("none", "ieee") for setting in settings)


def code_blocks(codebook_KD: Tensor) -> Iterator[tuple[int, Tensor]]:
    """(index of the first code, codes): at most MAX_CODES coordinates, but at least CLASSES codes, at a time."""
    size = min(8192, max(1, MAX_CODES // codebook_KD.shape[1] // CLASSES) * CLASSES)
    for start in range(0, len(codebook_KD), size):
        yield start, codebook_KD[start : start + size]


def score_rows(x_ND: Tensor, codes: int) -> int:
    """Number of rows to compare with `codes` codes at once."""
    return max(1, MAX_SCORES["cpu" if x_ND.device.type == "cpu" else "gpu"] // codes)


def chunks(rows: int, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The tensors, `rows` at a time; once if they are empty."""
    return zip(*(tensor.split(rows) for tensor in tensors), strict=True)


def reference_empty(x: Tensor, codebook: Tensor, metric: str) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[:-1], dtype=torch.int64), x.new_empty(x.shape[:-1], dtype=torch.float32)


# An operator, so that torch.compile and torch.vmap do not trace its data-dependent control flow.
nearest_code_reference = register_op("dae_kernels::nearest_code_reference", reference, reference_empty)
