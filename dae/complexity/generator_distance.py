"""The generator-induced distance D^G: fit generators of a family, and measure them on rows that none was fitted or chosen on."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dae.complexity.adversarial import adversarial_distance, train_adversarial
from dae.complexity.distances import ADVERSARIAL, Distance, check_name, make_distance
from dae.complexity.estimate import CRITIC_ROWS, Estimate, check_pair, check_seeds, pooled_error
from dae.complexity.families import GeneratorFamily, check_family
from dae.complexity.fitting import (
    Fitting,
    Generator,
    Rows,
    Split,
    closed_form,
    fit,
    generated_by,
    jackknife,
    measure,
    measure_by_jackknife,
    scale_ratio,
    seeded,
    split_rows,
)
from dae.precision import own_arithmetic
from dae.progress import progress_bar

PAIRS_LIMIT = 4096  # rows to measure on, and to choose on, by a distance that compares all pairs


@dataclass(frozen=True)
class Trial:
    """One generator, fitted with one seed: its distance on the rows to measure on, and on those to choose on (None: unknown).

    `error` is the standard error of the value (None: unknown).
    """

    generator: nn.Module
    value: float
    score: float | None
    exact: bool
    convention: str
    counts: tuple[int, int]
    error: float | None = None


@own_arithmetic(gradients=True)
def generator_distance(
    latents: Tensor,
    data: Tensor,
    family: GeneratorFamily,
    distance: str | Distance,
    *,
    seeds: Sequence[int] = (0, 1, 2),
    steps: int = 400,
    batch_size: int = 256,
    learning_rate: float | None = None,
    heldout: float = 0.5,
    measure_limit: int | None = None,
    progress: bool = False,
) -> Estimate:
    """The generator-induced distance of a latent and data, over a family G of generators.

        D^G(P_z, P_x) = inf over g in G of D(P_g(z), P_x)

    For each seed the rows are split at random: g is fitted on some and D is measured on the others, so that memorising does
    not help; 20 % of the fitting rows select the checkpoint. What training finds is above the infimum: an upper bound, apart from
    the error of finite samples, which `convention` describes. For linear maps the best g is computed, not trained, with
    "reconstruction" and "frechet".

    "frechet" uses means and covariances only, so there is nothing to memorise: for linear maps these moments
    are taken from all rows, whatever `heldout` > 0, and a jackknife removes the bias of order 1/N and tells the standard error.
    What is left is sampling error, so the bound is "exact". For other families the jackknife is over the held-out rows. Measured
    on Gaussians whose variances are (9, 5, 3, 2, 1, 0.6, 0.3, 0.1), with the first 2, 4 or 6 as latent and |W| <= 1: the mean of
    40 samples is at most 0.5 % off at N = 1000 and 0.2 % at 4000, and one sample deviates by 2 to 5 % and by 1 to 2 %.

    heldout=0 means the empirical laws of the rows as they are: for these, computed maps are exact and the rest is an upper bound,
    but both are too small for the laws that the rows were drawn from. There, codes are measured against their own rows too.

    An adversarial distance is a critic's supremum inside of this infimum, measured with a fresh critic: that bounds neither side.
    Where a generator makes points of a lower dimension than the data have, the true f-divergences are at their greatest, log 2 of
    "js", whatever g is. A critic of finite samples finds less the nearer the points lie, so that a curve may fall where the truth
    is flat.

    Where the distance does not pair rows (all but "reconstruction"), with heldout > 0 a latent is never measured against the data
    point in its own row: codes of an encoder bear the same error of finite samples as latents that are drawn.

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
        measure_limit: at most so many rows are measured on, and as many chosen on. None is 4096 for "sinkhorn", "mmd" and
            "energy", which compare all pairs of points, and no limit for the others. Not used where moments of all rows are.
        progress: show a bar over the seeds.

    Raises:
        TypeError: operands that are not floating tensors, or options of another type.
        ValueError: NaN or infinity, fewer points than the split needs, constant latents, latents and data of different lengths, a
            family that cannot map these shapes, an unknown distance, or options out of range.
        FloatingPointError: a training diverged.

    Time at these defaults, of N = 1000 points of 16 values from latents of 4 by linear maps, on one CPU core: "frechet" and
    "reconstruction" below 1 s, which are computed; "energy" 7 s, "mmd" 11 s, "sliced_wasserstein" and "sinkhorn" 13 s, "js" 11 s,
    "wgan_sn" and "wgan_gp" 23 s. It grows with `steps`, which 1000 instead of 300 bettered by less than the spread of seeds but
    for Lipschitz networks ("energy", two modes: 0.24 instead of 0.30); `progress=True` shows a bar.

    Source: Hu et al. 2023, "Complexity Matters: Rethinking the Latent Space for Generative Modeling", arXiv 2307.08283.
    """
    check_pair(latents, data)
    check_family("family", family)
    options = Fitting(steps, batch_size, learning_rate, heldout, measure_limit)
    seeds = check_seeds(seeds)
    trials = [fit_trial(latents, data, family, distance, seed, options) for seed in with_progress(seeds, str(family), progress)]
    return summarize(trials, seeds, family, distance)


@own_arithmetic(gradients=True)
def fit_generator(
    latents: Tensor, data: Tensor, family: GeneratorFamily, distance: str | Distance, *, seed: int = 0, **options
) -> nn.Module:
    """The generator that `generator_distance` measures with this seed: [B, *latent_shape] -> [B, *data_shape].

    `options` are its `steps`, `batch_size`, `learning_rate`, `heldout` and `measure_limit`; so are the errors.
    """
    check_pair(latents, data)
    check_family("family", family)
    check_seeds((seed,))
    return fit_trial(latents, data, family, distance, seed, Fitting.of(options)).generator


def fit_trial(
    latents: Tensor, data: Tensor, family: GeneratorFamily, distance: str | Distance, seed: int, options: Fitting
) -> Trial:
    dtype = torch.promote_types(torch.promote_types(latents.dtype, data.dtype), torch.float32)
    latents, data = latents.detach().to(dtype), data.detach().to(dtype)
    for role, cloud in (("latents", latents), ("data", data)):
        check_range(role, cloud)
    if not isinstance(distance, Distance):
        check_name(distance)
        if distance in ADVERSARIAL:
            return run_adversarial_trial(latents, data, family, distance, seed, options)
        distance = make_distance(distance, data)
    if distance.of_moments and options.heldout:
        trial = trial_by_moments(latents, data, family, distance, seed)
        if trial is not None:
            return trial
    limit = options.measure_limit or (PAIRS_LIMIT if distance.pairwise else None)
    split = split_rows(latents, data, seed, distance.paired, options, limit)
    generator, best = fit(family, split, distance, seed, options)
    if options.heldout:
        value, error = measure_by_jackknife(generator, split.measure, distance, seed)
        where = "; a jackknife of the held-out rows removed the bias of order 1/n" * distance.of_moments
    else:
        value, error = measure(generator, split.measure, distance, seed), None
        where = "; of the empirical laws: measured on the rows fitted on, too small for the laws they were drawn from"
    return Trial(
        generator=generator,
        value=value,
        score=measure(generator, split.choose, distance, seed),
        exact=best and split.measure is split.fit,
        convention=distance.convention + where,
        counts=(len(split.fit.data), len(split.measure.data)),
        error=error,
    )


def check_range(name: str, cloud: Tensor) -> None:
    """ValueError where squared distances between points could overflow."""
    largest, limit = cloud.abs().max().item(), math.sqrt(torch.finfo(cloud.dtype).max / cloud[0].numel()) / 4
    if largest > limit:
        raise ValueError(
            f"{name}: expected values up to {limit:.1e}, as squared distances overflow {cloud.dtype} beyond, got {largest:.1e}; "
            "divide by their scale, or call .double()"
        )


def trial_by_moments(latents: Tensor, data: Tensor, family: GeneratorFamily, distance: Distance, seed: int) -> Trial | None:
    """The least distance over the family from the moments of all rows, less its bias; None where the family does not know it."""
    rows = Rows(latents, data)
    generator = closed_form(family, rows, distance, seed)
    if generator is None:
        return None

    def least(rows: Rows) -> float:
        return measure(closed_form(family, rows, distance, seed), rows, distance, seed)

    _, value, error = jackknife(least, rows, seed)
    where = "; of the moments of all rows, a jackknife removed the bias of order 1/N"
    return Trial(generator, value, value, True, distance.convention + where, (len(data), len(data)), error)


def run_adversarial_trial(
    latents: Tensor, data: Tensor, family: GeneratorFamily, distance: str, seed: int, options: Fitting
) -> Trial:
    """A generator trained against a critic, measured with a fresh one that has rows of its own."""

    split = split_rows(latents, data, seed, False, options, options.measure_limit)
    check_critic_rows(distance, len(data), split, options)
    parts = (split.fit, split.choose) if options.heldout else (split.fit,)
    fitted = Rows(torch.cat([part.latents for part in parts]), torch.cat([part.data for part in parts]))
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
        generated = generated_by(generator, split.measure.latents)
    measured = adversarial_distance(split.measure.data.flatten(1), generated.flatten(1), distance, seeds=(seed,))
    where = (
        "; a critic's supremum in an infimum: may fall where the truth is flat, as for points of lower dimension than the data"
    )
    where += "" if options.heldout else "; measured on the rows fitted on"
    counts = len(fitted.data), len(split.measure.data)
    return Trial(generator, measured.value, None, False, measured.convention + where, counts, measured.standard_error)


def check_critic_rows(distance: str, N: int, split: Split, options: Fitting) -> None:
    """ValueError, before anything is trained, where there are too few rows for critics."""
    measured = len(split.measure.data)
    fitted = N if not options.heldout else N - round(options.heldout * N)
    if min(fitted, measured) < CRITIC_ROWS:
        limited = f", measure_limit={options.measure_limit}" if options.measure_limit else ""
        raise ValueError(
            f"{distance}: expected at least {CRITIC_ROWS} rows to fit on and as many to measure on, for critics of their own, "
            f"got {fitted} and {measured} of N={N} with heldout={options.heldout}{limited}; give more rows "
            f"(N >= {2 * CRITIC_ROWS} with heldout=0.5 and no measure_limit), or take a distance without a critic (sinkhorn)"
        )


def summarize(trials: Sequence[Trial], seeds: Sequence[int], family: GeneratorFamily, distance: str | Distance) -> Estimate:
    """One trial a seed."""
    name = distance.name if isinstance(distance, Distance) else distance
    bound = "neither" if name in ADVERSARIAL else "exact" if all(trial.exact for trial in trials) else "upper"
    return Estimate.over(
        [trial.value for trial in trials],
        seeds,
        bound=bound,
        distance=name,
        convention=trials[0].convention,
        family=str(family),
        capacity=family.capacity,
        counts=trials[0].counts,
        standard_error=pooled_error([trial.error for trial in trials]),
    )


def with_progress(items: Sequence, description: str, progress: bool) -> Iterator:
    """The items, with a bar if wanted."""
    if not progress:
        yield from items
        return
    bar = progress_bar(len(items), 0, description)
    for item in items:
        yield item
        bar.update()
    bar.close()
