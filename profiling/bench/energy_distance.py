"""Cases of energy_distance, forward and backward.

Flops: of the products, 2 D for each of the N^2 + M^2 and N M pairs, and as much again for the gradients of both clouds; roots
are not counted. Bytes: both clouds once, both gradients written.
Ours computes the gradients in the forward pass, so only `both` compares.
"""

from functools import partial

import torch
from cases import Case, geomloss, implementations, normal_clouds
from dae_kernels.energy_distance import energy_distance

SHAPES = {"cuda": [{"N": 16384, "M": 16384, "D": 64}], "cpu": [{"N": 2000, "M": 2000, "D": 16}]}


def cases(device, dtype, N, M, D):
    x_ND, y_MD = clouds = normal_clouds(N, M, D, device, dtype)
    flops, moved = 2 * D * (N * N + M * M + N * M), x_ND.nbytes + y_MD.nbytes
    work = {"flops": flops, "bytes": moved, "backward_flops": flops, "backward_bytes": 2 * moved}
    case = partial(Case, "energy_distance", leaves=clouds, product=dtype, **work)

    def eager():
        cross, within_x, within_y = torch.cdist(x_ND, y_MD), torch.cdist(x_ND, x_ND), torch.cdist(y_MD, y_MD)
        return 2 * cross.mean() - within_x.mean() - within_y.mean()

    yield from implementations(case, partial(energy_distance, x_ND, y_MD), device)
    yield case("eager", eager, note="whole matrices by torch.cdist")
    yield case("compile, eager", torch.compile(eager))
    yield from geomloss(case, lambda loss: 2 * loss("energy")(x_ND, y_MD), note="twice its value")
