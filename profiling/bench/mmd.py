"""Cases of mmd over three bandwidths, biased (as geomloss's), forward and backward.

Flops: of the products, 2 D for each of the N^2 + M^2 and N M pairs, and as much again for the gradients of both clouds;
exponentials are not counted. Bytes: both clouds once, both gradients written.
Ours computes the gradients in the forward pass, so only `both` compares.
"""

from functools import partial

import torch
from cases import Case, geomloss, implementations, normal_clouds
from dae_kernels.mmd import mmd

SHAPES = {"cuda": [{"N": 16384, "M": 16384, "D": 64}], "cpu": [{"N": 2000, "M": 2000, "D": 16}]}


def cases(device, dtype, N, M, D):
    x_ND, y_MD = clouds = normal_clouds(N, M, D, device, dtype)
    bandwidths = tuple(scale * D**0.5 for scale in (0.5, 1.0, 2.0))
    flops, moved = 2 * D * (N * N + M * M + N * M), x_ND.nbytes + y_MD.nbytes
    work = {"flops": flops, "bytes": moved, "backward_flops": flops, "backward_bytes": 2 * moved}
    case = partial(Case, "mmd", leaves=clouds, product=dtype, **work)

    def kernel_mean(a_ND, b_MD):
        square_NM = a_ND.square().sum(dim=1, keepdim=True) + b_MD.square().sum(dim=1) - 2 * a_ND @ b_MD.T
        return sum(torch.exp(square_NM / (-2 * s * s)).mean() for s in bandwidths)

    def eager():
        return kernel_mean(x_ND, x_ND) + kernel_mean(y_MD, y_MD) - 2 * kernel_mean(x_ND, y_MD)

    yield from implementations(case, partial(mmd, x_ND, y_MD, bandwidths=bandwidths, unbiased=False), device)
    yield case("eager", eager, note="whole matrices in plain torch")
    yield case("compile, eager", torch.compile(eager))
    note = "twice its value; one call per bandwidth"
    yield from geomloss(case, lambda loss: 2 * sum(loss("gaussian", blur=s)(x_ND, y_MD) for s in bandwidths), note=note)
