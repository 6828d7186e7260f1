"""The generator-induced distance D^G: fit generators of a family and measure them on held-out rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from dae.complexity import fitting
from dae.complexity.adversarial import adversarial_distance, train_adversarial
from dae.complexity.distances import ADVERSARIAL, Distance, check_name, make_distance
from dae.complexity.estimate import CRITIC_ROWS, Estimate, check_pair, check_seeds, pooled_error
from dae.complexity.families import GeneratorFamily, check_family
from dae.complexity.fitting import Fitting, Generator, Rows, measure, split_rows
from dae.precision import own_arithmetic
from dae.progress import with_progress

PAIRS_LIMIT = 4096  # measuring rows, and selection rows, for a distance over all pairs


@dataclass(frozen=True)
class Trial:
    """One generator, fitted with one seed."""

    generator: nn.Module
    value: float  # its distance on the measuring rows
    score: float | None  # on the selection rows; None if unknown
    exact: bool
    convention: str
    counts: tuple[int, int]
    error: float | None = None  # standard error of the value


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
    """The generator-induced distance between a latent and data, over a family G of generators.

        D^G(P_z, P_x) = inf over g in G of D(P_g(z), P_x)

    Per seed the rows are split at random: g is fitted on some and D is measured on the others, so that memorising does not help;
    20 % of the fitting rows select the checkpoint. Training finds an upper bound of the infimum, apart from the finite-sample
    error, which `convention` describes. With "reconstruction" and "frechet" the best linear map is computed.

    "frechet" uses means and covariances only: for linear maps these are taken from all rows, whatever `heldout` > 0, and a
    jackknife removes the bias of order 1/N and gives the standard error, so the bound is "exact". For other families the
    jackknife is over the held-out rows.

    heldout=0 takes the rows as empirical distributions: for these, computed maps are exact and trained ones an upper bound, but
    both are too small for the underlying distributions.

    An adversarial distance is a critic's supremum inside this infimum, measured with a fresh critic: it bounds neither side.
    If generated points have a lower dimension than the data, the true f-divergences are maximal for every g (log 2 for "js"), but
    a critic on finite samples finds less the closer the points are: a curve may decrease where the truth is constant.

    Unless the distance pairs rows ("reconstruction"), with heldout > 0 a latent is never measured against the data point of its
    own row, so that codes of an encoder have the same finite-sample error as drawn latents.

    Args:
        latents: [N, ...], floating, finite.
        data: [N, ...], floating, finite; row n belongs to row n of the latents if the distance pairs them.
        family: of generators.
        distance: "reconstruction", "sliced_wasserstein", "sinkhorn", "mmd", "energy", "frechet" (see
            `dae.complexity.distances.make_distance`); "js", "kl", "reverse_kl", "chi2", "hellinger", "wgan_gp", "wgan_sn" (see
            `dae.complexity.adversarial`); or a `Distance`.
        seeds: for splits, initial weights and batches; one value each.
        steps, batch_size, learning_rate: for Adam; a learning rate of None is the family's. With a critic, the generator's rate,
            and the critic's is half of it; None is the default of `train_adversarial`.
        heldout: share of measuring rows, in (0, 1/2]; 0 measures on the fitting rows.
        measure_limit: maximum of measuring rows, and of selection rows. None is 4096 for "sinkhorn", "mmd" and "energy", which
            compare all pairs of points, and no limit for the others. Not used with moments of all rows.
        progress: show a bar over the seeds.

    Raises:
        TypeError: operands that are not floating tensors, or options of another type.
        ValueError: NaN or infinity, fewer points than the split needs, constant latents, latents and data of different lengths, a
            family that cannot map these shapes, an unknown distance, or options out of range.
        FloatingPointError: a training diverged.

    docs/latents.md has times and sampling errors.

    Source: Hu et al. 2023, "Complexity Matters: Rethinking the Latent Space for Generative Modeling", arXiv 2307.08283.
    """
    check_pair(latents, data)
    check_family("family", family)
    options = Fitting(steps, batch_size, learning_rate, heldout, measure_limit)
    seeds = check_seeds(seeds)
    trials = [fit_trial(latents, data, family, distance, seed, options) for seed in with_progress(seeds, str(family), progress)]
    return estimate_of(trials, seeds, family, distance)


@own_arithmetic(gradients=True)
def fit_generator(
    latents: Tensor, data: Tensor, family: GeneratorFamily, distance: str | Distance, *, seed: int = 0, **options
) -> nn.Module:
    """The generator measured by `generator_distance` with this seed: [B, *latent_shape] -> [B, *data_shape].

    `options` are its `steps`, `batch_size`, `learning_rate`, `heldout` and `measure_limit`; errors as there.
    """
    check_pair(latents, data)
    check_family("family", family)
    check_seeds((seed,))
    return fit_trial(latents, data, family, distance, seed, Fitting.of(options)).generator


def fit_trial(
    latents: Tensor, data: Tensor, family: GeneratorFamily, distance: str | Distance, seed: int, options: Fitting
) -> Trial:
    """As `generator_distance`, with one seed. ValueError: also where squared distances between points could overflow."""
    dtype = torch.promote_types(torch.promote_types(latents.dtype, data.dtype), torch.float32)
    latents, data = latents.detach().to(dtype), data.detach().to(dtype)
    for role, cloud in (("latents", latents), ("data", data)):
        largest, most = cloud.abs().max().item(), math.sqrt(torch.finfo(dtype).max / cloud[0].numel()) / 4
        if largest > most:
            raise ValueError(
                f"{role}: expected values up to {most:.1e}, as squared distances overflow {dtype} beyond, got {largest:.1e}; "
                "divide by their scale, or call .double()"
            )
    if isinstance(distance, Distance):
        chosen = distance
    else:
        check_name(distance)
        if distance in ADVERSARIAL:
            return run_adversarial_trial(latents, data, family, distance, seed, options)
        chosen = make_distance(distance, data)
    if chosen.of_moments and options.heldout and (trial := trial_by_moments(latents, data, family, chosen, seed)):
        return trial
    limit = options.measure_limit or (PAIRS_LIMIT if chosen.pairwise else None)
    split = split_rows(latents, data, seed, chosen.paired, options, limit)
    generator, best = fitting.fit(family, split, chosen, seed, options)
    if options.heldout:
        value, error = fitting.measure_by_jackknife(generator, split.measure, chosen, seed)
        where = "; a jackknife of the held-out rows removed the bias of order 1/n" * chosen.of_moments
    else:
        value, error = measure(generator, split.measure, chosen, seed), None
        where = "; of the empirical laws: measured on the rows fitted on, too small for the laws they were drawn from"
    score, exact = measure(generator, split.choose, chosen, seed), best and split.measure is split.fit
    counts = len(split.fit.data), len(split.measure.data)
    return Trial(generator, value, score, exact, chosen.convention + where, counts, error)


def trial_by_moments(latents: Tensor, data: Tensor, family: GeneratorFamily, distance: Distance, seed: int) -> Trial | None:
    """The smallest distance over the family by the moments of all rows, bias removed; None without a closed form."""
    rows = Rows(latents, data)
    generator = fitting.closed_form(family, rows, distance, seed)
    if generator is None:
        return None

    def minimum(rows: Rows) -> float:
        return measure(cast(Generator, fitting.closed_form(family, rows, distance, seed)), rows, distance, seed)

    _, value, error = fitting.jackknife(minimum, rows, seed)
    where = "; of the moments of all rows, a jackknife removed the bias of order 1/N"
    return Trial(generator, value, value, True, distance.convention + where, (len(data), len(data)), error)


def run_adversarial_trial(
    latents: Tensor, data: Tensor, family: GeneratorFamily, distance: str, seed: int, options: Fitting
) -> Trial:
    """Train a generator against a critic and measure it with a fresh one on other rows."""
    split = split_rows(latents, data, seed, False, options, options.measure_limit)
    N, measured_on = len(data), len(split.measure.data)
    fitted_on = N - round(options.heldout * N)
    if min(fitted_on, measured_on) < CRITIC_ROWS:
        limited = f", measure_limit={options.measure_limit}" if options.measure_limit else ""
        raise ValueError(
            f"{distance}: expected at least {CRITIC_ROWS} rows to fit on and as many to measure on, for critics of their own, "
            f"got {fitted_on} and {measured_on} of N={N} with heldout={options.heldout}{limited}; give more rows "
            f"(N >= {2 * CRITIC_ROWS} with heldout=0.5 and no measure_limit), or take a distance without a critic (sinkhorn)"
        )
    parts = (split.fit, split.choose) if options.heldout else (split.fit,)
    fitted = Rows(torch.cat([part.latents for part in parts]), torch.cat([part.data for part in parts]))
    generator = Generator(fitted.latents, fitted.data)
    rate = options.learning_rate
    rates: dict[str, Any] = {} if rate is None else {"learning_rates": (rate, rate / 2)}
    standard = generator.standard_latents(fitted.latents), generator.standard_data(fitted.data)
    settings = {"seed": seed, "steps": options.steps, "batch_size": options.batch_size, **rates}
    generator.inner = train_adversarial(family.rescaled(generator.ratio), *standard, distance, **settings)
    with fitting.seeded(data.device, seed, "measure"), torch.no_grad():
        generated = fitting.generated_by(generator, split.measure.latents)
    measured = adversarial_distance(split.measure.data.flatten(1), generated.flatten(1), distance, seeds=(seed,))
    note = "; a critic's supremum in an infimum: may fall where the truth is flat, as for points of lower dimension than the data"
    note += "" if options.heldout else "; measured on the rows fitted on"
    counts = len(fitted.data), measured_on
    return Trial(generator, measured.value, None, False, measured.convention + note, counts, measured.standard_error)


def estimate_of(trials: Sequence[Trial], seeds: Sequence[int], family: GeneratorFamily, distance: str | Distance) -> Estimate:
    """The estimate of one trial per seed."""
    name = distance.name if isinstance(distance, Distance) else distance
    bound = "neither" if name in ADVERSARIAL else "exact" if all(trial.exact for trial in trials) else "upper"
    values, errors = [trial.value for trial in trials], [trial.error for trial in trials]
    facts = {"convention": trials[0].convention, "counts": trials[0].counts, "standard_error": pooled_error(errors)}
    return Estimate.over(values, seeds, bound=bound, distance=name, family=str(family), capacity=family.capacity, **facts)
