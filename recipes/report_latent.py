"""Write the report card of a latent: what a trained autoencoder promises a generative model, before one is trained on it.

    python recipes/report_latent.py --config recipes/configs/digits.yaml
    python recipes/report_latent.py --config recipes/configs/digits.yaml measure.compare_folders=[runs/compare]

Reads <output_dir>/autoencoder and the data set; of finished comparisons (recipes/compare.py) it says how well each line of the
card ranked the latents that were tried. Writes <output_dir>/latent/: card.json, card.html (one file without scripts and without
requests) and the pictures as PNG. Runs on a CPU in seconds.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dae.cli import main
from dae.complexity import predictors as measure
from dae.complexity.report_card import PREDICTORS, Encoded, decode_latents, encode_images, rank_predictors, report_card, some_of
from dae.config import Config
from dae.data import ImageData, in_memory, load_data
from dae.data.pictures import grid, to_uint8, write_png
from dae.files import announce, replaced_folder, write_file
from dae.hub import fingerprint, require_model
from dae.lock import writes
from dae.metrics import versions
from dae.models import Autoencoder, choose_kernels
from dae.reporting import elements as web
from dae.reporting.charts import Bar, bar_chart, interval_chart
from dae.reporting.elements import Html, number, paragraph, percent, strip
from dae.reporting.record import trained_configuration
from dae.seeding import seed_for
from dae.statistics import RankCorrelation
from dae.training import one_process
from dae.training.run import refuse_other_data

PAPER = web.link("Hu et al., “Complexity Matters”, NeurIPS 2023", "https://arxiv.org/abs/2307.08283")
HOPED = {"lower": "lower", "higher": "higher", "either": "depends"}
DISTURBANCES = (measure.PERTURBATION, 0.5, 1.0)
FEWEST_SEEDS = 5  # of a bootstrap over seeds from which anything is concluded
STEPS_BETWEEN, PAIRS = 9, 4  # pictures of an interpolation with both its ends, and interpolations


class Ranking(NamedTuple):
    """How well each predictor put the trials of one comparison into order, and over how many seeds."""

    found: dict[str, RankCorrelation]
    seeds: int


class MeasuredLatent(NamedTuple):
    """The autoencoder, what it was measured on, and its card."""

    config: Config
    method: str  # that trained it
    autoencoder: Autoencoder
    data: ImageData
    train: Encoded
    heldout: Encoded
    card: dict[str, float | None]
    yardsticks: dict[str, str]
    seconds: float


@writes("latent")
def report_latent(config: Config) -> Path:
    """Measure, write card.json and card.html, return the folder.

    Raises:
        FileNotFoundError: the run has no trained autoencoder, or a folder of `measure.compare_folders` holds no trials.
        ValueError: the autoencoder was trained on other data, there are too few images, or a trial's file is damaged or is of
            other data or another carrier than the autoencoder.
        FloatingPointError: the autoencoder gives NaN.
    """
    require_model(Path(config.output_dir) / "autoencoder", "train_dae")
    trained = trained_configuration(config)
    rankings = {folder: rank(read_trials(folder, trained), config.seed) for folder in comparison_folders(config)}
    run = measure_latent(config, trained)
    folder = Path(config.output_dir) / "latent"
    with replaced_folder(folder) as new:
        write_file(new / "card.json", json.dumps(facts(run, rankings), indent=2).encode())
        names = write_page(run, rankings, new)
    size = (folder / "card.html").stat().st_size / 1e6
    announce(folder, names, f"/card.html ({size:.1f} MB), measured in {web.duration(run.seconds)}")
    return folder


def write_page(run: MeasuredLatent, rankings: dict[Path, Ranking], folder: Path) -> list[str]:
    """card.html and its pictures; returns the names of all that is then in the folder."""
    page = web.Page(f"Report card of a latent: {run.data.title}", lead(run))
    page.section("In numbers", headline(run))
    page.section("The card", card_table(run))
    page.section("Pictures", reconstructions(run, folder), disturbances(run, folder), interpolations(run, folder))
    page.section("The latent", latent_map(run, folder), *code_usage(run))
    page.section("Which line to trust?", *(trust(path, ranking) for path, ranking in rankings.items()), *no_trials(rankings))
    page.section("What was measured", provenance(run))
    page.footer = [paragraph("The distances for simple generators follow ", PAPER, "; no number here is the paper's. "
                             "Written by recipes/report_latent.py.")]  # fmt: skip
    page.write(folder / "card.html")
    return [path.name for path in folder.iterdir()]


# ---- measuring ----


def measure_latent(config: Config, trained: Config) -> MeasuredLatent:
    """Load the autoencoder and its data, and measure the card."""
    device, folder = one_process(config), Path(config.output_dir) / "autoencoder"
    autoencoder = Autoencoder.from_pretrained(folder, device=device)
    choose_kernels(autoencoder, config.kernels)
    autoencoder.refuse_other_data(config.data.channels, config.data.resolution)
    data = load_data(config.data, config.seed)
    refuse_other_data(folder, config.data, data.fingerprint)
    data.list_skipped(config.output_dir)
    train, train_labels = collect(data.train, config)
    heldout, heldout_labels = collect(data.validation, config)
    labels = (train_labels, heldout_labels) if data.labelled else (None, None)
    started = time.monotonic()
    card = report_card(autoencoder, train, labels[0], heldout, labels[1], seed=config.seed)
    seconds = time.monotonic() - started
    encoded = encode_images(autoencoder, train), encode_images(autoencoder, heldout)
    yardsticks = compare_with(autoencoder, *encoded, labels[1], card, config.seed)
    return MeasuredLatent(config, trained.method, autoencoder, data, *encoded, card, yardsticks, seconds)


def collect(dataset, config: Config) -> tuple[Tensor, Tensor]:
    """Images and labels of a split, or `measure.max_images` of them."""
    options = {"seed": seed_for(config.seed, "report card"), "num_workers": config.data.num_workers, "knob": "measure.max_images"}
    return in_memory(dataset, config.measure.max_images, batch_size=config.evaluation.batch_size, **options)


def compare_with(
    autoencoder: Autoencoder, train: Encoded, heldout: Encoded, labels: Tensor | None, card: dict, seed: int
) -> dict[str, str]:
    """What each value is to be held against: its end of the scale, or what doing without the latent gives."""
    places = math.prod(heldout.latents.shape[2:])
    count = min(len(train.images), len(heldout.images))
    some = some_of(heldout.images)[: len(train.images)]
    mean_image = measure.mean_squared_error(train.images.mean(0).expand_as(heldout.images), heldout.images)
    real = measure.energy_coefficient(train.images[some_of(train.images)][: len(some)], heldout.images[some])
    sets = measure.sliced_distance(train.images[:count], heldout.images[:count], seed=seed)
    found = {
        "spectrum_slope": "0: all directions alike",
        "effective_dimension": f"at most {number(math.prod(heldout.latents.shape[1:]), 0)}",
        "sensitivity": f"{percent(measure.PERTURBATION)}: passed on as it is",
        "shift_error": "100\u00a0%: unrelated images", "flip_error": "100\u00a0%: unrelated images",
        "interpolation_distance": f"training images: {percent(real)}",
        "linear_sliced_distance": f"training images: {number(sets, 3)}",
        **dict.fromkeys(
            ("reconstruction_error", "linear_distance", "mlp_distance"), f"the mean image: {number(mean_image, 3)}"
        ),
    }  # fmt: skip
    if labels is not None:
        found["linear_probe"] = f"the commonest class: {percent(labels.bincount().max().item() / len(labels))}"
    if heldout.indices is None:
        return found | {"prior_bits": f"values guessed alone: {number(card['gaussian_rate'], 1)}"}
    codes = autoencoder.config.vq.codebook_size
    return found | {
        "codebook_usage": "at most 100\u00a0%", "codebook_perplexity": f"at most {codes:,}",
        "code_entropy": f"at most {number(math.log2(codes))}",
        **dict.fromkeys(("ngram_bits", "prior_bits"), f"codes guessed alone: {number(places * card['code_entropy'], 1)}"),
    }  # fmt: skip


def comparison_folders(config: Config) -> list[Path]:
    """`measure.compare_folders`, and the run's own folder if it holds trials. FileNotFoundError: a folder without trials."""
    folders = [Path(name) for name in config.measure.compare_folders]
    for folder in folders:
        if not (folder / "trials").is_dir():
            raise FileNotFoundError(
                f"measure.compare_folders: {folder} holds no trials/; expected the output_dir of recipes/compare.py"
            )
    own = Path(config.output_dir)
    return folders + ([own] if (own / "trials").is_dir() and own not in folders else [])


def read_trials(folder: Path, latent: Config) -> list[dict]:
    """The records of the trials that finished; those that diverged have none.

    ValueError: a damaged file, or trials of other data or another carrier than the latent's, of which they say nothing.
    """
    records = []
    ours = {
        "data.dataset_name": latent.data.dataset_name,
        "data.train_files": latent.data.train_files,
        "data.resolution": latent.data.resolution,
        "autoencoder.bottleneck": latent.autoencoder.bottleneck,
    }
    for path in sorted((folder / "trials").glob("*.json")):
        try:
            saved = json.loads(path.read_text())
            settings = {"data.train_files": []} | saved["settings"]  # trials of earlier versions knew no such files
            record, theirs = saved["record"], {key: settings[key] for key in ours}
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is damaged ({error}): delete it and run recipes/compare.py again") from error
        differences = [f"{k} is {theirs[k]!r} there and {ours[k]!r} of the latent" for k in ours if theirs[k] != ours[k]]
        if differences:
            raise ValueError(
                f"the trials in {folder} cannot tell which line of this card to trust: {'; '.join(differences)}; "
                "give a comparison of the same data and bottleneck"
            )
        if record is not None:
            records.append(record)
    return records


def rank(records: list[dict], seed: int) -> Ranking:
    measured = {r["seed"] for r in records if r["purpose"] == "measure" and r["rate"] is None and r["card"]}
    return Ranking(rank_predictors(records, seed=seed), len(measured))


def facts(run: MeasuredLatent, rankings: dict[Path, Ranking]) -> dict:
    """All of it for other programs; JSON-able, with None for what does not apply or is not known."""

    def finite(r: RankCorrelation, seeds: int) -> dict:
        known = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in r._asdict().items()}
        return known | {"seeds": seeds}

    return {
        "card": run.card,
        "predictors": {name: dataclasses.asdict(predictor) for name, predictor in PREDICTORS.items()},
        "rank_correlations": {
            str(folder): {name: finite(r, ranking.seeds) for name, r in ranking.found.items()}
            for folder, ranking in rankings.items()
        },
        "autoencoder": fingerprint(Path(run.config.output_dir) / "autoencoder"),
        "method": run.method,
        "data": run.data.describe(),
        "counts": {"train": len(run.train.images), "heldout": len(run.heldout.images)},
        "seed": run.config.seed,
        "versions": versions(),
        "seconds": run.seconds,
    }


# ---- sections, in their order on the page ----


def lead(run: MeasuredLatent) -> list[Html]:
    _, channels, h, w = run.heldout.latents.shape
    if run.heldout.indices is None:
        kind = f"{channels * h * w:,} numbers ({channels} for each of {h} × {w} places)"
    else:
        kind = f"{h * w} tokens ({h} × {w} places, each one of {run.autoencoder.config.vq.codebook_size:,} codes)"
    what = (
        f"An autoencoder writes an image as a short description, its latent: here {kind}. Images are generated by a second "
        "model, the prior, that writes new latents, which the decoder turns into pixels. How good those images become depends on "
        "the latent: it should keep what matters in the images, and be easy to model. This page measures both before a prior is "
        "trained."
    )
    how = (
        f"Everything was measured with {len(run.train.images):,} training and {len(run.heldout.images):,} held-out images; where "
        "something had to be fitted, it was fitted on the training images and judged on the held-out ones. Most of these "
        "measures are rules of thumb; how well they did where latents were compared stands under “Which line to trust?”."
    )
    return [paragraph(what), paragraph(how)]


def headline(run: MeasuredLatent) -> Html:
    shown = ("prior_bits", "linear_distance", "reconstruction_error", "sensitivity", "interpolation_distance")
    return web.tiles(
        [(value_of(name, run.card[name]), PREDICTORS[name].title, Html(unit_of(name) + web.text(run.yardsticks[name])))
         for name in shown if run.card[name] is not None]
    )  # fmt: skip


def value_of(name: str, value: float | None) -> str:
    """A value with as many digits as its unit deserves."""
    unit = PREDICTORS[name].unit
    if value is None or unit == "share":
        return percent(value)
    return number(value, {"bits per image": 1, "directions": 1, "codes": 1, "squared error": 4, "pixel units": 3}.get(unit, 2))


def unit_of(name: str) -> str:
    unit = PREDICTORS[name].unit
    return "" if unit in ("share", "") else f"{unit}; "


def card_table(run: MeasuredLatent) -> Html:
    rows = []
    for name, predictor in PREDICTORS.items():
        if run.card[name] is None:
            continue
        unit = "" if predictor.unit == "share" else predictor.unit
        value = value_of(name, run.card[name])
        measured = web.join([web.element("strong", predictor.title), web.element("div", predictor.meaning)])
        rows.append((measured, f"{value} {unit}".strip(), HOPED[predictor.direction], run.yardsticks.get(name, "")))
    missing = [predictor.title for name, predictor in PREDICTORS.items() if run.card[name] is None]
    note = f"Does not apply here: {', '.join(missing)}." if missing else ""
    words = (
        "“Hoped for” says in which direction a value should lie if its rule of thumb holds; “depends”, that more and less both "
        "have their price. “Compare with” names an end of the scale, or what one gets otherwise: from training images in place "
        "of made ones, or by always drawing the mean image. "
    )
    header = ("measure", "value", "hoped for", "compare with")
    return web.join([paragraph(words + note), web.table(header, rows, prose=(0, 2, 3))])


def reconstructions(run: MeasuredLatent, folder: Path) -> Html:
    columns = web.per_row(run.autoencoder.resolution)
    rows = {
        "original": run.heldout.images[:columns],
        "decoded again": decode_latents(run.autoencoder, run.heldout.latents[:columns]),
    }
    caption = "Held-out images, encoded and decoded again: what is lost here, no generative model on this latent can bring back."
    return picture(rows, caption, folder / "reconstructions.png")


def disturbances(run: MeasuredLatent, folder: Path) -> Html:
    columns = web.per_row(run.autoencoder.resolution)
    latents, seed = run.heldout.latents, run.config.seed
    rows = {"undisturbed": decode_latents(run.autoencoder, latents[:columns])}
    for size in DISTURBANCES:
        disturbed = measure.perturb(latents, seed=seed, size=size)[:columns]
        rows[f"disturbed by {size:.0%}"] = decode_latents(run.autoencoder, disturbed)
    caption = (
        "The same images, with random noise added to each latent value: so many percent of the value's usual spread. A prior "
        "makes errors of this kind, if not of this size; the slower the pictures fall apart, the better."
    )
    return picture(rows, caption, folder / "disturbances.png")


def interpolations(run: MeasuredLatent, folder: Path) -> Html:
    latents, rows = run.heldout.latents, {}
    _, first, second = measure.midpoints(latents, seed=run.config.seed)
    share = torch.linspace(0, 1, STEPS_BETWEEN).view(-1, 1, 1, 1)
    for a, b in zip(first[:PAIRS].tolist(), second[:PAIRS].tolist(), strict=True):
        rows[f"image {a + 1} to {b + 1}"] = decode_latents(run.autoencoder, torch.lerp(latents[a], latents[b], share))
    caption = (
        "From one held-out image (left) to another (right) in equal steps through the latent. In a good latent the way leads "
        "over images that could be real, not over two images laid on top of each other."
    )
    return picture(rows, caption, folder / "interpolations.png")


def picture(rows: dict[str, Tensor], caption: str, path: Path) -> Html:
    """Labelled rows of images on the page, and the same as a PNG."""
    images = {name: to_uint8(x_BCHW) for name, x_BCHW in rows.items()}
    sheet = np.concatenate(list(images.values()))
    factor = max(1, web.PICTURE_SIDE // max(sheet.shape[1:3]))
    columns = len(next(iter(images.values())))
    write_png(path, grid(sheet.repeat(factor, 1).repeat(factor, 2), columns, gap=2, background=255))
    return web.figure(web.strips([(name, strip(x, f"{name}: {len(x)} images")) for name, x in images.items()]), caption)


def latent_map(run: MeasuredLatent, folder: Path) -> Html:
    columns = web.per_row(run.autoencoder.resolution)
    rows = {
        "image": run.heldout.images[:columns].expand(-1, 3, -1, -1),
        "its latent": as_colours(run.heldout.latents)[:columns].repeat_interleave(run.autoencoder.factor, 2)
        .repeat_interleave(run.autoencoder.factor, 3),
    }  # fmt: skip
    kind = "code" if run.heldout.indices is not None else "latent vector"
    caption = (
        f"Each place of the latent as a colour: alike colours are alike {kind}s (the three directions in which the {kind}s of "
        "held-out images differ most are red, green and blue). In a simple latent, alike parts of images have alike colours."
    )
    return picture(rows, caption, folder / "map.png")


def as_colours(latents_NDhw: Tensor) -> Tensor:
    """[N, 3, h, w] in [-1, 1]: the three principal components of the latent vectors, at 2.5 standard deviations full."""
    x_ND = latents_NDhw.double().movedim(1, -1).flatten(0, 2)
    x_ND = x_ND - x_ND.mean(0)
    _, directions_DD = torch.linalg.eigh(x_ND.T @ x_ND)
    main_N3 = x_ND @ directions_DD.flip(1)[:, :3]
    main_N3 = (main_N3 / (2.5 * main_N3.std(0, correction=0).clamp(min=1e-12))).clamp(-1, 1)
    N, _, h, w = latents_NDhw.shape
    padded_N3 = torch.nn.functional.pad(main_N3, (0, 3 - main_N3.shape[1]))  # of fewer than three channels
    return padded_N3.view(N, h, w, 3).movedim(-1, 1).float()


def code_usage(run: MeasuredLatent) -> list[Html]:
    if run.heldout.indices is None:
        return []
    counts = run.heldout.indices.flatten().bincount(minlength=run.autoencoder.config.vq.codebook_size)
    counts = counts.sort(descending=True).values.tolist()
    svg = bar_chart(counts, x="code, by rank", y="tokens", level=(sum(counts) / len(counts), "if all were equal"))
    alt = f"Bars from {counts[0]:,} tokens for the commonest code to {counts[-1]:,} for the rarest"
    caption = f"How often each code is used in {sum(counts):,} tokens of held-out images, most frequent first."
    meaning = "A code that is never used is capacity left idle; one that is used all the time says little."
    return [web.side_by_side(web.figure(web.chart(svg, alt), caption), paragraph(meaning))]


def trust(folder: Path, ranking: Ranking) -> Html:
    """How well each predictor ranked the latents of one comparison."""
    found, enough = ranking.found, ranking.seeds >= FEWEST_SEEDS
    if not found:
        return paragraph(f"The comparison in {folder} has fewer than three finished trials with a card: nothing can be ranked.")
    shown = {name: r for name, r in found.items() if math.isfinite(r.rho)}
    trials = max(r.n for r in found.values())
    words = (
        f"In {folder}, {trials:,} autoencoders were trained in different ways, a prior on each, and the distance of the images "
        f"generated to held-out ones was measured (n = {trials:,}; only trials at the comparison's own codebook size or KL "
        "weight count). The rank correlation says how well a line of the card, known before, put them "
        "into order: +1, a larger value always meant a larger (worse) distance; -1, always a smaller (better) one; 0, "
        "it says nothing. So a line for which lower is hoped should lie on the right, one for which higher is hoped on the left."
    )
    caution = (
        "The interval is a bootstrap over whole seeds: what the same ways of training might show with other seeds. It is "
        "somewhat too narrow, and it says nothing about other ways of training. "
        if enough
        else f"From fewer than {FEWEST_SEEDS} seeds nothing is concluded here, and no interval is given. "
    )
    caution += f"There are trials of {ranking.seeds} seed(s). Of so many lines, some look good by chance."
    bars = [
        Bar(PREDICTORS[name].title, r.rho, *((r.low, r.high) if enough and math.isfinite(r.low) else ()))
        for name, r in shown.items()
    ]
    rows = [
        (
            PREDICTORS[name].title,
            number(r.rho),
            *([interval(r)] if enough else []),
            f"{r.n:,}",
            HOPED[PREDICTORS[name].direction],
            verdict(name, r) if enough else "too few seeds",
        )
        for name, r in found.items()
    ]
    parts = [web.element("h3", f"Trials in {folder}")]
    if bars:
        svg = interval_chart(bars, x="rank correlation with the generation distance", ends=("lower is worse", "higher is worse"))
        alt = "; ".join(f"{bar.name} {bar.mean:.2f}" for bar in bars)
        drawn_with = " with its 95\u00a0% interval; in colour where the interval does not hold 0" if enough else ""
        caption = f"Rank correlation with the generation distance{drawn_with}."
        drawn = web.figure(web.chart(svg, f"Rank correlations: {alt}"), caption)
        parts.append(web.side_by_side(web.element("div", paragraph(words), paragraph(caution)), drawn))
    header = ["measure", "rank correlation", *(["95\u00a0% interval"] if enough else []), "trials", "hoped for", "outcome"]
    return web.join([*parts, web.table(header, rows, prose=(0, len(header) - 2, len(header) - 1))])


def interval(r: RankCorrelation) -> str:
    return f"{number(r.low)} to {number(r.high)}" if math.isfinite(r.low) else "–"


def verdict(name: str, r: RankCorrelation) -> str:
    """Whether the interval holds what was hoped for."""
    if not math.isfinite(r.rho):
        return "the same in all trials"
    if not math.isfinite(r.low):
        return "no interval"
    if r.low <= 0 <= r.high:
        return "cannot be told"
    if PREDICTORS[name].sign == 0:
        return "more is worse" if r.low > 0 else "more is better"
    return "as hoped" if (r.low > 0) == (PREDICTORS[name].sign > 0) else "the opposite"


def no_trials(rankings: dict) -> list[Html]:
    if rankings:
        return []
    words = (
        "No comparison was given, so how far these measures can be trusted on this data set is not known. recipes/compare.py "
        "trains several autoencoders and a prior on each; with measure.compare_folders=[<its output_dir>] this page shows how "
        "well each line of the card had put them into order."
    )
    return [paragraph(words)]


def provenance(run: MeasuredLatent) -> Html:
    images = run.heldout.images
    rows = [
        ("Autoencoder", f"method {run.method}, bottleneck {run.autoencoder.config.bottleneck}, "
                        f"decoder {run.autoencoder.config.decoder.family}"),
        ("Its fingerprint", fingerprint(Path(run.config.output_dir) / "autoencoder")),
        ("Data set", f"{run.data.name}, {images.shape[2]} × {images.shape[3]} pixels, {images.shape[1]} channel(s)"),
        ("Images", f"{len(run.train.images):,} for training, {len(images):,} held-out"),
        ("Seed", run.config.seed),
        ("Time for the card", web.duration(run.seconds)),
        *((f"Version of {name}", version) for name, version in versions().items()),
    ]  # fmt: skip
    return web.table(("what", "value"), rows, prose=(0, 1))


if __name__ == "__main__":
    main(report_latent, __doc__)
