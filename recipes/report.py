"""Write the page of a run: what was trained, how good it is, what its samples look like, and whether they are copies.

    python recipes/report.py --config recipes/configs/digits.yaml

Reads what recipes/train_dae.py, train_prior.py, sample.py and evaluate.py left in <output_dir>; computes nothing anew.
Writes <output_dir>/report.html: one file without scripts and without requests, to open in any browser or to send by mail.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import math
from pathlib import Path

import numpy as np

from dae.config import Config, config_from_command_line, differing_keys, load_config
from dae.hub import fingerprint
from dae.report import (
    Html,
    Line,
    Page,
    bar_chart,
    details,
    element,
    figure,
    line_chart,
    link,
    paragraph,
    per_row,
    preformatted,
    side_by_side,
    strip,
    strips,
    table,
    tiles,
)
from dae.training import Run

PAPER = link("Hu et al., “Complexity Matters”, NeurIPS 2023", "https://arxiv.org/abs/2307.08283")
METHODS = {
    "dae": (
        "Decoupled Autoencoder",
        "The method is the Decoupled Autoencoder: the encoder is first trained together with a deliberately weak decoder, which "
        "forces tokens that a simple generator can read; then the encoder is frozen and the real decoder is trained on its tokens.",
    ),
    "joint": ("Jointly trained autoencoder", "The method is the usual one, a baseline here: encoder and real decoder are trained together."),
    "joint_dropout": (
        "Jointly trained autoencoder with dropout",
        "The method is a baseline: encoder and real decoder are trained together, with channel dropout in the decoder.",
    ),
}  # fmt: skip
STAGES = {"stage1": "stage 1, weak decoder", "stage2": "stage 2, real decoder", "joint": "one stage", "prior": "prior"}
CLASSES_SHOWN = 20


def report(config: Config) -> Path:
    """Write the page; returns its path.

    Raises:
        FileNotFoundError: the run has no metrics.json or no samples yet; the message names the recipe to run.
    """
    output = Path(config.output_dir)
    samples_file, metrics_file = output / "samples" / "samples.npz", output / "metrics.json"
    for file, recipe in ((samples_file, "sample"), (metrics_file, "evaluate")):
        if not file.is_file():
            raise FileNotFoundError(f"no {file}: run `python recipes/{recipe}.py` with the same configuration first")
    metrics = json.loads(metrics_file.read_text())
    samples = np.load(samples_file)
    pictures = np.load(output / "evaluation" / "pictures.npz") if (output / "evaluation" / "pictures.npz").is_file() else {}
    trained = trained_configuration(config)
    histories = {name: Run(config, name).history() if Run(config, name).history_file.is_file() else [] for name in ("autoencoder", "prior")}
    seconds = {name: seconds_by_stage(rows) for name, rows in histories.items()}

    measured_on = datetime.date.fromtimestamp(metrics_file.stat().st_mtime)
    page = Page(f"{METHODS[trained.method][0]} on {data_name(trained, metrics)}", lead(trained, metrics, samples, seconds, measured_on))
    page.lead += [paragraph(notice, class_="notice") for notice in contradictions(output, metrics)]
    page.section("In numbers", headline(trained, metrics))
    page.section("Samples", sample_grid(samples, metrics))
    page.section("Reconstructions", reconstructions(pictures, metrics))
    page.section("Training", *training_curves(histories, metrics, trained))
    page.section("Codebook", codebook(metrics))
    page.section("Copies?", *copies(pictures, metrics, trained))
    page.section("All measurements", all_measurements(metrics), element("h3", "What was measured"), counts(metrics))
    page.section("Time", timings(seconds, metrics))
    page.section("Configuration and versions", *configuration(trained, metrics))
    page.footer = [
        paragraph("Method as publicly described in ", PAPER, "; all hyper-parameters are ours, and no number here is the paper's."),
        paragraph("Written by recipes/report.py from the files of the run."),
    ]
    path = page.write(output / "report.html")
    print(f"saved {path} ({path.stat().st_size / 1e6:.1f} MB)")
    return path


# ---- facts ----


def trained_configuration(config: Config) -> Config:
    """What was really trained: each recipe saves the configuration that it ran with, and they may differ."""
    output = Path(config.output_dir)
    saved = {name: load_config(p) for name in ("", "autoencoder", "prior") if (p := output / name / "config.yaml").is_file()}
    trained = saved.get("", config)
    if one := saved.get("autoencoder"):
        keys = ("method", "data", "autoencoder", "auxiliary_decoder", "stage1", "stage2")
        trained = dataclasses.replace(trained, **{key: getattr(one, key) for key in keys})
    return dataclasses.replace(trained, prior=saved["prior"].prior) if "prior" in saved else trained


def contradictions(output: Path, metrics: dict) -> list[str]:
    """What in the folder is newer than the measurements, so that the page would show one run and count another."""
    found = []
    sampling = output / "samples" / "sampling.json"
    if sampling.is_file() and json.loads(sampling.read_text()) != metrics["sampling"]:
        found.append("The samples shown were drawn after the measurements: run recipes/evaluate.py again, then this recipe.")
    if (output / "prior" / "model.safetensors").is_file() and fingerprint(output / "prior") != metrics["sampling"]["prior"]:
        found.append("The prior was trained anew after the measurements: run sample.py and evaluate.py again, then this recipe.")
    return found


def seconds_by_stage(history: list[dict]) -> dict[str, float]:
    """Seconds a stage; the clock of a resumed run starts at 0 again, which shows as a step back."""
    seconds, before = {}, 0.0
    for row in history:
        passed = row["seconds"] - before if row["seconds"] >= before else row["seconds"]
        seconds[row["stage"]] = seconds.get(row["stage"], 0.0) + passed
        before = row["seconds"]
    return seconds


def data_name(config: Config, metrics: dict) -> str:
    name = str((metrics.get("data") or {}).get("name") or config.data.dataset_name)
    return Path(name).name if name.startswith(("/", ".", "~")) else name


def bits_an_image(metrics: dict) -> float:
    return metrics["prior"]["heldout_bits_per_token"] * metrics["prior"]["tokens_an_image"]


def number(value: float | None, digits: int = 2) -> str:
    return "–" if value is None or not math.isfinite(value) else f"{value:,.{digits}f}"


def percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f} %"


def spread(value: float, std: float, digits: int = 2) -> str:
    return number(value, digits) + (f" ± {number(std, digits)}" if std else "")


def duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


# ---- sections, in their order on the page ----


def lead(config: Config, metrics: dict, samples, seconds: dict, measured_on: datetime.date) -> list[Html]:
    count, side, tokens = metrics["counts"], samples["arr_0"].shape[1], metrics["prior"]["tokens_an_image"]
    sizes = metrics.get("data") or {}
    classes = int(samples["arr_1"].max()) + 1 if sizes.get("num_classes") is None else sizes["num_classes"]
    colours = "grey" if samples["arr_0"].shape[3] == 1 else "colour"
    about = f"{side} × {side} pixels, {colours}, " + (f"{classes:,} classes" if classes > 1 else "without classes")
    trained_on = f"{sizes.get('train') or count['train']:,} training images ({about})"
    spent = [
        f"{duration(sum(parts.values()))} for the {name}" for name, parts in seconds.items() if parts
    ]  # fmt: skip
    took = f"Training took {' and '.join(spent)}; " if spent else ""
    return [
        paragraph(
            f"An autoencoder learned to write an image of {data_name(config, metrics)} as {tokens} tokens, each one of "
            f"{config.autoencoder.vq.codebook_size:,} codes, and a Transformer, the prior, learned which tokens follow one another. "
            f"To make a new image, the prior writes tokens and the decoder turns them into pixels. Both learned from {trained_on}."
        ),
        paragraph(METHODS[config.method][1], " See ", PAPER, "."),
        paragraph(f"{took}the run was measured on {measured_on.day} {measured_on:%B %Y}, against {count['heldout']:,} held-out images."),
    ]


def headline(config: Config, metrics: dict) -> Html:
    g, floor, prior = metrics["generation"], metrics["floor"], metrics["prior"]
    entries = []
    if g["recognised"] is not None:
        accuracy = percent(metrics["extractor"]["heldout_accuracy"])
        entries.append((percent(g["recognised"]), "Samples recognised as their class", f"real held-out images: {accuracy}"))
    entries.append(
        (number(g["frechet"]), "Fréchet distance to held-out images", f"{g['frechet_ratio']:.1f} × that of training images ({number(floor['frechet'])})")
    )
    entries.append((percent(g["memorised"]), "Near-copies of training images", f"real held-out images: {percent(g['memorised_heldout'])}"))
    uniform = math.log2(config.autoencoder.vq.codebook_size)
    entries.append(
        (number(prior["heldout_bits_per_token"]), "Bits a token, held-out images",
         f"{number(bits_an_image(metrics), 1)} an image; {number(uniform)} a token if all codes were equally likely")
    )  # fmt: skip
    rebuilt = metrics["reconstruction"]
    weak = f"weak decoder of stage 1: {number(rebuilt['stage 1']['psnr'], 1)} dB" if "stage 1" in rebuilt else "mean of held-out images"
    entries.append((f"{number(rebuilt['final']['psnr'], 1)} dB", "PSNR of reconstructions", weak))
    return tiles(entries)


def class_label(number: int, metrics: dict) -> str:
    names = (metrics.get("data") or {}).get("class_names")
    return str(names[number]) if names and number < len(names) else str(number)


def sample_grid(samples, metrics: dict) -> Html:
    images, labels = samples["arr_0"], samples["arr_1"]
    columns, settings = per_row(max(images.shape[1:3])), metrics["sampling"]
    present = np.unique(labels)
    if len(present) > 1:
        shown = [(class_label(int(c), metrics), images[labels == c][:columns]) for c in present[:CLASSES_SHOWN]]
        rows = [(name, strip(x, f"{len(x)} samples of class {name}")) for name, x in shown]
        which = f"One row a class{f', the first {CLASSES_SHOWN} of {len(present):,} classes' if len(present) > CLASSES_SHOWN else ''}"
    else:
        blocks = [images[i : i + columns] for i in range(0, min(len(images), 6 * columns), columns)]
        rows, which = [("", strip(x, f"{len(x)} samples")) for x in blocks], "The first samples"
    how = f"guidance scale {settings['cfg_scale']:g}, temperature {settings['temperature']:g}"
    how += "".join(f", {key.replace('_', '-')} {settings[key]:g}" for key in ("top_k", "top_p") if settings.get(key) is not None)
    caption = f"{which}; the first of {len(images):,} samples, not a selection. Sampled with {how}, seed {settings['seed']}."
    return figure(strips(rows), caption)


def reconstructions(pictures, metrics: dict) -> Html:
    if "originals" not in pictures:
        return paragraph("This run has no evaluation/pictures.npz: recipes/evaluate.py writes it.")
    columns, rebuilt = per_row(max(pictures["originals"].shape[1:3])), metrics["reconstruction"]
    rows = [("original", strip(pictures["originals"][:columns], "held-out images"))]
    for name, values in rebuilt.items():
        if name in pictures:
            words = {"stage 1": f"stage 1, weak decoder ({values['decoder']})", "final": f"final decoder ({values['decoder']})"}[name]
            rows.append((words, strip(pictures[name][:columns], f"the same images through the {words}")))
    two = "stage 1" in rebuilt
    why = "Both decoders read the same tokens: the difference is the decoder's alone. " if two else ""
    quality = ", ".join(f"{n} {number(v['psnr'], 1)} dB (SSIM {number(v['ssim'], 3)})" for n, v in rebuilt.items())
    return figure(strips(rows), f"Held-out images, encoded into tokens and decoded again. {why}PSNR over all held-out images: {quality}.")


def training_curves(histories: dict, metrics: dict, config: Config) -> list[Html]:
    charts, rows = [], histories["autoencoder"]
    names = list(dict.fromkeys(row["stage"] for row in rows))
    switch = [(max(r["step"] for r in rows if r["stage"] == names[0]), "encoder frozen, new decoder")] if len(names) > 1 else []
    for split, key, label, caption in (
        ("train", "loss", "reconstruction loss", "Autoencoder, training: reconstruction loss (logarithmic)."),
        ("validation", "psnr", "PSNR, dB", "Autoencoder, held-out images: PSNR of reconstructions; higher is better."),
    ):
        lines = [
            Line(STAGES.get(name, name), [r["step"] for r in kept], [r[key] for r in kept], colour=("first", "second")[i % 2])
            for i, name in enumerate(names)
            if (kept := [r for r in rows if r["stage"] == name and r["split"] == split])
        ]
        if lines:
            caption += " The rule marks the switch: from there on only the real decoder learns." if switch else ""
            chart = line_chart(lines, x="step", y=label, alt=caption, marks=switch, logarithmic=split == "train")
            charts.append(figure(chart, caption))
    prior = {split: [r for r in histories["prior"] if r["split"] == split] for split in ("train", "validation")}
    if prior["train"] and prior["validation"]:
        lines = [
            Line("training", [r["step"] for r in prior["train"]], [r["loss"] / math.log(2) for r in prior["train"]]),
            Line("held-out", *([r[k] for r in prior["validation"]] for k in ("step", "bits_per_token")), colour="second", dashed=True),
        ]
        step = metrics["prior"]["step"]
        rule = "the step with the fewest held-out bits, whose weights are delivered" if config.prior.early_stopping else "the weights delivered"
        caption = (
            f"Prior: bits a token. The rule at step {step:,} marks {rule}. The training line is measured with dropout and hidden "
            "classes, so it can lie above the other one; where it falls and the held-out line rises, the prior learns by heart."
        )
        mark = [(step, f"delivered: step {step:,}")]
        charts.append(figure(line_chart(lines, x="step", y="bits a token", alt=caption, marks=mark), caption))
    return [side_by_side(*charts)] if charts else [paragraph("This run has no logs/history.jsonl.")]


def codebook(metrics: dict) -> Html:
    if not metrics.get("codebook"):
        return paragraph("The latent is continuous: there is no codebook.")
    counts, usage, perplexity = (metrics["codebook"][key] for key in ("counts", "usage", "perplexity"))
    total, size = sum(counts), len(counts)
    caption = (
        f"How often each of the {size:,} codes is used for held-out images ({total:,} tokens), most frequent first. Used at all: "
        f"{percent(usage)}. Perplexity {number(perplexity, 1)}: as varied as {number(perplexity, 1)} codes in equal parts would be."
    )
    chart = bar_chart(sorted(counts, reverse=True), x="code, by rank", y="tokens", alt=caption, level=(total / size, "all equal"))
    return side_by_side(figure(chart, caption))


def copies(pictures, metrics: dict, config: Config) -> list[Html]:
    g, settings, parts = metrics["generation"], config.prior, []
    parts.append(
        paragraph(
            "A generator that repeats its training images looks perfect and is useless. A sample counts as a near-copy if it is nearer "
            "to a training image, pixel by pixel, than 99 % of the held-out images are; real new images would show about 1 %. "
            f"Here: {percent(g['memorised'])} of the samples, {percent(g['memorised_heldout'])} of the held-out images."
        )
    )
    if "nearest training images" in pictures:
        columns = per_row(max(pictures["samples"].shape[1:3]))
        rows = [(n, strip(pictures[n][:columns], n)) for n in ("samples", "nearest training images")]
        parts.append(figure(strips(rows), "The first samples, and below each one the training image nearest to it in pixels."))
    if metrics.get("trade"):
        recognised = metrics["generation"]["recognised"] is not None
        columns = {
            "guidance": lambda r: f"{r['cfg_scale']:g}", "prior step": lambda r: f"{r['prior_step']:,}",
            "held-out bits a token": lambda r: number(r["heldout_bits_per_token"], 3),
            "recognised": lambda r: percent(r["recognised"]), "Fréchet ratio": lambda r: number(r["frechet_ratio"]),
            "precision": lambda r: number(r["precision"]), "recall": lambda r: number(r["recall"]),
            "near-copies": lambda r: percent(r["memorised"]),
        }  # fmt: skip
        columns = {name: cell for name, cell in columns.items() if recognised or name != "recognised"}
        used = (metrics["sampling"]["cfg_scale"], metrics["prior"]["step"])
        marked = [i for i, r in enumerate(metrics["trade"]) if (r["cfg_scale"], r["prior_step"]) == used]
        made = f"{settings.augmented_copies} augmented copies of each training image" if settings.augmented_copies else "no augmented copies"
        stop = "early stopping by held-out bits" if settings.early_stopping else "no early stopping"
        parts += [
            element("h3", "What fidelity costs"),
            paragraph(
                "Stronger guidance and longer training make samples easier to recognise, at the price of variety (recall) and, past "
                "the step with the fewest held-out bits, of copies; augmenting the training images and stopping at that step work "
                f"against copies, usually for a little fidelity. This prior saw {made}, with {stop}."
            ),
            table(list(columns), [[cell(r) for cell in columns.values()] for r in metrics["trade"]], prose=(), marked=marked),
        ]
    return parts


def all_measurements(metrics: dict) -> Html:
    g, floor, prior, extractor = metrics["generation"], metrics["floor"], metrics["prior"], metrics["extractor"]
    rows = []
    for name, v in metrics["reconstruction"].items():
        which = {"stage 1": "stage 1, weak decoder", "final": "final decoder"}.get(name, name)
        rows += [
            (f"PSNR, {which}", f"{number(v['psnr'])} dB", "Pixel error of reconstructions on a logarithmic scale; higher is better."),
            (f"SSIM, {which}", number(v["ssim"], 3), "Likeness of local structure of reconstructions; 1 is identical."),
            (f"Fréchet distance, {which}", number(v["frechet"]), "From reconstructions to held-out images; 0 if they are alike as sets."),
        ]
    if metrics.get("codebook"):
        rows += [
            ("Codebook usage", percent(metrics["codebook"]["usage"]), "Share of the codes that occur in held-out images."),
            ("Codebook perplexity", number(metrics["codebook"]["perplexity"], 1), "Effective number of codes; the exponential of their entropy."),
        ]
    rows += [
        ("Held-out bits a token", number(prior["heldout_bits_per_token"], 3), f"Code length under the prior, given the class (at step {prior['step']:,}); lower is better."),
        ("Held-out bits an image", number(bits_an_image(metrics), 1), f"The same for all {prior['tokens_an_image']} tokens. Comparable only for one autoencoder."),
        ("Recognised", percent(g["recognised"]), "Share of samples that the classifier puts into the class they were sampled for."
         if g["recognised"] is not None else "Not defined: the data have no classes."),
        ("Fréchet distance", spread(g["frechet"], g["frechet_std"]), "Between Gaussians fitted to features of samples and of held-out images; lower is better."),
        ("Its floor", spread(floor["frechet"], floor["frechet_std"]), "The same for training images in place of samples: what real images reach."),
        ("Ratio", number(g["frechet_ratio"]), "Fréchet distance over its floor; 1 is as near as real images are."),
        ("Precision", number(g["precision"], 3), "Share of samples that lie among held-out images in feature space: fidelity."),
        ("Recall", number(g["recall"], 3), "Share of held-out images that lie among samples in feature space: variety."),
        ("Near-copies", percent(g["memorised"]), "Share of samples nearer to a training image than 99 % of held-out images are."),
        ("The same, held-out", percent(g["memorised_heldout"]), "What a model without memory would show."),
        ("Its threshold", number(g["memorised_threshold"], 3), "Root mean square difference a pixel; black and white are 2 apart."),
        ("Classifier's accuracy", percent(extractor["heldout_accuracy"]), "On held-out images: the most that “recognised” can be expected to reach."
         if g["recognised"] is not None else "On held-out images, telling by how many quarter turns they were rotated."),
    ]  # fmt: skip
    return table(("measure", "value", "what it means"), rows, prose=(0, 2))


def counts(metrics: dict) -> Html:
    count, sampling = metrics["counts"], metrics["sampling"]
    rows = [
        ("Feature extractor", f"{metrics['extractor']['id']} ({metrics['extractor']['note']})"),
        ("Training images", f"{count['train']:,}"),
        ("Held-out images", f"{count['heldout']:,}"),
        ("Samples", f"{count['samples']:,}"),
        ("Images on each side of a Fréchet distance", f"{count['frechet']:,}; ± is the deviation between disjoint sets of so many"),
        ("Seeds", f"training and evaluation {metrics['seed']}, sampling {sampling['seed']}"),
    ]
    if fingerprint_of_data := (metrics.get("data") or {}).get("fingerprint"):
        rows.append(("Fingerprint of the data", fingerprint_of_data))
    return table(("what", "value"), rows, prose=(0, 1))


def timings(seconds: dict, metrics: dict) -> Html:
    rows = [(f"Training: {STAGES.get(stage, stage)}", duration(s)) for parts in seconds.values() for stage, s in parts.items()]
    images, sampling = metrics["counts"]["samples"], metrics["sampling"]["seconds"]
    rows.append((f"Sampling {images:,} images ({1000 * sampling / images:.1f} ms an image)", duration(sampling)))
    rows.append(("Evaluation, with the training of its classifier", duration(metrics["seconds"])))
    note = "Wall-clock time, from the logs; with validation and checkpoints. Loading the data is in the first stage; encoding is not logged."
    return figure(table(("what", "time"), rows), note)


def configuration(trained: Config, metrics: dict) -> list[Html]:
    from omegaconf import OmegaConf

    words = OmegaConf.to_yaml(OmegaConf.structured(trained))
    changed = differing_keys(Config(), trained)
    return [
        details(f"The resolved configuration ({len(changed)} keys differ from the defaults)", preformatted(words)),
        table(("software", "version"), list(metrics["versions"].items()), prose=(0, 1)),
    ]


if __name__ == "__main__":
    report(config_from_command_line(__doc__))
