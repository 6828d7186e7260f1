"""Cases of frechet_distance of two clouds, forward and backward.

Flops: both covariances, (N + M) D^2 as they are symmetric, the product of their roots, 2 D^3, and the reductions to two or one
diagonals with which the decompositions begin, 16/3 D^3 for the three; backward: the product of each cloud with the gradient of
its covariance, 2 (N + M) D^2. Bytes: both clouds once, both gradients written. All arithmetic is float64.
"""

from __future__ import annotations

import torch
from dae_kernels.frechet_distance import frechet_distance
from torch import Tensor

SHAPES = {"cuda": [{"N": 10000, "M": 10000, "D": 1024}], "cpu": [{"N": 2000, "M": 2000, "D": 256}]}
DTYPES = {"cuda": ["float32"], "cpu": ["float32"]}


def cases(Case, shape, dtype, device):
    N, M, D = shape["N"], shape["M"], shape["D"]
    x_ND = torch.randn(N, D, device=device).to(dtype).requires_grad_()
    y_MD = (1.2 * torch.randn(M, D, device=device) + 0.1).to(dtype).requires_grad_()
    moved, flops = (N + M) * D * x_ND.element_size(), (N + M) * D**2 + 2 * D**3 + 16 * D**3 // 3

    def case(impl, run, differentiable=True, **options):
        leaves = [x_ND, y_MD] if differentiable else []
        least = {"flops": flops, "bytes": moved, "backward_flops": 2 * (N + M) * D**2, "backward_bytes": 2 * moved}
        return Case("frechet_distance", impl, lambda: (run, leaves), **least, product="float64", **options)

    def ours() -> Tensor:
        return frechet_distance(x_ND, y_MD)

    def moments() -> tuple[Tensor, Tensor, Tensor, Tensor]:
        x, y = x_ND.double(), y_MD.double()
        return x.mean(dim=0), y.mean(dim=0), x.T.cov(), y.T.cov()

    def eigenvalues() -> Tensor:
        mean_x, mean_y, cov_x, cov_y = moments()
        trace_of_root = torch.linalg.eigvals(cov_x @ cov_y).sqrt().real.sum()
        return (mean_x - mean_y).square().sum() + cov_x.trace() + cov_y.trace() - 2 * trace_of_root

    def scipy() -> Tensor:
        from scipy.linalg import sqrtm

        mean_x, mean_y, cov_x, cov_y = (moment.detach() for moment in moments())
        trace_of_root = sqrtm((cov_x @ cov_y).numpy()).real.trace()
        return (mean_x - mean_y).square().sum() + cov_x.trace() + cov_y.trace() - 2 * trace_of_root

    def pot() -> Tensor:
        import ot

        mean_x, mean_y, cov_x, cov_y = moments()
        return ot.gaussian.bures_wasserstein_distance(mean_x, mean_y, cov_x, cov_y).square()

    with torch.no_grad():
        _, _, cov_x_DD, cov_y_DD = moments()

    def decompositions() -> Tensor:
        (_, vectors_x_DD), (_, vectors_y_DD) = torch.linalg.eigh(cov_x_DD), torch.linalg.eigh(cov_y_DD)
        return torch.linalg.svd(vectors_x_DD * vectors_y_DD).S  # of any matrix: the time is that of its size

    yield case("reference", ours, note="there is no kernel: decompositions and products in float64")
    yield case("compile", torch.compile(ours), note="of the reference")
    note = "two eigh and one svd of this size, with the vectors that gradients need"
    yield case("decompositions alone", decompositions, differentiable=False, note=note)
    yield case("eigenvalues of the product", eigenvalues, note="torchmetrics' formula in plain torch")
    yield case("compile, eigenvalues", torch.compile(eigenvalues))
    on_cpu = None if device.type == "cpu" else "works on the CPU"
    yield case("scipy sqrtm", scipy, differentiable=False, needs="scipy", refusal=on_cpu, note="pytorch-fid's formula")
    yield case("POT", pot, needs="ot", note="its squared bures_wasserstein_distance")
