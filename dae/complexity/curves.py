"""Complexity curves c -> D^{G_c}(P_z, P_x), and their inverse, the capacity C_eps that a latent needs."""

from __future__ import annotations

import itertools
import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

from torch import Tensor

from dae.complexity.distances import Distance
from dae.complexity.estimate import Estimate, check_pair, check_seeds
from dae.complexity.families import GeneratorFamily, check_family, check_number
from dae.complexity.fitting import Fitting
from dae.complexity.generator_distance import Trial, estimate_of, fit_trial
from dae.precision import own_arithmetic
from dae.progress import with_progress


@dataclass(frozen=True)
class ComplexityCurve:
    """c -> D^{G_c}(P_z, P_x) at some capacities.

    `raw` has the estimates per capacity, as by `generator_distance`. If the family is nested, `estimates` are those of the best
    generators fitted at this or a smaller capacity.
    """

    capacities: tuple[float, ...]  # increasing
    estimates: tuple[Estimate, ...]  # one per capacity
    raw: tuple[Estimate, ...]
    knob: str  # what the capacity is
    chosen: bool  # whether `estimates` are the best so far; else they are `raw`

    def required_capacity(self, eps: float) -> float | None:
        """C_eps: the smallest capacity of the curve whose estimate is at most eps; None where none is.

        Without interpolation C_eps is too large by up to a step of the capacities. Apart from that and sampling error it has the
        curve's bound: exact with "exact" estimates; an upper bound with "upper" ones, as better training could reach eps sooner;
        no bound with critics ("neither"). If the curve is flat near eps, small errors of the estimates move it far:
        `required_capacity_of_seeds` shows how far.

        Raises:
            TypeError: eps is not a number. ValueError: it is not finite.
        """
        return self._first(eps, [estimate.value for estimate in self.estimates])

    def required_capacity_of_seeds(self, eps: float) -> tuple[float | None, ...]:
        """C_eps of each seed's own curve, in the order of the seeds; None if it does not reach eps. Errors as above.

        Their spread is due to splits and training; `Estimate.standard_error` covers the finite sample.
        """
        values_SC = zip(*(estimate.values for estimate in self.estimates), strict=True)
        return tuple(self._first(eps, values) for values in values_SC)

    def _first(self, eps: float, values: Sequence[float]) -> float | None:
        check_number("eps", eps)
        if not math.isfinite(eps):
            raise ValueError(f"expected a finite eps, a distance in the unit of the estimates, got {eps}")
        return next((c for c, value in zip(self.capacities, values, strict=True) if value <= eps), None)

    def to_dict(self) -> dict:
        """For JSON."""
        curves = {name: [e.to_dict() for e in getattr(self, name)] for name in ("estimates", "raw")}
        return {"knob": self.knob, "chosen": self.chosen, **curves}


@own_arithmetic(gradients=True)
def complexity_curve(
    latents: Tensor,
    data: Tensor,
    family: GeneratorFamily,
    capacities: Sequence[float],
    distance: str | Distance,
    *,
    seeds: Sequence[int] = (0, 1, 2),
    progress: bool = False,
    **options,
) -> ComplexityCurve:
    """The generator-induced distance at several capacities of one family.

    Per seed all capacities share the split of the rows and the random draws of measuring, so they differ only by their
    generators. If the family is nested, G_c in G_c' for c <= c', a generator fitted at a smaller capacity also belongs to the
    larger one: each estimate is that of the best generator of this and smaller capacities on the selection rows (for linear maps
    with "frechet", by the moments of all rows). So the curve decreases up to sampling error. `raw` has the generators fitted per
    capacity. With an adversarial distance nothing is selected, as every score would need its own critic.

    Args:
        latents, data, distance: as in `generator_distance`.
        family: its capacity is replaced by `capacities`.
        capacities: increasing; at least one.
        seeds: of `generator_distance`.
        progress: show a bar over capacities and seeds.
        options: `steps`, `batch_size`, `learning_rate`, `heldout`, `measure_limit` of `generator_distance`.

    Raises:
        ValueError: capacities that do not increase or are not in the family, and as `generator_distance`.
        TypeError: likewise.
    """
    check_pair(latents, data)
    check_family("family", family)
    capacities, seeds = check_capacities(capacities), check_seeds(seeds)
    fitting = Fitting.of(options)
    families = [family.at(capacity) for capacity in capacities]
    jobs = [(member, seed) for member in families for seed in seeds]
    done = [fit_trial(latents, data, member, distance, seed, fitting) for member, seed in with_progress(jobs, "curve", progress)]
    trials_CS = [done[start : start + len(seeds)] for start in range(0, len(done), len(seeds))]
    chosen = family.nested and all(trial.score is not None for trial in done)
    best_CS = best_so_far(trials_CS) if chosen else trials_CS

    def estimates(rows: list[list[Trial]]) -> tuple[Estimate, ...]:
        return tuple(estimate_of(row, seeds, member, distance) for row, member in zip(rows, families, strict=True))

    return ComplexityCurve(capacities, estimates(best_CS), estimates(trials_CS), family.knob, chosen)


def best_so_far(trials_CS: list[list[Trial]]) -> list[list[Trial]]:
    """Per capacity and seed the best-scoring trial of this or a smaller capacity."""

    def better(before: list[Trial], row: list[Trial]) -> list[Trial]:
        return [min(pair, key=lambda trial: cast(float, trial.score)) for pair in zip(before, row, strict=True)]

    return list(itertools.accumulate(trials_CS, better))


def check_capacities(capacities: Sequence[float]) -> tuple[float, ...]:
    """TypeError or ValueError unless they are numbers that increase."""
    listed = hasattr(capacities, "__len__") and hasattr(capacities, "__getitem__")
    if not listed or any(isinstance(c, bool) or not isinstance(c, numbers.Real) for c in capacities):
        raise TypeError(f"expected capacities as a sequence of numbers, such as (1, 2, 4), got {capacities!r}")
    if len(capacities) == 0:
        raise ValueError("expected at least one capacity, got none")
    if not all(a < b for a, b in itertools.pairwise(capacities)):
        raise ValueError(f"expected capacities that increase, got {tuple(capacities)}; sort them and drop what is twice")
    return tuple(float(capacity) for capacity in capacities)
