"""What every estimate of this package returns, and the checks of the latents and the data that it is made from."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn

from dae.complexity.distances import ADVERSARIAL, Distance, check_name, make_distance
from dae.complexity.families import GeneratorFamily
from dae.complexity.fitting import Fitting, Generator, Rows, fit, generate, measure, scale_ratio, seeded, split_rows
from dae.training.loop import progress_bar

PAIRS_LIMIT = 4096  # rows to measure on by a distance that compares all pairs
BOUNDS = {"exact": "exact", "upper": "upper bound", "lower": "lower bound", "neither": "no bound"}


@dataclass(frozen=True)
class Estimate:
    """A distance with its spread over seeds, and which side of the true value it bounds.

    Args:
        value: mean of `values`.
        std: their sample standard deviation; 0 of one.
        values: one a seed.
        seeds: what the randomness of each was drawn from.
        bound: which side of the true value it bounds, apart from sampling error: "exact"; "upper", an infimum found by training;
            "lower", a critic's supremum; "neither", both together.
        distance: its name, such as "sinkhorn".
        convention: one line: squared or root, the cost, its parameters, and what finite samples do to it.
        family: the generators, such as "linear maps, |W| <= 1"; None for a plain distance of two clouds.
        capacity: the family's; None without a family.
        counts: points fitted on, points measured on.
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

    def __post_init__(self) -> None:
        if self.bound not in BOUNDS:
            raise ValueError(f"expected a bound out of {', '.join(BOUNDS)}, got {self.bound!r}")
        if not self.values or len(self.values) != len(self.seeds):
            raise ValueError(f"expected one value a seed, got {len(self.values)} values and {len(self.seeds)} seeds")

    @classmethod
    def over(cls, values: Sequence[float], seeds: Sequence[int], **rest) -> Self:
        """From one value a seed; `rest` are the fields but `value` and `std`. FloatingPointError: a value is not finite."""
        values = tuple(float(value) for value in values)
        if not all(math.isfinite(value) for value in values):
            raise FloatingPointError(f"{rest['distance']}: expected finite values, got {values}; scale the data to unit variance")
        std = statistics.stdev(values) if len(values) > 1 else 0.0
        return cls(statistics.fmean(values), std, values, tuple(seeds), **rest)

    def to_dict(self) -> dict:
        """For JSON; infinity, which JSON has not, as the word."""
        fields = dataclasses.asdict(self)
        for name in ("values", "seeds", "counts"):
            fields[name] = list(fields[name])
        if self.capacity is not None and math.isinf(self.capacity):
            fields["capacity"] = "infinity"
        return fields

    def __str__(self) -> str:
        seeds = f"{len(self.seeds)} seed" + "s" * (len(self.seeds) != 1)
        spread = f" ± {self.std:.2g}" if len(self.seeds) > 1 else ""  # one seed tells none
        return f"{self.value:.4g}{spread} ({BOUNDS[self.bound]}, {seeds})"


def check_cloud(name: str, cloud: Tensor) -> None:
    """A cloud [N, ...]: a floating tensor of at least 2 finite points with at least 1 value each.

    Raises:
        TypeError: not a tensor, or not floating.
        ValueError: another shape, fewer than 2 points, NaN or infinity.
    """
    if not isinstance(cloud, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor [N, ...], got {type(cloud).__name__}; torch.as_tensor makes one")
    if not cloud.is_floating_point():
        raise TypeError(
            f"{name}: expected floating point values, got {cloud.dtype}; call .float(), of token indices one_hot first"
        )
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
    """Latents [N, ...] and data [N, ...] that a generator can be fitted from; row n of the one belongs to row n of the other.

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


@dataclass(frozen=True)
class Trial:
    """One generator, fitted with one seed: its distance on the rows to measure on, and on those to choose on (None: unknown)."""

    generator: nn.Module
    value: float
    score: float | None
    exact: bool
    convention: str
    counts: tuple[int, int]


def generator_distance(
    latents: Tensor,
    data: Tensor,
    family: GeneratorFamily,
    distance: str | Distance,
    *,
    seeds: Sequence[int] = (0, 1, 2),
    steps: int = 1000,
    batch_size: int = 256,
    learning_rate: float | None = None,
    heldout: float = 0.5,
    measure_limit: int | None = None,
    progress: bool = False,
) -> Estimate:
    """The generator-induced distance of a latent and data, over a family G of generators.

        D^G(P_z, P_x) = inf over g in G of D(P_g(z), P_x)

    For each seed the rows are split at random: g is fitted on some and D is measured on the others, so that a generator which
    knows its points by heart gains nothing. A fifth of the rows to fit on chooses among the states of the training. What
    training finds is above the infimum: an upper bound, apart from the error of finite samples, which `convention` describes.
    For linear maps the best g is computed, not trained, with "reconstruction" and "frechet"; with heldout=0, where it is
    measured on the rows that it is the best for, this is exact. An adversarial distance is a critic's supremum inside of this
    infimum, measured with a fresh critic: that bounds neither side.

    Where the distance does not pair rows (all but "reconstruction"), a latent is never measured against the data point in its
    own row: codes of an encoder bear the same error of finite samples as latents that are drawn.

    Args:
        latents: [N, ...], floating, finite.
        data: [N, ...], floating, finite; row n belongs to row n of the latents where the distance pairs them.
        family: of generators.
        distance: "reconstruction", "sliced_wasserstein", "sinkhorn", "mmd", "energy", "frechet" (see
            `dae.complexity.distances.make_distance`); "js", "kl", "reverse_kl", "chi2", "hellinger", "wgan_gp", "wgan_sn" (see
            `dae.complexity.adversarial`); or a `Distance`.
        seeds: of splits, initial weights and batches; one estimate each.
        steps, batch_size, learning_rate: of Adam; a learning rate of None is the family's own. Against a critic, the rate of the
            generator, and the critic's is half; None is `train_adversarial`'s own.
        heldout: share of the rows to measure on, in (0, 1/2]; 0 measures on the rows that were fitted on.
        measure_limit: at most so many rows are measured on. None is 4096 for "sinkhorn", "mmd" and "energy", which compare all
            pairs of points, and no limit for the others.
        progress: show a bar over the seeds.

    Raises:
        TypeError: operands that are not floating tensors, or options of another type.
        ValueError: NaN or infinity, fewer points than the split needs, constant latents, latents and data of different lengths, a
            family that cannot map these shapes, an unknown distance, or options out of range.
        FloatingPointError: a training diverged.

    Source: Hu et al. 2023, "Complexity Matters: Rethinking the Latent Space for Generative Modeling", arXiv 2307.08283.
    """
    check_pair(latents, data)
    options = Fitting(steps, batch_size, learning_rate, heldout, measure_limit)
    trials = [
        run_trial(latents, data, family, distance, seed, options) for seed in shown(check_seeds(seeds), str(family), progress)
    ]
    return summarize(trials, seeds, family, distance, options)


def fit_generator(
    latents: Tensor, data: Tensor, family: GeneratorFamily, distance: str | Distance, *, seed: int = 0, **options
) -> nn.Module:
    """The generator that `generator_distance` measures with this seed: [B, *latent_shape] -> [B, *data_shape].

    `options` are its `steps`, `batch_size`, `learning_rate`, `heldout` and `measure_limit`; so are the errors.
    """
    check_pair(latents, data)
    check_seeds((seed,))
    return run_trial(latents, data, family, distance, seed, Fitting(**options)).generator


def run_trial(
    latents: Tensor, data: Tensor, family: GeneratorFamily, distance: str | Distance, seed: int, options: Fitting
) -> Trial:
    dtype = torch.promote_types(torch.promote_types(latents.dtype, data.dtype), torch.float32)
    latents, data = latents.detach().to(dtype), data.detach().to(dtype)
    if not isinstance(distance, Distance):
        check_name(distance)
        if distance in ADVERSARIAL:
            return run_adversarial_trial(latents, data, family, distance, seed, options)
        distance = make_distance(distance, data)
    limit = options.measure_limit or (PAIRS_LIMIT if distance.pairwise else None)
    split = split_rows(latents, data, seed, distance.paired, options, limit)
    generator, best = fit(family, split, distance, seed, options)
    return Trial(
        generator=generator,
        value=measure(generator, split.measure, distance, seed),
        score=measure(generator, split.choose, distance, seed),
        exact=best and options.heldout == 0,
        convention=distance.convention,
        counts=(len(data) - round(options.heldout * len(data)), len(split.measure.data)),
    )


def run_adversarial_trial(
    latents: Tensor, data: Tensor, family: GeneratorFamily, distance: str, seed: int, options: Fitting
) -> Trial:
    """A generator trained against a critic, measured with a fresh one that has rows of its own."""
    from dae.complexity.adversarial import adversarial_distance, train_adversarial  # which imports this module

    split = split_rows(latents, data, seed, False, options, options.measure_limit)
    fitted = Rows(torch.cat([split.fit.latents, split.choose.latents]), torch.cat([split.fit.data, split.choose.data]))
    generator = Generator(nn.Identity(), fitted.latents, fitted.data)
    rates = {} if options.learning_rate is None else {"learning_rates": (options.learning_rate, options.learning_rate / 2)}
    generator.inner = train_adversarial(
        family.rescaled(scale_ratio(fitted.latents, fitted.data)),
        generator.standard_latents(fitted.latents),
        generator.standard_data(fitted.data),
        distance,
        seed=seed,
        steps=options.steps,
        batch_size=options.batch_size,
        **rates,
    )
    with seeded(data.device, seed, "measure"), torch.no_grad():
        generated = generate(generator, split.measure.latents)
    measured = adversarial_distance(split.measure.data.flatten(1), generated.flatten(1), distance, seeds=(seed,))
    return Trial(generator, measured.value, None, False, measured.convention, (len(fitted.data), len(split.measure.data)))


def summarize(
    trials: Sequence[Trial], seeds: Sequence[int], family: GeneratorFamily, distance: str | Distance, options: Fitting
) -> Estimate:
    """One trial a seed."""
    name = distance.name if isinstance(distance, Distance) else distance
    bound = "neither" if name in ADVERSARIAL else "exact" if all(trial.exact for trial in trials) else "upper"
    where = "" if options.heldout else "; measured on the rows fitted on"
    return Estimate.over(
        [trial.value for trial in trials],
        seeds,
        bound=bound,
        distance=name,
        convention=trials[0].convention + where,
        family=str(family),
        capacity=family.capacity,
        counts=trials[0].counts,
    )


def check_seeds(seeds: Sequence[int]) -> tuple[int, ...]:
    """TypeError or ValueError unless there is at least one int, and none twice."""
    if isinstance(seeds, str) or not isinstance(seeds, Sequence) or any(type(seed) is not int for seed in seeds):
        raise TypeError(f"expected seeds as a sequence of ints, such as (0, 1, 2), got {seeds!r}")
    if len(seeds) == 0 or len(set(seeds)) < len(seeds):
        raise ValueError(f"expected at least one seed and none twice, got {tuple(seeds)}")
    return tuple(seeds)


def shown(items: Sequence, description: str, progress: bool) -> Iterator:
    """The items, with a bar if wanted."""
    if not progress:
        yield from items
        return
    bar = progress_bar(len(items), 0, description)
    for item in items:
        yield item
        bar.update()
    bar.close()
