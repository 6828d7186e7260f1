"""`Estimate`, the result type of every distance here, and the checks of latents and data."""

from __future__ import annotations

import dataclasses
import math
import operator
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from dae.metrics.validation import check_values

CRITIC_ROWS = 32  # minimum for fitting, selecting and measuring critics
BOUND_NAMES = {"exact": "exact", "upper": "upper bound", "lower": "lower bound", "neither": "no bound"}


@dataclass(frozen=True)
class Estimate:
    """A distance with its spread over seeds, and which side of the true value it bounds.

    Args:
        value: mean of `values`.
        std: their sample standard deviation, 0 for a single one: the effect of splits, initial weights and batches. All seeds
            share the data, so the variation over samples of the data is in `standard_error` instead.
        values: one per seed.
        seeds: seed of each value.
        bound: which side of the true value it bounds in expectation over samples: "exact"; "upper", an infimum found by training;
            "lower", a critic's supremum; "neither", both. A single value may violate it by its sampling error.
        distance: its name, such as "sinkhorn".
        convention: one line: squared or root, the cost, its parameters, and what finite samples do to it.
        family, capacity: of the generators, such as "linear maps, |W| <= 1" and 1.0; None for a plain distance of two clouds.
        counts: fitting and measuring points; points used only to select among fitted generators are in neither.
        standard_error: of one seed's value over samples of points, root mean square over the seeds; None if unknown. That of the
            mean over seeds is smaller, but not by the root of their number.
    """

    value: float
    std: float
    values: tuple[float, ...]
    seeds: tuple[int, ...]
    bound: str
    distance: str
    convention: str
    family: str | None
    capacity: float | None
    counts: tuple[int, int]
    standard_error: float | None = None

    def __post_init__(self) -> None:
        if self.bound not in BOUND_NAMES:
            raise ValueError(f"expected a bound out of {', '.join(BOUND_NAMES)}, got {self.bound!r}")
        if not self.values or len(self.values) != len(self.seeds):
            raise ValueError(f"expected one value a seed, got {len(self.values)} values and {len(self.seeds)} seeds")

    @classmethod
    def over(cls, values: Sequence[float], seeds: Sequence[int], **rest) -> Self:
        """Build from one value per seed; `rest` are the other fields but `std`, by default without a family.

        FloatingPointError: a value is not finite.
        """
        rest = {"family": None, "capacity": None} | rest
        values = tuple(float(value) for value in values)
        if not all(math.isfinite(value) for value in values):
            raise FloatingPointError(f"{rest['distance']}: expected finite values, got {values}; scale the data to unit variance")
        std = statistics.stdev(values) if len(values) > 1 else 0.0
        return cls(statistics.fmean(values), std, values, tuple(seeds), **rest)

    def to_dict(self) -> dict:
        """JSON-safe: infinity becomes a string."""
        fields = dataclasses.asdict(self)
        for name in ("values", "seeds", "counts"):
            fields[name] = list(fields[name])
        if self.capacity is not None and math.isinf(self.capacity):
            fields["capacity"] = "infinity"
        return fields

    def __str__(self) -> str:
        seeds = f"{len(self.seeds)} seed" + "s" * (len(self.seeds) != 1)
        spread, over = (f" ± {self.std:.2g}", "± over ") if len(self.seeds) > 1 else ("", "")  # none for one seed
        sampling = "not included" if self.standard_error is None else f"{self.standard_error:.2g}"
        return f"{self.value:.4g}{spread} ({BOUND_NAMES[self.bound]}; {over}{seeds}, sampling error {sampling})"


def pooled_error(errors: Sequence[float | None]) -> float | None:
    """Root mean square of the standard errors, one per seed; None if one is unknown."""
    known = [error for error in errors if error is not None]
    return math.hypot(*known) / math.sqrt(len(known)) if len(known) == len(errors) else None


def check_cloud(name: str, cloud: Tensor) -> None:
    """Check a cloud [N, ...]: a floating tensor of at least 2 finite points with at least 1 value each.

    Raises:
        TypeError: not a tensor, or not floating.
        ValueError: another shape, fewer than 2 points, NaN or infinity.
    """
    check_values(name, cloud, "a floating point tensor [N, ...]", "call .float(), of token indices one_hot first")
    if cloud.dim() < 2 or cloud[:1].numel() == 0 < len(cloud):
        raise ValueError(f"{name}: expected [N, ...] with at least one value a point, got {list(cloud.shape)}; reshape to [N, D]")
    if len(cloud) < 2:
        raise ValueError(f"{name}: expected at least 2 points, got {len(cloud)}; a distribution is not known from one point")
    bad_N = ~torch.isfinite(cloud).flatten(1).all(dim=1)
    if bad_N.any():
        raise ValueError(
            f"{name}: expected finite values, got NaN or infinity in {int(bad_N.sum())} of {len(cloud)} points, "
            f"first in point {int(bad_N.nonzero()[0])}; drop these points or mend what made them"
        )


def check_pair(latents: Tensor, data: Tensor) -> None:
    """Check latents [N, ...] and data [N, ...] for fitting a generator; rows n belong together.

    Raises:
        TypeError: not tensors, not floating, or on two devices.
        ValueError: NaN or infinity, fewer than 2 points, different numbers of points, or constant latents.
    """
    check_cloud("latents", latents)
    check_cloud("data", data)
    if len(latents) != len(data):
        raise ValueError(
            f"expected as many latents as data points, got {len(latents)} latents and {len(data)} data points; "
            "give one latent a data point, or draw as many"
        )
    if latents.device != data.device:
        raise TypeError(f"expected latents and data on one device, got {latents.device} and {data.device}; move one with .to()")
    if (latents == latents[:1]).all():
        raise ValueError(
            f"expected latents that differ, got {len(latents)} equal ones: a constant generates one point only; "
            "the encoder has collapsed, or the wrong tensor was given"
        )


def check_seeds(seeds: Sequence[int]) -> tuple[int, ...]:
    """The seeds as ints. TypeError or ValueError unless they are whole numbers, at least one, and none twice."""
    listed = hasattr(seeds, "__len__") and hasattr(seeds, "__getitem__") and not isinstance(seeds, str | bytes)
    try:
        whole = tuple(operator.index(seed) for seed in seeds) if listed else None
    except TypeError:
        whole = None
    if whole is None or any(isinstance(seed, bool) for seed in seeds):
        raise TypeError(f"expected seeds as a sequence of ints, such as (0, 1, 2), got {seeds!r}")
    if len(whole) == 0 or len(set(whole)) < len(whole):
        raise ValueError(f"expected at least one seed and none twice, got {whole}")
    return whole
