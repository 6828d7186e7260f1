"""Cases of sinkhorn_divergence, p = 2, debiased, forward and backward.

Flops: of the products alone, 2 N M D for each of the updates that epsilon scaling prescribes (four problems a step, a start
and a last step) and as much again for the four derivatives; bytes: both clouds, weights and potentials once. The gradient is
known after our forward pass, so the backward needs no product, and only `both` compares.
"""

from __future__ import annotations

import torch
from dae_kernels.dispatch import triton_refusal
from dae_kernels.sinkhorn_divergence import sinkhorn_divergence
from dae_kernels.sinkhorn_divergence.solver import box, epsilon_schedule

SHAPES = {"cuda": [{"N": 16384, "M": 16384, "D": 64}], "cpu": [{"N": 2000, "M": 2000, "D": 2}]}
DTYPES = {"cuda": ["float32"], "cpu": ["float32"]}
BLUR, SCALING = 0.05, 0.5


def cases(Case, shape, dtype, device):
    N, M, D = shape["N"], shape["M"], shape["D"]
    # Clouds of one scale at every D, half of it apart.
    x_ND = (torch.randn(N, D, device=device) / D**0.5).to(dtype).requires_grad_()
    y_MD = ((torch.randn(M, D, device=device) + 0.5) / D**0.5).to(dtype).requires_grad_()
    clouds = [x_ND, y_MD]
    steps = len(epsilon_schedule(box(x_ND.detach(), y_MD.detach())[1], BLUR, SCALING, 2)) + 2
    moved = (N + M) * (D * x_ND.element_size() + 8)
    pairs = 2 * N * M + N * N + M * M
    flops = 2 * pairs * D * steps + 2 * pairs * D

    def case(impl, run, **options):
        product = str(dtype).removeprefix("torch.")
        least = {"flops": flops, "bytes": moved, "backward_flops": (N + M) * D, "backward_bytes": 2 * moved}
        return Case("sinkhorn_divergence", impl, lambda: (run, clouds), **least, product=product, **options)

    def ours(impl):
        return lambda: sinkhorn_divergence(x_ND, y_MD, p=2, blur=BLUR, scaling=SCALING, impl=impl)

    def geomloss(backend):
        def run():
            from geomloss import SamplesLoss

            return SamplesLoss("sinkhorn", p=2, blur=BLUR, scaling=SCALING, backend=backend)(x_ND, y_MD)

        return run

    yield case("reference", ours("reference"))
    yield case("compile", torch.compile(ours("reference")), note="of the reference, whose updates are one opaque operator")
    yield case("triton", ours("triton"), refusal=triton_refusal(device))
    yield case("geomloss, tensorized", geomloss("tensorized"), needs="geomloss")
    yield case("geomloss, keops", geomloss("online"), needs="pykeops")
