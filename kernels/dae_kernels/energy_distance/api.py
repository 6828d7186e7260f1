"""`energy_distance`: checks and dispatch."""

from __future__ import annotations

import torch
from torch import Tensor

from dae_kernels.checks import check_clouds, check_weights
from dae_kernels.clouds import convention, normalised
from dae_kernels.dispatch import choose, dtype_refusal
from dae_kernels.pairwise.autograd import pair_distance, pair_sums


@convention(
    value="squared",
    cost="|x - y|, factor 1: 2 E|x - y| - E|x - x'| - E|y - y'|",
    bias="V-statistic: too large by sum a_i^2 E|x - x'| + sum b_j^2 E|y - y'| (1/N and 1/M for equal weights)",
)
def energy_distance(
    x: Tensor, y: Tensor, *, weights_x: Tensor | None = None, weights_y: Tensor | None = None, impl: str = "auto"
) -> Tensor:
    """Energy distance of two clouds, differentiable in points and weights.

        2 sum_ij a_i b_j |x_i - y_j| - sum_ij a_i a_j |x_i - x_j| - sum_ij b_i b_j |y_i - y_j|,  a, b normalised to sum 1

    The value is of the squared type: `scipy.stats.energy_distance` (1-D) is its root, and geomloss's "energy" loss is half of
    it. It is the V-statistic, which is not negative and is 0 on equal clouds; an unbiased one is not offered. The gradient of
    |x - y| at x = y is 0.

    Memory is O((N + M) D), forward and backward: distances are never stored (the reference keeps a few blocks of 8 MiB).
    Gradients, if needed, are computed in the forward pass; second derivatives raise.
    A point with NaN or infinity makes the result NaN, even if its weight is 0.

    The reference computes in float64. The kernel computes in float32 with |x|^2 + |y|^2 - 2 x.y, about medians of the clouds,
    so neither the origin nor a few outliers matter. Rounding changes the distance r of two points at distance R from the median
    by about 1e-7 R^2 / r, and points closer than 1e-3 R count as equal. This matters for points that are close to each other but
    far from the rest of their cloud: for pairs in a second cluster at R = 100 r, distances have three correct digits; from
    R = 1000 r on they are lost, an error of up to 1e-3 R in the result. The unit of the points does not matter: they are scaled
    by a power of 2.

    Args:
        x: [N, D], floating; any strides.
        y: [M, D], of the same dtype and device.
        weights_x: [N], floating, not negative, of positive sum; None for equal ones.
        weights_y: [M], likewise.
        impl: "auto" is "triton" for CUDA tensors of at most 32 bits where triton is installed, else "reference"; a named
            choice is obeyed or refused.

    Returns:
        Scalar; float64 for float64 clouds, else float32.

    Raises:
        ValueError: shapes or devices disagree, an empty cloud, bad weights, an unknown option, or `impl` cannot run here.
        TypeError: not tensors, not floating point, or clouds of two dtypes.

    Source: Szekely and Rizzo 2013, "Energy statistics: a class of statistics based on distances", section 2.
    """
    check_clouds("energy_distance", x, y)
    check_weights("energy_distance", "weights_x", weights_x, x)
    check_weights("energy_distance", "weights_y", weights_y, y)
    chosen = choose(impl, x.device, dtype_refusal(x))
    if chosen == "triton":
        a_N = None if weights_x is None else normalised(weights_x, x, torch.float64)
        b_M = None if weights_y is None else normalised(weights_y, y, torch.float64)
        return pair_distance(x, y, a_N, b_M, (), False)
    a_N, b_M = normalised(weights_x, x, torch.float64), normalised(weights_y, y, torch.float64)
    within_x, across, within_y = pair_sums(x, y, a_N, b_M, (), chosen)
    distance = 2.0 * across - within_x - within_y
    return distance if x.element_size() == 8 else distance.float()
