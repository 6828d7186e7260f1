"""What a comparison says: intervals, paired differences, differences at equal rate, predictors; as JSON and as Markdown."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Callable, Mapping, Sequence

from dae.comparison.arms import arm_config, parse_arms
from dae.comparison.jobs import Outcome, name_of, own_rate
from dae.config import Config
from dae.data.sources import source_title
from dae.statistics import (
    Interval,
    difference_at_equal_rate,
    holm,
    mean_interval,
    paired_p_value,
    rank_correlation,
)
from dae.training import Stage, plan_stages
from dae.training.priors import prior_family

LEVEL = 0.95


@dataclass(frozen=True)
class Measure:
    """A number of a trial. `better` is -1 where less is better, 1 where more is, 0 where neither is."""

    key: str
    name: str
    better: int
    of: Callable[[dict], float | None]
    digits: int = 2
    unit: str = ""
    least: float = -math.inf  # what it can be: intervals are cut there
    most: float = math.inf


def _of_prior(key: str) -> Callable[[dict], float | None]:
    return lambda record: record["priors"][0][key]


MEASURES = (
    Measure("frechet", "generation distance", -1, _of_prior("frechet"), least=0),
    Measure("bits", "bits per image under the prior", 0, _of_prior("bits"), 1),  # a smaller latent has fewer, and is no better
    Measure("rate_bits", "rate, bits per image", 0, lambda r: r["rate_bits"], 1, least=0),
    Measure("psnr", "PSNR of reconstructions", 1, lambda r: r["psnr"], 2, "dB"),
    Measure("ssim", "SSIM of reconstructions", 1, lambda r: r["ssim"], 3, least=-1, most=1),
    Measure("reconstruction_frechet", "distance of reconstructions", -1, lambda r: r["reconstruction_frechet"], least=0),
    Measure("memorised", "near-copies of training images", -1, _of_prior("memorised"), 1, "%", 0, 1),
    Measure("recognised", "samples recognised as their class", 1, _of_prior("recognised"), 1, "%", 0, 1),
    Measure("precision", "precision", 1, _of_prior("precision"), 3, least=0, most=1),
    Measure("recall", "recall", 1, _of_prior("recall"), 3, least=0, most=1),
    Measure("perplexity", "perplexity of the codebook", 0, lambda r: r["codebook"] and r["codebook"]["perplexity"], 1, least=1),
)
BY_KEY = {measure.key: measure for measure in MEASURES}
DETAILS = ("bits", "psnr")  # what is told of a difference beside the distance


def summarize(config: Config, facts: dict, outcomes: Sequence[Outcome]) -> dict:
    """All that a comparison found, as JSON-able data.

    Differences are arm minus baseline, seed by seed, at the configuration's own rate ("equal steps"), and against the
    baseline's frontier of the same seed at the arm's rate ("equal rate"). Decoupled arms are also held against an arm that
    trains its encoder for as many steps and then goes on with its decoder ("equal encoder steps"). What diverged or failed has
    no value: its pairs are missing from the intervals, and it is listed.

    Args:
        config: of the comparison.
        facts: of its `Bench`.
        outcomes: of its trials, tuning and measuring.

    Raises:
        ValueError: no trial has a result, or none of the baseline has.
    """
    compare, outcomes = config.compare, [_settled(o) for o in outcomes]
    plans = {arm.name: plan_stages(arm_config(config, arm)) for arm in parse_arms(compare)}
    tuning = [o for o in outcomes if o.job.purpose == "tune"]
    measured = [o for o in outcomes if o.job.purpose == "measure"]
    names = list(dict.fromkeys(o.job.arm for o in outcomes))
    own = {name: [o for o in measured if o.job.arm == name and o.job.rate is None] for name in names}
    if not any(o.record for o in own.get(compare.baseline, [])):
        troubles = "; ".join(f"{name_of(o.job)}: {o.failed or o.diverged}" for o in outcomes if not o.record)
        raise ValueError(
            f"no trial of the baseline {compare.baseline!r} has a result, so there is nothing to compare with"
            + (f" ({troubles})" if troubles else "")
        )
    baseline, others = own[compare.baseline], [name for name in names if name != compare.baseline]
    summary = {
        "data": source_title(config.data),
        "carrier": " + ".join(_carrier(config)),
        "baseline": compare.baseline,
        "seeds": list(compare.seeds),
        "level": LEVEL,
        "facts": facts,
        "tuning": _tuning(config, tuning),
        "arms": [_arm(name, own[name], plans[name]) for name in names],
        "differences": {m.key: _differences(m, baseline, own, others) for m in MEASURES},
        "equal_rate": _equal_rate(config, measured, own, others),
        "equal_encoder": _equal_encoder({name: own[name] for name in others}, plans),
        "frontier": [_point(config, o) for o in measured if o.record],
        "prior_sizes": _prior_sizes(names, own),
        "predictors": _predictors(measured),
        "trials": {"planned": len(outcomes), "finished": sum(o.record is not None for o in outcomes)},
        "seconds": sum(o.record.get("seconds", 0.0) for o in outcomes if o.record),
        "left_out": [
            {"trial": name_of(o.job), "arm": o.job.arm, "seed": o.job.seed, "kind": "diverged" if o.diverged else "failed",
             "why": o.diverged or o.failed}
            for o in outcomes if not o.record
        ],
    }  # fmt: skip
    return _jsonable(summary)


def _settled(outcome: Outcome) -> Outcome:
    """A trial whose samples have no finite distance diverged, too: no number of it is used."""
    if outcome.record is None or outcome.distance is not None:
        return outcome
    return replace(outcome, record=None, diverged="the generation distance of its samples is not finite")


def _carrier(config: Config) -> list[str]:
    adversarial = ["gan"] if config.stage2.loss.adversarial else []
    return [config.autoencoder.bottleneck, prior_family(config), *adversarial]


def value_of(measure: Measure, outcome: Outcome) -> float | None:
    """A measure of a trial; None if it has no such number, or none that is finite."""
    value = measure.of(outcome.record) if outcome.record else None
    return float(value) if value is not None and math.isfinite(value) else None


def _tuning(config: Config, tuning: Sequence[Outcome]) -> dict | None:
    if not tuning:
        return None
    trials = [
        {
            "arm": o.job.arm,
            "learning_rate": o.job.learning_rate,
            "prior_learning_rate": o.job.prior_learning_rate,
            "frechet": o.distance,
            "diverged": o.diverged,
            "failed": o.failed,
        }
        for o in tuning
    ]
    rates = {key: list(getattr(config.compare, key)) for key in ("learning_rates", "prior_learning_rates")}
    return {"seed": config.compare.tuning_seed, **rates, "trials": trials}


def decoupled(plan: Sequence[Stage]) -> bool:
    """Whether a new decoder is trained on a latent that was trained with another one."""
    return any(stage.latent_frozen and not stage.keeps_decoder for stage in plan)


def _finetuned(plan: Sequence[Stage]) -> bool:
    """Whether the decoder that the latent was trained with goes on alone."""
    return any(stage.latent_frozen and stage.keeps_decoder for stage in plan)


def _encoder_steps(plan: Sequence[Stage]) -> int:
    return sum(stage.config.max_train_steps for stage in plan if not stage.latent_frozen)


def _arm(name: str, outcomes: Sequence[Outcome], plan: Sequence[Stage]) -> dict:
    values = {m.key: [v for o in outcomes if (v := value_of(m, o)) is not None] for m in MEASURES}
    new = max((i for i, stage in enumerate(plan) if not stage.keeps_decoder), default=0)  # here the last decoder begins
    return {
        "name": name,
        "learning_rate": outcomes[0].job.learning_rate if outcomes else None,
        "prior_learning_rate": outcomes[0].job.prior_learning_rate if outcomes else None,
        "stages": next((o.record["stages"] for o in outcomes if o.record), None),
        "decoupled": decoupled(plan),
        "decoder": plan[-1].decoder.family,
        "encoder_steps": _encoder_steps(plan),
        "decoder_steps": sum(stage.config.max_train_steps for stage in plan[new:]),
        "trials": len(outcomes),
        "finished": sum(o.record is not None for o in outcomes),
        "diverged": sum(o.diverged is not None for o in outcomes),
        "failed": sum(o.failed is not None for o in outcomes),
        "measures": {m.key: _mean(m, values[m.key]) if values[m.key] else None for m in MEASURES},
        "values": values,
    }


def _mean(measure: Measure, values: Sequence[float]) -> dict:
    return _interval(mean_interval(values, LEVEL), measure.least, measure.most)


def _interval(interval: Interval, least: float = -math.inf, most: float = math.inf) -> dict:
    """As a dict, cut at what is possible: Student's interval of few shares reaches beyond 0 and 1."""
    row = interval._asdict() | {"verdict": interval.verdict}
    return row if interval.low is None else row | {"low": max(interval.low, least), "high": min(interval.high, most)}


def _differences(measure: Measure, baseline: Sequence[Outcome], own: Mapping[str, Sequence[Outcome]], others: list[str]) -> dict:
    """For each other arm the paired differences, their interval, p, and p adjusted for the number of arms."""
    theirs = {o.job.seed: v for o in baseline if (v := value_of(measure, o)) is not None}
    width, found = measure.most - measure.least, {}
    for name in others:
        ours = {o.job.seed: v for o in own[name] if (v := value_of(measure, o)) is not None and o.job.seed in theirs}
        if ours:
            pair = list(ours.values()), [theirs[seed] for seed in ours]
            differences = [x - y for x, y in zip(*pair, strict=True)]
            p = paired_p_value(*pair) if len(ours) > 1 else None
            row = _interval(mean_interval(differences, LEVEL), -width, width)
            found[name] = row | {"values": differences, "seeds": list(ours), "of": len(own[name]), "p": p, "baseline": pair[1]}
    return _adjusted(found)


def _adjusted(found: dict[str, dict]) -> dict[str, dict]:
    """With p after Holm's adjustment, by which alone a difference counts as shown: `verdict` is 0 if it is not."""
    tested = [name for name, row in found.items() if row["p"] is not None]
    for name, p in zip(tested, holm([found[name]["p"] for name in tested]), strict=True):
        found[name] |= {"adjusted": p, "alone": found[name]["verdict"]}
        found[name]["verdict"] *= p < 1 - LEVEL
    return found


def _equal_encoder(own: Mapping[str, Sequence[Outcome]], plans: Mapping[str, Sequence[Stage]]) -> dict | None:
    """Decoupled arms minus an arm with as many steps of the encoder whose decoder goes on; None where there are no such arms."""
    for base in (name for name in own if _finetuned(plans[name])):
        steps = _encoder_steps(plans[base])
        arms = [name for name in own if decoupled(plans[name]) and _encoder_steps(plans[name]) == steps]
        if arms:
            keys = ("frechet", *DETAILS)
            return {"baseline": base, "steps": steps} | {k: _differences(BY_KEY[k], own[base], own, arms) for k in keys}
    return None


def _equal_rate(
    config: Config, measured: Sequence[Outcome], own: Mapping[str, Sequence[Outcome]], others: list[str]
) -> dict | None:
    """For each measure and other arm the differences to the baseline's frontier; None if no frontier was trained."""
    if not config.compare.rates:
        return None
    trained = [o for o in measured if o.job.arm == config.compare.baseline and o.record]
    return {key: _at_equal_rate(BY_KEY[key], trained, own, others) for key in ("frechet", *DETAILS)}


def _at_equal_rate(measure: Measure, trained: Sequence[Outcome], own: Mapping[str, Sequence[Outcome]], others: list[str]) -> dict:
    rate, frontier, found = BY_KEY["rate_bits"], {}, {}
    for o in trained:
        if (point := (value_of(rate, o), value_of(measure, o))) and None not in point:
            frontier.setdefault(o.job.seed, []).append(point)
    for name in others:
        points = {o.job.seed: (value_of(rate, o), value_of(measure, o)) for o in own[name]}
        ours = {seed: point for seed, point in points.items() if None not in point and seed in frontier}
        if not ours:
            continue
        at = difference_at_equal_rate(frontier, ours, LEVEL)
        kept = [i for i, d in enumerate(at.differences) if d is not None]
        row = _interval(at.interval) if at.interval else {"mean": None, "low": None, "high": None, "n": 0, "verdict": 0}
        inside = [ours[at.seeds[i]][1] for i in kept], [at.baseline[i] for i in kept]
        found[name] = row | {
            "values": [at.differences[i] for i in kept], "seeds": [at.seeds[i] for i in kept], "of": len(own[name]),
            "p": paired_p_value(*inside) if len(kept) > 1 else None, "baseline": inside[1],
        }  # fmt: skip
    return _adjusted(found)


def _point(config: Config, outcome: Outcome) -> dict:
    job = outcome.job
    place = {"arm": job.arm, "seed": job.seed, "rate": job.rate if job.rate is not None else own_rate(config)}
    return place | {key: value_of(BY_KEY[key], outcome) for key in ("rate_bits", "frechet", "bits", "psnr")}


def _prior_sizes(names: Sequence[str], own: Mapping[str, Sequence[Outcome]]) -> list[dict]:
    """One row for each arm and size of prior, by growing size; nothing if there is one size only."""
    rows = []
    for name in names:
        by_size: dict[int, list[dict]] = {}
        for o in own[name]:
            for prior in o.record["priors"] if o.record else []:
                by_size.setdefault(prior["size"], []).append(prior)
        for size, priors in sorted(by_size.items()):
            row = {"arm": name, "size": size, "parameters": priors[0]["parameters"]}
            for key in ("frechet", "bits", "memorised"):
                values = [p[key] for p in priors if p[key] is not None and math.isfinite(p[key])]
                row[key] = _mean(BY_KEY[key], values) if values else None
            rows.append(row)
    return rows if len({row["size"] for row in rows}) > 1 else []


def _predictors(measured: Sequence[Outcome]) -> list[dict]:
    """The rank correlation of each number of the report card with the generation distance, strongest first.

    All over the same trials, those with a card; a number that some of these lack comes after those that all have. The rate and
    the main prior's bits stand beside the card's numbers as yardsticks, under the names of `MEASURES`. A number that
    measures the same as another one is left out: PSNR, which is the reconstruction error, and a code's perplexity, its entropy.
    """
    from dae.diagnostics.ranking import rank_predictors
    from dae.diagnostics.report_card import PREDICTORS

    usable = [o for o in measured if o.record and o.record.get("card")]
    found = rank_predictors([o.record for o in usable])
    found.pop("codebook_perplexity", None)
    for measure in (BY_KEY["rate_bits"], BY_KEY["bits"]):
        rows = [(value, o.distance, o.job.seed) for o in usable if (value := value_of(measure, o)) is not None]
        if len(rows) > 2:
            x, y, seeds = zip(*rows, strict=True)
            found[measure.key] = rank_correlation(x, y, groups=seeds, level=LEVEL, seed=0)
    titles = {key: PREDICTORS[key].title if key in PREDICTORS else BY_KEY[key].name for key in found}
    rows = [{"key": key, "name": titles[key], **found[key]._asdict()} for key in found]
    return sorted(rows, key=lambda row: (math.isnan(row["rho"]), -row["n"], -abs(row["rho"])))


def _jsonable(value: Any) -> Any:
    """NaN is None; tuples are lists."""
    if isinstance(value, dict):
        return {str(k): _jsonable(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_jsonable(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# ---- in words ----


def verdict(measure: Measure, row: dict) -> str:
    """`better`, `worse` or `no difference shown` by a difference's p after Holm's adjustment; `not known` without one."""
    if row["low"] is None:
        return "not known"
    if row["verdict"] == 0 or measure.better == 0:
        return "no difference shown" if row["verdict"] == 0 else "higher" if row["verdict"] > 0 else "lower"
    return "better" if row["verdict"] == measure.better else "worse"


def signed(value: float | None, digits: int = 2) -> str:
    """`+1.20`, `−0.30`; a dash for None."""
    return "–" if value is None else f"{value:+,.{digits}f}".replace("-", "−")


def shown(measure: Measure, row: dict | None, sign: bool = False) -> str:
    """A mean with its interval: `12.3 [10.1, 14.5] dB`; the mean alone where there is no interval."""
    if row is None or row["mean"] is None:
        return "–"
    factor, unit = (100, "\u00a0%") if measure.unit == "%" else (1, f"\u00a0{measure.unit}" if measure.unit else "")

    def write(value: float) -> str:
        return signed(factor * value, measure.digits) if sign else f"{factor * value:,.{measure.digits}f}".replace("-", "−")

    ends = "" if row["low"] is None else f" [{write(row['low'])}, {write(row['high'])}]"
    return f"{write(row['mean'])}{ends}{unit}"


def grouped(key: str, rows: dict[str, dict]) -> dict[str, list[str]]:
    """Names of arms by their `verdict`, in the order better, worse, no difference shown, not known."""
    words = ("better", "worse", "higher", "lower", "no difference shown", "not known")
    found = {word: [name for name, row in rows.items() if verdict(BY_KEY[key], row) == word] for word in words}
    return {word: names for word, names in found.items() if names}


def in_short(summary: dict, rows: dict[str, dict], base: str | None = None) -> str:
    """One sentence that answers, for one table of differences, which arms are better or worse than `base`, the baseline.

    Arms without any result are named, too, and those of which trials diverged are marked.
    """
    base, arms = base or summary["baseline"], {arm["name"]: arm for arm in summary["arms"]}
    words = {
        "better": f"better than {base}",
        "worse": f"worse than {base}",
        "no difference shown": "no difference shown",
        "not known": "not known, for want of two seeds",
    }
    groups = {words[word]: names for word, names in grouped("frechet", rows).items()}
    lost = [name for name, arm in arms.items() if arm["diverged"] and not arm["finished"] and name != base]
    groups |= {"no result": lost} if lost else {}
    said = "; ".join(f"{word}: {', '.join(_flagged(arms[name]) for name in names)}" for word, names in groups.items())
    itself = f" {_flagged(arms[base])} itself." if arms[base]["diverged"] else ""
    return (f"{said[0].upper()}{said[1:]}." if said else f"No arm can be held against {base}.") + itself


def _flagged(arm: dict) -> str:
    return arm["name"] + (f" ({arm['diverged']} of {arm['trials']} diverged)" if arm["diverged"] else "")


def detail(key: str, row: dict) -> str:
    """A difference in figures: `−3.05 [−3.26, −2.84]; 4 of 5 seeds`."""
    pairs = f"{row['n']} of {row['of']} seeds" if row["n"] < row["of"] else f"{row['n']} seed{'s' if row['n'] > 1 else ''}"
    return f"{shown(BY_KEY[key], row, sign=True)}; {pairs}"


def yardsticks(summary: dict, row: dict) -> tuple[str, str]:
    """A difference of distances in % of the baseline's own distance, and of that of training images; dashes without one."""
    wholes = sum(row["baseline"]) / len(row["baseline"]) if row["baseline"] else None, summary["facts"]["floor"]["frechet"]
    found = [None if row["mean"] is None or not whole else 100 * row["mean"] / whole for whole in wholes]
    return tuple("–" if share is None else f"{signed(round(share), 0)}\u00a0%" for share in found)


def in_figures(summary: dict, row: dict, base: str | None = None) -> str:
    """`detail` of a generation distance, with its yardsticks."""
    ours, floor = yardsticks(summary, row)
    scale = "" if ours == "–" else f" ({ours} of {base or summary['baseline']}'s distance, {floor} of training images')"
    return detail("frechet", row) + scale


def caveats(summary: dict, rows: dict[str, dict]) -> str:
    """How a difference came to count as shown, and what the intervals do not know; empty where there is nothing to say."""
    words, tested = [], {name: row for name, row in rows.items() if row["p"] is not None}
    if len(tested) > 1:
        words.append(
            f"These are {len(tested)} comparisons at once: a difference counts as shown if its p is below "
            f"{1 - summary['level']:.2f} after Holm's adjustment for that. The intervals are each arm's own, not adjusted."
        )
        if alone := [name for name, row in tested.items() if row["alone"] != row["verdict"]]:
            words.append(f"By its own interval, which leaves out 0, {' and '.join(alone)} would count, too.")
    if any(arm["diverged"] for arm in summary["arms"]):
        words.append("The figures know only the trials that did not diverge, and so flatter an arm of which some did.")
    return " ".join(words)


def headline(summary: dict, rows: dict[str, dict] | None) -> list[str]:
    """The answer of one table of generation distances, for a terminal: in short, each arm's figures, and the caveats."""
    if rows is None:
        return []
    figures = [f"  {name}: {in_figures(summary, row)}" for name, row in rows.items()]
    return [in_short(summary, rows), *figures, *filter(None, [caveats(summary, rows)])]


def budgets(summary: dict) -> str:
    """What equal numbers of steps mean for encoder and decoder, and which arms' images another decoder makes."""
    by_steps: dict[tuple[int, int], list[str]] = {}
    for arm in summary["arms"]:
        by_steps.setdefault((arm["encoder_steps"], arm["decoder_steps"]), []).append(arm["name"])
    parts = [f"{', '.join(names)}: encoder {e:,}, decoder {d:,}" for (e, d), names in by_steps.items()]
    words = "Steps are equal in sum only"
    if len(parts) > 1:
        words += "; the encoder and the decoder that makes the images are not trained equally long"
    else:
        words = "The encoder and the decoder that makes the images are trained equally long in all arms"
    words += f" (steps of {'; of '.join(parts)})."
    usual = next(arm["decoder"] for arm in summary["arms"] if arm["name"] == summary["baseline"])
    others = [f"{arm['name']} ({arm['decoder']})" for arm in summary["arms"] if arm["decoder"] != usual]
    return words + (f" The decoder is that of {summary['baseline']} in all but {', '.join(others)}." if others else "")


def rate_means(summary: dict) -> str:
    """What the rate is, for the bottleneck of this comparison."""
    if "vq" in summary["carrier"]:
        rate = "the entropy of the codes as if the tokens of an image were independent"
    else:
        rate = (
            "the mean Kullback-Leibler divergence of an image's latent distribution from a Gaussian with the moments of them all"
        )
    return f"Rate: {rate}, an upper bound of the information that the latent has of the image, not that information itself."


def bits_mean(summary: dict) -> str:
    """What the bits under the prior are; only some priors are told the class, and only of labelled images."""
    words = "Bits under the prior: what the trained prior needs to write down the latent of a held-out image"
    if summary["facts"].get("labelled"):
        words += ", not told its class" if "mixture" in summary["carrier"] else ", told the image's class"
    return words + "."


COLUMNS = ("frechet", "bits", "rate_bits", "psnr", "memorised", "recognised")


def markdown(summary: dict) -> str:
    """The table of all arms with intervals and paired differences, for documents."""
    measures = [BY_KEY[k] for k in COLUMNS if any(arm["measures"][k] for arm in summary["arms"])]
    frechet, equal = BY_KEY["frechet"], summary["equal_rate"]
    header = ["arm", *(m.name for m in measures), f"distance minus {summary['baseline']}'s", "p (Holm)"]
    header += [f"the same at equal rate (seeds inside {summary['baseline']}'s rates)"] if equal else []
    lines = [line(header), line(["---"] * len(header))]
    for arm in summary["arms"]:
        row = summary["differences"]["frechet"].get(arm["name"])
        cells = [_named(arm), *(shown(m, arm["measures"][m.key]) for m in measures)]
        cells += [f"{shown(frechet, row, True)} {verdict(frechet, row)}", p_value(row)] if row else ["–", "–"]
        if equal:
            at = equal["frechet"].get(arm["name"])
            cells.append(f"{shown(frechet, at, True)} {verdict(frechet, at)} ({at['n']} of {at['of']})" if at else "–")
        lines.append(line(cells))
    floor, copies = summary["facts"]["floor"]["frechet"], summary["facts"].get("memorised_heldout")
    lines.append(
        f"\nMeans over {len(summary['seeds'])} seeds with their {100 * summary['level']:.0f} % intervals, cut at what is "
    )
    lines[-1] += (
        f"possible; what a difference is said to be goes by p (Holm). Training images are {floor:,.2f} from the held-out ones"
    )
    lines[-1] += f"; of the held-out images themselves {100 * copies:.1f} % count as near-copies." if copies is not None else "."
    lines += [f"- Left out: {lost['trial']} {lost['kind']}: {lost['why']}" for lost in summary["left_out"]]
    return "\n".join(lines) + "\n"


def line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"


def _named(arm: dict) -> str:
    missing = [f"{arm[kind]} {kind}" for kind in ("diverged", "failed") if arm[kind]]
    return arm["name"] + (f" ({', '.join(missing)} of {arm['trials']})" if missing else "")


def p_value(row: dict) -> str:
    """p after Holm's adjustment; a dash where there is none."""
    return "–" if row["p"] is None else f"{row['adjusted']:.3f}" if row["adjusted"] >= 0.001 else "< 0.001"
