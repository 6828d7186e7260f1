"""Cases of vector_quantize, straight through, forward and backward.

Flops: the search, 2 N K D. Bytes: x, codebook and indices as for nearest_code, `quantized` written; the backward reads the
gradient of `quantized` and writes that of x.
"""

from functools import cache, partial
from importlib import import_module

import torch
from cases import Case, implementations
from dae_kernels.vector_quantize import vector_quantize

SHAPES = {"cuda": [{"N": 32768, "K": 16384, "D": 256}], "cpu": [{"N": 8192, "K": 1024, "D": 64}]}


def cases(device, dtype, N, K, D):
    x_ND, codebook_KD = torch.randn(N, D, device=device).to(dtype).requires_grad_(), torch.randn(K, D, device=device).to(dtype)
    work = {"flops": 2 * N * K * D, "bytes": 2 * x_ND.nbytes + codebook_KD.nbytes + 8 * N, "backward_bytes": 2 * x_ND.nbytes}
    case = partial(Case, "vector_quantize", leaves=[x_ND], product=dtype, **work)

    @cache
    def layer():
        made = import_module("vector_quantize_pytorch").VectorQuantize(D, codebook_size=K, rotation_trick=False).to(device)
        made._codebook.embed.data.copy_(codebook_KD)
        return made

    yield from implementations(case, lambda impl: vector_quantize(x_ND, codebook_KD, impl=impl)[0], device)
    note = "with its one-hot matrix, without its update"
    peer = lambda: layer()(x_ND[None], freeze_codebook=True)[0][0]  # noqa: E731
    yield case("vector_quantize_pytorch", peer, needs="vector_quantize_pytorch", note=note)
