"""The page of recipes/measure_latent.py, for readers who do not know the paper."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dae.complexity.estimate import Estimate
from dae.complexity.measurement import FAMILIES, GAP_CLOSED, Choice, Measurement
from dae.data.pictures import grid, to_uint8, write_png
from dae.metrics import versions
from dae.reporting import elements as web
from dae.reporting.charts import Series, frontier_chart, frontier_panel, save_png
from dae.reporting.elements import PAPER, Html, element, number, paragraph
from dae.reporting.prose import paragraphs, read_prose

PROSE = read_prose(__file__)
DISTANCES = {  # title and meaning
    name.removeprefix("distance "): (title, meaning)
    for name, words in PROSE.items()
    if name.startswith("distance ")
    for title, _, meaning in [words.partition(": ")]
}


def _title_of(measured: Measurement, name: str) -> str:
    """A latent's name, without parent folders unless two names would be the same."""
    return _shortened(name) if sum(_shortened(a.name) == _shortened(name) for a in measured.latents) == 1 else name


def _shortened(name: str) -> str:
    kind, colon, path = name.partition(":")
    if not colon or "/" not in path:
        return name
    parts = [part for part in Path(path).parts if part != "autoencoder"]
    return f"{kind}: {parts[-1] if parts else path}"


def write_latents_page(measured: Measurement, folder: Path) -> list[str]:
    """Write latents.html, curves-<distance>.png and pictures-<latent>.png into `folder`; returns the names of the PNG."""
    page = web.Page("Which latent needs the simplest generator?", _lead(measured))
    page.section("What is compared", _latents(measured))
    page.section("The answer", _answer(measured), *(part for d in measured.baselines for part in _table_of(measured, d)))
    page.section("How strong must the generator be?", *_strength(measured))
    page.section("Pictures", *_pictures(measured))
    page.section("Shape alone", *_shape(measured))
    page.section("What these numbers do not say", _limits(measured))
    page.section("How it was measured", *_method(measured))
    page.footer = paragraphs(PROSE["footer"], paper=PAPER)
    page.write(folder / "latents.html")
    return _write_pictures(measured, folder)


# ---- sections, in their order on the page ----


def _lead(measured: Measurement) -> list[Html]:
    _, C, H, W = measured.images.shape
    names = sorted({FAMILIES[name].name for name in measured.config.measure.families})
    fitted, judged = _counts(measured)
    seeds = len(measured.config.measure.seeds)
    times = "once" if seeds == 1 else f"{seeds} times with another split and another start (seeds)"
    use = f"trained on {fitted:,} and judged on {judged:,} others"
    if judged == len(measured.images):
        use = "computed from and judged on all of them"
    return paragraphs(
        PROSE["lead"], families=" and ".join(names), data=measured.data["name"], paper=PAPER, use=use, times=times,
        distance=web.join(["D", element("sup", "G")]), images=len(measured.images), height=H, width=W,
        colour="grey" if C == 1 else "colour", duration=web.duration(measured.seconds),
    )  # fmt: skip


def _certainty(measured: Measurement, mark: str = "± is the") -> str:
    many = len(measured.config.measure.seeds) > 1
    return f"{mark} {PROSE['certainty']}" if many else "Measured with one seed, which tells no spread."


def _margin(estimate: Estimate) -> float:
    return max(estimate.std, estimate.standard_error or 0.0)


def _counts(measured: Measurement) -> tuple[int, int]:
    """Numbers of fitting and measuring rows of the generators; all rows if every distance was computed from moments."""
    return min(e.counts for curve in measured.curves.values() for e in curve.estimates)


def _answer(measured: Measurement) -> Html:
    """Tiles for the first distance that all latents have."""
    distance = next((d for d in measured.baselines if d != "reconstruction"), next(iter(measured.baselines)))
    entries = []
    for name in measured.config.measure.families:
        choice = FAMILIES[name]
        for position, index in (("weakest", 0), ("strongest", -1)):
            ranked = sorted(measured.of(distance, name).items(), key=lambda pair: pair[1].estimates[index].value)
            found = [(_title_of(measured, latent), curve.estimates[index]) for latent, curve in ranked]
            words = f"nearest with the {position} {choice.name} ({choice.knob} {choice.capacities[index]:g})"
            entries.append(tile(found, words))
    note = PROSE["answer"].format(distance=DISTANCES[distance][0])
    return web.join([web.figure(web.tiles(entries), note), *_unequal(measured)])


def _unequal(measured: Measurement) -> list[Html]:
    """A warning if codes have different numbers of values, with the effect on each kind of family."""
    sizes = sorted({latent.codes[0].numel() for latent in measured.latents})
    if len(sizes) == 1:
        return []
    words = [PROSE["lengths"].format(shortest=sizes[0], longest=sizes[-1])]
    for limited, kind in ((True, "limited"), (False, "not limited")):
        families = [FAMILIES[f].name for f in measured.config.measure.families if FAMILIES[f].stretch is limited]
        if families:
            words.append(PROSE[f"lengths, stretch {kind}"].format(families=" and ".join(families)))
    return [paragraph(element("b", "Codes of different lengths. "), " ".join(words))]


def tile(ranked: Sequence[tuple[str, Estimate]], words: str) -> tuple[str, str, str]:
    """The best latent, or all not distinguishable from it: not ahead with each seed, or by less than twice the error."""
    (first, best), *others = ranked
    tied = [name for name, e in others if not _ahead(best, e)]
    places = _decimals([e.value for _, e in ranked])
    runner_up = f"; next {others[0][0]}, {_plus_minus(others[0][1], places)}" if others else "; the only latent"
    if len(best.values) == 1:
        return first, words, f"{_plus_minus(best, places)}{runner_up}; one seed, so how sure this is is not known"
    if tied:
        name = f"{first} or {tied[0]}" if len(tied) == 1 else "no clear winner"
        return name, words, f"{first}, {_plus_minus(best, places)}; tied with {', '.join(tied)}"
    return first, words, f"{_plus_minus(best, places)}{runner_up}; ahead with each of {len(best.values)} seeds"


def _ahead(best: Estimate, other: Estimate) -> bool:
    leads = [b - a for a, b in zip(best.values, other.values, strict=True)]
    of_seeds = statistics.stdev(leads) / math.sqrt(len(leads)) if len(leads) > 1 else 0.0
    error = max(of_seeds, math.hypot(best.standard_error or 0.0, other.standard_error or 0.0))
    return min(leads) > 0 and statistics.fmean(leads) >= 2 * error


def _table_of(measured: Measurement, distance: str) -> list[Html]:
    """Latents x families at the lowest and highest capacity, with baselines."""
    families, marks = measured.config.measure.families, measured.baselines[distance]
    columns = [(name, index) for name in families for index in (0, -1)]
    header = ["latent"] + [f"{FAMILIES[n].name}, {FAMILIES[n].knob} {FAMILIES[n].capacities[i]:g}" for n, i in columns]
    curves = {name: measured.of(distance, name) for name in families}
    shown = [curve.estimates[i] for n, i in columns for curve in curves[n].values()]
    places = _decimals([e.value for e in shown])
    lowest = {(name, i): min(curve.estimates[i].value for curve in curves[name].values()) for name, i in columns}
    rows = []
    for latent in curves[families[0]]:
        cells: list[Any] = [_title_of(measured, latent)]
        for name, i in columns:
            estimate = curves[name][latent].estimates[i]
            words = _plus_minus(estimate, places)
            cells.append(element("strong", words) if estimate.value == lowest[name, i] else words)
        rows.append(cells)
    for key, words in (("real", "real images instead, for comparison"), ("average", "the average image, again and again")):
        if key in marks and (key, distance) != ("real", "reconstruction"):
            rows.append([element("i", words)] + [_plus_minus(marks[key], places)] * len(columns))
    title, meaning = DISTANCES[distance]
    caption = f"{title}: {meaning}. Lower is better; the lowest of a column is bold. {_certainty(measured)} "
    of = {name: next(iter(curves[name].values())).estimates[0].bound for name in families}
    for bound in sorted(set(of.values())):
        caption += f"With {' and '.join(FAMILIES[n].name for n in of if of[n] == bound)} each number {PROSE[f'bound {bound}']}. "
    if distance == "reconstruction":
        caption += "Noise is left out: it belongs to no image, so nothing can be given back."
    return [element("h3", title), web.figure(web.table(header, rows), caption)]


def _strength(measured: Measurement) -> list[Html]:
    parts = paragraphs(PROSE["strength"], certainty=_certainty(measured, "Thin bars are ± the"))
    charts = []
    for distance in measured.baselines:
        title = DISTANCES[distance][0]
        for choice, series, axes in _lines_of(measured, distance):
            ranges = "; ".join(f"{line.name} from {line.y[0]:.3g} to {line.y[-1]:.3g}" for line in series)
            drawn = web.chart(frontier_chart(series, **axes), f"{title} over {choice.knob}: {ranges}")
            charts.append(web.figure(drawn, f"{title}, {choice.name}: {choice.words}."))
    parts.append(web.side_by_side(*charts))
    levels = {d: level for d in measured.baselines if (level := measured.enough(d)) is not None}
    return [*parts, element("h3", "Strength needed"), _needed(measured, levels)] if levels else parts


def _lines_of(measured: Measurement, distance: str) -> Iterator[tuple[Choice, list[Series], dict[str, Any]]]:
    """Per family: the family, a line per latent, and the axes of their chart."""
    order = [latent.name for latent in measured.latents]
    mark = None if distance == "reconstruction" else (measured.baselines[distance]["real"].value, "real images")
    for name in measured.config.measure.families:
        choice, series = FAMILIES[name], []
        for latent, curve in measured.of(distance, name).items():
            ys = [e.value for e in curve.estimates]
            ends = [[e.value + sign * _margin(e) for e in curve.estimates if len(e.values) > 1] or None for sign in (-1, 1)]
            series.append(Series(_title_of(measured, latent), curve.capacities, ys, order.index(latent), True, *ends))
        axes = {"x": f"{choice.knob} of {choice.name}", "y": DISTANCES[distance][0], "level": mark}
        yield choice, series, axes | {"logarithmic": choice.capacities[-1] >= 4 * choice.capacities[0]}


def _needed(measured: Measurement, levels: dict[str, float]) -> Html:
    """C_eps of each latent, with eps by distance."""
    columns = [(d, f) for d in levels for f in measured.config.measure.families]
    rows = []
    for latent in measured.latents:
        cells: list[Any] = [_title_of(measured, latent.name)]
        for distance, name in columns:
            curve = measured.of(distance, name).get(latent.name)
            capacity = None if curve is None else curve.required_capacity(levels[distance])
            most = f"more than {FAMILIES[name].capacities[-1]:g}"
            cells.append("–" if curve is None else most if capacity is None else f"{capacity:g}")
        rows.append(cells)
    header = ["latent"] + [f"{DISTANCES[d][0]}, {FAMILIES[f].knob} of {FAMILIES[f].name}" for d, f in columns]
    reached = "; ".join(f"{DISTANCES[d][0]} of at most {level:.3g}" for d, level in levels.items())
    caption = PROSE["strength needed"].format(share=100 * GAP_CLOSED, levels=reached)
    return web.figure(web.table(header, rows), caption)


def _pictures(measured: Measurement) -> list[Html]:
    parts = paragraphs(PROSE["pictures"])
    for latent in measured.latents:
        rows = [(label, web.strip(to_uint8(images), label)) for label, images in measured.generated[latent.name]]
        parts += [element("h3", _title_of(measured, latent.name)), web.figure(web.strips(rows), latent.description)]
    return parts


def _latents(measured: Measurement) -> Html:
    rows = []
    for latent, scale in zip(measured.latents, measured.scales, strict=True):
        shape = latent.codes.shape[1:]
        count = f"{shape.numel():,}" + (f" ({' × '.join(map(str, shape))})" if len(shape) > 1 else "")
        rows.append((latent.name, latent.description, count, f"{scale:.3g}"))
    caption = PROSE["latents"].format(pixels=measured.images[0].numel())
    return web.figure(web.table(("latent", "what it is", "numbers a code", "divided by"), rows, prose=(0, 1)), caption)


def _shape(measured: Measurement) -> list[Html]:
    words = paragraphs(PROSE["shape"])
    if measured.gromov is None:
        return [*words, *paragraphs(PROSE["shape not measured"])]
    places = _decimals([e.value for e in measured.gromov.values()])
    rows = [(_title_of(measured, name), _plus_minus(estimate, places)) for name, estimate in measured.gromov.items()]
    caption = PROSE["shape, caption"].format(points=next(iter(measured.gromov.values())).counts[0])
    return [*words, web.figure(web.table(("latent", "distance"), rows), caption)]


def _limits(measured: Measurement) -> Html:
    steps, judged = measured.config.measure.steps, _counts(measured)[1]
    return element("ul", *paragraphs(PROSE["limits"], "li", steps=steps, certainty=_certainty(measured), judged=judged))


def _method(measured: Measurement) -> list[Html]:
    settings, (fitted, judged) = measured.config.measure, _counts(measured)
    rows = [
        ("Question", "D^G(P_z, P_x) = the least distance D between g(z) and x over all generators g of a family G"),
        ("Images", f"{len(measured.images):,} of the training split of {measured.data['name']}"),
        ("Trained on, measured on", f"{fitted:,} and {judged:,}, at random for each seed; the rest chose the best state"),
        ("Seeds", ", ".join(map(str, settings.seeds))),
        ("Training", f"{settings.steps:,} steps of Adam, from whose states the best is chosen"),
        ("Not trained", "linear maps by reconstruction, and by Fréchet distance (there from the moments of all images): "
                        "computed"),
    ]  # fmt: skip
    rows += [(f"Family: {FAMILIES[name].name}", FAMILIES[name].words) for name in settings.families]
    for distance in measured.baselines:
        convention = next(curve.estimates[0].convention for (d, _, _), curve in measured.curves.items() if d == distance)
        rows.append((f"Distance: {DISTANCES[distance][0]}", convention))
    rows += [("Time", f"{web.duration(measured.seconds)}; threads: {torch.get_num_threads()}"), ("Day", measured.at[:10])]
    rows += [(name, version) for name, version in versions().items()]
    return [
        web.table(("what", "value"), rows, prose=(0, 1)),
        paragraph("All values, one per seed, with conventions and fingerprints: latents.json beside this page."),
        web.configuration(measured.config, "The resolved configuration"),
    ]


# ---- pictures as files ----


def _write_pictures(measured: Measurement, folder: Path) -> list[str]:
    """Write curves-<distance>.png and pictures-<latent>.png; returns their names."""
    names = []
    for distance in measured.baselines:
        panels = [frontier_panel(series, **axes) for _, series, axes in _lines_of(measured, distance)]
        names.append(f"curves-{_file_name(distance)}.png")
        save_png(panels, [3.6] * len(panels), folder / names[-1])
    factor = max(1, 64 // max(measured.images.shape[2:]))
    for latent, rows in measured.generated.items():
        sheet = np.concatenate([grid(to_uint8(images), len(images)) for _, images in rows])
        names.append(f"pictures-{_file_name(latent)}.png")
        write_png(folder / names[-1], sheet.repeat(factor, 0).repeat(factor, 1))
    return names


def _file_name(name: str) -> str:
    return re.sub(r"\W+", "-", name).strip("-")


# ---- numbers ----


def _decimals(values: Sequence[float]) -> int:
    """Decimals that give the smallest non-zero value three digits, at most 4."""
    smallest = min((abs(value) for value in values if value), default=1.0)
    return min(max(0, 2 - math.floor(math.log10(smallest))), 4)


def _plus_minus(estimate: Estimate, places: int) -> str:
    """`value ± deviation`, without the deviation for a single seed."""
    words = number(estimate.value, places)
    return words if len(estimate.values) == 1 else f"{words} ± {number(_margin(estimate), places)}"
