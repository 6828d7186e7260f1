"""Cases of energy_distance, forward and backward.

Flops: of the products, 2 D for each of the N^2 + M^2 and N M pairs, and as much again for the gradients of both clouds; roots
are not counted. Bytes: both clouds once, both gradients written.
Ours makes the gradients in the forward pass, so only `both` compares.
"""

from __future__ import annotations

import torch
from dae_kernels.dispatch import triton_refusal
from dae_kernels.energy_distance import energy_distance
from torch import Tensor

SHAPES = {"cuda": [{"N": 16384, "M": 16384, "D": 64}], "cpu": [{"N": 2000, "M": 2000, "D": 16}]}
DTYPES = {"cuda": ["float32"], "cpu": ["float32"]}


def cases(Case, shape, dtype, device):
    N, M, D = shape["N"], shape["M"], shape["D"]
    x_ND = torch.randn(N, D, device=device).to(dtype).requires_grad_()
    y_MD = (torch.randn(M, D, device=device) + 0.5).to(dtype).requires_grad_()
    moved, flops = (N + M) * D * x_ND.element_size(), 2 * D * (N * N + M * M + N * M)

    def case(impl, run, **options):
        product = str(dtype).removeprefix("torch.")
        least = {"flops": flops, "bytes": moved, "backward_flops": flops, "backward_bytes": 2 * moved}
        return Case("energy_distance", impl, lambda: (run, [x_ND, y_MD]), **least, product=product, **options)

    def ours(impl):
        return lambda: energy_distance(x_ND, y_MD, impl=impl)

    def eager() -> Tensor:
        cross, within_x, within_y = torch.cdist(x_ND, y_MD), torch.cdist(x_ND, x_ND), torch.cdist(y_MD, y_MD)
        return 2 * cross.mean() - within_x.mean() - within_y.mean()

    def geomloss(backend):
        def run():
            from geomloss import SamplesLoss

            return 2 * SamplesLoss("energy", backend=backend)(x_ND, y_MD)

        return run

    yield case("reference", ours("reference"))
    yield case("compile", torch.compile(ours("reference")), note="of the reference")
    yield case("triton", ours("triton"), refusal=triton_refusal(device))
    yield case("eager", eager, note="whole matrices by torch.cdist")
    yield case("compile, eager", torch.compile(eager))
    yield case("geomloss, tensorized", geomloss("tensorized"), needs="geomloss", note="twice its value")
    yield case("geomloss, keops", geomloss("online"), needs="pykeops", note="twice its value")
