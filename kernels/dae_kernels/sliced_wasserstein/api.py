"""`sliced_wasserstein` and `max_sliced_wasserstein`: checks, projections and the root."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dae_kernels.checks import FLOAT_DTYPES, as_integer, as_number, check_clouds, check_tensors, check_weights
from dae_kernels.clouds import convention, middle, normalised, sampled, unit_scale
from dae_kernels.sliced_wasserstein.autograd import greatest_cost, mean_cost
from dae_kernels.tracing import without_autocast

COST = "|<direction, x - y>|^p, without a factor"


@convention(
    value="root",
    cost=COST,
    bias="of W_p^p: none from the drawn directions, upwards from finite samples",
)
def sliced_wasserstein(
    x: Tensor, y: Tensor, *, p: float = 2, num_projections: int = 128,
    weights_x: Tensor | None = None, weights_y: Tensor | None = None,
    generator: torch.Generator | None = None, projections: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Sliced p-Wasserstein distance: the root of the mean over random directions of W_p^p of the projected clouds.

        (mean_l W_p^p(<t_l, x>, <t_l, y>))^(1/p),   t_l uniform on the unit sphere,
        W_p^p(u, v) = integral over q in [0, 1] of |F_u^-1(q) - F_v^-1(q)|^p dq

    Like POT's, the result is the root; `.pow(p)` is the mean of W_p^p, which is unbiased over the directions. W_p^p on the
    line is exact for any counts and weights, by merging the two quantile functions. Both clouds are moved by one median of
    their points first, so that rounding does not grow with the distance from the origin. Beside the operands and their moved
    copies, memory is O(N + M + block) in both passes: projections are handled in blocks of 2^22 projected points, and the
    backward pass computes a block anew where there are several. (torch.func.grad inside of torch.compile takes one block, and
    refuses several.)

    Plain torch on every device: most of the time is `torch.sort`, for which we have nothing faster. On one CPU core, with 128
    directions and 4096 to 16384 points per cloud, sorting takes 80 to 96 % of the forward time, and with weights, whose levels
    are sorted too, 63 to 80 %.

    Differentiable with respect to both clouds and both weights (almost everywhere: ties are kinks). At distance 0, where
    the root has no derivative, the gradient is 0. A cloud is at distance 0 from itself; in another order of its points, which a
    product of matrices may round in another way, at the rounding of a projection, with a gradient of any direction.

    Args:
        x, y: [N, D] and [M, D], N, M, D >= 1, floating, of one dtype. 16-bit clouds are projected in float32; autocast
            does not touch the operands (`torch.set_float32_matmul_precision` does).
        p: exponent of the cost, at least 1. Beyond 2 powers are float64; that of a difference smaller than 1e-308^(1/p) of the
            clouds' size is 0.
        num_projections: number L >= 1 of directions drawn; unused with `projections`.
        weights_x, weights_y: [N] and [M], not negative; only their proportions matter. None: equal weights.
        generator: source of the directions, which are drawn in float64 on its device, so that one seed gives one set of
            directions whatever the dtype and device of the clouds. None: torch's generator of the CPU. torch.compile cannot
            take a generator (it breaks the graph: give `projections`), nor can torch.export in torch 2.11, and Inductor draws
            others than eager mode does; torch.vmap needs its `randomness` set to draw.
        projections: [D, L] to use instead of drawn ones, as they are: unit columns make the sliced distance.

    Returns:
        Scalar, float64 for float64 clouds and float32 otherwise.

    Raises:
        TypeError: clouds, weights or projections are not floating point tensors, the clouds have two dtypes, or an option is
            of another type.
        ValueError: shapes or devices disagree, an empty cloud, p < 1, no projections, or weights that are negative or
            do not sum to a positive number.

    Source: Rabin et al. 2011, "Wasserstein Barycenter and Its Application to Texture Mixing"; Bonneel et al. 2015, "Sliced
    and Radon Wasserstein Barycenters of Measures".
    """
    options = p, num_projections, weights_x, weights_y, generator, projections
    return projected_distance(mean_cost, "sliced_wasserstein", x, y, *options)


@convention(
    value="root", cost=COST, bias="downwards from the drawn directions (the supremum is missed), upwards from finite samples"
)
def max_sliced_wasserstein(
    x: Tensor, y: Tensor, *, p: float = 2, num_projections: int = 128,
    weights_x: Tensor | None = None, weights_y: Tensor | None = None,
    generator: torch.Generator | None = None, projections: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The largest p-Wasserstein distance among the clouds' projections on random directions.

        max_l W_p(<t_l, x>, <t_l, y>)

    As POT's, the maximum is over the directions drawn: no direction is optimised, so the result is a lower bound of the
    max-sliced distance, a loose one in high dimensions; give found directions as `projections`. The gradient is that of
    a greatest direction, held fixed; at distance 0 it is 0. Arguments, result and errors are those of `sliced_wasserstein`.

    Source: Deshpande et al. 2019, "Max-Sliced Wasserstein Distance and Its Use for GANs", arXiv 1904.05877.
    """
    options = p, num_projections, weights_x, weights_y, generator, projections
    return projected_distance(greatest_cost, "max_sliced_wasserstein", x, y, *options)


def projected_distance(
    cost: Callable[..., Tensor],
    operation: str,
    x: Tensor,
    y: Tensor,
    p: float,
    num_projections: int,
    weights_x: Tensor | None,
    weights_y: Tensor | None,
    generator: torch.Generator | None,
    projections: Tensor | None,
) -> Tensor:
    """cost^(1/p) of the checked operands, for `mean_cost` or `greatest_cost`.

    Clouds and directions are each multiplied by a power of 2 meanwhile: powers of differences would overflow or be 0 in others.
    """
    check_clouds(operation, x, y)
    check_weights(operation, "weights_x", weights_x, x)
    check_weights(operation, "weights_y", weights_y, y)
    p = as_number(operation, "p", p)
    if not 1 <= p < float("inf"):
        raise ValueError(f"{operation} needs a finite p of at least 1, got {p}")
    D = x.shape[1]
    if projections is None:
        num_projections = as_integer(operation, "num_projections", num_projections)
        if generator is not None and not isinstance(generator, torch.Generator):
            raise TypeError(f"{operation} needs generator as a torch.Generator or None, got {type(generator).__name__}")
        if num_projections < 1:
            raise ValueError(f"{operation} needs at least 1 projection, got num_projections={num_projections}")
        device = "cpu" if generator is None else generator.device
        try:
            projections = torch.randn(D, num_projections, generator=generator, device=device, dtype=torch.float64)
        except NotImplementedError as error:  # of torch.fx, until 2.11
            if generator is None:
                raise
            version = torch.__version__
            raise ValueError(f"{operation}: torch {version} cannot record a generator in a graph, give projections") from error
        projections = (projections / projections.norm(dim=0)).to(x.device)
    else:
        check_projections(operation, projections, x)
    dtype = torch.promote_types(x.dtype, torch.float32)
    x, y = x.to(dtype), y.to(dtype)
    # The distance does not depend on the origin, but rounding grows with the size of the projections.
    near = [
        sampled(cloud, None if w is None else normalised(w, cloud, torch.float64))
        for cloud, w in ((x, weights_x), (y, weights_y))
    ]
    centre_D = middle(torch.cat(near))
    x, y, projections = x - centre_D, y - centre_D, projections.to(dtype)
    of_clouds, of_projections = unit_scale(x, y), unit_scale(projections)
    with without_autocast(x.device):
        found = root(cost(x * of_clouds, y * of_clouds, projections * of_projections, p, weights_x, weights_y), p)
        return (found.double() / of_clouds / of_projections).to(dtype)


def check_projections(operation: str, projections: Tensor, x: Tensor) -> None:
    check_tensors(operation, projections=projections)
    D = x.shape[1]
    if projections.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{operation} needs floating point projections, got {projections.dtype}")
    if projections.dim() != 2 or projections.shape[0] != D or projections.shape[1] == 0:
        raise ValueError(f"{operation} needs projections [{D}, L], L >= 1, got {list(projections.shape)}")
    if projections.device != x.device:
        raise ValueError(f"{operation} needs projections on {x.device}, where the clouds are, got {projections.device}")


def root(cost: Tensor, p: float) -> Tensor:
    """cost^(1/p), with derivative 0 instead of infinity at 0."""
    if p == 1:
        return cost
    positive = cost > 0
    return torch.where(positive, torch.where(positive, cost, 1.0).pow(1 / p), cost)
