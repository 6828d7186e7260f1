"""Fitting a generator of a family to data by a distance, choosing among fitted ones, and measuring: each on rows of its own."""

from __future__ import annotations

import copy
import dataclasses
import difflib
import math
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn

from dae.complexity.distances import Distance
from dae.complexity.families import GeneratorFamily, check_count, check_positive
from dae.seeding import seed_for

CHECKS = 10  # how often in a training its state is compared with the best before
GROUPS = 10  # of rows, that a jackknife leaves out in turn
ROWS_AT_ONCE = 4096  # that a network makes, or that a distance without batches takes


@dataclass(frozen=True)
class Fitting:
    """How generators are fitted and measured.

    Args:
        steps: of Adam, at a rate that falls to 0 as a cosine.
        batch_size: rows per step.
        learning_rate: at the start; None is the family's own, for latents and data of unit scale, to which they are brought.
        heldout: share of the rows to measure on, in (0, 1/2]; 0 measures on the rows that were fitted on.
        measure_limit: at most so many rows are measured on, and chosen on; None is 4096 for a distance that compares all pairs of
            points, and no limit for the others.
    """

    steps: int = 400
    batch_size: int = 256
    learning_rate: float | None = None
    heldout: float = 0.5
    measure_limit: int | None = None

    @classmethod
    def of(cls, options: dict) -> Self:
        """From options by name. TypeError: one that there is not."""
        known = [field.name for field in dataclasses.fields(cls)]
        for name in options:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
                hint = f"did you mean {near[0]!r}? " if near else ""
                raise TypeError(f"unknown option {name!r}: {hint}known are {', '.join(known)}")
        return cls(**options)

    def __post_init__(self) -> None:
        check_count("steps", self.steps)
        limit = 2 if self.measure_limit is None else self.measure_limit
        for name, rows in (("batch_size", self.batch_size), ("measure_limit", limit)):
            check_count(name, rows)
            if rows < 2:
                raise ValueError(f"expected {name} >= 2, as one point is no cloud, got {rows}")
        if self.learning_rate is not None:
            check_positive("learning_rate", self.learning_rate)
        if isinstance(self.heldout, bool) or not isinstance(self.heldout, int | float):
            raise TypeError(f"expected heldout as a number, got {type(self.heldout).__name__}")
        if not 0 <= self.heldout <= 0.5:
            raise ValueError(f"expected heldout in [0, 0.5], a share of the rows, got {self.heldout}")


@dataclass(frozen=True)
class Rows:
    """Latents and data of one purpose."""

    latents: Tensor
    data: Tensor


@dataclass(frozen=True)
class Split:
    """Rows to fit on, to choose on (which state of a training, which capacity), and to measure on."""

    fit: Rows
    choose: Rows
    measure: Rows


def split_rows(latents: Tensor, data: Tensor, seed: int, paired: bool, options: Fitting, limit: int | None = None) -> Split:
    """The split of one seed, the same for every family and capacity; at most `limit` rows to measure on, and to choose on.

    Where the distance does not pair rows, a latent and the data point that it may be the code of never serve the same purpose
    (with heldout = 1/2; with less, never in measuring). Else codes would be measured against their own images, and be spared the
    error of finite samples that a drawn latent has to bear. With heldout = 0 all rows serve all purposes.
    """
    N = len(data)
    measured = round(options.heldout * N)
    if options.heldout and (measured < 2 or N - measured < 2):
        raise ValueError(
            f"expected at least 2 rows to fit on and 2 to measure on, got {N - measured} and {measured} of {N}; "
            "give more points, or heldout=0.5, or heldout=0 to measure on the rows fitted on"
        )
    order = torch.randperm(N, generator=torch.Generator().manual_seed(seed_for(seed, "rows")))
    z_rows, x_rows = order, order if paired else order.roll(-measured)
    choosing = min((N - measured) // 5, limit or N) if options.heldout else 0
    if choosing < 2:
        choosing = 0

    def take(start: int, end: int) -> Rows:
        return Rows(latents[z_rows[start:end].to(latents.device)], data[x_rows[start:end].to(data.device)])

    fit = take(measured + choosing, N)
    if not measured:
        part = fit if limit is None or limit >= N else take(0, limit)
        return Split(fit, choose=part, measure=part)
    choose = take(measured, measured + choosing) if choosing else fit
    return Split(fit, choose, measure=take(0, min(measured, limit or measured)))


class Generator(nn.Module):
    """A member of a family in the units of the latents and the data: g(z) = t inner((z - a) / s) + b.

    a and b are means, one a channel; s and t are scales of all values. So that one learning rate serves latents and data of any
    scale.
    """

    def __init__(self, inner: nn.Module, latents: Tensor, data: Tensor):
        super().__init__()
        self.inner = inner
        for name, cloud in (("latent", latents), ("data", data)):
            center, scale = center_and_scale(cloud)
            self.register_buffer(f"{name}_center", center)
            self.register_buffer(f"{name}_scale", scale)

    def forward(self, latents: Tensor) -> Tensor:
        return self.inner(self.standard_latents(latents)) * self.data_scale + self.data_center

    def standard_latents(self, latents: Tensor) -> Tensor:
        return (latents - self.latent_center) / self.latent_scale

    def standard_data(self, data: Tensor) -> Tensor:
        return (data - self.data_center) / self.data_scale


def center_and_scale(cloud: Tensor) -> tuple[Tensor, Tensor]:
    """Mean of each channel [1, C, 1, ...] and the root mean square deviation from it of all values []; 1 where that is 0."""
    exact = cloud.double()  # squares of small values are 0 in float32
    center = exact.mean(dim=[0, *range(2, cloud.dim())], keepdim=True)
    scale = (exact - center).square().mean().sqrt().to(cloud.dtype)
    return center.to(cloud.dtype), torch.where(scale > 0, scale, 1.0)


def scale_ratio(latents: Tensor, data: Tensor) -> float:
    return (center_and_scale(latents)[1] / center_and_scale(data)[1]).item()


@contextmanager
def seeded(device: torch.device, *names: object) -> Iterator[torch.Generator]:
    """torch's global generators seeded for `names` inside the block and as before after it; yields one more such generator."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed_for(*names))
        yield torch.Generator().manual_seed(seed_for(*names, "distance"))


def closed_form(family: GeneratorFamily, rows: Rows, distance: Distance, seed: int) -> Generator | None:
    """The best generator of the family for these rows, where the family knows it."""
    if not distance.solvable:
        return None
    generator = Generator(nn.Identity(), rows.latents, rows.data)
    with seeded(rows.data.device, seed, "fit"):
        best = family.rescaled(scale_ratio(rows.latents, rows.data)).best(
            generator.standard_latents(rows.latents), generator.standard_data(rows.data), distance.name
        )
    if best is None:
        return None
    generator.inner = best
    return generator


def fit(family: GeneratorFamily, split: Split, distance: Distance, seed: int, options: Fitting) -> tuple[Generator, bool]:
    """A generator of the family, fitted on the rows to fit on; and whether it is exactly the best for these."""
    solved = closed_form(family, split.fit, distance, seed)
    if solved is not None:
        return solved, True
    latents, data = split.fit.latents, split.fit.data
    units = family.rescaled(scale_ratio(latents, data))
    generator = Generator(nn.Identity(), latents, data)
    with seeded(data.device, seed, "fit") as randomness:
        generator.inner = units.start(generator.standard_latents(latents), generator.standard_data(data))
        train(generator, units, split, distance, randomness, seed, options)
    return generator, False


def train(
    generator: Generator,
    family: GeneratorFamily,
    split: Split,
    distance: Distance,
    randomness: torch.Generator,
    seed: int,
    options: Fitting,
) -> None:
    """Adam with a projection into the family after each step; leaves the state that was best on the rows to choose on."""
    latents, data = split.fit.latents, split.fit.data
    rows = ROWS_AT_ONCE if distance.full_batch else options.batch_size
    rate = family.learning_rate if options.learning_rate is None else options.learning_rate
    optimizer = torch.optim.Adam(generator.parameters(), lr=rate, betas=(0.9, 0.99), eps=1e-12)
    family.constrain_(generator.inner)
    best, state = measure(generator, split.choose, distance, seed), copy.deepcopy(generator.state_dict())
    for step in range(options.steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * (1 + math.cos(math.pi * step / options.steps)) / 2
        z_rows = draw(len(latents), rows, randomness).to(latents.device)
        x_rows = z_rows if distance.paired else draw(len(data), rows, randomness).to(data.device)
        loss = distance(generator(latents[z_rows]), data[x_rows], randomness)
        if not torch.isfinite(loss):
            raise FloatingPointError(
                f"{distance.name}: the loss is {loss.item()} at step {step} of fitting {family}; lower learning_rate from {rate}"
            )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        family.constrain_(generator.inner)
        if (step + 1) % -(-options.steps // CHECKS) == 0 or step + 1 == options.steps:
            score = measure(generator, split.choose, distance, seed)
            if score < best:
                best, state = score, copy.deepcopy(generator.state_dict())
    generator.load_state_dict(state)


def draw(count: int, rows: int, randomness: torch.Generator) -> Tensor:
    """Indices of `rows` of `count` points, each at most once; all if there are no more."""
    return torch.randperm(count, generator=randomness)[:rows] if count > rows else torch.arange(count)


@torch.no_grad()
def measure(generator: nn.Module, rows: Rows, distance: Distance, seed: int) -> float:
    """The distance of what it generates to the data; the same randomness for whatever is measured with this seed."""
    with seeded(rows.data.device, seed, "measure") as randomness:
        return distance(generated_by(generator, rows.latents), rows.data, randomness).item()


@torch.no_grad()
def measure_by_jackknife(generator: nn.Module, rows: Rows, distance: Distance, seed: int) -> tuple[float, float | None]:
    """As `measure`, less the bias of a distance of moments, and the standard error that comes of these rows if it is known."""
    with seeded(rows.data.device, seed, "measure"):
        made = Rows(generated_by(generator, rows.latents), rows.data)
    if distance.pairwise or len(made.data) < 2 * GROUPS:
        return measure(nn.Identity(), made, distance, seed), None
    value, corrected, error = jackknife(lambda kept: measure(nn.Identity(), kept, distance, seed), made, seed)
    return corrected if distance.of_moments else value, error


def jackknife(statistic: Callable[[Rows], float], rows: Rows, seed: int) -> tuple[float, float, float]:
    """A statistic of rows; the same less its bias of order 1 / rows, and not below 0; and its standard error.

    With s of all rows and s_j of all but those of the j-th of g random groups, and m the mean of the s_j:

        s,    max(0, g s - (g - 1) m),    root of (g - 1) / g sum_j (s_j - m)^2

    Source: Quenouille 1956, "Notes on bias in estimation"; Efron 1982, "The Jackknife, the Bootstrap and Other Resampling Plans".
    """
    N = len(rows.data)
    group_N = torch.randperm(N, generator=torch.Generator().manual_seed(seed_for(seed, "groups"))) % GROUPS
    everything = statistic(rows)
    left = []
    for group in range(GROUPS):
        kept_N = group_N != group
        left.append(statistic(Rows(rows.latents[kept_N.to(rows.latents.device)], rows.data[kept_N.to(rows.data.device)])))
    mean = statistics.fmean(left)
    error = math.sqrt((GROUPS - 1) / GROUPS * sum((value - mean) ** 2 for value in left))
    return everything, max(0.0, GROUPS * everything - (GROUPS - 1) * mean), error


def generated_by(generator: nn.Module, latents: Tensor) -> Tensor:
    return torch.cat([generator(part) for part in latents.split(ROWS_AT_ONCE)])
