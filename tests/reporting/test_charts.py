"""Interval and frontier charts: well-formed, in both colour schemes, with every name, mark and point in them."""

import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from PIL import Image

from dae.reporting.charts import (
    MARKERS,
    PALETTE,
    SERIES_COLOURS,
    Bar,
    Series,
    frontier_chart,
    frontier_panel,
    interval_chart,
    interval_panel,
    save_png,
)

BARS = [Bar("linear", -2.0, -3.0, -1.0, (-2.5, -1.5)), Bar("narrow", 0.5, -1.0, 2.0), Bar("alone", 1.0)]
SERIES = [Series("joint", [40.0, 20.0, 30.0], [9.0, 12.0, 10.0], 0), Series("dae", [25.0], [8.0], 1, False, [7.0], [9.0])]


def test_interval_chart_names_all_rows_and_the_rule():
    svg = interval_chart(BARS, x="difference", ends=("better", "worse"))
    ElementTree.fromstring(svg)
    assert all(words in svg for words in ("linear", "narrow", "alone", "difference", "better", "worse"))
    assert not any(stand_in in svg for stand_in, _, _ in PALETTE.values())
    assert svg == interval_chart(BARS, x="difference", ends=("better", "worse"))
    assert "chance" in interval_chart(BARS, x="difference", level=(0.5, "chance"))


def test_only_an_interval_without_the_rule_is_in_colour():
    def coloured(*bars):
        return interval_chart(bars, x="x").split("</defs>", 1)[1].count("var(--first)")

    assert coloured(BARS[0]) > 0 and coloured(BARS[1]) == 0 and coloured(BARS[2]) == 0


def test_frontier_chart_tells_series_apart_by_colour_and_marker():
    many = [Series(f"arm {i}", [1.0, 2.0], [i, i + 1.0], i) for i in range(8)]
    svg = frontier_chart(many, x="rate", y="distance", level=(3.0, "floor"))
    ElementTree.fromstring(svg)
    assert all(f"arm {i}" in svg for i in range(8)) and "floor" in svg
    assert all(f"var(--{name})" in svg for name in SERIES_COLOURS)
    styles = {(SERIES_COLOURS[i % len(SERIES_COLOURS)], MARKERS[i % len(MARKERS)]) for i in range(30)}
    assert len(styles) == 30


def test_logarithmic_is_about_x():
    from matplotlib.figure import Figure

    axes = Figure().add_subplot()
    frontier_panel(SERIES, x="rate", y="distance", logarithmic=True)(axes, 0)
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "linear")


def test_points_are_joined_in_the_order_of_x():
    from matplotlib.figure import Figure

    axes = Figure().add_subplot()
    frontier_panel(SERIES, x="rate", y="distance")(axes, 0)
    joint, dae = axes.get_lines()
    assert list(joint.get_xdata()) == [20.0, 30.0, 40.0] and list(joint.get_ydata()) == [12.0, 10.0, 9.0]
    assert joint.get_linestyle() == "-" and dae.get_linestyle() == "None"


@pytest.mark.parametrize("panels", [1, 2])
def test_png_is_opaque_and_light(tmp_path, panels):
    drawn = [interval_panel(BARS, x="difference"), frontier_panel(SERIES, x="rate", y="distance")][:panels]
    save_png(drawn, [2.0, 3.0][:panels], tmp_path / "chart.png")
    pixels = np.asarray(Image.open(tmp_path / "chart.png").convert("RGBA"))
    assert pixels.shape[:2] == (160 * (2, 5)[panels - 1], 1024) and (pixels[..., 3] == 255).all()
    blue = tuple(int(PALETTE["first"][1][i : i + 2], 16) for i in (1, 3, 5))
    assert (pixels[..., :3] == blue).all(-1).any() and (pixels[0, 0, :3] == 255).all()
