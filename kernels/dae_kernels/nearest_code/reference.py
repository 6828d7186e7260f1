"""Nearest code in eager torch, a bounded number of scores at a time: the definition."""

from __future__ import annotations

import torch
from torch import Tensor

MAX_SCORES = 1 << 23  # float64 scores alive at once: 64 MiB
MAX_QUICK_SCORES = 1 << 19  # float32 scores alive at once, 2 MiB: they are read several times, from the cache
CLASSES = 64  # of codes, by their index modulo the number of columns, in the quick search


def nearest_code_reference(x: Tensor, codebook: Tensor, metric: str) -> tuple[Tensor, Tensor]:
    """Indices [N] int64 and distances [N] float32 of the nearest rows of a codebook [K, D] to x [N, D].

    With a codebook [H, K, D] x is [N, H, D] and the results are [N, H].

    The answer is that of float64 arithmetic, which no setting of torch lowers, as "high" and "medium" do for float32. On
    CPUs float32 scores settle the rows where they provably suffice. The score leaves |x|^2 out, which is the same for every
    code; the distance is taken from the winner itself, so it does not cancel and is never negative.
    """
    if codebook.dim() == 3:
        heads = [nearest_code_reference(x_ND, c_KD, metric) for x_ND, c_KD in zip(x.unbind(1), codebook.unbind(0), strict=True)]
        indices, distances = zip(*heads, strict=True)
        return torch.stack(indices, dim=1), torch.stack(distances, dim=1)
    codes_KD = codebook.double()
    if metric == "cosine":
        codes_KD = codes_KD * unit_scale(codes_KD)
        bias_K = codes_KD.new_zeros(codes_KD.shape[0])
    else:
        bias_K = codes_KD.square().sum(dim=1)
    if quick_search_applies(x, codebook):
        index_N, sure_N = quick_search(x, codes_KD, bias_K)
        unsure = (~sure_N).nonzero()[:, 0]
        if unsure.numel():
            index_N[unsure] = exact_search(x[unsure], codes_KD, bias_K)
    else:
        index_N = exact_search(x, codes_KD, bias_K)
    distances = []
    for x_nD, index_n in chunks(max(1, MAX_SCORES // x.shape[1]), x, index_N):
        x_nD, code_nD = x_nD.double(), codes_KD[index_n]
        if metric == "cosine":
            distance_n = 1.0 - (x_nD * unit_scale(x_nD) * code_nD).sum(dim=1)
        else:
            distance_n = (x_nD - code_nD).square().sum(dim=1)
        distances.append(distance_n.float())
    return index_N, torch.cat(distances)


def exact_search(x_ND: Tensor, codes_KD: Tensor, bias_K: Tensor) -> Tensor:
    """argmin_k bias_k - 2 x . c_k in float64, the first of equal ones."""
    rows = max(1, MAX_SCORES // codes_KD.shape[0])
    scores = (torch.addmm(bias_K, x_nD.double(), codes_KD.T, alpha=-2.0) for (x_nD,) in chunks(rows, x_ND))
    return torch.cat([score_nK.argmin(dim=1) for score_nK in scores])


def quick_search_applies(x: Tensor, codebook: Tensor) -> bool:
    """Whether float32 products are float32 products here, and values may steer what is computed."""
    if x.device.type != "cpu" or torch.promote_types(x.dtype, codebook.dtype) == torch.float64:
        return False
    if torch.compiler.is_compiling() or any(torch._C._functorch.is_batchedtensor(t) for t in (x, codebook)):  # compile, vmap
        return False
    settings = (torch.backends, torch.backends.mkldnn, torch.backends.mkldnn.matmul)
    return all(setting.fp32_precision in ("none", "ieee") for setting in settings)


def quick_search(x_ND: Tensor, codes_KD: Tensor, bias_K: Tensor) -> tuple[Tensor, Tensor]:
    """The code of the least float32 score [N], and whether no rounding can have made it so [N].

    A float32 score of D products and a bias, in any order of summation, is off by at most (D + 3) u (|bias| + 2 |x| |c|) with
    u = 2^-24 (Higham 2002, section 3.1), rounding the operands adds three u, and each underflow 2^-125; D + 8 leaves room for
    the square of D u. The winner is sure where it leads by more than two such errors: exact ties never are.

    torch's argmin reads a score ten times slower than amin, so the codes are laid out as [CLASSES, columns]: amin finds the
    best of each column, and argmin sees the columns and one column's codes only.
    """
    K, D = codes_KD.shape
    columns = -(-K // CLASSES)
    padding = CLASSES * columns - K
    codes_DK = torch.nn.functional.pad(codes_KD.float(), (0, 0, 0, padding)).T
    bias = torch.nn.functional.pad(bias_K.float(), (0, padding), value=float("inf"))
    bias_max, length_max = bias_K.max(), codes_KD.norm(dim=1).max()
    rows = max(64, MAX_QUICK_SCORES // len(bias))
    buffer = x_ND.new_empty(min(rows, len(x_ND)), len(bias), dtype=torch.float32)
    index_N = torch.empty(len(x_ND), dtype=torch.int64)
    sure_N = torch.empty(len(x_ND), dtype=torch.bool)
    for x_nD, index_n, sure_n in chunks(rows, x_ND, index_N, sure_N):
        x_nD = x_nD.float()
        with torch.autocast("cpu", enabled=False):
            score = torch.addmm(bias, x_nD, codes_DK, alpha=-2.0, out=buffer[: len(x_nD)])
        score_nCk = score.view(len(x_nD), CLASSES, columns)
        best_nk = score_nCk.amin(dim=1)
        column_n1 = best_nk.argmin(dim=1, keepdim=True)
        score_nC = score_nCk.gather(2, column_n1[:, None].expand(-1, CLASSES, 1))[:, :, 0]
        class_n1 = score_nC.argmin(dim=1, keepdim=True)
        best_n = score_nC.gather(1, class_n1)[:, 0].double()
        inside_n = score_nC.scatter_(1, class_n1, float("inf")).amin(dim=1)
        outside_n = best_nk.scatter_(1, column_n1, float("inf")).amin(dim=1)
        size_n = bias_max + 2.0 * length_max * x_nD.double().norm(dim=1)
        error_n = (D + 8) * (2.0**-24 * size_n + 2.0**-125)
        index_n.copy_((class_n1 * columns + column_n1)[:, 0].clamp(max=K - 1))
        # Also false for NaN, and where a sum may have overflowed.
        sure_n.copy_((torch.minimum(inside_n, outside_n).double() - best_n > 2.0 * error_n) & (size_n < 1e30))
    return index_N, sure_N


def chunks(rows: int, *tensors: Tensor) -> list[tuple[Tensor, ...]]:
    """The tensors, `rows` at a time."""
    # The tensors themselves, not a split into one: a graph compiled for one chunk then serves every N up to `rows`.
    if tensors[0].shape[0] <= rows:
        return [tensors]
    return list(zip(*(tensor.split(rows) for tensor in tensors), strict=True))


def unit_scale(x_ND: Tensor) -> Tensor:
    """[N, 1]: 1 / |x|, and 0 for a zero vector, whose cosine with anything is then 0."""
    norm_N1 = x_ND.norm(dim=1, keepdim=True)
    return torch.where(norm_N1 > 0, 1.0 / norm_N1, 0.0)
