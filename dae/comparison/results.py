"""What a comparison says: intervals, paired differences, differences at equal rate, predictors; as JSON and as Markdown."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Callable, Mapping, Sequence

from dae.comparison.jobs import Outcome, name_of, own_rate
from dae.comparison.statistics import (
    Interval,
    difference_at_equal_rate,
    holm,
    mean_interval,
    paired_interval,
    paired_p_value,
    rank_correlation,
)
from dae.comparison.training import prior_family
from dae.config import Config

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


def _of_prior(key: str) -> Callable[[dict], float | None]:
    return lambda record: record["priors"][0][key]


MEASURES = (
    Measure("frechet", "generation distance", -1, _of_prior("frechet")),
    Measure("bits", "bits an image under the prior", 0, _of_prior("bits"), 1),  # a smaller latent has fewer, and is no better
    Measure("rate_bits", "rate, bits an image", 0, lambda r: r["rate_bits"], 1),
    Measure("psnr", "PSNR of reconstructions", 1, lambda r: r["psnr"], 2, "dB"),
    Measure("ssim", "SSIM of reconstructions", 1, lambda r: r["ssim"], 3),
    Measure("reconstruction_frechet", "distance of reconstructions", -1, lambda r: r["reconstruction_frechet"]),
    Measure("copies", "near-copies of training images", -1, _of_prior("copies"), 1, "%"),
    Measure("recognised", "samples recognised as their class", 1, _of_prior("recognised"), 1, "%"),
    Measure("precision", "precision", 1, _of_prior("precision"), 3),
    Measure("recall", "recall", 1, _of_prior("recall"), 3),
    Measure("perplexity", "perplexity of the codebook", 0, lambda r: r["codebook"] and r["codebook"]["perplexity"], 1),
)
BY_KEY = {measure.key: measure for measure in MEASURES}
AT_EQUAL_RATE = ("frechet", "bits", "psnr")


def summarize(config: Config, facts: dict, outcomes: Sequence[Outcome]) -> dict:
    """All that a comparison found, as JSON-able data.

    Differences are arm minus baseline, seed by seed, at the configuration's own rate ("equal steps"), and against the
    baseline's frontier of the same seed at the arm's rate ("equal rate"). What diverged or failed has no value: its pairs are
    missing from the intervals, and it is listed.

    Args:
        config: of the comparison.
        facts: of its `Bench`.
        outcomes: of its trials, tuning and measuring.

    Raises:
        ValueError: no trial has a result, or none of the baseline has.
    """
    compare = config.compare
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
        "data": config.data.dataset_name,
        "carrier": " + ".join(_carrier(config)),
        "baseline": compare.baseline,
        "seeds": list(compare.seeds),
        "level": LEVEL,
        "facts": facts,
        "tuning": _tuning(config, tuning),
        "arms": [_arm(name, own[name]) for name in names],
        "differences": {m.key: _differences(m, baseline, own, others) for m in MEASURES},
        "equal_rate": _equal_rate(config, measured, own, others),
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
            "frechet": o.distance,
            "diverged": o.diverged,
            "failed": o.failed,
        }
        for o in tuning
    ]
    return {"seed": config.compare.tuning_seed, "learning_rates": list(config.compare.learning_rates), "trials": trials}


def _arm(name: str, outcomes: Sequence[Outcome]) -> dict:
    values = {m.key: [v for o in outcomes if (v := value_of(m, o)) is not None] for m in MEASURES}
    return {
        "name": name,
        "learning_rate": outcomes[0].job.learning_rate if outcomes else None,
        "stages": next((o.record["stages"] for o in outcomes if o.record), None),
        "trials": len(outcomes),
        "finished": sum(o.record is not None for o in outcomes),
        "diverged": sum(o.diverged is not None for o in outcomes),
        "failed": sum(o.failed is not None for o in outcomes),
        "measures": {key: _interval(mean_interval(v, LEVEL)) if v else None for key, v in values.items()},
        "values": values,
    }


def _interval(interval: Interval) -> dict:
    return {**interval._asdict(), "verdict": interval.verdict}


def _differences(measure: Measure, baseline: Sequence[Outcome], own: Mapping[str, Sequence[Outcome]], others: list[str]) -> dict:
    """For each other arm the paired differences, their interval, p, and p adjusted for the number of arms."""
    theirs = {o.job.seed: v for o in baseline if (v := value_of(measure, o)) is not None}
    found = {}
    for name in others:
        ours = {o.job.seed: v for o in own[name] if (v := value_of(measure, o)) is not None and o.job.seed in theirs}
        if ours:
            pair = list(ours.values()), [theirs[seed] for seed in ours]
            differences = [x - y for x, y in zip(*pair, strict=True)]
            interval = paired_interval(*pair, LEVEL) if len(ours) > 1 else mean_interval(differences, LEVEL)
            p = paired_p_value(*pair) if len(ours) > 1 else None
            found[name] = _interval(interval) | {"values": differences, "seeds": list(ours), "of": len(own[name]), "p": p}
            found[name]["baseline"] = pair[1]
    return _adjusted(found)


def _adjusted(found: dict[str, dict]) -> dict[str, dict]:
    tested = [name for name, row in found.items() if row["p"] is not None]
    for name, p in zip(tested, holm([found[name]["p"] for name in tested]), strict=True):
        found[name]["adjusted"] = p
    return found


def _equal_rate(
    config: Config, measured: Sequence[Outcome], own: Mapping[str, Sequence[Outcome]], others: list[str]
) -> dict | None:
    """For each measure and other arm the differences to the baseline's frontier; None if no frontier was trained."""
    if not config.compare.rates:
        return None
    trained = [o for o in measured if o.job.arm == config.compare.baseline and o.record]
    return {key: _at_equal_rate(BY_KEY[key], trained, own, others) for key in AT_EQUAL_RATE}


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
            for key in ("frechet", "bits", "copies"):
                values = [p[key] for p in priors if p[key] is not None and math.isfinite(p[key])]
                row[key] = _interval(mean_interval(values, LEVEL)) if values else None
            rows.append(row)
    return rows if len({row["size"] for row in rows}) > 1 else []


def _predictors(measured: Sequence[Outcome]) -> list[dict]:
    """The rank correlation of each number of the report card with the generation distance over all trials, strongest first.

    The rate, PSNR and the main prior's bits stand beside the card's numbers as yardsticks, under the names of `MEASURES`.
    """
    from dae.complexity.report_card import PREDICTORS, rank_predictors

    usable = [o for o in measured if o.distance is not None]
    found = rank_predictors([o.record | {"card": o.record.get("card")} for o in usable])
    for measure in (BY_KEY["rate_bits"], BY_KEY["psnr"], BY_KEY["bits"]):
        rows = [(value, o.distance, o.job.seed) for o in usable if (value := value_of(measure, o)) is not None]
        if len(rows) > 2:
            x, y, seeds = zip(*rows, strict=True)
            found[measure.key] = rank_correlation(x, y, groups=seeds, level=LEVEL, seed=0)
    titles = {key: PREDICTORS[key].title if key in PREDICTORS else BY_KEY[key].name for key in found}
    rows = [{"key": key, "name": titles[key], **found[key]._asdict()} for key in found]
    return sorted(rows, key=lambda row: -1 if math.isnan(row["rho"]) else abs(row["rho"]), reverse=True)


def _jsonable(value: Any) -> Any:
    """NaN is None; tuples are lists."""
    if isinstance(value, dict):
        return {str(k): _jsonable(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_jsonable(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# ---- in words ----


def verdict(measure: Measure, row: dict) -> str:
    """`better`, `worse` or `no difference shown` by the interval of a difference; `not known` without one."""
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


def in_short(summary: dict, rows: dict[str, dict]) -> str:
    """One sentence that answers, for one table of differences, which arms are better or worse than the baseline."""
    base, groups = summary["baseline"], grouped("frechet", rows)
    words = {
        "better": f"better than {base}",
        "worse": f"worse than {base}",
        "no difference shown": "no difference shown",
        "not known": "not known, for want of two seeds",
    }
    said = "; ".join(f"{words[word]}: {', '.join(names)}" for word, names in groups.items())
    return f"{said[0].upper()}{said[1:]}." if said else f"No arm can be held against {base}."


def detail(key: str, row: dict) -> str:
    """A difference in figures: `−3.05 [−3.26, −2.84]; 4 of 5 seeds`."""
    pairs = f"{row['n']} of {row['of']} seeds" if row["n"] < row["of"] else f"{row['n']} seed{'s' if row['n'] > 1 else ''}"
    return f"{shown(BY_KEY[key], row, sign=True)}; {pairs}"


def adjustment(summary: dict, rows: dict[str, dict]) -> str:
    """What remains of the differences after Holm's adjustment for their number; empty where nothing was tested at once."""
    tested = {name: row for name, row in rows.items() if row["p"] is not None}
    if len(tested) < 2:
        return ""
    kept = [name for name, row in tested.items() if row["adjusted"] < 1 - summary["level"]]
    return (
        f"These are {len(tested)} comparisons at once, and one interval in twenty misses the truth by chance alone; allowing for "
        f"that (Holm's adjustment), {'a difference remains for ' + ', '.join(kept) if kept else 'no difference remains'}."
    )


def headline(summary: dict, rows: dict[str, dict] | None) -> list[str]:
    """The answer of one table of generation distances, for a terminal: in short, each arm's figures, and the adjustment."""
    if rows is None:
        return []
    figures = [f"  {name}: {detail('frechet', row)}" for name, row in rows.items()]
    return [in_short(summary, rows), *figures, *filter(None, [adjustment(summary, rows)])]


COLUMNS = ("frechet", "bits", "rate_bits", "psnr", "copies", "recognised")


def markdown(summary: dict) -> str:
    """The table of all arms with intervals and paired differences, for documents."""
    measures = [BY_KEY[k] for k in COLUMNS if any(arm["measures"][k] for arm in summary["arms"])]
    frechet, equal = BY_KEY["frechet"], summary["equal_rate"]
    header = ["arm", *(m.name for m in measures), f"distance minus {summary['baseline']}'s", "p (Holm)"]
    header += [f"the same at equal rate (seeds inside {summary['baseline']}'s rates)"] if equal else []
    lines = [_line(header), _line(["---"] * len(header))]
    for arm in summary["arms"]:
        row = summary["differences"]["frechet"].get(arm["name"])
        cells = [_named(arm), *(shown(m, arm["measures"][m.key]) for m in measures)]
        cells += [f"{shown(frechet, row, True)} {verdict(frechet, row)}", p_value(row)] if row else ["–", "–"]
        if equal:
            at = equal["frechet"].get(arm["name"])
            cells.append(f"{shown(frechet, at, True)} {verdict(frechet, at)} ({at['n']} of {at['of']})" if at else "–")
        lines.append(_line(cells))
    floor, copies = summary["facts"]["floor"]["frechet"], summary["facts"].get("copies_floor")
    lines.append(f"\nMeans over {len(summary['seeds'])} seeds with their {100 * summary['level']:.0f} % intervals. ")
    lines[-1] += f"Training images are {floor:,.2f} from the held-out ones"
    lines[-1] += f"; of the held-out images themselves {100 * copies:.1f} % count as near-copies." if copies is not None else "."
    lines += [f"- Left out: {lost['trial']} {lost['kind']}: {lost['why']}" for lost in summary["left_out"]]
    return "\n".join(lines) + "\n"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"


def _named(arm: dict) -> str:
    missing = [f"{arm[kind]} {kind}" for kind in ("diverged", "failed") if arm[kind]]
    return arm["name"] + (f" ({', '.join(missing)} of {arm['trials']})" if missing else "")


def p_value(row: dict) -> str:
    """p after Holm's adjustment; a dash where there is none."""
    return "–" if row["p"] is None else f"{row['adjusted']:.3f}" if row["adjusted"] >= 0.001 else "< 0.001"


# ---- over several comparisons ----


def pool(summaries: Mapping[str, dict]) -> dict[str, dict]:
    """For each arm, over several comparisons: in how many it was better, worse or neither, and its mean ratio of distances.

    Distances of different data and features have different scales, so each comparison gives the mean over its seeds of
    log(distance of the arm / distance of its baseline); the pooled ratio is the exponential of their mean, with Student's
    interval over the comparisons, each of which counts once. At equal rate the baseline's distance is its frontier's.

    Args:
        summaries: name of the comparison -> `summarize`.

    Returns:
        {"equal_steps": {arm: row}, "equal_rate": {arm: row}}, row = {"better", "worse", "no difference shown", "not known",
        "ratios": {comparison: ratio}, "ratio": {"mean", "low", "high", "n"}}.

    Raises:
        ValueError: no comparison, or different baselines.
    """
    baselines = {summary["baseline"] for summary in summaries.values()}
    if len(baselines) != 1:
        raise ValueError(f"expected comparisons with one baseline, got {sorted(baselines)} of {len(summaries)} comparisons")
    differences = {name: s["differences"]["frechet"] for name, s in summaries.items()}
    at_rate = {name: s["equal_rate"]["frechet"] for name, s in summaries.items() if s["equal_rate"]}
    return {"equal_steps": _pooled(differences), "equal_rate": _pooled(at_rate)}


def _pooled(tables: Mapping[str, dict[str, dict]]) -> dict[str, dict]:
    measure, pooled = BY_KEY["frechet"], {}
    for name in dict.fromkeys(arm for table in tables.values() for arm in table):
        rows = {comparison: table[name] for comparison, table in tables.items() if name in table}
        verdicts = [verdict(measure, row) for row in rows.values()]
        counts = {word: verdicts.count(word) for word in ("better", "worse", "no difference shown", "not known")}
        logs = {}
        for comparison, row in rows.items():
            pairs = [(b + d, b) for d, b in zip(row["values"], row["baseline"], strict=True) if b > 0 and b + d > 0]
            if pairs:
                logs[comparison] = sum(math.log(x / y) for x, y in pairs) / len(pairs)
        ratio = None
        if logs:
            interval = mean_interval(list(logs.values()), LEVEL)
            ends = {k: None if v is None else math.exp(v) for k, v in interval._asdict().items() if k != "n"}
            ratio = ends | {"n": interval.n}
        pooled[name] = counts | {"ratios": {c: math.exp(v) for c, v in logs.items()}, "ratio": ratio}
    return pooled


def pooled_markdown(pooled: dict[str, dict]) -> str:
    """The table of `pool`: one row for each arm, at equal steps and, where a frontier was trained, at equal rate."""
    header = ["arm", "better", "worse", "no difference shown", "not known", "distance / baseline's", "comparisons"]
    lines = []
    for title, table in (("At equal steps", pooled["equal_steps"]), ("At equal rate", pooled["equal_rate"])):
        if table:
            lines += [f"{title}:", "", _line(header), _line(["---"] * len(header))]
        for name, row in table.items():
            r = row["ratio"]
            ends = f" [{r['low']:.2f}, {r['high']:.2f}]" if r and r["low"] is not None else ""
            ratio = f"{r['mean']:.2f}{ends}" if r else "–"
            lines.append(_line([name, *(row[word] for word in header[1:5]), ratio, r["n"] if r else 0]))
        lines += [""] if table else []
    return "\n".join(lines)


def pooled_predictors(summaries: Mapping[str, dict]) -> list[dict]:
    """Each predictor's rank correlation averaged over the comparisons, strongest first, with Student's interval over them."""
    found: dict[str, list[float]] = {}
    for summary in summaries.values():
        for row in summary["predictors"]:
            if row["rho"] is not None:
                found.setdefault(row["name"], []).append(row["rho"])
    rows = [{"name": name, **mean_interval(rhos, LEVEL)._asdict()} for name, rhos in found.items()]
    return sorted(rows, key=lambda row: abs(row["mean"]), reverse=True)
