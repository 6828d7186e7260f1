"""The charts of a comparison, for its page and as one PNG."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Mapping, Sequence

import numpy as np

from dae.reporting import charts
from dae.reporting import elements as web
from dae.reporting.charts import Bar, Panel, Series
from dae.reporting.elements import Html

DISTANCE, RATE = "generation distance", "rate, bits per image"
BITS, SIZE = "bits per image under the prior", "parameters of the prior"


def difference_bars(rows: Mapping[str, dict]) -> list[Bar]:
    """A bar per arm with a mean difference; labels tell if seeds lack a pair."""
    kept = {name: row for name, row in rows.items() if row["mean"] is not None}
    counted = {name: "" if row["n"] == row["of"] else f" ({row['n']} of {row['of']} seeds)" for name, row in kept.items()}
    return [Bar(name + counted[name], row["mean"], row["low"], row["high"], row["values"]) for name, row in kept.items()]


def rate_series(summary: dict, styles: Mapping[str, int], key: str) -> list[Series]:
    """One series per arm: the mean over seeds at each rate, with the range of the seeds."""
    series = []
    for name, style in styles.items():
        by_rate: dict[float, list[tuple[float, float]]] = {}
        for point in summary["frontier"]:
            if point["arm"] == name and point["rate_bits"] is not None and point[key] is not None:
                by_rate.setdefault(point["rate"], []).append((point["rate_bits"], point[key]))
        if by_rate:
            x, y = (np.array([np.mean([p[i] for p in points]) for points in by_rate.values()]) for i in (0, 1))
            low, high = ([end(p[1] for p in points) for points in by_rate.values()] for end in (min, max))
            series.append(Series(name, x.tolist(), y.tolist(), style, True, low, high))
    return series


def size_series(summary: dict, styles: Mapping[str, int], key: str) -> list[Series]:
    """One series per arm: the mean over seeds per size of the prior."""
    rows = {name: [row for row in summary["prior_sizes"] if row["arm"] == name and row[key]] for name in styles}
    found = {
        name: ([row["parameters"] for row in mine], [row[key]["mean"] for row in mine]) for name, mine in rows.items() if mine
    }
    return [Series(name, *points, styles[name]) for name, points in found.items()]


def interval_figure(bars: Sequence[Bar], axis: str, caption: str, **options: Any) -> Html:
    """`interval_chart` with caption, and its numbers as alternative text."""
    words = [f"{b.name} {b.mean:.3g}" + ("" if b.low is None else f" from {b.low:.3g} to {b.high:.3g}") for b in bars]
    drawn = charts.interval_chart(bars, x=axis, **options)
    return web.figure(web.chart(drawn, f"Chart of {axis}: {'; '.join(words)}"), caption)


def frontier_figure(series: Sequence[Series], x: str, y: str, caption: str, **options: Any) -> Html:
    """As `interval_figure`, for a `frontier_chart`; the caption follows the name of the y axis."""
    words = [f"{s.name} {', '.join(f'{b:.3g} at {a:.4g}' for a, b in zip(s.x, s.y, strict=True))}" for s in series]
    drawn = charts.frontier_chart(series, x=x, y=y, **options)
    return web.figure(web.chart(drawn, f"Chart of {y} over {x}: {'; '.join(words)}"), f"{y[0].upper()}{y[1:]} {caption}")


def save_charts(summary: dict, styles: Mapping[str, int], path: Path) -> None:
    """Write a PNG of differences, distance and bits against the rate, and distance by size of the prior."""
    panels: list[tuple[Panel, float]] = []
    for rows, title in ((summary["differences"], "equal steps"), (summary["equal_rate"], "equal rate")):
        if rows and (bars := difference_bars(rows["frechet"])):
            axis = f"{DISTANCE}, minus {summary['baseline']}’s, at {title}"
            panels.append((charts.interval_panel(bars, x=axis, ends=("better", "worse")), charts.interval_height(bars)))
    for key, axis, level in (("frechet", DISTANCE, floor_of(summary)), ("bits", BITS, None)):
        panels.append((charts.frontier_panel(rate_series(summary, styles, key), x=RATE, y=axis, level=level), 3.6))
    if summary["prior_sizes"]:
        series = size_series(summary, styles, "frechet")
        panels.append((charts.frontier_panel(series, x=SIZE, y=DISTANCE, logarithmic=True), 3.6))
    charts.save_png([panel for panel, _ in panels], [height for _, height in panels], path)


def floor_of(summary: dict) -> tuple[float, str]:
    """The distance of real training images, as a chart's level."""
    return summary["facts"]["floor"]["frechet"], "training images"
