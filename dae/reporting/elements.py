"""Elements of self-contained HTML pages: numbers, tables, pictures and charts, without network or JavaScript.

Everything but `Html` is escaped, so class names and configuration values cannot break a page. Pictures are PNG and charts SVG,
both as `data:` URLs; the page and each chart define light and dark colours.
"""

from __future__ import annotations

import base64
import html
import io
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Sequence

import numpy as np

from dae.config import Config, config_differences
from dae.files import write_file
from dae.progress import duration as duration
from dae.reporting.charts import bar_chart, colour_rules

PICTURE_SIDE, LARGEST_SIDE = 64, 96  # CSS pixels of a small picture, maximum pixels of a large one
STYLE = Path(__file__).with_name("style.css")


class Html(str):
    """Markup that needs no escaping."""


def text(value: Any) -> Html:
    """`value` as markup: escaped, unless it is `Html` already."""
    return value if isinstance(value, Html) else Html(html.escape(str(value)))


def join(parts: Sequence[Any], separator: str = "") -> Html:
    return Html(separator.join(text(part) for part in parts))


def element(tag: str, *content: Any, **attributes: Any) -> Html:
    """`<tag attributes>content</tag>`; `class_` is `class`, `aria_label` is `aria-label`; None is omitted."""
    given = {k.rstrip("_").replace("_", "-"): html.escape(str(v)) for k, v in attributes.items() if v is not None}
    pairs = "".join(f' {name}="{value}"' for name, value in given.items())
    return Html(f"<{tag}{pairs}>" + ("" if tag == "img" else f"{join(content)}</{tag}>"))


def link(words: str, address: str) -> Html:
    return element("a", words, href=address)


PAPER = link("Hu et al., “Complexity Matters”, NeurIPS 2023", "https://arxiv.org/abs/2307.08283")


def paragraph(*parts: Any, class_: str | None = None) -> Html:
    return element("p", *parts, class_=class_)


def tiles(entries: Sequence[tuple[Any, Any, Any]]) -> Html:
    """Headline numbers, each as (number, name, comparison)."""
    cells = [
        element("div", element("dt", name), element("dd", value, class_="number"), element("dd", baseline), class_="tile")
        for value, name, baseline in entries
    ]
    return element("dl", *cells, class_="tiles")


def table(
    header: Sequence[Any], rows: Sequence[Sequence[Any]], *, prose: Sequence[int] = (0,), marked: Sequence[int] = ()
) -> Html:
    """A scrollable table; columns in `prose` are text, the others numbers; rows in `marked` are highlighted."""

    def row(values: Sequence[Any], tag: str, class_: str | None = None) -> Html:
        cells = [element(tag, value, class_="prose" if i in prose else None) for i, value in enumerate(values)]
        return element("tr", *cells, class_=class_)

    body = [row(values, "td", "marked" if i in marked else None) for i, values in enumerate(rows)]
    inner = element("table", element("thead", row(header, "th")), element("tbody", *body))
    return element("div", inner, class_="scroll", tabindex=0)


def figure(content: Html, *caption: Any) -> Html:
    return element("figure", content, element("figcaption", *caption))


def side_by_side(*figures: Html) -> Html:
    return element("div", *figures, class_="pair")


def configuration(config: Config, title: str | None = None) -> Html:
    """The resolved configuration as YAML, collapsed."""
    from omegaconf import OmegaConf

    changed = len(config_differences(Config(), config))
    summary = element("summary", title or f"The resolved configuration ({changed} keys differ from the defaults)")
    words = element("pre", OmegaConf.to_yaml(OmegaConf.structured(config)))
    return element("details", summary, element("div", words, class_="scroll", tabindex=0))


@dataclass
class Page:
    """A page: title, lead, list of sections, sections, footer."""

    title: str
    lead: Sequence[Html] = ()
    footer: Sequence[Html] = ()
    sections: list[tuple[str, Html]] = field(default_factory=list)

    def section(self, heading: str, *content: Html) -> None:
        self.sections.append((heading, join(content)))

    def render(self) -> str:
        names = [re.sub(r"\W+", "-", heading.lower()).strip("-") for heading, _ in self.sections]
        contents = [link(heading, f"#{name}") for name, (heading, _) in zip(names, self.sections, strict=True)]
        body = [element("section", element("h2", h), c, id=n) for n, (h, c) in zip(names, self.sections, strict=True)]
        head = element("header", element("h1", self.title), *self.lead)
        main = element("main", head, element("nav", *contents, aria_label="Sections"), *body, element("footer", *self.footer))
        # The policy forbids every request: nothing can be loaded, not even by mistake.
        policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
        return (
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            '<meta name="color-scheme" content="light dark">\n'
            f"{element('title', self.title)}\n<style>\n{colour_rules()}\n{STYLE.read_text()}</style>\n</head>\n"
            f"<body>\n{main}\n</body>\n</html>\n"
        )

    def write(self, path: str | Path) -> Path:
        write_file(Path(path), self.render().encode())
        return Path(path)


# ---- pictures ----


def per_row(side: int) -> int:
    """Maximum number of pictures with this side in a strip."""
    return 12 if side <= PICTURE_SIDE else 8


def strip(images_NHWC: np.ndarray, alt: str) -> Html:
    """One row of pictures as one PNG, with transparent gaps.

    Small pictures are enlarged by whole factors, repeating pixels, so that browsers do not blur them; those above
    `LARGEST_SIDE` pixels are reduced to it, to keep pages small.
    """
    from PIL import Image

    N, H, W, C = images_NHWC.shape
    side = max(H, W)
    if side > LARGEST_SIDE:
        size = (max(1, round(W * LARGEST_SIDE / side)), max(1, round(H * LARGEST_SIDE / side)))
        reduced = [Image.fromarray(x[..., 0] if C == 1 else x).resize(size, Image.Resampling.BOX) for x in images_NHWC]
        images_NHWC = np.stack([np.asarray(x).reshape(size[1], size[0], C) for x in reduced])
    elif side <= PICTURE_SIDE // 2:
        images_NHWC = images_NHWC.repeat(2 * PICTURE_SIDE // side, 1).repeat(2 * PICTURE_SIDE // side, 2)
    N, H, W, C = images_NHWC.shape
    shown = min(max(side, PICTURE_SIDE), LARGEST_SIDE)
    gap = max(1, round(4 * max(H, W) / shown))
    opaque = np.concatenate([images_NHWC, np.full((N, H, W, 1), 255, np.uint8)], 3)
    sheet = np.concatenate(np.pad(opaque, ((0, 0), (0, 0), (0, gap), (0, 0))), 1)[:, :-gap]
    file = io.BytesIO()
    Image.fromarray(sheet).save(file, "PNG", optimize=True)
    width = round(sheet.shape[1] * shown / max(H, W))
    return _image("image/png", file.getvalue(), alt=alt, style=f"width:{width}px")


def strips(rows: Sequence[tuple[Any, Html]]) -> Html:
    """Labelled rows of pictures: (label, `strip`); on a phone long labels are above the pictures."""
    longest = max(len(str(label)) for label, _ in rows)
    cells = [element("div", label, class_="label") + element("div", picture) for label, picture in rows]
    return element("div", *map(Html, cells), class_="strips long" if longest > 4 else "strips" if longest else "strips bare")


def _image(kind: str, data: bytes, **attributes: Any) -> Html:
    return element("img", src=f"data:{kind};base64,{base64.b64encode(data).decode()}", **attributes)


def chart(svg: str, alt: str) -> Html:
    """Embed a chart at full width, as an image so that its ids cannot clash with the page's."""
    return _image("image/svg+xml", svg.encode(), alt=alt, class_="chart")


def ranked_bars(values: Sequence[float], x: str, y: str, alt: str, caption: str, meaning: str) -> Html:
    """Bars of ranked values with a rule at their mean, beside a paragraph."""
    svg = bar_chart(values, x=x, y=y, level=(sum(values) / len(values), "if all were equal"))
    return side_by_side(figure(chart(svg, alt), caption), paragraph(meaning))


def code_usage(counts: Sequence[int], meaning: str) -> Html:
    """`ranked_bars` of code frequencies."""
    ranked = sorted(counts, reverse=True)
    alt = f"Bars from {ranked[0]:,} tokens for the commonest code to {ranked[-1]:,} for the rarest"
    caption = f"How often each code is used in {sum(ranked):,} tokens of held-out images, most frequent first."
    return ranked_bars(ranked, "code, by rank", "tokens", alt, caption, meaning)


# ---- numbers ----


def number(value: float | None, digits: int = 2) -> str:
    """`1,234.50`; a dash if unknown or not finite."""
    return "–" if value is None or not math.isfinite(value) else f"{value:,.{digits}f}"


def percent(share: float | None) -> str:
    return "–" if share is None else f"{number(100 * share, 1)}\u00a0%"


def spread(mean: float, deviation: float, digits: int = 2) -> str:
    """`mean ± deviation`; only the mean if the deviation is 0, which means unknown."""
    return number(mean, digits) + (f" ± {number(deviation, digits)}" if deviation else "")
