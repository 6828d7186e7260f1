"""`sinkhorn_divergence`: checks, dispatch, and the operator that carries the envelope gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dae_kernels.clouds import check_clouds, check_weights, convention, normalised
from dae_kernels.dispatch import choose, dtype_refusal, register_op
from dae_kernels.sinkhorn_divergence.reference import ReferenceUpdate
from dae_kernels.sinkhorn_divergence.solver import scale_limits, solve


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

    As blur goes to 0 and scaling to 1, S tends to half the squared 2-Wasserstein distance (p = 2) or the 1-Wasserstein distance
    (p = 1); as blur grows, to half the squared distance of the means, or half the energy distance 2 E|x-y| - E|x-x'| - E|y-y'|.

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
        blur: > 0, in the units of the points: the scale below which mass is not told apart; epsilon = blur^p, which with its
            inverse must be a number of the dtype computed in, as must |x - y|^p and |x - y|^p / epsilon.
        scaling: in (0, 1), the ratio of successive scales.
        debias: whether to take off the cost of each cloud against itself.
        weights_x: [N], not negative, or None for equal ones. They are divided by their sum. A weight of 0 takes its point out
            of the plan and of the diameter.
        weights_y: [M], likewise.
        diameter: > 0, the scale to start from, with the limits of blur; None takes the diagonal of the box around both clouds.
            (The box is looked at in any case, which waits for a GPU.)
        potentials: return the potentials in place of their sum.
        impl: "auto" is "triton" for CUDA tensors of at most 32 bits where triton is installed, else "reference"; a named
            choice is obeyed or refused.

    Returns:
        S: [], float64 for float64 clouds, else float32. Equal to sum_i a_i f_i + sum_j b_j g_j.
        With `potentials`, (f [N], g [M]) in its place: the dual potentials of OT(a, b), less those of OT(a, a) and OT(b, b)
        with debias. Differentiable by the points where they live, in the same way: df_i / dx_i.

    Raises:
        TypeError: clouds or weights that are not floating point, clouds of two dtypes, or options of a wrong type.
        ValueError: shapes, devices or options that do not fit, weights that are negative or do not sum to a positive number,
            a blur, diameter or spread of the points that the dtype cannot hold, or `impl` cannot run here.

    Source: Feydy et al. 2019, arXiv 1810.08278; the schedule: Feydy 2020, "Geometric data analysis, beyond convolutions",
    algorithm 3.5.
    """
    check_clouds("sinkhorn_divergence", x, y)
    check_weights("sinkhorn_divergence", "weights_x", weights_x, x)
    check_weights("sinkhorn_divergence", "weights_y", weights_y, y)
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    check_options(p, blur, scaling, diameter, dtype)
    for name, flag in (("debias", debias), ("potentials", potentials)):
        if not isinstance(flag, bool):
            raise TypeError(f"{name} must be a bool, got {flag!r}")
    triton = choose(impl, x.device, dtype_refusal(x)) == "triton"
    a_N, b_M = normalised(weights_x, x, dtype), normalised(weights_y, y, dtype)
    options = (int(p), blur, scaling, diameter, debias, triton)
    divergence, f_N, g_M = envelope(x.to(dtype), y.to(dtype), a_N, b_M, *options)
    return (f_N, g_M) if potentials else divergence


def check_options(p: int, blur: float, scaling: float, diameter: float | None, dtype: torch.dtype) -> None:
    for name, number in (("p", p), ("blur", blur), ("scaling", scaling), ("diameter", 1.0 if diameter is None else diameter)):
        if isinstance(number, bool) or not isinstance(number, int | float):
            raise TypeError(f"{name} must be a number, got {number!r}")
    if p not in (1, 2):
        raise ValueError(f"p must be 1 or 2, got {p!r}")
    if not 0 < scaling < 1:
        raise ValueError(f"scaling must be between 0 and 1, both excluded, got {scaling!r}")
    least, largest = scale_limits(int(p), dtype)
    for name, scale in (("blur", blur), ("diameter", diameter)):
        if scale is not None and not least <= scale <= largest:
            raise ValueError(
                f"{name} must be positive and finite, for p={p} in {dtype} between {least:.3g} and {largest:.3g}, got {scale!r}"
            )


def solve_problem(
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


def empty_potentials(x_ND, y_MD, a_N, b_M, p, blur, scaling, diameter, debias, triton):
    return torch.empty_like(a_N), torch.empty_like(b_M), x_ND.new_empty(x_ND.shape), y_MD.new_empty(y_MD.shape)


# Opaque to torch.compile with Triton too, unlike the other operators of this package: the number of updates depends on the data.
sinkhorn_potentials = register_op("dae_kernels::sinkhorn_potentials", solve_problem, empty_potentials)


def envelope(*arguments) -> tuple[Tensor, Tensor, Tensor]:
    """The divergence [] and its potentials f [N] and g [M] by the operator above, with their gradients."""
    if torch.compiler.is_compiling():
        from dae_kernels.whole import envelope_function
    else:
        envelope_function = apply_envelope
    return envelope_function(*arguments)


def apply_envelope(*arguments) -> tuple[Tensor, Tensor, Tensor]:
    return Envelope.apply(*arguments)[:3]


class Envelope(torch.autograd.Function):
    """A Function, as what `register_autograd` makes is closed to torch.func.

    What makes the gradients is an output too: whoever differentiates the gradients again comes by it.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x_ND: Tensor, y_MD: Tensor, a_N: Tensor, b_M: Tensor, *options) -> tuple[Tensor, ...]:
        f_N, g_M, df_ND, dg_MD = sinkhorn_potentials(x_ND, y_MD, a_N, b_M, *options)
        return (a_N * f_N).sum() + (b_M * g_M).sum(), f_N, g_M, f_N.clone(), g_M.clone(), df_ND, dg_MD

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[2:4], *output[3:])

    @staticmethod
    def backward(
        ctx: Any, d_value: Tensor | None, d_f_N: Tensor | None, d_g_M: Tensor | None, *d_made: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        if any(d is not None for d in d_made):
            raise RuntimeError("sinkhorn_divergence has no second derivative: its gradient holds the transport plan constant")
        a_N, b_M, f_N, g_M, df_ND, dg_MD = ctx.saved_tensors
        d_x_ND, d_a_N = side_gradients(a_N, f_N, df_ND, d_value, d_f_N)
        d_y_MD, d_b_M = side_gradients(b_M, g_M, dg_MD, d_value, d_g_M)
        return d_x_ND, d_y_MD, d_a_N, d_b_M, *[None] * 6


def side_gradients(
    a_N: Tensor, f_N: Tensor, df_ND: Tensor, d_value: Tensor | None, d_f_N: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients to the points [N, D] and the weights [N] of one side; a potential takes none to the weights."""
    by_row_N = [d for d in (None if d_value is None else d_value * a_N, d_f_N) if d is not None]
    return sum(by_row_N)[:, None] * df_ND if by_row_N else None, None if d_value is None else d_value * f_N
