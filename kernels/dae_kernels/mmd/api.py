"""`mmd`: checks and dispatch."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from dae_kernels.checks import as_flag, as_integer, as_number, as_numbers, check_choice, check_clouds, check_weights, described
from dae_kernels.clouds import convention, normalised
from dae_kernels.dispatch import choose, dtype_refusal
from dae_kernels.pairwise.autograd import POLYNOMIAL, pair_distance, pair_sums
from dae_kernels.tracing import values_readable


@convention(
    value="squared",
    cost="kernel k(x, y) = sum_s exp(-|x - y|^2 / (2 s^2)) or (gamma x.y + coef0)^degree, factor 1: "
    "E k(x, x') + E k(y, y') - 2 E k(x, y)",
    bias="unbiased=True: none, may be negative; unbiased=False: V-statistic, at least 0 and too large by O(1/N + 1/M)",
)
def mmd(
    x: Tensor,
    y: Tensor,
    *,
    bandwidths: Sequence[float] | None = None,
    kernel: str = "gaussian",
    degree: int = 3,
    gamma: float | None = None,
    coef0: float = 1.0,
    unbiased: bool = True,
    weights_x: Tensor | None = None,
    weights_y: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """Squared maximum mean discrepancy of two clouds, differentiable in points and weights.

        gaussian:    k(x, y) = sum_s exp(-|x - y|^2 / (2 s^2)) over the bandwidths s: a sum, not a mean
        polynomial:  k(x, y) = (gamma x.y + coef0)^degree
        biased   = sum_ij a_i a_j k(x_i, x_j) + sum_ij b_i b_j k(y_i, y_j) - 2 sum_ij a_i b_j k(x_i, y_j)
        unbiased = sum_{i != j} a_i a_j k(x_i, x_j) / (1 - sum_i a_i^2) + the same of y - 2 sum_ij a_i b_j k(x_i, y_j)

    with a and b normalised to sum 1; for equal weights the divisor is that of the U-statistic, (N - 1) / N. A pair i = j is
    identified by its index, so equal points are kept. geomloss's "gaussian" loss with one blur is half of the biased value. The
    unbiased polynomial one with the defaults is KID of image features (`dae.metrics.kernel_distance`: means over subsets).

    Memory is O((N + M) D), forward and backward: kernel values are never stored (the reference keeps a few blocks of 8 MiB).
    Gradients, if needed, are computed in the forward pass; second derivatives raise.
    A point with NaN or infinity, or 1e154 away from another, makes the result NaN, even if its weight is 0.

    The reference computes in float64, as do polynomials everywhere: nearly all their time is three matrix products, so they have
    no Triton kernel. The kernel for Gaussians computes in float32 with |x|^2 + |y|^2 - 2 x.y, about medians of the clouds, so
    neither the origin nor a few outliers matter. Rounding changes the exponent |x - y|^2 / (2 s^2) of two points at distance R
    from the median by about 1e-7 (R / s)^2. This matters for points that are close to each other but far from the rest of their
    cloud: for pairs in a second cluster at R = 100 s, kernel values have three correct digits; from R = 3000 s on they are
    arbitrary in 0..1, so use the reference. Distances of 1e19 or more from the median overflow to NaN.

    Args:
        x: [N, D], floating; any strides.
        y: [M, D], of the same dtype and device.
        bandwidths: at least one standard deviation s, in the unit of the points, from 1e-150 to 1e150; from 1e-18 to 1e18 for
            the kernel, which computes in float32. Required for "gaussian", refused for "polynomial".
        kernel: "gaussian" or "polynomial".
        degree, gamma, coef0: of the polynomial: a whole degree of at least 1, gamma and coef0 finite; gamma None is 1 / D.
        unbiased: the U-statistic, which needs two points of positive weight in each cloud and a sum of squared weights of at
            most 1 - 1e-9, or the V-statistic.
        weights_x: [N], floating, not negative, of positive sum; None for equal ones.
        weights_y: [M], likewise.
        impl: "auto" is "triton" for CUDA tensors of at most 32 bits where triton is installed, else "reference"; a named
            choice is obeyed or refused.

    Returns:
        Scalar; float64 for float64 clouds, else float32.

    Raises:
        ValueError: shapes or devices disagree, an empty cloud, too few points for `unbiased`, bad bandwidths or weights, an
            unknown option, or `impl` cannot run here.
        TypeError: not tensors, not floating point, clouds of two dtypes, bandwidths that are not a sequence of numbers, or other
            parameters of a wrong type.

    Source: Gretton et al. 2012, "A kernel two-sample test", JMLR 13, lemma 6; sums of kernels: Li et al. 2015, arXiv 1502.02761;
    the polynomial: Binkowski et al. 2018, arXiv 1801.01401, section 3.
    """
    check_clouds("mmd", x, y)
    check_weights("mmd", "weights_x", weights_x, x)
    check_weights("mmd", "weights_y", weights_y, y)
    check_choice("kernel", kernel, ("gaussian", "polynomial"))
    unbiased = as_flag("mmd", "unbiased", unbiased)
    if unbiased and (weights_x is not None or weights_y is not None or x.shape[0] < 2 or y.shape[0] < 2):
        check_pairs("x", x, weights_x)
        check_pairs("y", y, weights_y)
    parameters: tuple[float, ...] = checked_polynomial(degree, gamma, coef0, x.shape[1])
    if kernel == "polynomial":
        if bandwidths is not None:
            got = described(bandwidths)
            raise ValueError(f"mmd with kernel='polynomial' has no bandwidths, got {got}; it has degree, gamma and coef0")
        choose(impl, x.device, "the polynomial kernel has no Triton kernel")
        chosen = POLYNOMIAL
    else:
        parameters = checked_bandwidths(bandwidths)
        refusal = dtype_refusal(x)
        if min(parameters) < 1e-18 or max(parameters) > 1e18:
            refusal = f"the kernel takes bandwidths from 1e-18 to 1e18, got {parameters}"
        chosen = choose(impl, x.device, refusal)
        if chosen == "triton":
            a_N = None if weights_x is None else normalised(weights_x, x, torch.float64)
            b_M = None if weights_y is None else normalised(weights_y, y, torch.float64)
            return pair_distance(x, y, a_N, b_M, parameters, unbiased)
    a_N, b_M = normalised(weights_x, x, torch.float64), normalised(weights_y, y, torch.float64)
    within_x, across, within_y = pair_sums(x, y, a_N, b_M, parameters, chosen)
    if unbiased:
        pairs_x, pairs_y = 1.0 - a_N.square().sum(), 1.0 - b_M.square().sum()
        squared = within_x / pairs_x + within_y / pairs_y - 2.0 * across
    else:  # the sums lack the pairs i = j
        own = (own_pairs(cloud, weights, kernel, parameters) for cloud, weights in ((x, a_N), (y, b_M)))
        squared = within_x + within_y + sum(own) - 2.0 * across
    return squared if x.element_size() == 8 else squared.float()


def own_pairs(x_ND: Tensor, a_N: Tensor, kernel: str, parameters: tuple[float, ...]) -> Tensor:
    """sum_i a_i^2 k(x_i, x_i)."""
    if kernel == "gaussian":  # the value is exactly 1 per bandwidth
        return len(parameters) * a_N.square().sum()
    degree, gamma, coef0 = parameters
    return (a_N.square() * (gamma * x_ND.double().square().sum(dim=1) + coef0).pow(degree)).sum()


def checked_polynomial(degree: int, gamma: float | None, coef0: float, D: int) -> tuple[int, float, float]:
    if type(degree) is int and degree >= 1 and gamma is None and type(coef0) is float and math.isfinite(coef0):
        return degree, 1.0 / D, coef0
    degree, coef0 = as_integer("mmd", "degree", degree), as_number("mmd", "coef0", coef0)
    gamma = 1.0 / D if gamma is None else as_number("mmd", "gamma", gamma)
    for name, number in (("gamma", gamma), ("coef0", coef0)):
        if not math.isfinite(number):
            raise ValueError(f"mmd needs a finite {name}, got {number!r}")
    if degree < 1:
        raise ValueError(f"mmd needs a degree of at least 1, got {degree}")
    return degree, gamma, coef0


def checked_bandwidths(bandwidths: Sequence[float] | None) -> tuple[float, ...]:
    numbers = as_numbers("mmd", "bandwidths", bandwidths)
    for bandwidth in numbers:
        if not 1e-150 <= bandwidth <= 1e150:  # squares beyond are not representable in float64
            raise ValueError(f"mmd needs bandwidths that are positive and finite, from 1e-150 to 1e150, got {bandwidth!r:.20}")
    if len(numbers) == 0:
        raise ValueError("mmd needs at least one bandwidth, got none")
    return numbers


def check_pairs(name: str, cloud: Tensor, weights: Tensor | None) -> None:
    """ValueError unless two points have positive weight, as an unbiased mean over pairs needs; weights are read if possible.

    The mean divides by the weight of pairs, 1 - sum a_i^2, which is only rounding if one point has nearly all weight.
    """
    points, pairs = cloud.shape[0], 1.0
    if weights is not None and values_readable(weights):
        points = int((weights.detach() > 0).sum())
        pairs = 1.0 - normalised(weights.detach(), cloud, torch.float64).square().sum().item()
    if points < 2:
        raise ValueError(
            f"mmd with unbiased=True needs at least two points of positive weight in each cloud, got {points} in {name}; "
            "unbiased=False takes one"
        )
    if pairs < 1e-9:
        raise ValueError(
            f"mmd with unbiased=True needs weights_{name} whose pairs have a weight 1 - sum a_i^2 of at least 1e-9, "
            f"got {pairs:.3g}; unbiased=False takes any"
        )
