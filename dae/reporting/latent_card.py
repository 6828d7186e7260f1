"""The page of recipes/report_latent.py: the report card of a latent, for readers new to the field."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from torch import Tensor

from dae.data.pictures import grid, to_uint8, write_png
from dae.diagnostics.latent_report import MeasuredLatent, pictures
from dae.diagnostics.predictors import PERTURBATION
from dae.diagnostics.ranking import Ranking
from dae.diagnostics.report_card import PREDICTORS
from dae.hub import fingerprint
from dae.metrics import CodebookUsage, versions
from dae.reporting import elements as web
from dae.reporting.charts import Bar, interval_chart
from dae.reporting.elements import PAPER, Html, number, paragraph, percent, strip
from dae.reporting.prose import paragraphs, read_prose
from dae.statistics import RankCorrelation

PROSE = read_prose(__file__)
HOPED = {"lower": "lower", "higher": "higher", "either": "depends"}
DIGITS = {"bits per image": 1, "directions": 1, "codes": 1, "squared error": 4, "pixel units": 3}  # else 2
HEADLINES = ("prior_bits", "linear_distance", "reconstruction_error", "sensitivity", "interpolation_distance")
FEWEST_SEEDS = 5  # below, no conclusion is drawn from a bootstrap over seeds


def write_card_page(run: MeasuredLatent, rankings: dict[Path, Ranking], folder: Path) -> None:
    """Write card.html and its pictures as PNG into `folder`."""
    page = web.Page(f"Report card of a latent: {run.data.title}", _lead(run))
    compared = _compare_with(run)
    page.section("In numbers", _headline(run, compared))
    page.section("The card", _card_table(run, compared))
    kind = "code" if run.autoencoder.bottleneck.discrete else "latent vector"
    *shown, latent_map = (
        _picture(rows, PROSE[name].format(kind=kind), folder / f"{name}.png")
        for name, rows in pictures(run, web.per_row(run.autoencoder.resolution)).items()
    )
    page.section("Pictures", *shown)
    page.section("The latent", latent_map, *_code_usage(run))
    trusted = [_trust(path, ranking) for path, ranking in rankings.items()]
    page.section("Which line to trust?", *(trusted or paragraphs(PROSE["no trials"])))
    page.section("What was measured", _provenance(run))
    page.footer = paragraphs(PROSE["footer"], paper=PAPER)
    page.write(folder / "card.html")


def _num_codes(run: MeasuredLatent) -> int:
    return run.autoencoder.bottleneck.num_codes(run.autoencoder.config)


# ---- sections, in their order on the page ----


def _lead(run: MeasuredLatent) -> list[Html]:
    _, channels, h, w = run.heldout.latents.shape
    kind = f"{channels * h * w:,} numbers ({channels} for each of {h} × {w} places)"
    if run.autoencoder.bottleneck.discrete:
        kind = f"{h * w} tokens ({h} × {w} places, each one of {_num_codes(run):,} codes)"
    return paragraphs(PROSE["lead"], kind=kind, train=len(run.train.images), heldout=len(run.heldout.images))


def _compare_with(run: MeasuredLatent) -> dict[str, str]:
    """What to compare each value with: the end of its scale, or the value without the latent."""
    latents, without = run.heldout.latents, run.baselines
    mean_image = f"the mean image: {number(without['reconstruction_error'], 3)}"
    found = {
        "spectrum_slope": "0: all directions alike",
        "effective_dimension": f"at most {number(math.prod(latents.shape[1:]), 0)}",
        "sensitivity": f"{percent(PERTURBATION)}: passed on as it is",
        "interpolation_distance": f"training images: {percent(without['interpolation_distance'])}",
        "linear_sliced_distance": f"training images: {number(without['linear_sliced_distance'], 3)}",
        **dict.fromkeys(("shift_error", "flip_error"), "100\u00a0%: unrelated images"),
        **dict.fromkeys(("reconstruction_error", "linear_distance", "mlp_distance"), mean_image),
    }
    if "linear_probe" in without:
        found["linear_probe"] = f"the commonest class: {percent(without['linear_probe'])}"
    entropy = run.card["code_entropy"]
    if entropy is None:
        return found | {"prior_bits": f"values guessed alone: {number(run.card['gaussian_rate'], 1)}"}
    codes, alone = _num_codes(run), number(math.prod(latents.shape[2:]) * entropy, 1)
    return found | {
        "codebook_usage": "at most 100\u00a0%",
        "codebook_perplexity": f"at most {codes:,}",
        "code_entropy": f"at most {number(math.log2(codes))}",
        **dict.fromkeys(("ngram_bits", "prior_bits"), f"codes guessed alone: {alone}"),
    }


def _headline(run: MeasuredLatent, compared: dict[str, str]) -> Html:
    entries = []
    for name in HEADLINES:
        if run.card[name] is not None:
            value, unit = _value_and_unit(name, run.card[name])
            entries.append((value, PREDICTORS[name].title, f"{unit}; {compared[name]}" if unit else compared[name]))
    return web.tiles(entries)


def _value_and_unit(name: str, value: float | None) -> tuple[str, str]:
    """A value formatted for its unit, and the unit; shares are in per cent, without unit."""
    unit = PREDICTORS[name].unit
    return (percent(value), "") if unit == "share" else (number(value, DIGITS.get(unit, 2)), unit)


def _card_table(run: MeasuredLatent, compared: dict[str, str]) -> Html:
    rows = []
    for name, predictor in PREDICTORS.items():
        if run.card[name] is not None:
            measured = web.join([web.element("strong", predictor.title), web.element("div", predictor.meaning)])
            value = " ".join(_value_and_unit(name, run.card[name])).strip()
            rows.append((measured, value, HOPED[predictor.direction], compared.get(name, "")))
    missing = [predictor.title for name, predictor in PREDICTORS.items() if run.card[name] is None]
    note = f"Does not apply here: {', '.join(missing)}." if missing else ""
    header = ("measure", "value", "hoped for", "compare with")
    return web.join([*paragraphs(PROSE["card"], note=note), web.table(header, rows, prose=(0, 2, 3))])


def _picture(rows: dict[str, Tensor], caption: str, path: Path) -> Html:
    """Labelled rows of images for the page; also written as a PNG."""
    images = {name: to_uint8(x_BCHW) for name, x_BCHW in rows.items()}
    sheet = np.concatenate(list(images.values()))
    factor = max(1, web.PICTURE_SIDE // max(sheet.shape[1:3]))
    columns = len(next(iter(images.values())))
    write_png(path, grid(sheet.repeat(factor, 1).repeat(factor, 2), columns, gap=2, background=255))
    return web.figure(web.strips([(name, strip(x, f"{name}: {len(x)} images")) for name, x in images.items()]), caption)


def _code_usage(run: MeasuredLatent) -> list[Html]:
    if run.heldout.indices is None:
        return []
    usage = CodebookUsage(*run.autoencoder.bottleneck.vocabulary(run.autoencoder.config)).update(run.heldout.indices)
    counts = usage.counts.tolist()
    return [web.code_usage(counts, "A code that is never used is capacity left idle; one that is used all the time says little.")]


def _trust(folder: Path, ranking: Ranking) -> Html:
    """How well each predictor ranked the latents of one comparison."""
    found, enough = ranking.found, ranking.seeds >= FEWEST_SEEDS
    if not found:
        return paragraph(f"The comparison in {folder} has fewer than three finished trials with a card: nothing can be ranked.")
    trials = max(r.n for r in found.values())
    caution = PROSE["trust, many seeds" if enough else "trust, few seeds"].format(fewest=FEWEST_SEEDS)
    words = paragraphs(PROSE["trust"], folder=folder, trials=trials, caution=caution, seeds=ranking.seeds)
    parts, rows, bars = [web.element("h3", f"Trials in {folder}")], [], []
    for name, r in found.items():
        title, hoped, ends = PREDICTORS[name].title, HOPED[PREDICTORS[name].direction], math.isfinite(r.low)
        between = [f"{number(r.low)} to {number(r.high)}" if ends else "–"] if enough else []
        rows.append((title, number(r.rho), *between, f"{r.n:,}", hoped, outcome(name, r) if enough else "too few seeds"))
        if math.isfinite(r.rho):
            bars.append(Bar(title, r.rho, r.low, r.high) if enough and ends else Bar(title, r.rho))
    if bars:
        svg = interval_chart(bars, x="rank correlation with the generation distance", ends=("lower is worse", "higher is worse"))
        alt = "; ".join(f"{bar.name} {bar.mean:.2f}" for bar in bars)
        drawn_with = " with its 95\u00a0% interval; in colour where the interval does not hold 0" if enough else ""
        caption = f"Rank correlation with the generation distance{drawn_with}."
        drawn = web.figure(web.chart(svg, f"Rank correlations: {alt}"), caption)
        parts.append(web.side_by_side(web.element("div", *words), drawn))
    header = ["measure", "rank correlation", *(["95\u00a0% interval"] if enough else []), "trials", "hoped for", "outcome"]
    return web.join([*parts, web.table(header, rows, prose=(0, len(header) - 2, len(header) - 1))])


def outcome(name: str, r: RankCorrelation) -> str:
    """Whether the interval agrees with the expected direction."""
    if not math.isfinite(r.rho):
        return "the same in all trials"
    if not math.isfinite(r.low):
        return "no interval"
    if r.low <= 0 <= r.high:
        return "cannot be told"
    if PREDICTORS[name].sign == 0:
        return "more is worse" if r.low > 0 else "more is better"
    return "as hoped" if (r.low > 0) == (PREDICTORS[name].sign > 0) else "the opposite"


def _provenance(run: MeasuredLatent) -> Html:
    images, trained = run.heldout.images, run.autoencoder.config
    rows = [
        ("Autoencoder", f"method {run.method}, bottleneck {trained.bottleneck}, decoder {trained.decoder.family}"),
        ("Its fingerprint", fingerprint(Path(run.config.output_dir) / "autoencoder")),
        ("Data set", f"{run.data.name}, {images.shape[2]} × {images.shape[3]} pixels, {images.shape[1]} channel(s)"),
        ("Images", f"{len(run.train.images):,} for training, {len(images):,} held-out"),
        ("Seed", run.config.seed),
        ("Time for the card", web.duration(run.seconds)),
        *((f"Version of {name}", version) for name, version in versions().items()),
    ]
    return web.table(("what", "value"), rows, prose=(0, 1))
