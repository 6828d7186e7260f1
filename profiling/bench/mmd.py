"""Cases of mmd over three bandwidths, biased (as geomloss's), forward and backward.

Flops: of the products, 2 D for each of the N^2 + M^2 and N M pairs, and as much again for the gradients of both clouds;
exponentials are not counted. Bytes: both clouds once, both gradients written.
Ours makes the gradients in the forward pass, so only `both` compares.
"""

from __future__ import annotations

import torch
from dae_kernels.dispatch import triton_refusal
from dae_kernels.mmd import mmd
from torch import Tensor

SHAPES = {"cuda": [{"N": 16384, "M": 16384, "D": 64}], "cpu": [{"N": 2000, "M": 2000, "D": 16}]}
DTYPES = {"cuda": ["float32"], "cpu": ["float32"]}


def cases(Case, shape, dtype, device):
    N, M, D = shape["N"], shape["M"], shape["D"]
    x_ND = torch.randn(N, D, device=device).to(dtype).requires_grad_()
    y_MD = (torch.randn(M, D, device=device) + 0.5).to(dtype).requires_grad_()
    bandwidths = tuple(scale * D**0.5 for scale in (0.5, 1.0, 2.0))
    moved, flops = (N + M) * D * x_ND.element_size(), 2 * D * (N * N + M * M + N * M)

    def case(impl, run, **options):
        product = str(dtype).removeprefix("torch.")
        least = {"flops": flops, "bytes": moved, "backward_flops": flops, "backward_bytes": 2 * moved}
        return Case("mmd", impl, lambda: (run, [x_ND, y_MD]), **least, product=product, **options)

    def ours(impl):
        return lambda: mmd(x_ND, y_MD, bandwidths=bandwidths, unbiased=False, impl=impl)

    def kernel_mean(a_ND: Tensor, b_MD: Tensor) -> Tensor:
        square_NM = a_ND.square().sum(dim=1, keepdim=True) + b_MD.square().sum(dim=1) - 2 * a_ND @ b_MD.T
        return sum(torch.exp(square_NM / (-2 * s * s)).mean() for s in bandwidths)

    def eager() -> Tensor:
        return kernel_mean(x_ND, x_ND) + kernel_mean(y_MD, y_MD) - 2 * kernel_mean(x_ND, y_MD)

    def geomloss(backend):
        def run():
            from geomloss import SamplesLoss

            return 2 * sum(SamplesLoss("gaussian", blur=s, backend=backend)(x_ND, y_MD) for s in bandwidths)

        return run

    yield case("reference", ours("reference"))
    yield case("compile", torch.compile(ours("reference")), note="of the reference")
    yield case("triton", ours("triton"), refusal=triton_refusal(device))
    yield case("eager", eager, note="whole matrices in plain torch")
    yield case("compile, eager", torch.compile(eager))
    yield case("geomloss, tensorized", geomloss("tensorized"), needs="geomloss", note="twice its value; a call a bandwidth")
    yield case("geomloss, keops", geomloss("online"), needs="pykeops", note="twice its value; a call a bandwidth")
