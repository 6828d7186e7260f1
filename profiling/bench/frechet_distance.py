"""Cases of frechet_distance of two clouds, forward and backward.

Flops: both covariances, (N + M) D^2 as they are symmetric, the product of their roots, 2 D^3, and the reductions to two or one
diagonals with which the decompositions begin, 16/3 D^3 for the three; backward: the product of each cloud with the gradient of
its covariance, 2 (N + M) D^2. Bytes: both clouds once, both gradients written. All arithmetic is float64.
"""

from functools import partial
from importlib import import_module

import torch
from cases import Case, normal_clouds, with_compiled
from dae_kernels.frechet_distance import frechet_distance

SHAPES = {"cuda": [{"N": 10000, "M": 10000, "D": 1024}], "cpu": [{"N": 2000, "M": 2000, "D": 256}]}


def cases(device, dtype, N, M, D):
    x_ND, y_MD = clouds = normal_clouds(N, M, D, device, dtype, scale=1.2, shift=0.1)
    moved, flops = x_ND.nbytes + y_MD.nbytes, (N + M) * D**2 + 2 * D**3 + 16 * D**3 // 3
    work = {"flops": flops, "bytes": moved, "backward_flops": 2 * (N + M) * D**2, "backward_bytes": 2 * moved}
    case = partial(Case, "frechet_distance", leaves=clouds, product="float64", **work)

    def moments():
        x, y = x_ND.double(), y_MD.double()
        return x.mean(dim=0), y.mean(dim=0), x.T.cov(), y.T.cov()

    def distance(mean_x, mean_y, cov_x, cov_y, trace_of_root):
        return (mean_x - mean_y).square().sum() + cov_x.trace() + cov_y.trace() - 2 * trace_of_root

    def eigenvalues():
        *means, cov_x, cov_y = moments()
        return distance(*means, cov_x, cov_y, torch.linalg.eigvals(cov_x @ cov_y).sqrt().real.sum())

    def scipy():
        *means, cov_x, cov_y = (moment.detach() for moment in moments())
        return distance(*means, cov_x, cov_y, import_module("scipy.linalg").sqrtm((cov_x @ cov_y).numpy()).real.trace())

    with torch.no_grad():
        covariances = moments()[2:]

    def decompositions():
        (_, vectors_x_DD), (_, vectors_y_DD) = map(torch.linalg.eigh, covariances)
        return torch.linalg.svd(vectors_x_DD * vectors_y_DD).S  # any matrix: the time depends only on its size

    note = "there is no kernel: decompositions and products in float64"
    yield from with_compiled(case, lambda: frechet_distance(x_ND, y_MD), note)
    note = "two eigh and one svd of this size, with the vectors that gradients need"
    yield case("decompositions alone", decompositions, leaves=[], note=note)
    yield case("eigenvalues of the product", eigenvalues, note="torchmetrics' formula in plain torch")
    yield case("compile, eigenvalues", torch.compile(eigenvalues))
    on_cpu = None if device.type == "cpu" else "works on the CPU"
    yield case("scipy sqrtm", scipy, leaves=[], needs="scipy", refusal=on_cpu, note="pytorch-fid's formula")
    pot = lambda: import_module("ot").gaussian.bures_wasserstein_distance(*moments()).square()  # noqa: E731
    yield case("POT", pot, needs="ot", note="its squared bures_wasserstein_distance")
