"""Self-contained HTML pages: numbers, tables, pictures and charts in one file that needs no network and no JavaScript.

Whatever is not `Html` is escaped where it enters a page, so class names and configuration values cannot break one. Pictures
are PNG and charts SVG, both inside `data:` addresses; the page and each chart carry their colours for light and for dark.
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

from dae.files import write_file
from dae.reporting.charts import colour_rules

PICTURE_SIDE, LARGEST_SIDE = 64, 96  # CSS pixels of a small picture, pixels kept of a large one


class Html(str):
    """Markup that is safe to put into a page as it is."""


def text(value: Any) -> Html:
    """`value` as markup: escaped, unless it is `Html` already."""
    return value if isinstance(value, Html) else Html(html.escape(str(value)))


def join(parts: Sequence[Any], separator: str = "") -> Html:
    return Html(separator.join(text(part) for part in parts))


def element(tag: str, *content: Any, **attributes: Any) -> Html:
    """`<tag attributes>content</tag>`; `class_` is `class`, `aria_label` is `aria-label`, what is None is left out."""
    names = {k: k.rstrip("_").replace("_", "-") for k in attributes}
    pairs = "".join(f' {names[k]}="{html.escape(str(v))}"' for k, v in attributes.items() if v is not None)
    return Html(f"<{tag}{pairs}>" + ("" if tag == "img" else f"{join(content)}</{tag}>"))


def link(words: str, address: str) -> Html:
    return element("a", words, href=address)


PAPER = link("Hu et al., “Complexity Matters”, NeurIPS 2023", "https://arxiv.org/abs/2307.08283")


def paragraph(*parts: Any, class_: str | None = None) -> Html:
    return element("p", *parts, class_=class_)


def tiles(entries: Sequence[tuple[Any, Any, Any]]) -> Html:
    """Headline numbers, each as (number, what it is, what to hold it against)."""
    cells = [
        element("div", element("dt", name), element("dd", number, class_="number"), element("dd", yardstick), class_="tile")
        for number, name, yardstick in entries
    ]
    return element("dl", *cells, class_="tiles")


def table(
    header: Sequence[Any], rows: Sequence[Sequence[Any]], *, prose: Sequence[int] = (0,), marked: Sequence[int] = ()
) -> Html:
    """A table that scrolls in its own box; columns in `prose` are words, the others numbers; rows in `marked` stand out."""

    def row(cells: Sequence[Any], tag: str, class_: str | None = None) -> Html:
        return element(
            "tr", *(element(tag, c, class_="prose" if i in prose else None) for i, c in enumerate(cells)), class_=class_
        )

    body = [row(cells, "td", "marked" if number in marked else None) for number, cells in enumerate(rows)]
    inner = element("table", element("thead", row(header, "th")), element("tbody", *body))
    return element("div", inner, class_="scroll", tabindex=0)


def figure(content: Html, *caption: Any) -> Html:
    return element("figure", content, element("figcaption", *caption))


def side_by_side(*figures: Html) -> Html:
    return element("div", *figures, class_="pair")


def details(summary: str, *content: Any) -> Html:
    return element("details", element("summary", summary), *content)


def preformatted(words: str) -> Html:
    return element("div", element("pre", words), class_="scroll", tabindex=0)


@dataclass
class Page:
    """One page, from top to bottom.

    Args:
        title: heading and name of the window.
        lead: what stands under the heading, before the list of sections.
        footer: last lines.
    """

    title: str
    lead: Sequence[Html] = ()
    footer: Sequence[Html] = ()
    sections: list[tuple[str, Html]] = field(default_factory=list)

    def section(self, heading: str, *content: Html) -> None:
        self.sections.append((heading, join(content)))

    def render(self) -> str:
        names = [re.sub(r"\W+", "-", heading.lower()).strip("-") for heading, _ in self.sections]
        contents = element(
            "nav", *(link(h, f"#{n}") for n, (h, _) in zip(names, self.sections, strict=True)), aria_label="Sections"
        )
        body = [element("section", element("h2", h), c, id=n) for n, (h, c) in zip(names, self.sections, strict=True)]
        head = element("header", element("h1", self.title), *self.lead)
        main = element("main", head, contents, *body, element("footer", *self.footer))
        # The policy forbids every request: a page that tried to load something would show it as missing, not fetch it.
        policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
        return (
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            '<meta name="color-scheme" content="light dark">\n'
            f"{element('title', self.title)}\n<style>\n{colour_rules()}{STYLE}</style>\n</head>\n"
            f"<body>\n{main}\n</body>\n</html>\n"
        )

    def write(self, path: str | Path) -> Path:
        write_file(Path(path), self.render().encode())
        return Path(path)


# ---- pictures ----


def per_row(side: int) -> int:
    """How many pictures of so many pixels a strip holds at most."""
    return 12 if side <= PICTURE_SIDE else 8


def strip(images_NHWC: np.ndarray, alt: str) -> Html:
    """One row of pictures as one PNG, with transparent gaps.

    Small pictures are enlarged to whole multiples here, by repeating pixels, so that a browser never blurs them; those above
    `LARGEST_SIDE` pixels are reduced to it, so that a page stays small.
    """
    from PIL import Image

    N, H, W, C = images_NHWC.shape
    side = max(H, W)
    if side > LARGEST_SIDE:
        size = (max(1, round(W * LARGEST_SIDE / side)), max(1, round(H * LARGEST_SIDE / side)))
        reduced = [Image.fromarray(x[..., 0] if C == 1 else x).resize(size, Image.Resampling.BOX) for x in images_NHWC]
        images_NHWC, factor = np.stack([np.asarray(x).reshape(size[1], size[0], C) for x in reduced]), 1
    else:
        factor = max(1, 2 * PICTURE_SIDE // side) if side <= PICTURE_SIDE // 2 else 1
        images_NHWC = images_NHWC.repeat(factor, 1).repeat(factor, 2)
    N, H, W, C = images_NHWC.shape
    shown = side if PICTURE_SIDE < side <= LARGEST_SIDE else LARGEST_SIDE if side > LARGEST_SIDE else PICTURE_SIDE
    gap = max(1, round(4 * max(H, W) / shown))
    sheet = np.zeros((H, N * (W + gap) - gap, C + 1), np.uint8)
    for n, image in enumerate(images_NHWC):
        sheet[:, n * (W + gap) : n * (W + gap) + W, :C] = image
        sheet[:, n * (W + gap) : n * (W + gap) + W, C] = 255
    file = io.BytesIO()
    Image.fromarray(sheet).save(file, "PNG", optimize=True)
    width = round(sheet.shape[1] * shown / max(H, W))
    return element("img", src=_data_address("image/png", file.getvalue()), alt=alt, style=f"width:{width}px")


def strips(rows: Sequence[tuple[Any, Html]]) -> Html:
    """Labelled rows of pictures: (label, `strip`); where labels are long they stand above the pictures on a phone."""
    longest = max(len(str(label)) for label, _ in rows)
    cells = [element("div", label, class_="label") + element("div", picture) for label, picture in rows]
    return element("div", *map(Html, cells), class_="strips long" if longest > 4 else "strips" if longest else "strips bare")


def _data_address(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def chart(svg: str, alt: str) -> Html:
    """A chart of `dae.reporting.charts`, as wide as its place. It is an image, so its names cannot meet those of the page."""
    return element("img", src=_data_address("image/svg+xml", svg.encode()), alt=alt, class_="chart")


# ---- numbers ----


def number(value: float | None, digits: int = 2) -> str:
    """`1,234.50`; a dash for what is not known or not finite."""
    return "–" if value is None or not math.isfinite(value) else f"{value:,.{digits}f}"


def percent(share: float | None) -> str:
    return "–" if share is None else f"{number(100 * share, 1)}\u00a0%"


def spread(mean: float, deviation: float, digits: int = 2) -> str:
    """`mean ± deviation`; the mean alone where the deviation is 0, which stands for not known."""
    return number(mean, digits) + (f" ± {number(deviation, digits)}" if deviation else "")


def duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


# ---- style ----


STYLE = """
:root{color-scheme:light dark;--page:#fff;--card:#f6f7f8}
@media (prefers-color-scheme:dark){:root{--page:#131518;--card:#1b1e23}}
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%}
body{margin:0;background:var(--page);color:var(--ink);
 font:1rem/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Noto Sans",sans-serif}
main{max-width:66rem;margin:0 auto;padding:clamp(1rem,4vw,3rem)}
h1{font-size:clamp(1.6rem,4vw,2.4rem);line-height:1.15;letter-spacing:-.02em;margin:0 0 1rem}
h2{font-size:1.35rem;letter-spacing:-.01em;margin:3.2rem 0 .6rem}
h3{font-size:1.02rem;margin:2rem 0 .4rem}
p,ul{max-width:70ch;margin:.6rem 0}
header p{font-size:1.06rem}
a{color:var(--first)}
nav{display:flex;flex-wrap:wrap;gap:.2rem 1.1rem;margin-top:1.4rem;font-size:.92rem}
.notice{border-left:.25rem solid var(--second);padding:.5rem .9rem;background:var(--card)}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(11.2rem,1fr));gap:.8rem;margin:1rem 0}
.tile{display:flex;flex-direction:column;background:var(--card);border-radius:.6rem;padding:.9rem 1rem}
.tile dt{font-weight:600;font-size:.9rem;line-height:1.3}
.tile dt{margin-bottom:.25rem}
.tile dd{margin:0;color:var(--soft);font-size:.85rem;line-height:1.4}
.tile .number{order:-1;overflow-wrap:anywhere;color:var(--ink);
 font-size:1.9rem;font-weight:650;letter-spacing:-.02em;line-height:1.3;font-variant-numeric:tabular-nums}
figure{margin:1.2rem 0;min-width:0}
figcaption{color:var(--soft);font-size:.88rem;line-height:1.45;max-width:75ch;margin-top:.5rem}
img{display:block;max-width:100%;height:auto}
.chart{width:100%}
.pair{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,25rem),1fr));gap:0 2.5rem}
.strips{display:grid;grid-template-columns:minmax(1.5rem,max-content) minmax(0,1fr);gap:.3rem .8rem;align-items:center}
.strips .label{color:var(--soft);font-size:.88rem;line-height:1.25;font-variant-numeric:tabular-nums;overflow-wrap:anywhere}
.strips.long{grid-template-columns:7.5rem minmax(0,1fr)}
.strips.bare{grid-template-columns:minmax(0,1fr)}.strips.bare .label{display:none}
.scroll{overflow-x:auto;margin:.8rem 0}
table{border-collapse:collapse;font-size:.9rem;font-variant-numeric:tabular-nums;min-width:min(100%,30rem)}
th,td{text-align:right;padding:.4rem .8rem;border-bottom:1px solid var(--line);vertical-align:top;white-space:nowrap}
th{color:var(--soft);font-weight:600;vertical-align:bottom;white-space:normal}
th.prose,td.prose{text-align:left;white-space:normal}
th:first-child,td:first-child{padding-left:0}
td.prose:last-child{min-width:16rem}
.marked td{background:var(--card);font-weight:650}
details{margin:1rem 0}
summary{cursor:pointer;font-weight:600}
pre{font:.82rem/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;
 background:var(--card);border-radius:.6rem;padding:1rem;margin:0;width:max-content;min-width:100%}
footer{margin-top:4rem;padding-top:1rem;border-top:1px solid var(--line);color:var(--soft);font-size:.88rem}
@media (max-width:40rem){.strips.long{grid-template-columns:minmax(0,1fr);gap:.2rem}.strips.long .label{margin-top:.5rem}
.tiles{grid-template-columns:repeat(auto-fit,minmax(9rem,1fr))}
table{font-size:.84rem;min-width:0}th,td{padding:.35rem .5rem}td.prose:last-child{min-width:8.5rem}}
"""
