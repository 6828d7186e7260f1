"""Cases of codebook_statistics: each vector and index read once, counts and sums written once; N D additions."""

from __future__ import annotations

import torch
from dae_kernels.codebook_statistics import codebook_statistics
from torch import Tensor

SHAPES = {"cuda": [{"N": 32768, "K": 16384, "D": 256}], "cpu": [{"N": 8192, "K": 1024, "D": 64}]}
DTYPES = {"cuda": ["bfloat16", "float32"], "cpu": ["float32"]}


def cases(Case, shape, dtype, device):
    N, K, D = shape["N"], shape["K"], shape["D"]
    x_ND = torch.randn(N, D, device=device).to(dtype)
    indices_N = torch.randint(K, (N,), device=device)
    moved = N * D * x_ND.element_size() + 8 * N + K * (8 + 4 * D)

    def case(impl, run, **options):
        make = lambda: (lambda: run()[1], [])  # the sums are what is compared  # noqa: E731
        return Case("codebook_statistics", impl, make, N * D, moved, product="float32", **options)

    def ours() -> tuple[Tensor, Tensor]:
        return codebook_statistics(x_ND, indices_N, K)

    def one_hot() -> tuple[Tensor, Tensor]:
        chosen_NK = torch.nn.functional.one_hot(indices_N, K).to(x_ND.dtype)
        return chosen_NK.sum(dim=0), (chosen_NK.T @ x_ND).float()

    def atomics() -> tuple[Tensor, Tensor]:
        sums_KD = torch.zeros(K, D, device=device).index_add_(0, indices_N, x_ND.float())
        return torch.bincount(indices_N, minlength=K), sums_KD

    yield case("reference", ours)
    yield case("compile", torch.compile(ours), note="of the reference")
    yield case("one-hot product", one_hot, note="what vector-quantize-pytorch does")
    yield case("bincount + index_add", atomics, note="not deterministic on a GPU")
