"""Charts as SVG that follow the reader's light or dark colour scheme; `dae.report` puts them into pages.

matplotlib writes fixed colours. So it draws in stand-ins, which are then replaced by the CSS variables of one table, and each
chart carries the rules that give those variables their light and dark values.
"""

from __future__ import annotations

import io
import math
import re
from dataclasses import dataclass
from typing import Any, Sequence

import numpy as np

# Name: (stands for it while matplotlib draws, in the light, in the dark). One table colours the page and its charts.
PALETTE = {
    "ink": ("#010101", "#1c1e21", "#e7e9ec"),
    "soft": ("#020202", "#5f656d", "#a3aab3"),
    "line": ("#030303", "#dcdfe3", "#363b43"),
    "first": ("#040404", "#2a62c9", "#86b1ff"),
    "second": ("#050505", "#c2560c", "#f5a662"),
}
CHART_POINTS = 600  # what is kept of a long line


def colour_rules() -> str:
    """CSS that defines a variable for each entry of `PALETTE`, for pages and charts alike."""
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


def in_words(lines: Sequence[Line], x: str, y: str) -> str:
    """What a line chart shows, for those who cannot see it."""
    runs = [f"{a.name} from {a.y[0]:.3g} at {a.x[0]:,} to {a.y[-1]:.3g} at {a.x[-1]:,}" for a in lines]
    return f"Chart of {y} over {x}: " + "; ".join(runs)


def line_chart(
    lines: Sequence[Line], *, x: str, y: str, marks: Sequence[tuple[float, str]] = (), logarithmic: bool = False
) -> str:
    """Lines over an axis from 0, with `marks` (where, words) as vertical rules. Long lines are averaged to `CHART_POINTS`."""
    from matplotlib.ticker import LogLocator, NullFormatter

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
        axes.annotate(
            words, (where, 1), xycoords=("data", "axes fraction"), xytext=(-5 if left else 5, -4), textcoords="offset points",
            ha="right" if left else "left", va="top", color=PALETTE["soft"][0],
        )  # fmt: skip
    if marks:
        axes.margins(y=0.14)  # room for their words
    if logarithmic:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
    if len(lines) > 1:
        axes.legend(loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncols=3, frameon=False, labelcolor=PALETTE["ink"][0])
    return _draw(drawing)


def bar_chart(heights: Sequence[float], *, x: str, y: str, level: tuple[float, str] | None = None) -> str:
    """Bars side by side in the order given, at most `CHART_POINTS` (then each is a mean), and a `level` to compare them with."""
    drawing, axes = _axes(x, y)
    _, values = _thin(range(len(heights)), heights)
    axes.stairs(values, np.linspace(0, len(heights), len(values) + 1), fill=True, color=PALETTE["first"][0])
    axes.set_xlim(0, len(heights))
    axes.set_ylim(bottom=0)
    if level:
        axes.axhline(level[0], color=PALETTE["second"][0], linewidth=1.4, linestyle=(0, (5, 2)))
        axes.annotate(level[1], (1, level[0]), xycoords=("axes fraction", "data"), xytext=(-4, 4), textcoords="offset points",
                      ha="right", color=PALETTE["second"][0])  # fmt: skip
    return _draw(drawing)


def _thin(x: Sequence[float], y: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    block = math.ceil(len(x) / CHART_POINTS) or 1
    return tuple(np.array([np.mean(v[i : i + block]) for i in range(0, len(v), block)]) for v in (np.asarray(x), np.asarray(y)))


def _axes(x: str, y: str) -> tuple[Any, Any]:
    from matplotlib.figure import Figure  # without pyplot: no global state, no window

    drawing = Figure(figsize=(5.2, 3.0), layout="constrained")
    axes = drawing.add_subplot()
    axes.set_xlabel(x, color=PALETTE["soft"][0])
    axes.set_ylabel(y, color=PALETTE["soft"][0])
    axes.tick_params(which="both", color=PALETTE["line"][0], labelcolor=PALETTE["soft"][0])
    axes.tick_params(which="minor", length=0)
    axes.grid(axis="y", color=PALETTE["line"][0], linewidth=0.8)
    axes.set_axisbelow(True)
    for name, spine in axes.spines.items():
        spine.set(visible=name == "bottom", color=PALETTE["line"][0])
    return drawing, axes


def _draw(drawing: Any) -> str:
    import matplotlib

    file = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))  # equal data give equal files
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "dae"}):
        drawing.savefig(file, format="svg", transparent=True, metadata=nothing)
    svg = re.sub(r"'DejaVu Sans'[^;\"]*", "system-ui, sans-serif", file.getvalue())
    for name, (stand_in, _, _) in PALETTE.items():
        svg = svg.replace(stand_in, f"var(--{name})")
    return svg.replace("<defs>", f"<defs><style>{colour_rules()}</style>", 1)
