"""The page builder: escaping, pictures to the pixel, charts in both colour schemes."""

import base64
import io
import math
import re

import numpy as np
import pytest
from PIL import Image

from dae.reporting.charts import CHART_POINTS, PALETTE, Line, bar_chart, in_words, line_chart
from dae.reporting.elements import (
    LARGEST_SIDE,
    Page,
    chart,
    duration,
    element,
    number,
    paragraph,
    percent,
    spread,
    strip,
    strips,
    table,
    text,
)


def decoded(picture: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(re.search('base64,([^"]*)', picture)[1]))))


def test_only_markup_is_left_as_it_is():
    assert text('<b> & "') == "&lt;b&gt; &amp; &quot;"
    assert text(element("b", "<")) == "<b>&lt;</b>"
    assert element("a", "x", href='"><script>', class_="k", aria_label="y", title=None).count('"') == 6
    assert "&lt;i&gt;" in table(["<i>"], [["a"]]) and "&lt;i&gt;" in strips(
        [("<i>", strip(np.zeros((1, 8, 8, 1), np.uint8), "a"))]
    )


def test_page_writes_sections_with_anchors(tmp_path):
    page = Page("A & B", [paragraph("lead")], [paragraph("foot")])
    page.section("What is it?", paragraph("one"), paragraph("two"))
    words = page.write(tmp_path / "page.html").read_text()
    assert words == page.render() and "<title>A &amp; B</title>" in words
    assert '<a href="#what-is-it">What is it?</a>' in words and '<section id="what-is-it">' in words
    assert words.index("<p>lead") < words.index("<p>one</p><p>two") < words.index("<p>foot")


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("side", "factor"), [(8, 16), (28, 4), (32, 4), (33, 1), (64, 1), (96, 1)])
def test_strip_repeats_pixels_exactly(side, factor, channels):
    images = np.random.default_rng(0).integers(0, 256, (3, side, side, channels)).astype(np.uint8)
    sheet = decoded(strip(images, "three"))
    enlarged = images.repeat(factor, 1).repeat(factor, 2)
    step = (sheet.shape[1] - side * factor) // 2
    for n in range(3):
        part = sheet[:, n * step : n * step + side * factor]
        np.testing.assert_array_equal(part[..., :channels], enlarged[n])
        assert (part[..., channels] == 255).all()
    assert (sheet[..., channels] == 0).sum() == 2 * (step - side * factor) * side * factor


def test_strip_reduces_large_and_keeps_proportions():
    assert decoded(strip(np.full((2, 200, 100, 3), 7, np.uint8), "two")).shape[0] == LARGEST_SIDE
    sheet = decoded(strip(np.full((1, 200, 100, 1), 7, np.uint8), "one"))
    assert sheet.shape == (LARGEST_SIDE, LARGEST_SIDE // 2, 2) and (sheet[..., 0] == 7).all()


def test_charts_follow_the_colour_scheme_and_repeat():
    lines = [Line("a", [1, 2, 3], [1.0, 0.1, 0.01]), Line("b", [3], [0.5], "second", dashed=True)]
    svg = line_chart(lines, x="step", y="loss", marks=[(2, "switch")], logarithmic=True)
    assert svg == line_chart(lines, x="step", y="loss", marks=[(2, "switch")], logarithmic=True)
    assert "switch" in svg and "@media (prefers-color-scheme:dark)" in svg and "var(--second)" in svg
    assert not any(stand_in in svg for stand_in, _, _ in PALETTE.values())
    assert in_words(lines, "step", "loss") == "Chart of loss over step: a from 1 at 1 to 0.01 at 3; b from 0.5 at 3 to 0.5 at 3"
    assert chart(svg, "alt").startswith('<img src="data:image/svg+xml;base64,')


def test_long_charts_stay_small():
    many = range(200 * CHART_POINTS)
    assert len(line_chart([Line("a", many, [math.sin(i) for i in many])], x="step", y="y")) < 100_000
    assert len(bar_chart(sorted(many, reverse=True), x="code", y="tokens", level=(5, "mean"))) < 100_000


def test_numbers():
    assert (number(1234.5), number(None), number(math.nan), percent(0.5), percent(None)) == (
        "1,234.50",
        "–",
        "–",
        "50.0\u00a0%",
        "–",
    )
    assert (spread(1.0, 0.5), spread(1.0, 0.0)) == ("1.00 ± 0.50", "1.00")
    assert [duration(s) for s in (0.94, 42, 130, 9000)] == ["0.9 s", "42 s", "2 min", "2 h 30 min"]
