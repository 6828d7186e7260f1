"""Statistics of a comparison: intervals, paired differences, differences at equal rate, predictors."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from typing import Hashable, Mapping, Sequence

from dae.comparison.arms import arm_config, parse_arms
from dae.comparison.jobs import Outcome, name_of, own_rate
from dae.config import Config
from dae.data.sources import source_title
from dae.diagnostics.ranking import rank_predictors
from dae.diagnostics.report_card import PREDICTORS
from dae.priors import prior_family
from dae.statistics import difference_at_equal_rate, holm, mean_interval, paired_p_value, rank_correlation
from dae.training import Stage, plan_stages

LEVEL = 0.95


@dataclass(frozen=True)
class Measure:
    """A measured quantity of a trial. `better` is -1 if lower is better, 1 if higher is, 0 if neither."""

    key: str
    name: str
    better: int
    digits: int = 2
    unit: str = ""
    minimum: float = -math.inf  # possible range, to which intervals are clipped
    maximum: float = math.inf


MEASURES = (
    Measure("frechet", "generation distance", -1, minimum=0),
    Measure("bits", "bits per image under the prior", 0, 1),  # a smaller latent has fewer without being better
    Measure("rate_bits", "rate, bits per image", 0, 1, minimum=0),
    Measure("psnr", "PSNR of reconstructions", 1, 2, "dB"),
    Measure("ssim", "SSIM of reconstructions", 1, 3, minimum=-1, maximum=1),
    Measure("reconstruction_frechet", "distance of reconstructions", -1, minimum=0),
    Measure("memorised", "near-copies of training images", -1, 1, "%", 0, 1),
    Measure("recognised", "samples recognised as their class", 1, 1, "%", 0, 1),
    Measure("precision", "precision", 1, 3, minimum=0, maximum=1),
    Measure("recall", "recall", 1, 3, minimum=0, maximum=1),
    Measure("perplexity", "perplexity of the codebook", 0, 1, minimum=1),
)
BY_KEY = {measure.key: measure for measure in MEASURES}
DETAILS = ("bits", "psnr")  # reported for a difference beside the distance
Trials = Mapping[str, Sequence[Outcome]]  # by arm, at the configuration's own rate
Pairs = dict[Hashable, tuple[float, float]]  # by seed: an arm's value and the baseline's


def summarize_comparison(config: Config, facts: dict, outcomes: Sequence[Outcome]) -> dict:
    """All results of a comparison, JSON-able.

    Differences are arm minus baseline, seed by seed, at the configuration's own rate ("equal steps"), and against the
    baseline's frontier of the same seed at the arm's rate ("equal rate"). Decoupled arms are also compared with an arm that
    trains its encoder for as many steps and then finetunes its decoder ("equal encoder steps"). Trials that diverged or failed
    have no value: their pairs are missing from the intervals, and they are listed.

    Args:
        config: of the comparison.
        facts: of its `Bench`.
        outcomes: of its trials, tuning and measuring.

    Raises:
        ValueError: no trial, or none of the baseline, has a result.
    """
    compare, outcomes = config.compare, [_settled(o) for o in outcomes]
    plans = {arm.name: plan_stages(arm_config(config, arm)) for arm in parse_arms(compare)}
    tuning, measured = ([o for o in outcomes if o.job.purpose == purpose] for purpose in ("tune", "measure"))
    names = list(dict.fromkeys(o.job.arm for o in outcomes))
    own = {name: [o for o in measured if o.job.arm == name and o.job.rate is None] for name in names}
    lost = [o for o in outcomes if o.record is None]
    if not any(o.record for o in own.get(compare.baseline, [])):
        troubles = "; ".join(f"{name_of(o.job)}: {o.failed or o.diverged}" for o in lost)
        raise ValueError(
            f"no trial of the baseline {compare.baseline!r} has a result, so there is nothing to compare with"
            + (f" ({troubles})" if troubles else "")
        )
    others = [name for name in names if name != compare.baseline]
    adversarial = ["gan"] if config.stage2.loss.adversarial else []
    summary = {
        "data": source_title(config.data),
        "latent_type": " + ".join([config.autoencoder.bottleneck, prior_family(config).name, *adversarial]),
        "baseline": compare.baseline,
        "seeds": compare.seeds,
        "level": LEVEL,
        "facts": facts,
        "tuning": _tuning(config, tuning),
        "arms": [_arm(name, own[name], plans[name]) for name in names],
        "differences": {m.key: _differences(m, own, compare.baseline, others) for m in MEASURES},
        "equal_rate": _equal_rate(config, measured, own, others),
        "equal_encoder": _equal_encoder(own, others, plans),
        "frontier": [_point(config, o) for o in measured if o.record],
        "prior_sizes": _prior_sizes(own),
        "predictors": _predictors(measured),
        "trials": {"planned": len(outcomes), "finished": len(outcomes) - len(lost)},
        "seconds": sum(o.record.get("seconds", 0.0) for o in outcomes if o.record),
        "left_out": [
            {"trial": name_of(o.job), "arm": o.job.arm, "seed": o.job.seed, "kind": "diverged" if o.diverged else "failed",
             "why": o.diverged or o.failed}
            for o in lost
        ],
    }  # fmt: skip
    return json.loads(json.dumps(summary), parse_constant=lambda _: None)  # NaN is None


def _settled(outcome: Outcome) -> Outcome:
    """Count a trial whose samples have no finite distance as diverged, so that none of its numbers is used."""
    if outcome.record is None or outcome.distance is not None:
        return outcome
    return replace(outcome, record=None, diverged="the generation distance of its samples is not finite")


def value_of(measure: Measure, outcome: Outcome) -> float | None:
    """A measure of a trial, its main prior or its codebook; None if missing or not finite."""
    record = outcome.record or {"priors": [{}]}
    value = (record | record["priors"][0] | (record.get("codebook") or {})).get(measure.key)
    return float(value) if value is not None and math.isfinite(value) else None


def _by_seed(measure: Measure, outcomes: Sequence[Outcome]) -> dict[int, float]:
    return {o.job.seed: value for o in outcomes if (value := value_of(measure, o)) is not None}


def _tuning(config: Config, tuning: Sequence[Outcome]) -> dict | None:
    if not tuning:
        return None
    trials = [
        {"arm": o.job.arm, "learning_rate": o.job.learning_rate, "prior_learning_rate": o.job.prior_learning_rate}
        | {"frechet": o.distance, "diverged": o.diverged, "failed": o.failed}
        for o in tuning
    ]
    rates = {key: getattr(config.compare, key) for key in ("learning_rates", "prior_learning_rates")}
    return {"seed": config.compare.tuning_seed, **rates, "trials": trials}


def _decoupled(plan: Sequence[Stage]) -> bool:
    """Whether a new decoder is trained on a latent trained with another decoder."""
    return any(stage.latent_frozen and not stage.keeps_decoder for stage in plan)


def _finetunes(plan: Sequence[Stage]) -> bool:
    """Whether the decoder that the encoder was trained with, and no weaker form of it, goes on alone."""
    return any(stage.latent_frozen and stage.keeps_decoder and stage.decoder == plan[0].decoder for stage in plan)


def _encoder_steps(plan: Sequence[Stage]) -> int:
    return sum(stage.config.max_train_steps for stage in plan if not stage.latent_frozen)


def _arm(name: str, outcomes: Sequence[Outcome], plan: Sequence[Stage]) -> dict:
    values = {m.key: [v for o in outcomes if (v := value_of(m, o)) is not None] for m in MEASURES}
    new = max((i for i, stage in enumerate(plan) if not stage.keeps_decoder), default=0)  # where the last decoder starts
    return {
        "name": name,
        "learning_rate": outcomes[0].job.learning_rate if outcomes else None,
        "prior_learning_rate": outcomes[0].job.prior_learning_rate if outcomes else None,
        "stages": next((o.record["stages"] for o in outcomes if o.record), None),
        "decoupled": _decoupled(plan),
        "decoder": plan[-1].decoder.family,
        "encoder_steps": _encoder_steps(plan),
        "decoder_steps": sum(stage.config.max_train_steps for stage in plan[new:]),
        "trials": len(outcomes),
        "finished": sum(o.record is not None for o in outcomes),
        "diverged": sum(o.diverged is not None for o in outcomes),
        "failed": sum(o.failed is not None for o in outcomes),
        "measures": {m.key: _mean(values[m.key], m.minimum, m.maximum) for m in MEASURES},
        "values": values,
    }


def _mean(values: Sequence[float], minimum: float, maximum: float) -> dict | None:
    """Student's interval, clipped to the possible range, which that of few shares can exceed; None without values."""
    if not values:
        return None
    interval = mean_interval(values, LEVEL)
    row = interval._asdict() | {"verdict": interval.verdict}
    return row if interval.low is None else row | {"low": max(row["low"], minimum), "high": min(row["high"], maximum)}


def _differences(measure: Measure, own: Trials, baseline: str, arms: Sequence[str]) -> dict:
    """Paired differences to the baseline, per arm with a result."""
    theirs = _by_seed(measure, own[baseline])
    pairs: dict[str, Pairs] = {}
    for name in arms:
        ours = _by_seed(measure, own[name])
        if shared := [seed for seed in ours if seed in theirs]:
            pairs[name] = {seed: (ours[seed], theirs[seed]) for seed in shared}
    return _tested(measure, pairs, own)


def _tested(measure: Measure, pairs: Mapping[str, Pairs], own: Trials) -> dict[str, dict]:
    """Per arm the paired differences, their interval, p, and p after Holm's adjustment for the number of arms.

    Only the adjusted p decides whether a difference is shown; `verdict` is 0 if it is not.
    """
    found, width = {}, measure.maximum - measure.minimum
    for name, by_seed in pairs.items():
        ours, theirs = [x for x, _ in by_seed.values()], [y for _, y in by_seed.values()]
        differences = [x - y for x, y in by_seed.values()]
        row = _mean(differences, -width, width) or {"mean": None, "low": None, "high": None, "n": 0, "verdict": 0}
        row |= {"values": differences, "seeds": list(by_seed), "of": len(own[name])}
        found[name] = row | {"p": paired_p_value(ours, theirs) if len(ours) > 1 else None, "baseline": theirs}
    tested = [row for row in found.values() if row["p"] is not None]
    for row, p in zip(tested, holm([row["p"] for row in tested]), strict=True):
        row |= {"adjusted": p, "alone": row["verdict"], "verdict": row["verdict"] * (p < 1 - LEVEL)}
    return found


def _equal_encoder(own: Trials, others: Sequence[str], plans: Mapping[str, Sequence[Stage]]) -> dict | None:
    """Decoupled arms minus an arm with as many encoder steps that finetunes its decoder; None without such arms."""
    for base in others:
        steps = _encoder_steps(plans[base])
        arms = [name for name in others if _decoupled(plans[name]) and _encoder_steps(plans[name]) == steps]
        if arms and _finetunes(plans[base]):
            found = {key: _differences(BY_KEY[key], own, base, arms) for key in ("frechet", *DETAILS)}
            return {"baseline": base, "steps": steps} | found
    return None


def _equal_rate(config: Config, measured: Sequence[Outcome], own: Trials, others: Sequence[str]) -> dict | None:
    """Per measure and other arm the differences to the baseline's frontier; None if no frontier was trained."""
    if not config.compare.rates:
        return None
    trained, found = [o for o in measured if o.job.arm == config.compare.baseline], {}
    for measure in (BY_KEY[key] for key in ("frechet", *DETAILS)):
        frontier: dict[Hashable, list[tuple[float, float]]] = {}
        for seed, point in _points(measure, trained):
            frontier.setdefault(seed, []).append(point)
        pairs = {}
        for name in others:
            if ours := {seed: point for seed, point in _points(measure, own[name]) if seed in frontier}:
                at = difference_at_equal_rate(frontier, ours, LEVEL)
                inside = [(seed, theirs) for seed, theirs in zip(at.seeds, at.baseline, strict=True) if theirs is not None]
                pairs[name] = {seed: (ours[seed][1], theirs) for seed, theirs in inside}
        found[measure.key] = _tested(measure, pairs, own)
    return found


def _points(measure: Measure, outcomes: Sequence[Outcome]) -> list[tuple[Hashable, tuple[float, float]]]:
    """(seed, rate, value) of the trials that have rate and value."""
    found = [(o.job.seed, value_of(BY_KEY["rate_bits"], o), value_of(measure, o)) for o in outcomes]
    return [(seed, (rate, value)) for seed, rate, value in found if rate is not None and value is not None]


def _point(config: Config, outcome: Outcome) -> dict:
    job = outcome.job
    place = {"arm": job.arm, "seed": job.seed, "rate": job.rate if job.rate is not None else own_rate(config)}
    return place | {key: value_of(BY_KEY[key], outcome) for key in ("rate_bits", "frechet", "bits", "psnr")}


def _prior_sizes(own: Trials) -> list[dict]:
    """One row per arm and size of prior, by increasing size; empty if there is only one size."""
    rows = []
    for name, outcomes in own.items():
        by_size: dict[int, list[dict]] = {}
        for prior in (prior for o in outcomes if o.record for prior in o.record["priors"]):
            by_size.setdefault(prior["size"], []).append(prior)
        for size, priors in sorted(by_size.items()):
            row = {"arm": name, "size": size, "parameters": priors[0]["parameters"]}
            for key in ("frechet", "bits", "memorised"):
                values = [p[key] for p in priors if p[key] is not None and math.isfinite(p[key])]
                row[key] = _mean(values, BY_KEY[key].minimum, BY_KEY[key].maximum)
            rows.append(row)
    return rows if len({row["size"] for row in rows}) > 1 else []


def _predictors(measured: Sequence[Outcome]) -> list[dict]:
    """Rank correlation of each number of the report card with the generation distance, strongest first.

    All use the same trials, those with a card; a number that some of these lack comes last. The rate and the main prior's
    bits are included for comparison, under the names of `MEASURES`. Redundant numbers are left out: PSNR (the reconstruction
    error) and a code's perplexity (its entropy).
    """
    usable = [o for o in measured if o.record and o.record.get("card")]
    found = rank_predictors([o.record for o in usable if o.record])
    found.pop("codebook_perplexity", None)
    names = {key: predictor.title for key, predictor in PREDICTORS.items()}
    for measure in (BY_KEY["rate_bits"], BY_KEY["bits"]):
        known = [(value, o.distance, o.job.seed) for o in usable if (value := value_of(measure, o)) is not None]
        if len(known) > 2:
            x, y, seeds = zip(*known, strict=True)
            found[measure.key], names[measure.key] = rank_correlation(x, y, groups=seeds, level=LEVEL, seed=0), measure.name
    rows = [{"key": key, "name": names[key], **correlation._asdict()} for key, correlation in found.items()]
    return sorted(rows, key=lambda row: (math.isnan(row["rho"]), -row["n"], -abs(row["rho"])))


def verdict_in_words(measure: Measure, row: dict) -> str:
    """`better`, `worse` or `no difference shown` by the Holm-adjusted p; `not known` without one."""
    if row["low"] is None:
        return "not known"
    if row["verdict"] == 0:
        return "no difference shown"
    if measure.better == 0:
        return "higher" if row["verdict"] > 0 else "lower"
    return "better" if row["verdict"] == measure.better else "worse"
