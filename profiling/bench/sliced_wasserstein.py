"""Cases of sliced_wasserstein, p = 2, given directions.

Flops: the projections, 2 (N + M) D L, and as much for each gradient; comparisons of the sorts are not counted. Bytes: both
clouds once; a sort that does not fit on the chip moves more.
"""

from __future__ import annotations

import torch
from dae_kernels.sliced_wasserstein import sliced_wasserstein

SHAPES = {"cuda": [{"N": 16384, "M": 16384, "D": 64, "L": 128}], "cpu": [{"N": 2000, "M": 2000, "D": 16, "L": 64}]}
DTYPES = {"cuda": ["float32"], "cpu": ["float32"]}


def cases(Case, shape, dtype, device):
    N, M, D, L = shape["N"], shape["M"], shape["D"], shape["L"]
    x_ND = torch.randn(N, D, device=device).to(dtype).requires_grad_()
    y_MD = (torch.randn(M, D, device=device) + 0.5).to(dtype).requires_grad_()
    directions_DL = torch.nn.functional.normalize(torch.randn(D, L, device=device), dim=0).to(dtype)
    moved, flops = (N + M) * D * x_ND.element_size(), 2 * (N + M) * D * L

    def case(impl, run, **options):
        product = str(dtype).removeprefix("torch.")
        least = {"flops": flops, "bytes": moved, "backward_flops": flops, "backward_bytes": 2 * moved}
        return Case("sliced_wasserstein", impl, lambda: (run, [x_ND, y_MD]), **least, product=product, **options)

    def ours():
        return sliced_wasserstein(x_ND, y_MD, p=2, projections=directions_DL)

    def pot():
        import ot

        return ot.sliced_wasserstein_distance(x_ND, y_MD, p=2, projections=directions_DL)

    yield case("reference", ours, note="there is no kernel: the time is that of torch.sort")
    yield case("compile", torch.compile(ours), note="of the reference")
    yield case("POT", pot, needs="ot")
