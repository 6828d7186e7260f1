"""Cases of codebook_statistics: each vector and index read once, counts and sums written once; N D additions."""

from functools import partial

import torch
from cases import Case, with_compiled
from dae_kernels.codebook_statistics import codebook_statistics

SHAPES = {"cuda": [{"N": 32768, "K": 16384, "D": 256}], "cpu": [{"N": 8192, "K": 1024, "D": 64}]}
DTYPES = {"cuda": ["bfloat16", "float32"]}


def cases(device, dtype, N, K, D):
    x_ND, indices_N = torch.randn(N, D, device=device).to(dtype), torch.randint(K, (N,), device=device)
    case = partial(Case, "codebook_statistics", flops=N * D, bytes=x_ND.nbytes + 8 * N + K * (8 + 4 * D))

    # Each returns the sums, which are compared, then the counts.
    def one_hot():
        chosen_NK = torch.nn.functional.one_hot(indices_N, K).to(x_ND.dtype)
        return (chosen_NK.T @ x_ND).float(), chosen_NK.sum(dim=0)

    def atomics():
        sums_KD = torch.zeros(K, D, device=device).index_add_(0, indices_N, x_ND.float())
        return sums_KD, torch.bincount(indices_N, minlength=K)

    yield from with_compiled(case, lambda: codebook_statistics(x_ND, indices_N, K)[::-1])
    yield case("one-hot product", one_hot, note="what vector-quantize-pytorch does")
    yield case("bincount + index_add", atomics, note="not deterministic on a GPU")
