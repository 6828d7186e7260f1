"""`sinkhorn_divergence`, `sinkhorn_transport` and `barycentric_map`: checks and dispatch."""

from __future__ import annotations

import torch
from torch import Tensor

from dae_kernels.checks import as_flag, as_integer, as_number, check_clouds, check_tensors, check_weights
from dae_kernels.clouds import convention, normalised
from dae_kernels.dispatch import choose, dtype_refusal
from dae_kernels.sinkhorn_divergence.autograd import envelope, plan_means
from dae_kernels.sinkhorn_divergence.solver import TransportOptions


@convention(
    value="squared",
    cost="|x - y|^p / p: half the squared distance for p = 2, the distance itself for p = 1 (a root, then)",
    bias="0 on equal clouds with debias, else the entropic bias of order blur^p; biased upwards by sampling",
)
def sinkhorn_divergence(
    x: Tensor,
    y: Tensor,
    *,
    p: int = 2,
    blur: float = 0.05,
    scaling: float = 0.5,
    debias: bool = True,
    reach: float | None = None,
    max_iter: int | None = None,
    tolerance: float | None = None,
    weights_x: Tensor | None = None,
    weights_y: Tensor | None = None,
    diameter: float | None = None,
    potentials: bool = False,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Sinkhorn divergence between two weighted point clouds, with the names, defaults and factors of geomloss.

        OT(a, b) = min over plans P with marginals a, b of  sum_ij P_ij |x_i - y_j|^p / p + blur^p KL(P | a b^T)
        S(a, b)  = OT(a, b) - OT(a, a) / 2 - OT(b, b) / 2        with debias, else OT(a, b)

    With `reach` (unbalanced transport) mass may be created and destroyed instead of moved farther than about that distance:

        OT(a, b) = min over P >= 0 of  sum_ij P_ij |x_i - y_j|^p / p + blur^p KL(P | a b^T)
                                       + reach^p (KL(P 1 | a) + KL(P^T 1 | b)),  KL(u | v) = sum u log(u / v) - sum u + sum v
        S(a, b)  = OT(a, b) - OT(a, a) / 2 - OT(b, b) / 2 + blur^p (sum a - sum b)^2 / 2

    As blur goes to 0 and scaling to 1, S tends to half the squared 2-Wasserstein distance (p = 2) or the 1-Wasserstein distance
    (p = 1); as blur grows, to half the squared distance of the means, or half the energy distance 2 E|x-y| - E|x-x'| - E|y-y'|.

    Computed by symmetric, averaged Sinkhorn updates in the log domain while epsilon falls from diameter^p to blur^p by
    scaling^p per step. As in geomloss the number of updates is set by that schedule and nothing tests for convergence, unless
    `max_iter` or `tolerance` is given: then alternating updates follow at the final blur, until the plan has its marginals.
    `scaling` closer to 1 is more accurate but slower. Points are moved and scaled by a power of 2 first, so neither their
    origin nor their unit matters: a value beyond the dtype is infinite or 0, and its gradient right. Memory is O(N + M): scores
    are computed in blocks and never kept (but for p = 1 the reference keeps up to 2^22 distances of each of the four pairs of
    clouds).

    16-bit clouds are computed in float32, and neither autocast nor `torch.set_float32_matmul_precision` lowers that.

    The gradient is that of the envelope theorem, from the last potentials with the plan held constant, never through the
    updates. By the points it is sum_j P_ij d|x_i - y_j|^p / p / dx_i (less that of the cloud against itself); by the weights
    it is the potential, less its mean as weights are normalised first. It is exact at convergence, where it errs by the order
    of `tolerance`. There is no second derivative.

    Args:
        x: [N, D], floating, N, D >= 1; any strides.
        y: [M, D], of the same dtype and on the same device.
        p: 1 or 2, the exponent of the cost.
        blur: > 0, in the units of the points: the scale below which points are not distinguished; epsilon = blur^p.
            |x - y|^p / epsilon must be representable in the compute dtype.
        scaling: in (0, 1), the ratio of successive scales.
        debias: whether to subtract the cost of each cloud against itself.
        reach: > 0, in the units of the points: the distance beyond which destroying and creating mass is cheaper than moving
            it; None: all mass is moved.
            Its ratio to the diagonal of the box around the points, and that of blur, must have powers p that the dtype holds.
        max_iter: at least 0: maximum of iterations at the final blur, 1000 if only `tolerance` is given. Without `tolerance`
            all are done.
        tolerance: > 0: the final iterations stop once the plan's marginals, taken before an iteration, are off by no more than
            this share of the mass (sum_i |sum_j P_ij - a_i| for sum a = 1; with reach, from a_i exp(-f_i / reach^p)). If
            max_iter is not enough, a RuntimeWarning says how much they are off by, and the result is that of the last iteration.
            Rounding keeps them off by about the largest cost over epsilon, times the unit roundoff.
        weights_x: [N], not negative, or None for equal ones. They are divided by their sum, but not with reach: there their
            sum is the cloud's mass. A weight of 0 takes its point out of the plan and of the diameter.
        weights_y: [M], likewise.
        diameter: > 0, the scale to start from, with the limits of blur; None takes the diagonal of the box around both clouds.
            (The box is computed in any case, which synchronises with a GPU.)
        potentials: return the potentials instead of their sum.
        impl: "auto" is "triton" for CUDA tensors of at most 32 bits where triton is installed, else "reference"; a named
            choice is obeyed or refused.

    Returns:
        S: [], float64 for float64 clouds, else float32. Without reach equal to sum_i a_i f_i + sum_j b_j g_j.
        With `potentials`, (f [N], g [M]) in its place: the dual potentials of OT(a, b), less those of OT(a, a) and OT(b, b)
        with debias. Differentiable by the points where they live, in the same way: df_i / dx_i.

    Raises:
        TypeError: clouds or weights that are not floating point, clouds of two dtypes, or options of a wrong type.
        ValueError: shapes, devices or options that do not fit, weights that are negative or do not sum to a positive number,
            a spread of the points that the dtype cannot hold beside blur, diameter or reach, or `impl` cannot run here.

    Source: Feydy et al. 2019, arXiv 1810.08278; the schedule: Feydy 2020, "Geometric data analysis, beyond convolutions",
    algorithm 3.5; reach: Sejourne et al. 2019, arXiv 1910.12958, whose derivative by the points has the factor
    reach^p + blur^p (geomloss 0.3.1's SamplesLoss has reach^p + blur^p / 2 there, its `ot` module the same as here).
    """
    operation = "sinkhorn_divergence"
    debias, potentials = as_flag(operation, "debias", debias), as_flag(operation, "potentials", potentials)
    options = checked_options(operation, p, blur, scaling, diameter, reach, max_iter, tolerance)
    clouds, triton = checked_operands(operation, x, y, weights_x, weights_y, reach, impl)
    divergence, f_N, g_M = envelope(*clouds, *options, debias, potentials, weights_x is None and weights_y is None, triton)
    return (f_N, g_M) if potentials else divergence


def sinkhorn_transport(
    x: Tensor, y: Tensor, values: Tensor, *,
    p: int = 2, blur: float = 0.05, scaling: float = 0.5, reach: float | None = None,
    max_iter: int | None = None, tolerance: float | None = 1e-3,
    weights_x: Tensor | None = None, weights_y: Tensor | None = None, diameter: float | None = None, impl: str = "auto",
) -> Tensor:  # fmt: skip
    """The product P v of the entropic transport plan with values on the points of y, without the plan.

        P = argmin of OT(a, b) in `sinkhorn_divergence`,   out_i = sum_j P_ij v_j

    The last update is made on the side of x: rows of P sum to a_i exactly (with reach to a_i exp(-f_i / reach^p)), columns to b_j
    up to `tolerance`. For P^T u, on the points of x, swap x and y. Memory is O((N + M) (D + E)): P is made
    in blocks and never kept.

    Differentiable with respect to `values`, once; the plan is held constant.

    Args:
        values: [M, E] or [M], of the dtype of the clouds and on their device.
        The others are as in `sinkhorn_divergence`.

    Returns:
        [N, E] or [N], float64 for float64 clouds, else float32.

    Raises:
        As `sinkhorn_divergence`, and for values of another dtype (TypeError), shape or device (ValueError).

    Source: as `sinkhorn_divergence`.
    """
    operation = "sinkhorn_transport"
    check_tensors(operation, values=values)
    options = checked_options(operation, p, blur, scaling, diameter, reach, max_iter, tolerance)
    clouds, triton = checked_operands(operation, x, y, weights_x, weights_y, reach, impl)
    if values.dtype != x.dtype:
        raise TypeError(f"{operation} needs values of the dtype of the clouds, got {values.dtype} and {x.dtype}")
    if values.dim() not in (1, 2) or len(values) != len(y) or values.numel() == 0 or values.device != y.device:
        got = f"{list(values.shape)} on {values.device}"
        raise ValueError(f"{operation} needs values [{len(y)}, E] or [{len(y)}] on {y.device}, a row a point of y, got {got}")
    values_ME = values.to(clouds[0].dtype).reshape(len(values), -1)
    means_NE, sums_N = plan_means(*(t.detach() for t in clouds), values_ME, *options, triton)
    return (means_NE * sums_N[:, None]).reshape(len(x), *values.shape[1:])


@torch.no_grad()
def barycentric_map(
    x: Tensor, y: Tensor, *,
    p: int = 2, blur: float = 0.05, scaling: float = 0.5, reach: float | None = None,
    max_iter: int | None = None, tolerance: float | None = 1e-3,
    weights_x: Tensor | None = None, weights_y: Tensor | None = None, diameter: float | None = None, impl: str = "auto",
) -> Tensor:  # fmt: skip
    """Barycentric map of the entropic transport plan: each point of x goes to the mean of the y it is coupled with.

        P = argmin of OT(a, b) in `sinkhorn_divergence`,   out_i = sum_j P_ij y_j / sum_j P_ij

    For p = 2 this is x_i less the derivative of the transport cost by x_i, over a_i; as blur goes to 0 it tends to the optimal
    map where there is one (between Gaussians, an affine one). Points of weight 0 are sent where the others' potential sends
    them. Not differentiable. Memory is O((N + M) D): P is never kept.

    Args: those of `sinkhorn_divergence`.

    Returns:
        [N, D], float64 for float64 clouds, else float32.

    Raises:
        As `sinkhorn_divergence`.

    Source: Pooladian and Niles-Weed 2021, "Entropic estimation of optimal transport maps", arXiv 2109.12004, section 2.
    """
    options = checked_options("barycentric_map", p, blur, scaling, diameter, reach, max_iter, tolerance)
    clouds, triton = checked_operands("barycentric_map", x, y, weights_x, weights_y, reach, impl)
    return plan_means(*clouds, None, *options, triton)[0]


def checked_options(
    operation: str,
    p: int,
    blur: float,
    scaling: float,
    diameter: float | None,
    reach: float | None,
    max_iter: int | None,
    tolerance: float | None,
) -> TransportOptions:
    """The options as numbers."""
    exponent, scaling = as_number(operation, "p", p), as_number(operation, "scaling", scaling)
    if exponent not in (1, 2):
        raise ValueError(f"p must be 1 or 2, got {exponent:g}")
    if not 0 < scaling < 1:
        raise ValueError(f"scaling must be between 0 and 1, both excluded, got {scaling!r}")
    blur = as_number(operation, "blur", blur)
    diameter, reach, tolerance = (
        None if scale is None else as_number(operation, name, scale)
        for name, scale in (("diameter", diameter), ("reach", reach), ("tolerance", tolerance))
    )
    for name, scale in (("blur", blur), ("diameter", diameter), ("reach", reach), ("tolerance", tolerance)):
        if scale is not None and not 0 < scale < float("inf"):
            raise ValueError(f"{name} must be positive and finite, got {scale!r}")
    max_iter = None if max_iter is None else as_integer(operation, "max_iter", max_iter)
    if max_iter is not None and max_iter < 0:
        raise ValueError(f"max_iter must be a whole number that is not negative, got {max_iter!r}")
    return TransportOptions(int(exponent), blur, scaling, diameter, reach, max_iter, tolerance)


def checked_operands(
    operation: str, x: Tensor, y: Tensor, weights_x: Tensor | None, weights_y: Tensor | None, reach: float | None, impl: str
) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], bool]:
    """The checked clouds and weights in the dtype to compute in, weights normalised without reach; and whether by Triton."""
    check_clouds(operation, x, y)
    check_weights(operation, "weights_x", weights_x, x)
    check_weights(operation, "weights_y", weights_y, y)
    triton = choose(impl, x.device, dtype_refusal(x)) == "triton"
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    a_N, b_M = (
        normalised(w, cloud, dtype) if reach is None or w is None else w.to(dtype)
        for w, cloud in ((weights_x, x), (weights_y, y))
    )
    return (x.to(dtype), y.to(dtype), a_N, b_M), triton
