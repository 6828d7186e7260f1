"""Cases of vector_quantize, straight through, forward and backward.

Flops: the search, 2 N K D. Bytes: x, codebook and indices as for nearest_code, `quantized` written; the backward reads the
gradient of `quantized` and writes that of x.
"""

from __future__ import annotations

import torch
from dae_kernels.dispatch import triton_refusal
from dae_kernels.vector_quantize import vector_quantize

SHAPES = {"cuda": [{"N": 32768, "K": 16384, "D": 256}], "cpu": [{"N": 8192, "K": 1024, "D": 64}]}
DTYPES = {"cuda": ["float32"], "cpu": ["float32"]}


def cases(Case, shape, dtype, device):
    N, K, D = shape["N"], shape["K"], shape["D"]
    x_ND, codebook_KD = torch.randn(N, D, device=device).to(dtype).requires_grad_(), torch.randn(K, D, device=device).to(dtype)
    size = x_ND.element_size()

    def case(impl, make, **options):
        least = {"flops": 2 * N * K * D, "bytes": (2 * N + K) * D * size + 8 * N}
        least |= {"backward_flops": 0, "backward_bytes": 2 * N * D * size}
        return Case("vector_quantize", impl, make, **least, product=str(dtype).removeprefix("torch."), **options)

    def ours(impl):
        return lambda: vector_quantize(x_ND, codebook_KD, impl=impl)[0]

    def vector_quantize_pytorch():
        from vector_quantize_pytorch import VectorQuantize

        layer = VectorQuantize(dim=D, codebook_size=K, rotation_trick=False).to(device)
        layer._codebook.embed.data.copy_(codebook_KD)
        return (lambda: layer(x_ND[None], freeze_codebook=True)[0][0]), [x_ND]

    yield case("reference", lambda: (ours("reference"), [x_ND]))
    yield case("compile", lambda: (torch.compile(ours("reference")), [x_ND]), note="of the reference")
    yield case("triton", lambda: (ours("triton"), [x_ND]), refusal=triton_refusal(device))
    note = "with its one-hot matrix, without its update"
    yield case("vector_quantize_pytorch", vector_quantize_pytorch, needs="vector_quantize_pytorch", note=note)
