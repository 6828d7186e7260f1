"""The torch operators of entropic transport: a solved divergence, means under a plan, and their transpose.

Opaque to torch.compile with Triton too, unlike the other operators of this package: the number of updates depends on the data.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dae_kernels.dispatch import register_op
from dae_kernels.sinkhorn_divergence.reference import ReferenceUpdate
from dae_kernels.sinkhorn_divergence.solver import Sinkhorn, TransportOptions
from dae_kernels.tracing import without_autocast


def sinkhorn(
    x_ND: Tensor, y_MD: Tensor, a_N: Tensor, b_M: Tensor, options: TransportOptions, debias: bool, equal: bool, triton: bool
) -> Sinkhorn:
    """The problems to solve, by the reference or the kernels."""
    if not triton:
        return Sinkhorn(ReferenceUpdate, x_ND, y_MD, a_N, b_M, options, debias, None, equal)
    from dae_kernels.sinkhorn_divergence.fused import TritonUpdate
    from dae_kernels.sinkhorn_divergence.fused_joint import TritonJoint

    return Sinkhorn(TritonUpdate, x_ND, y_MD, a_N, b_M, options, debias, TritonJoint, equal)


def solve_divergence(
    x_ND: Tensor,
    y_MD: Tensor,
    a_N: Tensor,
    b_M: Tensor,
    p: int,
    blur: float,
    scaling: float,
    diameter: float | None,
    reach: float | None,
    max_iter: int | None,
    tolerance: float | None,
    debias: bool,
    potentials: bool,
    equal: bool,
    triton: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`Sinkhorn.divergence` of the solved problems."""
    options = TransportOptions(p, blur, scaling, diameter, reach, max_iter, tolerance)
    with without_autocast(x_ND.device):
        return sinkhorn(x_ND, y_MD, a_N, b_M, options, debias, equal, triton).solve().divergence(potentials)


def empty_divergence(x_ND: Tensor, y_MD: Tensor, a_N: Tensor, b_M: Tensor, *options: Any) -> tuple[Tensor, ...]:
    potentials = options[-3]
    values = (torch.empty_like(t) if potentials else t.new_empty(0) for t in (a_N, b_M))
    by_weight = (torch.empty_like(t) for t in (a_N, b_M))
    return a_N.new_empty(()), *values, *by_weight, x_ND.new_empty(x_ND.shape), y_MD.new_empty(y_MD.shape)


def solve_means(
    x_ND: Tensor,
    y_MD: Tensor,
    a_N: Tensor,
    b_M: Tensor,
    values_ME: Tensor | None,
    p: int,
    blur: float,
    scaling: float,
    diameter: float | None,
    reach: float | None,
    max_iter: int | None,
    tolerance: float | None,
    triton: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`Sinkhorn.means` of the solved problem."""
    options = TransportOptions(p, blur, scaling, diameter, reach, max_iter, tolerance)
    with without_autocast(x_ND.device):
        return sinkhorn(x_ND, y_MD, a_N, b_M, options, False, False, triton).solve().means(values_ME)


def empty_means(
    x_ND: Tensor, y_MD: Tensor, a_N: Tensor, b_M: Tensor, values_ME: Tensor | None, *options: Any
) -> tuple[Tensor, ...]:
    means_NE = x_ND.new_empty(len(x_ND), (y_MD if values_ME is None else values_ME).shape[1])
    return means_NE, *(torch.empty_like(t) for t in (a_N, a_N, b_M))


def transposed_means(
    x_ND: Tensor,
    y_MD: Tensor,
    a_N: Tensor,
    b_M: Tensor,
    f_N: Tensor,
    g_M: Tensor,
    d_means_NE: Tensor,
    p: int,
    blur: float,
    scaling: float,
    diameter: float | None,
    reach: float | None,
    triton: bool,
) -> Tensor:
    """The gradient of `solve_means` by its values."""
    options = TransportOptions(p, blur, scaling, diameter, reach, None, None)
    with without_autocast(x_ND.device):
        return sinkhorn(x_ND, y_MD, a_N, b_M, options, False, False, triton).sums_over_rows(f_N, g_M, d_means_NE)


def empty_transposed(
    x_ND: Tensor, y_MD: Tensor, a_N: Tensor, b_M: Tensor, f_N: Tensor, g_M: Tensor, d_means_NE: Tensor, *options: Any
) -> Tensor:
    return y_MD.new_empty(len(y_MD), d_means_NE.shape[1])


sinkhorn_potentials = register_op("dae_kernels::sinkhorn_potentials", solve_divergence, empty_divergence)
sinkhorn_means = register_op("dae_kernels::sinkhorn_means", solve_means, empty_means)
sinkhorn_transposed = register_op("dae_kernels::sinkhorn_transposed", transposed_means, empty_transposed)
