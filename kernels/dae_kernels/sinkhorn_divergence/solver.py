"""The symmetric Sinkhorn loop with epsilon scaling, above whatever computes one update: the reference or the kernels."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

# prepare(x_ND, y_MD, p) gives update(log_b_M, g_M, epsilon, gradient=False), which returns the new potential f_N of x, and the
# derivative of the cost by x under the plan, df_ND, or None. For p = 2 potentials stand here less half the squared norm of their
# point: then a score is a product and two numbers, nothing cancels, and every step rounds less. `ReferenceUpdate` defines it.
Prepare = Callable[[Tensor, Tensor, int], Callable[..., tuple[Tensor, Tensor | None]]]


def box(x_ND: Tensor, y_MD: Tensor) -> tuple[Tensor, Tensor]:
    """Centre [D] of the box that holds both clouds, and its diagonal [], which bounds every distance."""
    low_D = torch.minimum(x_ND.amin(dim=0), y_MD.amin(dim=0))
    high_D = torch.maximum(x_ND.amax(dim=0), y_MD.amax(dim=0))
    return (low_D + high_D) / 2, (high_D - low_D).norm()


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
    centre_D, diagonal = box(x_ND, y_MD)
    schedule = epsilon_schedule(diagonal.item() if diameter is None else diameter, blur, scaling, p)
    # The cost does not see a translation, the rounding of |x|^2 - 2 x.y + |y|^2 does.
    x_ND, y_MD = (x_ND - centre_D).contiguous(), (y_MD - centre_D).contiguous()
    # An update, the log weights it sums over, and the potential it sums over.
    problems = [(prepare(x_ND, y_MD, p), log_b_M, 1), (prepare(y_MD, x_ND, p), log_a_N, 0)]
    if debias:
        problems += [(prepare(x_ND, x_ND, p), log_a_N, 2), (prepare(y_MD, y_MD, p), log_b_M, 3)]

    half_N, half_M = (t.square().sum(dim=1) / 2 if p == 2 else t.new_zeros(len(t)) for t in (x_ND, y_MD))
    potentials = [-half_N, -half_M, -half_N, -half_M]
    potentials = [update(log, potentials[over], schedule[0])[0] for update, log, over in problems]
    for epsilon in schedule:
        new = [update(log, potentials[over], epsilon)[0] for update, log, over in problems]
        potentials = [(f + f_new) / 2 for f, f_new in zip(potentials, new, strict=True)]
    # A full step, not an average: its derivative is that of the cost under the plan, which the envelope theorem asks for.
    last = [update(log, potentials[over], schedule[-1], gradient=True) for update, log, over in problems]
    (f_N, df_ND), (g_M, dg_MD) = last[:2]
    if debias:
        (f_xx_N, df_xx_ND), (g_yy_M, dg_yy_MD) = last[2:]
        return f_N - f_xx_N, g_M - g_yy_M, df_ND - df_xx_ND, dg_MD - dg_yy_MD
    return f_N + half_N, g_M + half_M, df_ND, dg_MD
