"""Pool several comparisons: how often an arm won, its mean ratio of distances, and predictors' rank correlations."""

from __future__ import annotations

import math
from typing import Mapping

from dae.comparison.results import BY_KEY, LEVEL, verdict_in_words
from dae.statistics import fisher_z, holm, mean_correlation, mean_interval, paired_p_value

OUTCOMES = ("better", "worse", "no difference shown", "not known")


def pool(summaries: Mapping[str, dict]) -> dict[str, dict | None]:
    """Per arm, over several comparisons: in how many it was better, worse or neither, and its mean ratio of distances.

    Distances of different data and features have different scales, so each comparison gives the mean over its seeds of
    log(distance of the arm / distance of its baseline); the pooled ratio is the exponential of their mean, with Student's
    interval over the comparisons, each counted once. A comparison needs at least two seeds with a difference, and at least half
    of its seeds: at equal rate some lie outside the baseline's frontier.

    Args:
        summaries: results of `summarize_comparison` by name of the comparison.

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
    keys = {"equal_steps": "differences", "equal_encoder": "equal_encoder", "equal_rate": "equal_rate"}
    tables = {key: {name: s[of]["frechet"] for name, s in summaries.items() if s[of]} for key, of in keys.items()}
    return {key: _pooled(table) if table else None for key, table in tables.items()}


def _pooled(tables: Mapping[str, dict[str, dict]]) -> dict[str, dict]:
    pooled = {}
    for name in dict.fromkeys(arm for table in tables.values() for arm in table):
        rows = {comparison: table[name] for comparison, table in tables.items() if name in table}
        verdicts = {comparison: verdict_in_words(BY_KEY["frechet"], row) for comparison, row in rows.items()}
        logs = {}
        for comparison, row in rows.items():
            pairs = [(b + d, b) for d, b in zip(row["values"], row["baseline"], strict=True) if b > 0 and b + d > 0]
            if len(pairs) >= max(2, row["of"] / 2):
                logs[comparison] = sum(math.log(x / y) for x, y in pairs) / len(pairs)
        interval = mean_interval(list(logs.values()), LEVEL)._asdict() if logs else {}
        pooled[name] = {word: list(verdicts.values()).count(word) for word in OUTCOMES} | {
            "verdicts": verdicts,
            "ratios": {comparison: math.exp(log) for comparison, log in logs.items()},
            "ratio": {k: v if k == "n" or v is None else math.exp(v) for k, v in interval.items()} or None,
            "seeds": sum(row["n"] for row in rows.values()),
            "of": sum(row["of"] for row in rows.values()),
        }
    return pooled


def pooled_predictors(summaries: Mapping[str, dict]) -> list[dict]:
    """Each predictor's rank correlation averaged over the comparisons, in Fisher's z, with Student's interval over them.

    Sorted by the number of comparisons that have it, then by strength, since means over different comparisons do not compare.
    "rivals" of the first: predictors in as many comparisons that do not differ from it significantly (p of the paired
    differences of z over the comparisons, after Holm's adjustment, not below 1 - LEVEL); None without an interval.
    """
    found: dict[str, dict[str, tuple[float, int]]] = {}
    for comparison, summary in summaries.items():
        known = [row for row in summary["predictors"] if row["rho"] is not None]
        for row in known:
            if row["n"] == max(other["n"] for other in known):  # over the trials that have every predictor
                found.setdefault(row["name"], {})[comparison] = row["rho"], row["n"]
    rows: list[dict] = []
    for name, pairs in found.items():
        rhos, counts = zip(*pairs.values(), strict=True)
        rows.append({"name": name, **mean_correlation(rhos, counts, LEVEL)._asdict(), "rivals": None})
    rows.sort(key=lambda row: (-row["n"], -abs(row["mean"])))
    if rows and rows[0]["n"] > 1:
        rows[0]["rivals"] = _rivals(rows, found)
    return rows


def _rivals(rows: list[dict], found: Mapping[str, Mapping[str, tuple[float, int]]]) -> list[str]:
    def strengths(row: dict) -> list[float]:
        """z per comparison, positive in the predictor's expected direction."""
        sign = 1 if row["mean"] >= 0 else -1
        return [sign * fisher_z(rho, n) for rho, n in (found[row["name"]][c] for c in comparisons)]

    comparisons = list(found[rows[0]["name"]])
    others = [row for row in rows[1:] if set(found[row["name"]]) == set(comparisons)]
    p_values = holm([paired_p_value(strengths(rows[0]), strengths(other)) for other in others])
    return [other["name"] for other, p in zip(others, p_values, strict=True) if p >= 1 - LEVEL]
