"""Cases of sliced_wasserstein, p = 2, given directions.

Flops: the projections, 2 (N + M) D L, and as much for each gradient; comparisons of the sorts are not counted. Bytes: both
clouds once; a sort that does not fit on the chip moves more.
"""

from functools import partial

import torch
from cases import Case, normal_clouds
from dae_kernels.sliced_wasserstein import sliced_wasserstein

SHAPES = {"cuda": [{"N": 16384, "M": 16384, "D": 64, "L": 128}], "cpu": [{"N": 2000, "M": 2000, "D": 16, "L": 64}]}


def cases(device, dtype, N, M, D, L):
    x_ND, y_MD = clouds = normal_clouds(N, M, D, device, dtype)
    directions_DL = torch.nn.functional.normalize(torch.randn(D, L, device=device), dim=0).to(dtype)
    flops, moved = 2 * (N + M) * D * L, x_ND.nbytes + y_MD.nbytes
    least = {"flops": flops, "bytes": moved, "backward_flops": flops, "backward_bytes": 2 * moved}
    case = partial(Case, "sliced_wasserstein", leaves=clouds, product=dtype, **least)

    def ours():
        return sliced_wasserstein(x_ND, y_MD, p=2, projections=directions_DL)

    def pot():
        import ot

        return ot.sliced_wasserstein_distance(x_ND, y_MD, p=2, projections=directions_DL)

    yield case("reference", ours, note="there is no kernel: the time is that of torch.sort")
    yield case("compile", torch.compile(ours), note="of the reference")
    yield case("POT", pot, needs="ot")
