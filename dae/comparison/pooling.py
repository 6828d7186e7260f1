"""Several comparisons together: in how many an arm was better, its ratio of distances, and how well predictors rank."""

from __future__ import annotations

import math
from typing import Mapping

from dae.comparison.results import BY_KEY, LEVEL, line, verdict
from dae.statistics import fisher_z, holm, mean_correlation, mean_interval, paired_p_value

OUTCOMES = ("better", "worse", "no difference shown", "not known")
TABLES = {
    "equal_steps": "At equal steps",
    "equal_encoder": "At equal steps of the encoder, against {} instead",
    "equal_rate": "At equal rate",
}


def pool(summaries: Mapping[str, dict]) -> dict[str, dict]:
    """For each arm, over several comparisons: in how many it was better, worse or neither, and its mean ratio of distances.

    Distances of different data and features have different scales, so each comparison gives the mean over its seeds of
    log(distance of the arm / distance of its baseline); the pooled ratio is the exponential of their mean, with Student's
    interval over the comparisons, each of which counts once. A comparison enters with at least two seeds, and at least half of
    those it has: at equal rate, where the baseline's distance is its frontier's, some lie outside.

    Args:
        summaries: name of the comparison -> `summarize`.

    Returns:
        {"equal_steps": {arm: row}, "equal_encoder": ..., "equal_rate": ...}, row = {"better", "worse", "no difference shown",
        "not known", "verdicts": {comparison: one of these}, "ratios": {comparison: ratio}, "ratio": {"mean", "low", "high",
        "n"}, "seeds": those that have a difference, "of": all}. A table is None if no comparison made it.

    Raises:
        ValueError: no comparison, or different baselines.
    """
    baselines = {summary["baseline"] for summary in summaries.values()}
    if len(baselines) != 1:
        raise ValueError(f"expected comparisons with one baseline, got {sorted(baselines)} of {len(summaries)} comparisons")
    tables = {"equal_steps": {name: s["differences"] for name, s in summaries.items()}}
    tables |= {key: {name: s[key] for name, s in summaries.items() if s[key]} for key in ("equal_encoder", "equal_rate")}
    return {key: _pooled({c: t["frechet"] for c, t in of.items()}) if of else None for key, of in tables.items()}


def _pooled(tables: Mapping[str, dict[str, dict]]) -> dict[str, dict]:
    measure, pooled = BY_KEY["frechet"], {}
    for name in dict.fromkeys(arm for table in tables.values() for arm in table):
        rows = {comparison: table[name] for comparison, table in tables.items() if name in table}
        verdicts = {comparison: verdict(measure, row) for comparison, row in rows.items()}
        logs = {}
        for comparison, row in rows.items():
            pairs = [(b + d, b) for d, b in zip(row["values"], row["baseline"], strict=True) if b > 0 and b + d > 0]
            if len(pairs) >= max(2, row["of"] / 2):
                logs[comparison] = sum(math.log(x / y) for x, y in pairs) / len(pairs)
        ratio = None
        if logs:
            interval = mean_interval(list(logs.values()), LEVEL)
            ends = {k: None if v is None else math.exp(v) for k, v in interval._asdict().items() if k != "n"}
            ratio = ends | {"n": interval.n}
        pooled[name] = {word: list(verdicts.values()).count(word) for word in OUTCOMES} | {
            "verdicts": verdicts,
            "ratios": {c: math.exp(v) for c, v in logs.items()},
            "ratio": ratio,
            "seeds": sum(row["n"] for row in rows.values()),
            "of": sum(row["of"] for row in rows.values()),
        }
    return pooled


def pooled_markdown(pooled: dict[str, dict], finetuned: str | None = None) -> str:
    """The tables of `pool`, one row for each arm; `finetuned` is what arms are held against at equal steps of the encoder."""
    header = ["arm", *OUTCOMES, "distance / other's", "comparisons in it", "seeds with a difference"]
    lines = []
    for key, title in TABLES.items():
        if table := pooled[key]:
            lines += [f"{title.format(finetuned)}:", "", line(header), line(["---"] * len(header))]
            for name, row in table.items():
                counted = row["ratio"]["n"] if row["ratio"] else 0
                of = sum(row[word] for word in OUTCOMES)
                cells = [name, *(row[word] for word in OUTCOMES), ratio_in_figures(row), f"{counted} of {of}"]
                lines.append(line([*cells, f"{row['seeds']} of {row['of']}"]))
            lines.append("")
    return "\n".join(lines)


def ratio_in_figures(row: dict) -> str:
    """`0.93 [0.90, 0.96]`; the mean alone of one comparison; a dash of none."""
    r = row["ratio"]
    ends = f" [{r['low']:.2f}, {r['high']:.2f}]" if r and r["low"] is not None else ""
    return f"{r['mean']:.2f}{ends}" if r else "–"


def pooled_predictors(summaries: Mapping[str, dict]) -> list[dict]:
    """Each predictor's rank correlation averaged over the comparisons, in Fisher's z, with Student's interval over them.

    Sorted by how many comparisons know it, then by strength: means over different comparisons are not held against each other.
    "rivals" of the first: the names of those beside it, in as many comparisons, that it cannot be told from (p of the paired
    differences of z over the comparisons, after Holm's adjustment, not below 1 - LEVEL); None without an interval.
    """
    found: dict[str, dict[str, tuple[float, int]]] = {}
    for comparison, summary in summaries.items():
        known = [row for row in summary["predictors"] if row["rho"] is not None]
        for row in known:
            if row["n"] == max(other["n"] for other in known):  # over the trials that all are ranked over
                found.setdefault(row["name"], {})[comparison] = row["rho"], row["n"]
    rows = []
    for name, known in found.items():
        rhos, counts = zip(*known.values(), strict=True)
        rows.append({"name": name, **mean_correlation(rhos, counts, LEVEL)._asdict(), "rivals": None})
    rows.sort(key=lambda row: (-row["n"], -abs(row["mean"])))
    if rows and rows[0]["n"] > 1:
        rows[0]["rivals"] = _rivals(rows, found)
    return rows


def _rivals(rows: list[dict], found: Mapping[str, Mapping[str, tuple[float, int]]]) -> list[str]:
    def strengths(row: dict) -> list[float]:
        """z in each comparison, positive in the predictor's own direction."""
        sign = 1 if row["mean"] >= 0 else -1
        return [sign * fisher_z(rho, n) for rho, n in (found[row["name"]][c] for c in comparisons)]

    comparisons = list(found[rows[0]["name"]])
    others = [row for row in rows[1:] if set(found[row["name"]]) == set(comparisons)]
    p_values = holm([paired_p_value(strengths(rows[0]), strengths(other)) for other in others])
    return [other["name"] for other, p in zip(others, p_values, strict=True) if p >= 1 - LEVEL]
