"""Nearest code in eager torch, a bounded number of scores at a time: the definition."""

from __future__ import annotations

import torch
from torch import Tensor

MAX_SCORES = 1 << 23  # scores alive at once: 64 MiB in float64


def nearest_code_reference(x_ND: Tensor, codebook_KD: Tensor, metric: str) -> tuple[Tensor, Tensor]:
    """Indices [N] int64 and distances [N] float32 of the nearest rows of `codebook_KD`.

    All arithmetic is float64: no setting of torch lowers the precision of its products, as "high" and "medium" do for
    float32. The score leaves |x|^2 out, which is the same for every code; the distance is taken from the winner itself,
    so it does not cancel and is never negative.
    """
    codebook_KD = codebook_KD.double()
    if metric == "cosine":
        codebook_KD = codebook_KD * unit_scale(codebook_KD)
        bias_K = codebook_KD.new_zeros(codebook_KD.shape[0])
    else:
        bias_K = codebook_KD.square().sum(dim=1)
    rows = max(1, MAX_SCORES // codebook_KD.shape[0])
    # The plain tuple, not a split into one: a graph compiled for one chunk then serves every N up to `rows`.
    chunks = (x_ND,) if x_ND.shape[0] <= rows else x_ND.split(rows)
    indices, distances = [], []
    for x_nD in chunks:
        x_nD = x_nD.double()
        index_n = torch.addmm(bias_K, x_nD, codebook_KD.T, alpha=-2.0).argmin(dim=1)  # the first of equal ones
        code_nD = codebook_KD[index_n]
        if metric == "cosine":
            distance_n = 1.0 - (x_nD * unit_scale(x_nD) * code_nD).sum(dim=1)
        else:
            distance_n = (x_nD - code_nD).square().sum(dim=1)
        indices.append(index_n)
        distances.append(distance_n.float())
    return torch.cat(indices), torch.cat(distances)


def unit_scale(x_ND: Tensor) -> Tensor:
    """[N, 1]: 1 / |x|, and 0 for a zero vector, whose cosine with anything is then 0."""
    norm_N1 = x_ND.norm(dim=1, keepdim=True)
    return torch.where(norm_N1 > 0, 1.0 / norm_N1, 0.0)
