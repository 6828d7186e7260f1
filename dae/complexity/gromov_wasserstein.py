"""Gromov-Wasserstein distance between a latent and data, by POT: a comparison that needs no generator."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dae.complexity.estimate import Estimate, check_pair, check_seeds
from dae.complexity.families import check_count
from dae.optional import optional
from dae.precision import own_arithmetic
from dae.seeding import seed_for


@own_arithmetic(gradients=False)
def gromov_wasserstein(
    latents: Tensor,
    data: Tensor,
    *,
    seeds: Sequence[int] = (0, 1, 2),
    num_points: int = 256,
    normalize: bool = False,
    max_iterations: int = 1000,
) -> Estimate:
    """Gromov-Wasserstein distance: how far two clouds, in any spaces, are from being isometric.

        GW = min over plans T with equal marginals of  sum_ijkl (|z_i - z_j| - |x_k - x_l|)^2 T_ik T_jl

    Squared; 0 for a rotated, reflected or shifted copy. POT's conditional gradients find a local minimum; the best of three
    starts is taken: the product plan, the plan that matches points by eccentricity (mean squared distance to the others, as in
    Memoli's first lower bound), and the plan that pairs the rows. So it is an upper bound of the minimum for the drawn points.

    Args:
        latents: [N, ...], floating, finite.
        data: [N, ...], likewise; flattened, Euclidean distances.
        seeds: for drawing points; one value each.
        num_points: points drawn from each, the same rows; all if there are no more. Time grows with its cube.
        normalize: divide each cloud's distances by their root mean square, to ignore scale.
        max_iterations: for the conditional gradients.

    Raises:
        ImportError: POT is not installed.
        TypeError, ValueError: as `check_pair`, or options out of range.

    Source: Memoli 2011, "Gromov-Wasserstein Distances and the Metric Approach to Object Matching"; Peyre, Cuturi and Solomon
    2016, "Gromov-Wasserstein Averaging of Kernel and Distance Matrices".
    """
    check_pair(latents, data)
    seeds = check_seeds(seeds)
    check_count("num_points", num_points)
    check_count("max_iterations", max_iterations)
    if num_points < 2:
        raise ValueError(f"expected num_points >= 2, as one point has no distances, got {num_points}")
    values = []
    for seed in seeds:
        rows = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed_for(seed, "gromov")))[:num_points]
        within_z, within_x = (distances(cloud[rows.to(cloud.device)], normalize) for cloud in (latents, data))
        values.append(minimal_distortion(within_z, within_x, max_iterations))
    used = min(num_points, len(data))
    convention = "squared, sum (|z - z'| - |x - x'|)^2 T T, Euclidean" + ", distances divided by their rms" * normalize
    facts = {"convention": convention, "counts": (used, used)}
    return Estimate.over(values, seeds, bound="upper", distance="gromov_wasserstein", **facts)


def distances(cloud: Tensor, normalize: bool) -> Tensor:
    """Euclidean distances, float64 [N, N] on the CPU."""
    cloud_ND = cloud.detach().flatten(1).double().cpu()
    # Not by |x|^2 + |y|^2 - 2 x.y, which cancels for small distances.
    distances_NN = torch.cdist(cloud_ND, cloud_ND, compute_mode="donot_use_mm_for_euclid_dist")
    scale = distances_NN.square().mean().sqrt()
    return distances_NN / scale if normalize and scale > 0 else distances_NN


def minimal_distortion(within_z_NN: Tensor, within_x_NN: Tensor, max_iterations: int) -> float:
    with optional("POT", "gromov_wasserstein"):
        import ot

    N = len(within_z_NN)
    product = torch.full((N, N), 1 / N**2, dtype=torch.float64)
    by_eccentricity, by_row = torch.zeros_like(product), torch.eye(N, dtype=torch.float64) / N
    order_z, order_x = (within.square().mean(dim=1).argsort() for within in (within_z_NN, within_x_NN))
    by_eccentricity[order_z, order_x] = 1 / N
    clouds = within_z_NN.numpy(), within_x_NN.numpy(), ot.unif(N), ot.unif(N)
    found = [
        ot.gromov.gromov_wasserstein2(*clouds, "square_loss", G0=start.numpy(), max_iter=max_iterations)
        for start in (product, by_eccentricity, by_row)
    ]
    return max(0.0, float(min(found)))
