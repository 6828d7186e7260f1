"""The symmetric Sinkhorn loop with epsilon scaling, above whatever computes one update: the reference or the kernels."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

# prepare(x_ND, y_MD, p) gives update(log_b_M, g_M, epsilon, flat, gradient=False), which returns the new potential f_N of x, and
# the derivative of the cost by x under the plan, df_ND, or None. For p = 2 potentials stand here less half the squared norm of
# their point: then a score is a product and two numbers, nothing cancels, and every step rounds less. `flat` says that all
# scores are below 1.5, as they are where epsilon exceeds every cost: there a sum of exponentials is nearly 1, and epsilon times
# the rounding of its logarithm would drown the potentials. log1p of the mean of expm1, in its place, errs by a rounding of the
# costs. `ReferenceUpdate` defines it all.
Prepare = Callable[[Tensor, Tensor, int], Callable[..., tuple[Tensor, Tensor | None]]]


def box(x_ND: Tensor, y_MD: Tensor) -> tuple[Tensor, Tensor]:
    """Centre [D] of the box that holds both clouds, and its diagonal [], which bounds every distance."""
    low_D = torch.minimum(x_ND.amin(dim=0), y_MD.amin(dim=0))
    high_D = torch.maximum(x_ND.amax(dim=0), y_MD.amax(dim=0))
    side_D = high_D - low_D
    longest = side_D.amax().clamp_min(torch.finfo(side_D.dtype).tiny)  # whose square may overflow
    return (low_D + high_D) / 2, longest * (side_D / longest).norm()


def with_weight(x_ND: Tensor, log_a_N: Tensor) -> Tensor:
    """The cloud, with points of weight 0 moved to one that has some."""
    return torch.where((log_a_N > -math.inf)[:, None], x_ND, x_ND.index_select(0, log_a_N.argmax()[None]))


def scale_limits(p: int, dtype: torch.dtype) -> tuple[float, float]:
    """The least and the largest scale whose power p and its inverse are numbers of `dtype` (with all digits)."""
    least = torch.finfo(dtype).tiny ** (1 / p)
    return least, 1 / least


def check_span(span: float, blur: float, p: int, dtype: torch.dtype) -> None:
    """ValueError where |x - y|^p or |x - y|^p / epsilon overflows; points that are not finite themselves make a NaN instead."""
    largest = (torch.finfo(dtype).max / 16) ** (1 / p)
    if largest * min(1.0, blur) < span < math.inf:
        raise ValueError(
            f"costs overflow {dtype}: the points must span less than {largest * min(1.0, blur):.3g} for p={p} and blur={blur!r}, "
            f"got {span:.3g}"
        )


def epsilon_schedule(diameter: float, blur: float, scaling: float, p: int) -> list[float]:
    """diameter^p twice, then times scaling^p down to blur^p, which is always the last.

    Points that (nearly) coincide, or that are not finite, have no scale to start from: there it is blur^p alone.
    """
    if not 1e-9 * blur < diameter < math.inf:
        return [blur**p] * 2
    start, stop, step = p * math.log(diameter), p * math.log(blur), p * math.log(scaling)
    between = [math.exp(start + i * step) for i in range(math.ceil((stop - start) / step))]
    return [diameter**p, *between, blur**p]


def solve(
    prepare: Prepare,
    x_ND: Tensor,
    y_MD: Tensor,
    log_a_N: Tensor,
    log_b_M: Tensor,
    p: int,
    blur: float,
    scaling: float,
    diameter: float | None,
    debias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Potentials f [N], g [M] and their derivatives by their own points, df [N, D], dg [M, D].

    With `debias` the potentials of each cloud against itself are taken off.
    """
    span = box(x_ND, y_MD)[1].item()
    check_span(span, blur, p, x_ND.dtype)
    centre_D, diagonal = box(with_weight(x_ND, log_a_N), with_weight(y_MD, log_b_M))
    if diameter is None:
        diameter = diagonal.item()
        if diameter < scale_limits(p, x_ND.dtype)[0]:
            diameter = 0.0
    schedule = [(epsilon, epsilon > span**p) for epsilon in epsilon_schedule(diameter, blur, scaling, p)]
    # The cost does not see a translation, the rounding of |x|^2 - 2 x.y + |y|^2 does.
    x_ND, y_MD = (x_ND - centre_D).contiguous(), (y_MD - centre_D).contiguous()
    # An update, the log weights it sums over, and the potential it sums over.
    problems = [(prepare(x_ND, y_MD, p), log_b_M, 1), (prepare(y_MD, x_ND, p), log_a_N, 0)]
    if debias:
        problems += [(prepare(x_ND, x_ND, p), log_a_N, 2), (prepare(y_MD, y_MD, p), log_b_M, 3)]

    half_N, half_M = (t.square().sum(dim=1) / 2 if p == 2 else t.new_zeros(len(t)) for t in (x_ND, y_MD))
    potentials = [-half_N, -half_M, -half_N, -half_M]
    potentials = [update(log, potentials[over], *schedule[0])[0] for update, log, over in problems]
    for step in schedule:
        new = [update(log, potentials[over], *step)[0] for update, log, over in problems]
        potentials = [(f + f_new) / 2 for f, f_new in zip(potentials, new, strict=True)]
    # A full step, not an average: its derivative is that of the cost under the plan, which the envelope theorem asks for.
    last = [update(log, potentials[over], *schedule[-1], gradient=True) for update, log, over in problems]
    (f_N, df_ND), (g_M, dg_MD) = last[:2]
    if debias:
        (f_xx_N, df_xx_ND), (g_yy_M, dg_yy_MD) = last[2:]
        return f_N - f_xx_N, g_M - g_yy_M, df_ND - df_xx_ND, dg_MD - dg_yy_MD
    return f_N + half_N, g_M + half_M, df_ND, dg_MD
