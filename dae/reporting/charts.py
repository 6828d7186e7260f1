"""SVG charts that follow the reader's light or dark colour scheme; `dae.reporting.elements` embeds them in pages.

matplotlib writes fixed colours, so it draws in placeholders that are then replaced by CSS variables; each chart includes the
rules that give these variables their light and dark values.
"""

from __future__ import annotations

import io
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Sequence

import numpy as np

from dae.files import write_file

# Name: (placeholder for matplotlib, light, dark). One table colours the page and its charts.
PALETTE = {
    "ink": ("#010101", "#1c1e21", "#e7e9ec"),
    "soft": ("#020202", "#5f656d", "#a3aab3"),
    "line": ("#030303", "#dcdfe3", "#363b43"),
    "first": ("#040404", "#2a62c9", "#86b1ff"),
    "second": ("#050505", "#c2560c", "#f5a662"),
    "third": ("#060606", "#18794a", "#6fd39b"),
    "fourth": ("#070707", "#8a3fb0", "#cf9bf0"),
    "fifth": ("#080808", "#0b7285", "#62cfe0"),
    "sixth": ("#090909", "#b02a62", "#f593b8"),
}
SERIES_COLOURS = ("first", "second", "third", "fourth", "fifth", "sixth")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">")  # with the colours: thirty pairs before one repeats
CHART_POINTS = 600  # maximum points of a line


def colour_rules() -> str:
    """CSS with a variable per entry of `PALETTE`, for pages and charts."""
    light, dark = ("".join(f"--{name}:{colours[i]};" for name, colours in PALETTE.items()) for i in (1, 2))
    return f":root{{{light}}}@media (prefers-color-scheme:dark){{:root{{{dark}}}}}\n"


@dataclass
class Line:
    """A line of a chart. `colour` names an entry of `PALETTE`; a line with few points shows them."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    colour: str = "first"
    dashed: bool = False


@dataclass
class Bar:
    """A row of an interval chart: an estimate, its interval (None draws none), and the single values behind it."""

    name: str
    mean: float
    low: float | None = None
    high: float | None = None
    values: Sequence[float] = ()


@dataclass
class Series:
    """Points of one series in a frontier chart; `joined` connects them in order of x.

    `style` is the index of its colour and marker, for the same look in all charts of a page; `low` and `high` are the ends of
    the intervals of y, if any.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    style: int = 0
    joined: bool = True
    low: Sequence[float | None] | None = None
    high: Sequence[float | None] | None = None


Panel = Callable[[Any, int], None]  # draws into matplotlib's axes with the colours of a column of `PALETTE`


def in_words(lines: Sequence[Line], x: str, y: str) -> str:
    """Alternative text of a line chart."""
    runs = [f"{a.name} from {a.y[0]:.3g} at {a.x[0]:,} to {a.y[-1]:.3g} at {a.x[-1]:,}" for a in lines]
    return f"Chart of {y} over {x}: " + "; ".join(runs)


def line_chart(
    lines: Sequence[Line], *, x: str, y: str, marks: Sequence[tuple[float, str]] = (), logarithmic: bool = False
) -> str:
    """Line chart with the x axis from 0 and `marks` (x, words) as vertical rules; long lines are averaged to `CHART_POINTS`."""
    drawing, axes = _axes(x, y)
    end = max(value for line in lines for value in line.x)
    axes.set_xlim(0, end * 1.03)
    for line in lines:
        xs, ys = _thin(line.x, line.y)
        style = {"linestyle": (0, (5, 2)) if line.dashed else "-", "marker": "o" if len(xs) <= 30 else None, "markersize": 3.5}
        axes.plot(xs, ys, color=PALETTE[line.colour][0], linewidth=1.7, label=line.name, **style)
    for where, words in marks:
        left = where > end / 2
        axes.axvline(where, color=PALETTE["soft"][0], linewidth=1, linestyle=(0, (2, 2)))
        _note(axes, words, (where, 1), (-5 if left else 5, -4), ha="right" if left else "left", color=PALETTE["soft"][0])
    if marks:
        axes.margins(y=0.14)  # room for the words
    if logarithmic:
        _logarithmic(axes.yaxis, axes.set_yscale)
    if len(lines) > 1:
        _legend(axes, 0, ncols=3)
    return _draw(drawing)


def bar_chart(heights: Sequence[float], *, x: str, y: str, level: tuple[float, str] | None = None) -> str:
    """Bars in the given order, averaged to at most `CHART_POINTS`, and a `level` to compare them with."""
    drawing, axes = _axes(x, y)
    _, values = _thin(range(len(heights)), heights)
    axes.stairs(values, np.linspace(0, len(heights), len(values) + 1), fill=True, color=PALETTE["first"][0])
    axes.set_xlim(0, len(heights))
    axes.set_ylim(bottom=0)
    if level:
        axes.axhline(level[0], color=PALETTE["second"][0], linewidth=1.4, linestyle=(0, (5, 2)))
        _note(axes, level[1], (1, level[0]), (-4, 4), above=True, color=PALETTE["second"][0])
    return _draw(drawing)


def interval_chart(bars: Sequence[Bar], **options: Any) -> str:
    """`interval_panel` as SVG."""
    return _draw(_figure([interval_panel(bars, **options)], [interval_height(bars)], 0))


def frontier_chart(series: Sequence[Series], **options: Any) -> str:
    """`frontier_panel` as SVG."""
    return _draw(_figure([frontier_panel(series, **options)], [3.6], 0))


def save_png(panels: Sequence[Panel], heights: Sequence[float], path: str | Path) -> None:
    """Write the panels stacked vertically, in light colours on white, as a PNG for documents without SVG."""
    file = io.BytesIO()
    _figure(panels, heights, 1).savefig(file, format="png", dpi=160, facecolor="white", metadata={"Software": None})
    write_file(Path(path), file.getvalue())


def interval_panel(
    bars: Sequence[Bar], *, x: str, level: tuple[float, str] | None = (0.0, ""), ends: tuple[str, str] | None = None
) -> Panel:
    """Forest plot: estimates with their intervals, around a vertical rule `level` (x, words).

    Args:
        bars: rows from top to bottom; intervals that exclude the rule are coloured, others grey.
        x: name of the axis.
        level: the rule, such as (0, "no difference"); None draws none.
        ends: labels left and right of the rule, such as ("better", "worse"), instead of its words.
    """

    def draw(axes: Any, scheme: int) -> None:
        ink, soft, first = (PALETTE[name][scheme] for name in ("ink", "soft", "first"))
        _dress(axes, scheme, x, "", grid="x")
        for row, bar in enumerate(bars):
            colour = soft
            if bar.values:
                axes.plot(bar.values, [row + 0.22] * len(bar.values), "|", color=soft, markersize=5, alpha=0.8)
            if bar.low is not None and bar.high is not None:
                colour = soft if level is None or bar.low <= level[0] <= bar.high else first
                axes.plot([bar.low, bar.high], [row, row], color=colour, linewidth=1.9, solid_capstyle="butt")
            axes.plot([bar.mean], [row], "o", color=colour, markersize=6.5)
        axes.set_yticks(range(len(bars)), [bar.name for bar in bars], color=ink)
        axes.tick_params(axis="y", length=0)
        axes.set_ylim(len(bars) - 0.4, -0.75 if level or ends else -0.5)
        axes.margins(x=0.08)
        if level is None:
            return
        axes.axvline(level[0], color=soft, linewidth=1.1, linestyle=(0, (4, 2)), zorder=1)
        for words, side, shift in zip(ends or ("", level[1]), ("right", "left"), (-6, 6), strict=True):
            _note(axes, words, (level[0], 1), (shift, -2), ha=side, color=soft, fontsize=9)

    return draw


def frontier_panel(
    series: Sequence[Series], *, x: str, y: str, level: tuple[float, str] | None = None, logarithmic: bool = False
) -> Panel:
    """Scatter of several series, each with its colour and marker; `level` is a horizontal rule (y, words).

    `logarithmic` applies to x. The axes fit the points and need not start at 0.
    """

    def draw(axes: Any, scheme: int) -> None:
        soft = PALETTE["soft"][scheme]
        _dress(axes, scheme, x, y, grid="y")
        for each in series:
            colour = PALETTE[SERIES_COLOURS[each.style % len(SERIES_COLOURS)]][scheme]
            order = np.argsort(each.x, kind="stable")
            xs, ys = np.asarray(each.x, float)[order], np.asarray(each.y, float)[order]
            if each.low is not None and each.high is not None:
                low, high = (np.array([np.nan if v is None else v for v in ends])[order] for ends in (each.low, each.high))
                axes.vlines(xs, low, high, color=colour, linewidth=1.1, alpha=0.75)
            marker = MARKERS[each.style % len(MARKERS)]
            line = "-" if each.joined else "none"
            axes.plot(xs, ys, color=colour, linestyle=line, linewidth=1.3, marker=marker, markersize=6, label=each.name)
        if level:
            axes.axhline(level[0], color=soft, linewidth=1.1, linestyle=(0, (4, 2)), zorder=1)
            _note(axes, level[1], (1, level[0]), (-4, 4), above=True, color=soft, fontsize=9)
        axes.margins(0.08)
        if logarithmic:
            _logarithmic(axes.xaxis, axes.set_xscale)
        if len(series) > 1:
            _legend(axes, scheme, ncols=4, fontsize=9, handletextpad=0.3, columnspacing=1.2)

    return draw


def interval_height(bars: Sequence[Bar]) -> float:
    """Height in inches for `save_png`."""
    return 0.9 + 0.36 * len(bars)


def _note(axes: Any, words: str, at: tuple[float, float], shift: tuple[float, float], above: bool = False, **style: Any) -> None:
    """Label a rule: beside the top of a vertical one, above the right end of a horizontal one."""
    coordinates = ("axes fraction", "data") if above else ("data", "axes fraction")
    style = ({"ha": "right"} if above else {"va": "top"}) | style
    axes.annotate(words, at, xycoords=coordinates, xytext=shift, textcoords="offset points", **style)


def _legend(axes: Any, scheme: int, **style: Any) -> None:
    axes.legend(loc="lower left", bbox_to_anchor=(-0.02, 1.0), frameon=False, labelcolor=PALETTE["ink"][scheme], **style)


def _thin(x: Sequence[float], y: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    block = math.ceil(len(x) / CHART_POINTS) or 1
    xs, ys = ([np.mean(v[i : i + block]) for i in range(0, len(v), block)] for v in (np.asarray(x), np.asarray(y)))
    return np.array(xs), np.array(ys)


def _figure(panels: Sequence[Panel], heights: Sequence[float], scheme: int) -> Any:
    from matplotlib.figure import Figure  # without pyplot: no global state, no window

    drawing = Figure(figsize=(6.4, sum(heights)), layout="constrained")
    places = drawing.subplots(len(panels), 1, squeeze=False, height_ratios=list(heights))[:, 0]
    for panel, axes in zip(panels, places, strict=True):
        panel(axes, scheme)
    return drawing


def _axes(x: str, y: str) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(5.2, 3.0), layout="constrained")
    axes = drawing.add_subplot()
    _dress(axes, 0, x, y, grid="y")
    return drawing, axes


def _dress(axes: Any, scheme: int, x: str, y: str, grid: str) -> None:
    line, soft = PALETTE["line"][scheme], PALETTE["soft"][scheme]
    axes.set_xlabel(x, color=soft)
    axes.set_ylabel(y, color=soft)
    axes.tick_params(which="both", color=line, labelcolor=soft)
    axes.tick_params(which="minor", length=0)
    axes.grid(axis=grid, color=line, linewidth=0.8)
    axes.set_axisbelow(True)
    for name, spine in axes.spines.items():
        spine.set(visible=name == "bottom", color=line)


def _logarithmic(axis: Any, set_scale: Callable[[str], Any]) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter

    set_scale("log")
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


def _draw(drawing: Any) -> str:
    import matplotlib

    file = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))  # for reproducible files
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "dae"}):
        drawing.savefig(file, format="svg", transparent=True, metadata=nothing)
    svg = re.sub(r"'DejaVu Sans'[^;\"]*", "system-ui, sans-serif", file.getvalue())
    for name, (stand_in, _, _) in PALETTE.items():
        svg = svg.replace(stand_in, f"var(--{name})")
    return svg.replace("<defs>", f"<defs><style>{colour_rules()}</style>", 1)
