"""The symmetric Sinkhorn loop with epsilon scaling, over updates by the reference or by the kernels."""

from __future__ import annotations

import functools
import math
import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dae_kernels.sinkhorn_divergence.reference import Update

DEFAULT_ITERATIONS = 1000  # at the final blur, with a tolerance but no limit
LARGE = 2.0**60  # absorbs 1 in addition, also in float64
STEP = 100  # 2^100 and 2^-100 are representable in both dtypes


class TransportOptions(NamedTuple):
    """Arguments of `sinkhorn_divergence` of the same names; lengths are in the units of the points."""

    p: int
    blur: float
    scaling: float
    diameter: float | None
    reach: float | None
    max_iter: int | None
    tolerance: float | None


class Potential(NamedTuple):
    """A potential minus half the squared norm of its point (p = 2), as a small vector and a number to add."""

    vector: Tensor
    constant: float

    def average(self, other: Potential) -> Potential:
        return Potential((self.vector + other.vector) / 2, (self.constant + other.constant) / 2)

    def less(self, other: Potential) -> Tensor:
        return self.vector - other.vector + (self.constant - other.constant)


class Problem(NamedTuple):
    """One side of a transport problem: its update computes one cloud's potential from that of the cloud `over`."""

    update: Update
    log_b_M: Tensor  # of the other cloud's weights, which are normalised
    log_mass: float  # of the other cloud
    half_N: Tensor  # half squared norms of its points, 0 for p = 1
    a_N: Tensor  # its weights, normalised
    over: int


def times_power_of_two(x: Tensor, exponent: int) -> Tensor:
    """x 2^exponent, by factors representable in its dtype."""
    while exponent:
        step = max(-STEP, min(STEP, exponent))
        x, exponent = x * 2.0**step, exponent - step
    return x


def boxes(*groups: tuple[Tensor, ...]) -> list[tuple[Tensor, float]]:
    """Centre [D] of the box around each group of clouds, and its diagonal, which bounds every distance; a GPU is asked once."""
    centres, sizes = [], []
    for clouds in groups:
        low_D = functools.reduce(torch.minimum, [cloud.amin(dim=0) for cloud in clouds]) / 2
        high_D = functools.reduce(torch.maximum, [cloud.amax(dim=0) for cloud in clouds]) / 2
        side_D = high_D - low_D
        longest = side_D.amax()
        norm = (side_D / longest.clamp_min(torch.finfo(side_D.dtype).tiny)).norm()  # the square of a side may overflow
        centres.append(low_D + high_D)
        sizes += [longest, norm]
    numbers = torch.stack(sizes).tolist()
    return [(centre_D, 2 * longest * norm) for centre_D, longest, norm in zip(centres, numbers[::2], numbers[1::2], strict=True)]


def with_weight(x_ND: Tensor, a_N: Tensor) -> Tensor:
    """The cloud with points of weight 0 moved onto a point of positive weight."""
    return torch.where((a_N > 0)[:, None], x_ND, x_ND.index_select(0, a_N.argmax()[None]))


def check_span(span: float, options: TransportOptions, dtype: torch.dtype) -> None:
    """ValueError if |x - y|^p / epsilon overflows; non-finite points give NaN instead."""
    largest = (torch.finfo(dtype).max / 16) ** (1 / options.p)
    for name, scale in (("blur", options.blur), ("diameter", options.diameter)):
        if scale is not None and largest * scale < span < math.inf:
            raise ValueError(
                f"costs overflow {dtype}: the points must span less than {largest * scale:.3g} for p={options.p} and "
                f"{name}={scale!r}, got {span:.3g}"
            )


def check_reach(span: float, options: TransportOptions, dtype: torch.dtype) -> None:
    """ValueError if powers of the ratio of blur or reach to the span of the points overflow or underflow."""
    limit = (torch.finfo(dtype).max ** 0.75) ** (1 / options.p)
    for name, scale in (("blur", options.blur), ("reach", options.reach)):
        if scale is not None and not span / limit <= scale <= span * limit:
            raise ValueError(
                f"with reach, {name} must be between {span / limit:.3g} and {span * limit:.3g} for points that span {span:.3g} "
                f"in {dtype}, got {scale!r}" + ("; without reach no mass is lost" if name == "reach" else "")
            )


def epsilon_schedule(diameter: float, blur: float, scaling: float, p: int) -> list[float]:
    """Epsilons: diameter^p twice, then times scaling^p down to blur^p, which is always last.

    Points that (nearly) coincide or are not finite have no initial scale: then blur^p alone.
    """
    if not 1e-9 * blur < diameter < math.inf:
        return [blur**p] * 2
    start, stop, step = p * math.log(diameter), p * math.log(blur), p * math.log(scaling)
    between = [math.exp(start + i * step) for i in range(math.ceil((stop - start) / step))]
    return [diameter**p, *between, blur**p]


class Sinkhorn:
    """The transport problems between two clouds, and with `debias` of each to itself, in units in which the points span about 1.

    `potentials` are those of x and y for the first problem, and of x and y for the others; `epsilon` and `rho` are blur^p and
    reach^p in these units, in which costs are scaled by 2^-`exponent`p. `joint`, if not None, takes a step of all problems at
    once; with reach it is not used. `equal`: the weights are known to be equal in each cloud.
    """

    def __init__(
        self, kind: type[Update], x_ND: Tensor, y_MD: Tensor, a_N: Tensor, b_M: Tensor, options: TransportOptions, debias: bool,
        joint: Any = None, equal: bool = False,
    ) -> None:  # fmt: skip
        p, dtype = options.p, x_ND.dtype
        joint = None if options.reach is not None else joint
        given = (x_ND, y_MD) if joint is None else (torch.cat([x_ND, y_MD]),)
        weighted = () if equal else ((with_weight(x_ND, a_N), with_weight(y_MD, b_M)),)
        found = boxes(given, *weighted)
        span, (centre_D, diagonal) = found[0][1], found[-1]
        check_span(span, options, dtype)
        scale = diagonal if 0 < diagonal < math.inf else options.blur
        if options.reach is not None:
            check_reach(scale, options, dtype)
        self.options, self.p = options, p
        self.exponent = max(-1000, math.frexp(scale)[1])
        unit = math.ldexp(1.0, -self.exponent)
        # From a blur of 2^30 diameters on changes are below rounding, until its power overflows.
        largest = LARGE ** (1 / p)
        blur = options.blur * unit if options.reach is not None else min(options.blur * unit, largest)
        diameter = (diagonal if options.diameter is None else options.diameter) * unit
        schedule = epsilon_schedule(min(diameter, largest) if diameter < math.inf else diameter, blur, options.scaling, p)
        self.schedule = [(epsilon, epsilon > (span * unit) ** p) for epsilon in schedule]
        self.epsilon = schedule[-1]
        self.rho = None if options.reach is None else (options.reach * unit) ** p
        self.kind, self.debias, self.centre_D, self.weights = kind, debias, centre_D, (a_N, b_M)
        # Translation changes the rounding of |x|^2 - 2 x.y + |y|^2, but no cost.
        self.joint: Any = None
        self.joined = x_ND.new_empty(0)
        if joint is not None:
            z_ND = times_power_of_two(given[0] - centre_D, -self.exponent)
            self.joint = joint(z_ND, torch.cat([a_N, b_M]), len(a_N), p, 4 if debias else 2)
            self.clouds = self.joint.clouds
        else:
            self.clouds = tuple(times_power_of_two(c - centre_D, -self.exponent).contiguous() for c in (x_ND, y_MD))
        self.masses = [1.0, 1.0] if self.rho is None else torch.stack([a_N.sum(), b_M.sum()]).tolist()

    @functools.cached_property
    def problems(self) -> list[Problem]:
        log_a, log_b = (math.log(mass) for mass in self.masses)
        a_N, b_M = (t if self.rho is None else t / t.sum() for t in self.weights)
        half_N, half_M = (t.square().sum(dim=1) / 2 if self.p == 2 else t.new_zeros(len(t)) for t in self.clouds)
        of_x, of_y = (a_N.log(), log_a), (b_M.log(), log_b)
        (x_ND, y_MD), kind, p = self.clouds, self.kind, self.p
        problems = [Problem(kind(x_ND, y_MD, p), *of_y, half_N, a_N, 1), Problem(kind(y_MD, x_ND, p), *of_x, half_M, b_M, 0)]
        if self.debias:
            problems += [
                Problem(kind(x_ND, x_ND, p), *of_x, half_N, a_N, 2),
                Problem(kind(y_MD, y_MD, p), *of_y, half_M, b_M, 3),
            ]
        return problems

    @functools.cached_property
    def potentials(self) -> list[Potential]:
        if self.joint is None:
            return [Potential(-problem.half_N, 0.0) for problem in (*self.problems[:2], *self.problems[:2])]
        return [Potential(vector, 0.0) for vector in self.joint.apart(self.joined)]

    def solve(self) -> Sinkhorn:
        """Run the schedule and, if requested, iterate to convergence; returns itself."""
        if self.joint is not None:
            self.joined = self.joint.solved(self.schedule)
        else:
            several = range(len(self.problems))
            self.potentials = [self.updated(k, *self.schedule[0])[0] for k in several]
            spare: list[Tensor | None] = [None] * len(self.problems)  # the potentials before last, to be written over
            for step in self.schedule:
                new = [self.averaged(k, *step, spare[k]) for k in several]
                spare, self.potentials = [old.vector for old in self.potentials], new
        max_iter, tolerance = self.options.max_iter, self.options.tolerance
        if max_iter is not None or tolerance is not None:
            self.converge(DEFAULT_ITERATIONS if max_iter is None else max_iter, tolerance)
            if self.joint is not None:
                self.joined = torch.cat([potential.vector for potential in self.potentials]).view_as(self.joined)
        return self

    def damping(self, epsilon: float) -> float:
        return 1.0 if self.rho is None else self.rho / (self.rho + epsilon)

    def updated(self, k: int, epsilon: float, flat: bool, **wanted: Any) -> tuple[Potential, Tensor]:
        """The new potential of problem k, and the further outputs requested."""
        problem, damping = self.problems[k], self.damping(epsilon)
        over = self.potentials[problem.over]
        vector_N, made = problem.update(problem.log_b_M, over.vector, epsilon, flat, **wanted)
        if self.rho is None:
            return Potential(vector_N, 0.0), made
        # Damping applies to the potential itself, before subtracting half a squared norm.
        vector_N = damping * vector_N - epsilon / (self.rho + epsilon) * problem.half_N
        return Potential(vector_N, -damping * (over.constant + epsilon * problem.log_mass)), made

    def averaged(self, k: int, epsilon: float, flat: bool, into_N: Tensor | None = None) -> Potential:
        """The average of problem k's potential and its new one."""
        old = self.potentials[k]
        if self.rho is None:
            return self.updated(k, epsilon, flat, average_N=old.vector, into_N=into_N)[0]
        return old.average(self.updated(k, epsilon, flat, into_N=into_N)[0])

    def converge(self, max_iter: int, tolerance: float | None) -> None:
        """Up to max_iter iterations at the final epsilon: alternating between x and y, averaged for a cloud and itself.

        Alternation takes a quarter of the steps of averaging (its rate is the square, with half the updates); between a cloud
        and itself averages halve all errors.
        """
        error = math.inf
        for _ in range(max_iter):
            errors = []
            for k in range(len(self.problems)):
                new = self.updated(k, *self.schedule[-1])[0]
                if tolerance is not None:
                    errors.append(self.marginal_error(k, new))
                self.potentials[k] = new if k < 2 else self.potentials[k].average(new)
            if tolerance is None:
                continue
            error = torch.stack(errors).amax().item()  # NaN if one is
            if error <= tolerance or math.isnan(error):
                return
        if tolerance is not None:
            warnings.warn(
                f"Sinkhorn has not converged: after {max_iter} iterations at blur={self.options.blur:g} the marginals "
                f"of the plan are off by {error:.3g} of the mass, more than tolerance={tolerance:g}; "
                "a larger max_iter or blur helps",
                RuntimeWarning,
                stacklevel=2,
            )

    def marginal_error(self, k: int, new: Potential) -> Tensor:
        """Sum over the points of problem k of the difference between the plan's marginal and its target.

        The plan is that of the current potentials; if mass may be lost, the target is a exp(-f / rho).
        """
        problem, old = self.problems[k], self.potentials[k]
        error_N = torch.expm1(old.less(new) / (self.damping(self.epsilon) * self.epsilon)).abs()
        if self.rho is not None:
            error_N = error_N * torch.exp(-self.whole(k, new) / self.rho)
        return (problem.a_N * error_N).where(problem.a_N > 0, 0.0).sum()

    def whole(self, k: int, potential: Potential) -> Tensor:
        return potential.vector + self.problems[k].half_N + potential.constant

    def divergence(self, potentials: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """The divergence [], u_N, v_M, du_N, dv_M, dx_ND, dy_MD, in the units of the points.

        The divergence is sum_i a_i u_i + sum_j b_j v_j, its derivatives are du by a, dv by b, a_i dx_i by x_i and b_j dy_j by
        y_j. With `potentials` u and v are these, and dx and dy their derivatives; else u and v are empty.
        """
        # Full steps, not averages: their derivative is that of the cost under the plan, as the envelope theorem requires.
        if self.joint is not None:
            return self.joint_divergence(potentials)
        last = [self.updated(k, *self.schedule[-1], gradient=True) for k in range(len(self.problems))]
        sides = [self.side(k, last, potentials) for k in range(2)]
        values, by_weight, by_point = zip(*sides, strict=True)
        # Summed before scaling, as two overflowing powers have no difference.
        value = sum(m * (one.a_N * u).sum() for m, one, u in zip(self.masses, self.problems[:2], values, strict=True))
        values = values if potentials else tuple(one.new_empty(0) for one in values)
        value, u_N, v_M, du_N, dv_M = (times_power_of_two(t, self.p * self.exponent) for t in (value, *values, *by_weight))
        dx_ND, dy_MD = (times_power_of_two(t, (self.p - 1) * self.exponent) for t in by_point)
        return value, u_N, v_M, du_N, dv_M, dx_ND, dy_MD

    def joint_divergence(self, potentials: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """`divergence` by `joint`."""
        new, slopes = self.joint.slopes(self.joined, *self.schedule[-1])
        if self.debias:
            net, net_slopes = torch.sub(*new.unbind()), torch.sub(*slopes.unbind())
        else:
            net, net_slopes = new[0] - self.joint.start(), slopes[0]
        sizes, exponent = [len(weights) for weights in self.weights], self.p * self.exponent
        value = times_power_of_two((self.joint.w * net).sum(), exponent)
        u_N, v_M = times_power_of_two(net, exponent).split(sizes)
        dx_ND, dy_MD = times_power_of_two(net_slopes, exponent - self.exponent).split(sizes)
        values = (u_N.clone(), v_M.clone()) if potentials else (u_N.new_empty(0), v_M.new_empty(0))
        return value, *values, u_N.clone(), v_M.clone(), dx_ND.clone(), dy_MD.clone()  # results share no memory

    def side(self, k: int, last: list[tuple[Potential, Tensor]], potentials: bool) -> tuple[Tensor, Tensor, Tensor]:
        """u, du and dx of `divergence` for one cloud."""
        f, df_ND = last[k]
        own = last[k + 2] if len(last) > 2 else None
        plain_N = self.whole(k, f) if own is None else f.less(own[0])
        net_ND = df_ND if own is None else df_ND - own[1]
        if self.rho is None:
            return plain_N, plain_N.clone(), net_ND
        epsilon, rho, other_mass = self.epsilon, self.rho, self.masses[1 - k]
        if potentials:
            return plain_N, plain_N.clone(), self.damping(epsilon) * net_ND
        # Sejourne et al. 2019, proposition 12; differences of exponentials by expm1, as rho may be large.
        kept_N = torch.exp(-self.whole(k, f) / rho)[:, None]
        if own is not None:
            own_kept_N = torch.exp(-self.whole(k, own[0]) / rho)
            lost_N = -own_kept_N * torch.expm1(-plain_N / rho)
            return (rho + epsilon / 2) * lost_N, (rho + epsilon) * lost_N, kept_N * df_ND - own_kept_N[:, None] * own[1]
        lost_N, excess = -torch.expm1(-plain_N / rho), epsilon * (other_mass - 1)
        return (rho + epsilon / 2) * lost_N + excess / 2, (rho + epsilon) * lost_N + excess, kept_N * df_ND

    def means(self, values_ME: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Means of values (of the points y, if None) under the rows of the plan, and the rows' sums [N].

        Also the potentials f, which normalise those rows, and g, in the units of this object.
        """
        values = self.clouds[1] if values_ME is None else values_ME
        problem, over = self.problems[0], self.potentials[1]
        f_N, means_NE = problem.update(problem.log_b_M, over.vector, *self.schedule[-1], values_ME=values)
        if values_ME is None:
            means_NE = times_power_of_two(means_NE, self.exponent) + self.centre_D
        sums_N = self.masses[0] * problem.a_N
        if self.rho is not None:
            sums_N = sums_N * torch.exp(-self.whole(0, self.updated(0, *self.schedule[-1])[0]) / self.rho)
        return means_NE, sums_N, f_N, over.vector.clone()

    def sums_over_rows(self, f_N: Tensor, g_M: Tensor, d_NE: Tensor) -> Tensor:
        """[M, E]: sum over i of d_i times the weight of value j in the mean i of `means`."""
        problem, N = self.problems[1], len(f_N)
        # With equal weights for x, as the normalised rows of the plan do not depend on them.
        t_M, means_ME = problem.update(torch.full_like(f_N, -math.log(N)), f_N, self.epsilon, False, values_ME=d_NE)
        return (N * problem.a_N * torch.exp((g_M - t_M) / self.epsilon))[:, None] * means_ME
