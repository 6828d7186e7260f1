"""Cases of sliced_wasserstein, p = 2, given directions.

Flops: the projections, 2 (N + M) D L, and as much per gradient; comparisons in the sorts are not counted. Bytes: both
clouds once; a sort that does not fit on the chip moves more.
"""

from functools import partial
from importlib import import_module

import torch
from cases import Case, normal_clouds, with_compiled
from dae_kernels.sliced_wasserstein import sliced_wasserstein

SHAPES = {"cuda": [{"N": 16384, "M": 16384, "D": 64, "L": 128}], "cpu": [{"N": 2000, "M": 2000, "D": 16, "L": 64}]}


def cases(device, dtype, N, M, D, L):
    x_ND, y_MD = clouds = normal_clouds(N, M, D, device, dtype)
    directions_DL = torch.nn.functional.normalize(torch.randn(D, L, device=device), dim=0).to(dtype)
    flops, moved = 2 * (N + M) * D * L, x_ND.nbytes + y_MD.nbytes
    work = {"flops": flops, "bytes": moved, "backward_flops": flops, "backward_bytes": 2 * moved}
    case = partial(Case, "sliced_wasserstein", leaves=clouds, product=dtype, **work)
    operands = {"p": 2, "projections": directions_DL}
    note = "there is no kernel: the time is that of torch.sort"
    yield from with_compiled(case, lambda: sliced_wasserstein(x_ND, y_MD, **operands), note)
    yield case("POT", lambda: import_module("ot").sliced_wasserstein_distance(x_ND, y_MD, **operands), needs="ot")
