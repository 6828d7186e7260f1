"""Cases of precision_recall_density_coverage, k = 5, comparing its four numbers.

Flops: the products, 2 D for each of the N^2 + M^2 + N M pairs, in float64; comparisons and the search for the k nearest are not
counted. Bytes: both clouds once.
"""

import contextlib
import io
from functools import partial
from importlib import import_module

import torch
from cases import Case, normal_clouds
from dae_kernels.precision_recall_density_coverage import precision_recall_density_coverage

SHAPES = {"cuda": [{"N": 10000, "M": 10000, "D": 1024}], "cpu": [{"N": 2000, "M": 2000, "D": 64}]}
NEIGHBOURS = 5


def cases(device, dtype, N, M, D):
    real_ND, fake_MD = (cloud.detach() for cloud in normal_clouds(N, M, D, device, dtype, scale=0.9, shift=0.1))
    work = {"flops": 2 * D * (N * N + M * M + N * M), "bytes": real_ND.nbytes + fake_MD.nbytes}
    case = partial(Case, "precision_recall_density_coverage", product="float64", **work)

    def products():
        """Its matrix products alone, without neighbour search, balls and the handling of near-ties."""
        real, fake = real_ND.double(), fake_MD.double()
        return torch.stack([torch.mm(a, b.T)[0, 0] for a, b in ((real, real), (fake, fake), (real, fake))])

    def whole():
        radius_N = torch.cdist(real_ND, real_ND).topk(NEIGHBOURS + 1, largest=False).values[:, -1]
        radius_M = torch.cdist(fake_MD, fake_MD).topk(NEIGHBOURS + 1, largest=False).values[:, -1]
        distance_NM = torch.cdist(real_ND, fake_MD)
        in_real_NM, in_fake_NM = distance_NM < radius_N[:, None], distance_NM < radius_M
        density = in_real_NM.float().sum(dim=0).mean() / NEIGHBOURS
        shares = in_real_NM.any(dim=0), in_fake_NM.any(dim=1), in_real_NM.any(dim=1)
        precision, recall, coverage = (share.float().mean() for share in shares)
        return torch.stack([precision, recall, density, coverage])

    def prdc():
        with contextlib.redirect_stdout(io.StringIO()):  # it prints its sizes
            found = import_module("prdc").compute_prdc(real_ND.numpy(), fake_MD.numpy(), nearest_k=NEIGHBOURS)
        return torch.tensor([found[name] for name in ("precision", "recall", "density", "coverage")])

    ours = lambda: torch.stack(precision_recall_density_coverage(real_ND, fake_MD, k=NEIGHBOURS))  # noqa: E731
    yield case("reference", ours, note="there is no kernel: float64 throughout")
    yield case("compile", torch.compile(ours), note="of the reference, which is one opaque operator")
    yield case("products alone", products, note="the three matrices of products in float64, whole")
    yield case("whole matrices", whole, note="torch.cdist in the dtype of the clouds")
    yield case("compile, whole matrices", torch.compile(whole))
    on_cpu = None if device.type == "cpu" else "works on the CPU"
    yield case("prdc", prdc, needs="prdc", refusal=on_cpu, note="its search in 8 threads of joblib")
