"""Fit generators of a family to data by a distance, select among them, and measure, each on separate rows."""

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

from dae.complexity.critics import annealed, descend
from dae.complexity.distances import Distance
from dae.complexity.families import GeneratorFamily, check_count, check_number, check_positive
from dae.seeding import seed_for

CHECKS = 10  # checkpoint selections per training
GROUPS = 10  # of rows, left out in turn by the jackknife
ROWS_AT_ONCE = 4096  # for a network, or a full-batch distance


@dataclass(frozen=True)
class Fitting:
    """How generators are fitted and measured: the options of `generator_distance`."""

    steps: int = 400  # of Adam, with cosine decay to 0
    batch_size: int = 256
    learning_rate: float | None = None  # initial, for latents and data of unit scale; None is the family's
    heldout: float = 0.5
    measure_limit: int | None = None

    @classmethod
    def of(cls, options: dict) -> Self:
        """From options by name. TypeError: an unknown one."""
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
        check_number("heldout", self.heldout)
        if not 0 <= self.heldout <= 0.5:
            raise ValueError(f"expected heldout in [0, 0.5], a share of the rows, got {self.heldout}")


@dataclass(frozen=True)
class Rows:
    """Latents and data for one purpose."""

    latents: Tensor
    data: Tensor


@dataclass(frozen=True)
class RowSplit:
    """Rows for fitting, for selection (of checkpoints and capacities), and for measuring."""

    fit: Rows
    choose: Rows
    measure: Rows


def split_rows(latents: Tensor, data: Tensor, seed: int, paired: bool, options: Fitting, limit: int | None = None) -> RowSplit:
    """One seed's split, the same for every family and capacity; at most `limit` measuring and selection rows each.

    If the distance does not pair rows, a latent and its own data point never serve the same purpose (with heldout = 1/2; with
    less, never measuring). Otherwise codes would be compared with their own images and avoid the finite-sample error of drawn
    latents. With heldout = 0 all rows serve all purposes.
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
        return RowSplit(fit, choose=part, measure=part)
    choose = take(measured, measured + choosing) if choosing else fit
    return RowSplit(fit, choose, measure=take(0, min(measured, limit or measured)))


class Generator(nn.Module):
    """A member of a family in the units of the latents and the data: g(z) = t inner((z - a) / s) + b.

    a and b are means per channel; s and t are scales of all values, so that one learning rate suits latents and data of any
    scale. `inner` is the identity until set to a member of the family; `ratio` is s / t.
    """

    latent_center: Tensor
    latent_scale: Tensor
    data_center: Tensor
    data_scale: Tensor

    def __init__(self, latents: Tensor, data: Tensor):
        super().__init__()
        self.inner: nn.Module = nn.Identity()
        for name, cloud in (("latent", latents), ("data", data)):
            center, scale = center_and_scale(cloud)
            self.register_buffer(f"{name}_center", center)
            self.register_buffer(f"{name}_scale", scale)
        self.ratio = (self.latent_scale / self.data_scale).item()

    def forward(self, latents: Tensor) -> Tensor:
        return self.inner(self.standard_latents(latents)) * self.data_scale + self.data_center

    def standard_latents(self, latents: Tensor) -> Tensor:
        return (latents - self.latent_center) / self.latent_scale

    def standard_data(self, data: Tensor) -> Tensor:
        return (data - self.data_center) / self.data_scale


def center_and_scale(cloud: Tensor) -> tuple[Tensor, Tensor]:
    """Mean of each channel [1, C, 1, ...] and root mean square deviation of all values from it []; 1 if that is 0."""
    exact = cloud.double()  # small squares underflow in float32
    center = exact.mean(dim=[0, *range(2, cloud.dim())], keepdim=True)
    scale = (exact - center).square().mean().sqrt().to(cloud.dtype)
    return center.to(cloud.dtype), torch.where(scale > 0, scale, 1.0)


@contextmanager
def seeded(device: torch.device, *names: object) -> Iterator[torch.Generator]:
    """Seed torch's global generators by `names` inside the block and restore them after it; yields another such generator."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed_for(*names))
        yield torch.Generator().manual_seed(seed_for(*names, "distance"))


def closed_form(family: GeneratorFamily, rows: Rows, distance: Distance, seed: int) -> Generator | None:
    """The best generator of the family on these rows; None without a closed form."""
    if not distance.solvable:
        return None
    generator = Generator(rows.latents, rows.data)
    latents, data = generator.standard_latents(rows.latents), generator.standard_data(rows.data)
    with seeded(rows.data.device, seed, "fit"):
        best = family.rescaled(generator.ratio).best(latents, data, distance.name)
    if best is None:
        return None
    generator.inner = best
    return generator


def fit(family: GeneratorFamily, split: RowSplit, distance: Distance, seed: int, options: Fitting) -> tuple[Generator, bool]:
    """A generator fitted on the fitting rows, and whether it is exactly optimal on them.

    Without a closed form it is trained by Adam with a projection into the family after each step, and the checkpoint that is
    best on the selection rows is kept.
    """
    solved = closed_form(family, split.fit, distance, seed)
    if solved is not None:
        return solved, True
    latents, data = split.fit.latents, split.fit.data
    generator = Generator(latents, data)
    units = family.rescaled(generator.ratio)
    with seeded(data.device, seed, "fit") as randomness:
        generator.inner = units.start(generator.standard_latents(latents), generator.standard_data(data))
        rows = ROWS_AT_ONCE if distance.full_batch else options.batch_size
        rate = units.learning_rate if options.learning_rate is None else options.learning_rate
        optimizer = torch.optim.Adam(generator.parameters(), lr=rate, betas=(0.9, 0.99), eps=1e-12)
        schedule = annealed(optimizer, options.steps)
        units.constrain_(generator.inner)
        best, state = measure(generator, split.choose, distance, seed), copy.deepcopy(generator.state_dict())
        for step in range(options.steps):
            z_rows = batch_rows(len(latents), rows, randomness).to(latents.device)
            x_rows = z_rows if distance.paired else batch_rows(len(data), rows, randomness).to(data.device)
            loss = distance(generator(latents[z_rows]), data[x_rows], randomness)
            if not torch.isfinite(loss):
                raise FloatingPointError(
                    f"{distance.name}: the loss is {loss.item()} at step {step} of fitting {units}; "
                    f"lower learning_rate from {rate}"
                )
            descend(optimizer, loss, schedule)
            units.constrain_(generator.inner)
            if (step + 1) % -(-options.steps // CHECKS) == 0 or step + 1 == options.steps:
                score = measure(generator, split.choose, distance, seed)
                if score < best:
                    best, state = score, copy.deepcopy(generator.state_dict())
        generator.load_state_dict(state)
    return generator, False


def batch_rows(count: int, rows: int, randomness: torch.Generator) -> Tensor:
    """Indices of `rows` of `count` points without replacement; all if there are no more."""
    return torch.randperm(count, generator=randomness)[:rows] if count > rows else torch.arange(count)


@torch.no_grad()
def measure(generator: nn.Module, rows: Rows, distance: Distance, seed: int) -> float:
    """Distance of generated points to the data; equal seeds use the same randomness."""
    with seeded(rows.data.device, seed, "measure") as randomness:
        return distance(generated_by(generator, rows.latents), rows.data, randomness).item()


@torch.no_grad()
def measure_by_jackknife(generator: nn.Module, rows: Rows, distance: Distance, seed: int) -> tuple[float, float | None]:
    """As `measure`, with the bias of a distance of moments removed; and the standard error over rows, None if unknown."""
    with seeded(rows.data.device, seed, "measure"):
        made = Rows(generated_by(generator, rows.latents), rows.data)
    if distance.pairwise or len(made.data) < 2 * GROUPS:
        return measure(nn.Identity(), made, distance, seed), None
    value, corrected, error = jackknife(lambda kept: measure(nn.Identity(), kept, distance, seed), made, seed)
    return corrected if distance.of_moments else value, error


def jackknife(statistic: Callable[[Rows], float], rows: Rows, seed: int) -> tuple[float, float, float]:
    """A statistic of rows; the same without its bias of order 1 / rows, at least 0; and its standard error.

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
