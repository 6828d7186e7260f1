"""`precision_recall_density_coverage` and `k_nearest_distances`: checks and dtypes."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dae_kernels.checks import as_flag, as_integer, check_clouds, check_tensors
from dae_kernels.clouds import convention
from dae_kernels.precision_recall_density_coverage.reference import k_nearest_reference, shares_reference
from dae_kernels.tracing import values_readable


class PrecisionRecallDensityCoverage(NamedTuple):
    """Scalars: `precision`, `recall` and `coverage` in [0, 1], `density` at least 0 and about 1 for equal distributions."""

    precision: Tensor
    recall: Tensor
    density: Tensor
    coverage: Tensor


@convention(
    value="share",
    cost="|x - y|, the Euclidean distance, which decides what lies in a ball; density is a mean count over k",
    bias="of all four, by amounts that depend on both counts and k",
)
@torch.no_grad()
def precision_recall_density_coverage(real: Tensor, fake: Tensor, *, k: int = 5) -> PrecisionRecallDensityCoverage:
    """Fidelity and diversity of a generated cloud, from balls that reach the k-th nearest neighbour.

        ball(a in A) = {z : |z - a| < distance of a to its k-th nearest neighbour in A, a itself excluded}
        precision = share of fake points in the ball of some real point
        recall    = share of real points in the ball of some fake point
        density   = mean over fake points of (number of balls of real points it is in) / k
        coverage  = share of real points with a fake point in their ball

    Distances are Euclidean, in float64: from products, and from differences wherever the error bound of the products is not
    sufficient. So the result equals that from differences alone, also for near-duplicates, far from the origin and at any scale;
    such clouds take longer. Coinciding points are at distance 0, and distances with a relative difference of at most
    (D + 1) 2^-52 are equal. As in the package `prdc` balls are open: a point on the sphere is outside, and k + 1 coinciding
    points have empty balls. Both papers use closed balls, which differ only for equal distances.

    Compare results only at equal N, M and k. Memory beside the operands and their copies in float64 is O(N + M + block), with
    arrays of at most 64 MiB in a block. Nothing is differentiable: all four are counts.

    There is no Triton kernel, as this is computed once per evaluation. One might pay off: on one CPU core at 2000 points per
    cloud, D = 64, products are 9 to 22 % of the time, the rest mostly passes over blocks of distances, and the whole is 1.3 to
    2.0 times the time of `prdc` (five runs on a shared machine). Not measured on a GPU.

    Args:
        real, fake: features [N, D] and [M, D], floating.
        k: neighbour that sets the radius (`nearest_k` of prdc): at least 1, less than N and M. Kynkäänniemi et al. use 3,
            Naeem et al. 5.

    Returns:
        Scalars, float64 for float64 clouds and float32 otherwise.

    Raises:
        TypeError: clouds that are not floating point tensors or of two dtypes, or k is not an int.
        ValueError: fewer than k + 1 points in a cloud, k < 1, NaN or infinity, or shapes or devices disagree.

    Source: precision and recall: Kynkäänniemi et al. 2019, arXiv 1904.06991, section 2; density and coverage: Naeem et al.
    2020, arXiv 2002.09797, section 3.
    """
    operation = "precision_recall_density_coverage"
    check_tensors(operation, real=real, fake=fake)
    check_clouds(operation, real, fake)
    check_finite(operation, real=real, fake=fake)
    k = as_integer(operation, "k", k)
    for name, cloud in (("real", real), ("fake", fake)):
        check_k(operation, k, cloud.shape[0] - 1, f"{cloud.shape[0]} points in {name}")
    dtype = torch.promote_types(real.dtype, torch.float32)
    result = shares_reference(real.detach().double(), fake.detach().double(), k)
    return PrecisionRecallDensityCoverage(*result.to(dtype).unbind())


@convention(value="root", cost="|x - y|, the Euclidean distance", bias="none: exact in the points it is given")
@torch.no_grad()
def k_nearest_distances(x: Tensor, y: Tensor, k: int, exclude_self: bool = False) -> Tensor:
    """Euclidean distances of every point of x to its k nearest points of y, by blockwise brute force.

        out[i] = the k smallest of |x_i - y_j|, ascending, over all j (over j != i with exclude_self)

    Float64 products choose k + 8 candidates, whose distances are computed from differences: coinciding points are at distance 0.
    If the error bound of the products cannot exclude all other points, products about a nearby point decide, then
    differences. So every distance is that of float64 differences, to a relative (D + 2) 2^-53. Memory beside the operands and
    their copies in float64 is O(N k + M + block), with arrays of at most 64 MiB in a block. Not differentiable.

    There is no Triton kernel, for the reason in `precision_recall_density_coverage`; on one CPU core at 2000 points per cloud,
    D = 64, k = 5, torch's products and `topk` are 45 % of the time. On a GPU it is not measured.

    Args:
        x, y: [N, D] and [M, D], floating.
        k: from 1 to the number of candidates: M, or M - 1 with exclude_self.
        exclude_self: leave out j = i, by index, if x and y are the same points in the same order. Duplicates of a point
            remain neighbours.

    Returns:
        [N, k], float64 for float64 clouds and float32 otherwise.

    Raises:
        TypeError: clouds that are not floating point tensors or of two dtypes, or k is not an int.
        ValueError: k out of range, NaN or infinity, exclude_self with N != M, or shapes or devices disagree.
    """
    operation = "k_nearest_distances"
    check_clouds(operation, x, y)
    check_finite(operation, x=x, y=y)
    k, exclude_self = as_integer(operation, "k", k), as_flag(operation, "exclude_self", exclude_self)
    if exclude_self and x.shape != y.shape:
        raise ValueError(f"exclude_self needs x and y to be the same points, got x {list(x.shape)}, y {list(y.shape)}")
    check_k(operation, k, y.shape[0] - int(exclude_self), f"{y.shape[0]} points in y, exclude_self={exclude_self}")
    distance_Nk = k_nearest_reference(x.detach().double(), y.detach().double(), k, exclude_self)
    return distance_Nk.to(torch.promote_types(x.dtype, torch.float32))


def check_k(operation: str, k: int, available: int, got: str) -> None:
    if not 1 <= k <= available:
        raise ValueError(f"{operation} needs k from 1 to {available}, the number of neighbours, got k={k} with {got}")


def check_finite(operation: str, **clouds: Tensor) -> None:
    """ValueError for NaN or infinity, where values can be read (`values_readable`); reading them waits for a GPU."""
    for name, cloud in clouds.items():
        if values_readable(cloud) and not torch.isfinite(cloud).all():
            raise ValueError(f"{operation} needs finite points, got NaN or infinity in {name}")
