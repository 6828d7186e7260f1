"""`sinkhorn_divergence`: checks, dispatch, and the operator that carries the envelope gradient."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dae_kernels.clouds import check_clouds, check_weights, convention, normalised
from dae_kernels.dispatch import choose, dtype_refusal
from dae_kernels.sinkhorn_divergence.reference import ReferenceUpdate
from dae_kernels.sinkhorn_divergence.solver import solve


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
    weights_x: Tensor | None = None,
    weights_y: Tensor | None = None,
    diameter: float | None = None,
    potentials: bool = False,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Sinkhorn divergence between two weighted point clouds, with the names, defaults and factors of geomloss.

        OT(a, b) = min over plans P with marginals a, b of  sum_ij P_ij |x_i - y_j|^p / p + blur^p KL(P | a b^T)
        S(a, b)  = OT(a, b) - OT(a, a) / 2 - OT(b, b) / 2        with debias, else OT(a, b)

    As blur goes to 0, S is half the squared 2-Wasserstein distance (p = 2) or the 1-Wasserstein distance (p = 1); as it grows,
    half the squared distance of the means, or half the energy distance 2 E|x-y| - E|x-x'| - E|y-y'|.

    Computed by symmetric, averaged Sinkhorn updates in the log domain while epsilon falls from diameter^p to blur^p by
    scaling^p a step. As in geomloss the number of updates is set by that schedule and nothing tests for convergence: `scaling`
    nearer to 1 is more accurate and slower. Memory is O(N + M): scores are computed in blocks and never kept (but for p = 1
    the reference keeps up to 2^22 distances of each of the four pairs of clouds).

    16-bit clouds are computed in float32, and neither autocast nor `torch.set_float32_matmul_precision` lowers that.

    The gradient is that of the envelope theorem, from the last potentials with the plan held constant, never through the
    updates. By the points it is sum_j P_ij d|x_i - y_j|^p / p / dx_i (less that of the cloud against itself); by the weights
    it is the potential, less its mean as weights are normalised first. It is exact at convergence. There is no second
    derivative.

    Args:
        x: [N, D], floating, N, D >= 1; any strides.
        y: [M, D], of the same dtype and on the same device.
        p: 1 or 2, the exponent of the cost.
        blur: > 0, in the units of the points: the scale below which mass is not told apart; epsilon = blur^p.
        scaling: in (0, 1), the ratio of successive scales.
        debias: whether to take off the cost of each cloud against itself.
        weights_x: [N], not negative, or None for equal ones. They are divided by their sum. A weight of 0 takes its point out.
        weights_y: [M], likewise.
        diameter: > 0, the scale to start from; None takes the diagonal of the box around both clouds (waits for a GPU).
        potentials: return the potentials in place of their sum.
        impl: "auto" is "triton" for CUDA tensors of at most 32 bits where triton is installed, else "reference"; a named
            choice is obeyed or refused.

    Returns:
        S: [], float64 for float64 clouds, else float32. Equal to sum_i a_i f_i + sum_j b_j g_j.
        With `potentials`, (f [N], g [M]) in its place: the dual potentials of OT(a, b), less those of OT(a, a) and OT(b, b)
        with debias. Differentiable by the points where they live, in the same way: df_i / dx_i.

    Raises:
        TypeError: clouds or weights that are not floating point, or clouds of two dtypes.
        ValueError: shapes, devices or options that do not fit, weights that are negative or do not sum to a positive number,
            or `impl` cannot run here.

    Source: Feydy et al. 2019, arXiv 1810.08278; the schedule: Feydy 2020, "Geometric data analysis, beyond convolutions",
    algorithm 3.5.
    """
    check_clouds("sinkhorn_divergence", x, y)
    check_weights("sinkhorn_divergence", "weights_x", weights_x, x)
    check_weights("sinkhorn_divergence", "weights_y", weights_y, y)
    check_options(p, blur, scaling, diameter)
    triton = choose(impl, x.device, dtype_refusal(x)) == "triton"
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    a_N, b_M = normalised(weights_x, x, dtype), normalised(weights_y, y, dtype)
    options = (a_N.detach(), b_M.detach(), p, blur, scaling, diameter, debias, triton)
    f_N, g_M = envelope_potentials(x.to(dtype), y.to(dtype), *options)
    if potentials:
        return f_N, g_M
    return (a_N * f_N).sum() + (b_M * g_M).sum()


def check_options(p: int, blur: float, scaling: float, diameter: float | None) -> None:
    if p not in (1, 2):
        raise ValueError(f"p must be 1 or 2, got {p!r}")
    if not 0 < blur < math.inf:
        raise ValueError(f"blur must be positive and finite, got {blur!r}")
    if not 0 < scaling < 1:
        raise ValueError(f"scaling must be between 0 and 1, both excluded, got {scaling!r}")
    if diameter is not None and not 0 < diameter < math.inf:
        raise ValueError(f"diameter must be positive and finite, or None, got {diameter!r}")


# Opaque to torch.compile, unlike the other operators of this package: the number of updates depends on the data.
@torch.library.custom_op("dae_kernels::sinkhorn_potentials", mutates_args=())
def sinkhorn_potentials(
    x_ND: Tensor,
    y_MD: Tensor,
    a_N: Tensor,
    b_M: Tensor,
    p: int,
    blur: float,
    scaling: float,
    diameter: float | None,
    debias: bool,
    triton: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Potentials f [N], g [M] and their derivatives by their own points, df [N, D], dg [M, D]."""
    if triton:
        from dae_kernels.sinkhorn_divergence.fused import TritonUpdate as prepare
    else:
        prepare = ReferenceUpdate
    with torch.autocast(x_ND.device.type, enabled=False):
        return solve(prepare, x_ND, y_MD, a_N.log(), b_M.log(), p, blur, scaling, diameter, debias)


@sinkhorn_potentials.register_fake
def _(x_ND, y_MD, a_N, b_M, p, blur, scaling, diameter, debias, triton):
    return torch.empty_like(a_N), torch.empty_like(b_M), x_ND.new_empty(x_ND.shape), y_MD.new_empty(y_MD.shape)


@sinkhorn_potentials.register_vmap
def _(info, in_dims, *arguments):
    """One problem after the other: their schedules differ."""
    one = lambda k: [t if d is None else t.select(d, k) for t, d in zip(arguments, in_dims, strict=True)]  # noqa: E731
    results = zip(*(sinkhorn_potentials(*one(k)) for k in range(info.batch_size)), strict=True)
    return tuple(map(torch.stack, results)), (0,) * 4


def envelope_potentials(x_ND: Tensor, y_MD: Tensor, *options) -> tuple[Tensor, Tensor]:
    """Potentials f [N] and g [M] of the operator above, with its gradient."""
    if not torch.compiler.is_compiling():
        return EnvelopePotentials.apply(x_ND, y_MD, *options)[:2]
    # Dynamo (torch 2.13) fails on a Function where nothing requires a gradient, and under vmap of grad. The terms added are 0,
    # and their derivative is the gradient.
    f_N, g_M, df_ND, dg_MD = sinkhorn_potentials(x_ND.detach(), y_MD.detach(), *options)
    return f_N + ((x_ND - x_ND.detach()) * df_ND).sum(dim=1), g_M + ((y_MD - y_MD.detach()) * dg_MD).sum(dim=1)


class EnvelopePotentials(torch.autograd.Function):
    """Where nothing is compiled: a Function, as what `register_autograd` makes is closed to torch.func."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x_ND: Tensor, y_MD: Tensor, a_N: Tensor, b_M: Tensor, *options):
        return sinkhorn_potentials(x_ND, y_MD, a_N, b_M, *options)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*output[2:])

    @staticmethod
    def backward(ctx, d_f_N, d_g_M, d_df_ND, d_dg_MD):
        if d_df_ND is not None or d_dg_MD is not None:
            raise RuntimeError("sinkhorn_divergence has no second derivative: its gradient holds the transport plan constant")
        df_ND, dg_MD = ctx.saved_tensors
        d_x_ND = None if d_f_N is None else d_f_N[:, None] * df_ND
        d_y_MD = None if d_g_M is None else d_g_M[:, None] * dg_MD
        return d_x_ND, d_y_MD, *[None] * 8
