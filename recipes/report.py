"""Write the page of a run: what was trained, how good it is, what its samples look like, and whether they are copies.

    python recipes/report.py --config recipes/configs/digits.yaml

Reads what recipes/train_dae.py, train_prior.py, sample.py and evaluate.py left in <output_dir>; measures nothing anew.
Writes <output_dir>/report.html: one file without scripts and without requests, to open in any browser or to send by mail.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from omegaconf import OmegaConf

from dae.cli import main
from dae.config import Config, config_differences
from dae.files import announce
from dae.lock import writes
from dae.reporting import elements as web
from dae.reporting.charts import Line, bar_chart, in_words, line_chart
from dae.reporting.elements import Html, number, paragraph, percent, strip
from dae.reporting.record import Record, seconds_by_stage

PAPER = web.link("Hu et al., “Complexity Matters”, NeurIPS 2023", "https://arxiv.org/abs/2307.08283")
METHODS = {
    "dae": (
        "Decoupled Autoencoder",
        "The method is the Decoupled Autoencoder: the encoder is first trained together with a deliberately weak decoder, so "
        "that it learns {codes} from which even a simple generator can make images; then the encoder is frozen, and the real "
        "decoder is trained on its {codes}.",
    ),
    "joint": (
        "Jointly trained autoencoder",
        "The method is the usual one, which serves as a baseline: encoder and real decoder are trained together.",
    ),
    "joint_dropout": (
        "Jointly trained autoencoder with dropout",
        "The method is a baseline: encoder and real decoder are trained together, with channel dropout in the decoder.",
    ),
    "joint_finetuned": (
        "Jointly trained autoencoder with a fine-tuned decoder",
        "The method is a baseline: encoder and real decoder are trained together; then the encoder is frozen, and the same "
        "decoder is trained further on its {codes}.",
    ),
    "weak": (
        "Weak autoencoder",
        "The method is a baseline: the encoder is trained together with a deliberately weak decoder, and no other follows.",
    ),
}
STAGES = {
    "stage1": "stage 1, weak decoder", "stage2": "stage 2, real decoder", "joint": "one stage",
    "finetune": "decoder fine-tuned", "prior": "prior",
}  # fmt: skip
DECODERS = {"stage 1": "stage 1, weak decoder", "final": "final decoder"}
CLASSES_SHOWN = 20


@writes("report")
def report(config: Config) -> Path:
    """Write the page; returns its path. FileNotFoundError: the run has no samples or no metrics.json yet."""
    run = Record.load(config)
    page = web.Page(f"{METHODS[run.config.method][0]} on {run.data_name}", lead(run))
    page.section("In numbers", headline(run))
    page.section("Samples", sample_grid(run))
    page.section("Reconstructions", reconstructions(run))
    if run.tables:
        page.section("Data", *data_tables(run))
    page.section("Training", autoencoder_curves(run.autoencoder), prior_curves(run))
    if run.family == "ar":
        page.section("Codebook", codebook(run.metrics.get("codebook")))
    else:
        page.section("Latent", latent(run))
    page.section("Copies?", *copies(run), *trade(run))
    page.section("All measurements", measurements(run), web.element("h3", "What was measured"), provenance(run))
    page.section("Time", timings(run))
    page.section("Configuration and versions", *configuration(run))
    ours = "; all hyper-parameters are ours, and no number here is the paper's."
    page.footer = [paragraph("The method as publicly described in ", PAPER, ours, " Written by recipes/report.py.")]
    path = page.write(Path(config.output_dir) / "report.html")
    announce(path.parent, [path.name], f"/{path.name} ({path.stat().st_size / 1e6:.1f} MB)")
    return path


# ---- sections, in their order on the page ----


def lead(run: Record) -> list[Html]:
    _, height, width, channels = run.images.shape
    classes = run.data.get("num_classes") or int(run.labels.max()) + 1
    kind = f"{height} × {width} pixels, {'grey' if channels == 1 else 'colour'}"
    kind += f", {classes:,} classes" if classes > 1 else ", without classes"
    kind += ", which this prior does not know" if classes > 1 and run.family == "mixture" else ""
    train, heldout = run.data.get("train", run.metrics["counts"]["train"]), run.metrics["counts"]["heldout"]
    number_of_images = "a stream of" if train is None else f"{train:,}"
    what = f"{how_it_works(run)} Both learned from {number_of_images} training images of the data set “{run.data_name}” ({kind})."
    method = METHODS[run.config.method][1].format(codes="tokens" if run.family == "ar" else "latents")
    if run.config.stage2.loss.adversarial > 0:
        method += " The final decoder also learned to deceive a discriminator, as the generator of a GAN does."
    logs = {"autoencoder": run.autoencoder, "prior": run.prior}
    spent = [f"{web.duration(sum(seconds_by_stage(rows).values()))} for the {name}" for name, rows in logs.items() if rows]
    when = f"Training took {' and '.join(spent)}. " if spent else ""
    when += f"The run was measured on {run.measured_on.day} {run.measured_on:%B %Y}, against {heldout:,} held-out images. "
    stopped = run.config.prior.early_stopping and run.family != "mixture"
    chosen = "; they did choose the step at which the prior stops" if stopped else ""
    when += f"No weight was trained on them{chosen}."
    notices = [paragraph(notice, class_="notice") for notice in run.contradictions]
    return [paragraph(what), paragraph(method, " See ", PAPER, "."), paragraph(when), *notices]


def how_it_works(run: Record) -> str:
    if run.family == "ar":
        codes, tokens = run.config.autoencoder.vq.codebook_size, run.metrics["prior"]["tokens_an_image"]
        return (
            f"An autoencoder learned to write an image as {tokens} tokens, each one of {codes:,} codes; a Transformer, the "
            "prior, learned which tokens follow one another. To make a new image, the prior writes tokens, and the decoder turns "
            "them into pixels."
        )
    channels, size = run.metrics["latent"]["channels"], run.metrics["latent"]["size"]
    if run.family == "dit":
        prior = "a Diffusion Transformer, the prior, learned to turn pure noise into such a latent, step by step"
    else:
        prior = f"a mixture of {run.config.prior.num_components} Gaussians, the prior, was fitted to such latents"
    return (
        f"An autoencoder learned to write an image as a latent: {channels * size**2:,} numbers ({channels} channels of {size} × "
        f"{size}), each with a little noise on it; {prior}. To make a new image, the prior draws a latent, and the decoder turns "
        "it into pixels."
    )


def headline(run: Record) -> Html:
    g, floor, rebuilt = run.metrics["generation"], run.metrics["floor"]["frechet"], run.metrics["reconstruction"]
    weak = (
        f"weak decoder of stage 1: {number(rebuilt['stage 1']['psnr'], 1)}\u00a0dB"
        if "stage 1" in rebuilt
        else "mean of held-out images"
    )
    entries = [
        (percent(g["recognised"]), "Samples recognised as their class",
         f"real held-out images: {percent(run.metrics['extractor']['heldout_accuracy'])}"),
        (number(g["frechet"]), "Fréchet distance to held-out images",
         f"{number(g['frechet_ratio'])} × that of real training images ({number(floor)})"),
        (percent(g["memorised"]), "Near-copies of training images", f"real held-out images: {percent(g['memorised_heldout'])}"),
        bits(run),
        (f"{number(rebuilt['final']['psnr'], 1)}\u00a0dB", "PSNR of reconstructions", weak),
    ]  # fmt: skip
    return web.tiles(entries if run.labelled else entries[1:])


def bits(run: Record) -> tuple[str, str, str]:
    """The tile of the prior: number, what it is, what to hold it against."""
    if run.family != "ar":
        plain = number(run.metrics["latent"]["gaussian_bits"], 1)
        return number(run.bits_an_image, 1), "Bits per image, held-out images", f"{plain} if the prior were one plain Gaussian"
    if run.metrics.get("codebook"):
        known = f"{number(math.log2(run.metrics['codebook']['perplexity']))} if only the frequency of each code is known"
    else:
        known = f"{number(math.log2(run.config.autoencoder.vq.codebook_size))} if all codes were equally likely"
    token = number(run.metrics["prior"]["heldout_bits_per_token"])
    return token, "Bits per token, held-out images", f"{known}; {number(run.bits_an_image, 1)} a whole image"


def sample_grid(run: Record) -> Html:
    images, labels, names = run.images, run.labels, run.data.get("class_names")
    columns, settings, present = web.per_row(max(images.shape[1:3])), run.metrics["sampling"], np.unique(labels)
    if len(present) > 1:
        shown = [(names[c] if names else c, images[labels == c][:columns]) for c in present[:CLASSES_SHOWN].tolist()]
        rows = [(name, strip(x, f"{len(x)} samples of class {name}")) for name, x in shown]
        which = "One row a class" + (f" ({len(rows)} of {len(present):,} classes)" if len(present) > len(rows) else "")
    else:
        blocks = [images[i : i + columns] for i in range(0, min(len(images), 6 * columns), columns)]
        rows, which = [("", strip(x, f"{len(x)} samples")) for x in blocks], "New images"
    used = {"ar": ("cfg_scale", "temperature", "top_k", "top_p"), "dit": ("cfg_scale", "num_inference_steps"), "mixture": ()}
    words = {
        "cfg_scale": "guidance scale {:g}, ", "temperature": "temperature {:g}, ", "top_k": "top-k {:g}, ",
        "top_p": "top-p {:g}, ", "num_inference_steps": "{} steps from noise to latent, ",
    }  # fmt: skip
    how = "".join(words[key].format(settings[key]) for key in used[run.family] if settings[key] is not None)
    caption = f"{which}: the first of {len(images):,} samples, not a selection. Sampled with {how}seed {settings['seed']}."
    caption += f" Pictures are reduced to {web.LARGEST_SIDE} pixels." if max(images.shape[1:3]) > web.LARGEST_SIDE else ""
    return web.figure(web.strips(rows), caption)


def reconstructions(run: Record) -> Html:
    if "originals" not in run.pictures:
        return paragraph("This run has no evaluation/pictures.npz; recipes/evaluate.py writes it.")
    columns, rebuilt = web.per_row(max(run.pictures["originals"].shape[1:3])), run.metrics["reconstruction"]
    rows = [("original", strip(run.pictures["originals"][:columns], "held-out images"))]
    for name in (n for n in rebuilt if n in run.pictures):
        words = f"{DECODERS[name]} ({rebuilt[name]['decoder']})"
        rows.append((words, strip(run.pictures[name][:columns], f"the same images through the {words}")))
    codes = "tokens" if run.family == "ar" else "latents"
    why = f"Both decoders read the same {codes}, so what differs is the decoder's doing. " if "stage 1" in rebuilt else ""
    quality = ", ".join(f"{DECODERS[n]} {number(v['psnr'], 1)}\u00a0dB (SSIM {number(v['ssim'], 3)})" for n, v in rebuilt.items())
    caption = f"Held-out images, encoded into {codes} and decoded again. {why}PSNR over all held-out images: {quality}."
    return web.figure(web.strips(rows), caption)


def data_tables(run: Record) -> list[Html]:
    words = ("What training read, as it said before the first step:",)
    if len(run.tables) > 1:
        words = (
            "What training of the autoencoder read, as it said before the first step:",
            "The prior was trained on other data:",
        )
    parts = []
    for sentence, table in zip(words, run.tables, strict=True):
        parts += [paragraph(sentence), web.table(("what", "read"), table, prose=(0, 1))]
    return parts


def autoencoder_curves(history: list[dict]) -> Html:
    charts, stages = [], {}
    for row in history:
        stages.setdefault(row["stage"], []).append(row)
    words = "encoder frozen" if "finetune" in stages else "encoder frozen, new decoder"
    switch = [(rows[-1]["step"], words) for rows in list(stages.values())[:-1]]
    rule = " The rule marks the switch: from there on, only the real decoder learns." if switch else ""
    for split, key, axis, caption in (
        ("train", "loss", "reconstruction loss", "Autoencoder, training images: reconstruction loss, on a logarithmic scale."),
        ("validation", "psnr", "PSNR, dB", "Autoencoder, held-out images: PSNR of reconstructions; higher is better."),
    ):
        lines = []
        for (name, rows), colour in zip(stages.items(), ("first", "second"), strict=False):
            if kept := [row for row in rows if row["split"] == split]:
                lines.append(Line(STAGES[name], [r["step"] for r in kept], [r[key] for r in kept], colour))
        if lines:
            svg = line_chart(lines, x="step", y=axis, marks=switch, logarithmic=split == "train")
            charts.append(web.figure(web.chart(svg, in_words(lines, "step", axis)), caption + rule))
    return web.side_by_side(*charts) if charts else paragraph("This run has no autoencoder/logs/history.jsonl.")


def prior_curves(run: Record) -> Html:
    seen, heldout = ([row for row in run.prior if row["split"] == split] for split in ("train", "validation"))
    if not seen or not heldout:
        return paragraph("This run has no prior/logs/history.jsonl.")
    if run.family == "mixture":
        fitted, new = (number(rows[-1]["bits_per_image"], 1) for rows in (seen, heldout))
        return paragraph(
            f"The prior is fitted at once, not in steps. It needs {fitted} bits to write down the latent of a training image and "
            f"{new} for a held-out one. Where the second is much larger than the first, the prior has memorised training images."
        )
    if run.family == "ar":
        key, axis, scale = "bits_per_token", "bits per token", math.log(2)
        meaning = "Bits per token are what the prior needs to write down one token of an image, given those before it."
    else:
        key, axis, scale = "loss", "flow-matching loss", 1.0
        meaning = (
            "The prior sees a latent mixed with noise and estimates the way from the one to the other; the loss is its mean "
            "squared error. Nobody can undo the mixture exactly, so the loss does not reach 0."
        )
    lines = [
        Line("training", [r["step"] for r in seen], [r["loss"] / scale for r in seen]),
        Line("held-out", [r["step"] for r in heldout], [r[key] for r in heldout], "second", dashed=True),
    ]
    step = run.metrics["prior"]["step"]
    svg = line_chart(lines, x="step", y=axis, marks=[(step, f"used: step {step:,}")])
    least = "fewest held-out bits" if run.family == "ar" else "lowest held-out loss"
    marked = f"the step with the {least}, whose weights are" if run.config.prior.early_stopping else "the weights that are"
    words = (
        f"{meaning} Where the training line falls while the held-out line rises, the prior memorises. The training line is "
        "measured with dropout and with some classes hidden, so it can lie above the other."
    )
    caption = f"Prior: {axis}; lower is better. The rule marks {marked} used."
    return web.side_by_side(web.figure(web.chart(svg, in_words(lines, "step", axis)), caption), paragraph(words))


def latent(run: Record) -> Html:
    found = run.metrics["latent"]
    by_channel = sorted(found["gaussian_bits_by_channel"], reverse=True)
    mean, most, total = sum(by_channel) / len(by_channel), number(by_channel[0], 1), number(found["gaussian_bits"], 1)
    svg = bar_chart(by_channel, x="channel, by rank", y="bits per image", level=(mean, "if all were equal"))
    caption = f"What each of the {found['channels']} channels of the latent tells of a held-out image, most telling first."
    alt = f"Bars from {most} bits for the most telling channel to {number(by_channel[-1], 1)} for the least"
    meaning = (
        "The encoder does not say one number but a range, a mean and the noise about it. The wider the means of different images "
        f"lie apart beside that noise, the more bits the latent carries: {total} bits per image here, if its values were "
        "independent Gaussians. A channel of nearly no bits is capacity left idle."
    )
    return web.side_by_side(web.figure(web.chart(svg, alt), caption), paragraph(meaning))


def codebook(found: dict | None) -> Html:
    if not found:
        return paragraph("No codes were counted: the latent of this run is continuous.")
    counts, perplexity = sorted(found["counts"], reverse=True), number(found["perplexity"], 1)
    svg = bar_chart(counts, x="code, by rank", y="tokens", level=(sum(counts) / len(counts), "if all were equal"))
    caption = f"How often each code is used in {sum(counts):,} tokens of held-out images, most frequent first."
    alt = f"Bars from {counts[0]:,} tokens for the commonest code to {counts[-1]:,} for the rarest"
    meaning = (
        f"Of {len(counts):,} codes, {percent(found['usage'])} occur at all. The perplexity is {perplexity}: the tokens are as "
        f"varied as {perplexity} codes in equal parts would be. A code that is never used is capacity left idle."
    )
    return web.side_by_side(web.figure(web.chart(svg, alt), caption), paragraph(meaning))


def copies(run: Record) -> list[Html]:
    share, of_heldout = (percent(run.metrics["generation"][key]) for key in ("memorised", "memorised_heldout"))
    words = (
        "A generator that repeats its training images looks perfect and is useless. A sample counts as a near-copy if it is "
        "nearer to a training image, pixel by pixel, than 99\u00a0% of the held-out images are; so about 1\u00a0% is what new "
        f"images show. Here it is {share} of the samples ({of_heldout} of the held-out images)."
    )
    parts = [paragraph(words)]
    if "nearest training images" in run.pictures:
        columns = web.per_row(max(run.pictures["samples"].shape[1:3]))
        rows = [(name, strip(run.pictures[name][:columns], name)) for name in ("samples", "nearest training images")]
        caption = "The samples nearest to a training image, the worst cases of all; below each, that training image."
        parts.append(web.figure(web.strips(rows), caption))
    return parts


def trade(run: Record) -> list[Html]:
    if not run.metrics.get("trade"):
        return []
    score, key, least = {
        "ar": ("held-out bits per token", "heldout_bits_per_token", "fewest held-out bits"),
        "dit": ("held-out loss", "heldout_loss", "lowest held-out loss"),
    }[run.family]
    columns = {
        "guidance": lambda r: f"{r['cfg_scale']:g}", "prior step": lambda r: f"{r['prior_step']:,}",
        score: lambda r: number(r[key], 3),
        "recognised": lambda r: percent(r["recognised"]), "Fréchet ratio": lambda r: number(r["frechet_ratio"]),
        "precision": lambda r: number(r["precision"]), "recall": lambda r: number(r["recall"]),
        "near-copies": lambda r: percent(r["memorised"]),
    }  # fmt: skip
    if not run.labelled:
        del columns["recognised"]
    shown = (run.metrics["sampling"]["cfg_scale"], run.metrics["prior"]["step"])
    marked = [i for i, row in enumerate(run.metrics["trade"]) if (row["cfg_scale"], row["prior_step"]) == shown]
    copies_seen, stopping = run.config.prior.num_augmentations or "no", "with" if run.config.prior.early_stopping else "without"
    bold = "The row in bold has the settings of the samples above; it is another draw, so its numbers differ a little."
    words = (
        "Stronger guidance and longer training usually make samples easier to recognise, at the price of variety (recall) and, "
        f"past the step with the {least}, of copies; augmenting the images and stopping at that step work "
        f"against copies, for some fidelity. This prior saw {copies_seen} further encodings of each training image and was "
        f"trained {stopping} early stopping. {bold if marked else ''}"
    )
    rows = [[cell(row) for cell in columns.values()] for row in run.metrics["trade"]]
    return [web.element("h3", "What fidelity costs"), paragraph(words), web.table(list(columns), rows, prose=(), marked=marked)]


def measurements(run: Record) -> Html:
    g, floor, rows = run.metrics["generation"], run.metrics["floor"], []
    for name, v in run.metrics["reconstruction"].items():
        which = f", {DECODERS[name]}"
        rows += [
            (f"PSNR{which}", f"{number(v['psnr'])}\u00a0dB", "Pixel error of reconstructions, logarithmic; higher is better."),
            (f"SSIM{which}", number(v["ssim"], 3), "Likeness of local structure in reconstructions; 1 is identical."),
            (f"Fréchet distance{which}", number(v["frechet"]), "Of reconstructions to held-out images; 0 is no difference."),
        ]
    if found := run.metrics.get("codebook"):
        rows += [
            ("Codebook usage", percent(found["usage"]), "Share of the codes that occur in held-out images."),
            ("Codebook perplexity", number(found["perplexity"], 1), "Effective number of codes: exponential of their entropy."),
        ]
    distance, least = web.spread(g["frechet"], g["frechet_std"]), web.spread(floor["frechet"], floor["frechet_std"])
    right = percent(run.metrics["extractor"]["heldout_accuracy"])
    task = "telling by how many quarter turns one was rotated"
    if run.labelled or run.data.get("labelled"):
        task = "what “recognised” is to be held against" if run.labelled else "telling their classes apart"
    rows += [
        *prior_measurements(run),
        ("Recognised", percent(g["recognised"]), "Samples that the classifier takes for the class they were sampled as."),
        ("Fréchet distance", distance, "Of samples to held-out images, as Gaussians of features; lower is better."),
        ("Fréchet distance, floor", least, "Of real training images to held-out images, at equal counts."),
        *kernel_distances(g, floor),
        ("Fréchet ratio", number(g["frechet_ratio"]), "The distance over its floor; 1 is as near as real images are."),
        ("Precision", number(g["precision"], 3), "Share of samples that lie among held-out images, in features: fidelity."),
        ("Recall", number(g["recall"], 3), "Share of held-out images that lie among samples, in features: variety."),
        ("Near-copies", percent(g["memorised"]), "Samples nearer to a training image than 99\u00a0% of held-out images are."),
        ("Near-copies, held-out", percent(g["memorised_heldout"]), "The same share of the held-out images themselves."),
        ("Near-copies, threshold", number(g["memorised_threshold"], 3), "RMS difference a pixel; black and white are 2 apart."),
        ("Classifier's accuracy", right, f"On held-out images: {task}."),
    ]
    rows = [row for row in rows if run.labelled or row[0] != "Recognised"]
    return web.table(("measure", "value", "what it means"), rows, prose=(0, 2))


def kernel_distances(generation: dict, floor: dict) -> list[tuple[str, str, str]]:
    rows = []
    for name, values, of in (("", generation, "samples"), (", floor", floor, "real training images")):
        if "kernel_distance" in values:  # not measured by earlier versions
            subsets, size = values["kernel_subsets"], values["kernel_subset_size"]
            spread = web.spread(values["kernel_distance"], values["kernel_distance_std"], 4)
            meaning = f"KID's formula in our features: of {of} to held-out images; {subsets} random subsets of {size:,} a side."
            rows.append((f"Kernel distance{name}", spread, meaning))
    return rows


def prior_measurements(run: Record) -> list[tuple[str, str, str]]:
    prior, image = run.metrics["prior"], number(run.bits_an_image, 1)
    if run.family == "ar":
        token = number(prior["heldout_bits_per_token"], 3)
        return [
            ("Held-out bits per token", token, "Code length under the prior, given the class; lower is better."),
            ("Held-out bits per image", image, "The same for all tokens; compares priors of one autoencoder only."),
        ]
    given = "" if run.family == "mixture" else ", given the class"
    meaning = f"Code length of the latent under the prior{given}, less that of its noise; lower is better."
    plain = number(run.metrics["latent"]["gaussian_bits"], 1)
    rows = [
        ("Held-out bits per image", image, meaning),
        ("The same, plain Gaussian", plain, "If all values of the latent were independent Gaussians: what a prior has to beat."),
    ]
    if run.family == "dit":
        loss = number(prior["heldout_loss"], 4)
        rows.append(("Held-out loss", loss, "Flow matching's squared error; compares steps of one prior only."))
    return rows


def provenance(run: Record) -> Html:
    count, extractor = run.metrics["counts"], run.metrics["extractor"]
    rows = [
        ("Training images, for the floor and the copies", f"{count['train']:,}"),
        ("Held-out images", f"{count['heldout']:,}"),
        ("Samples", f"{count['samples']:,}"),
        ("Images a side in a Fréchet distance", f"{count['frechet']:,}; ± is the deviation between disjoint sets of so many"),
        ("Extractor of the features", f"{extractor['id']} ({extractor['note']})"),
        ("Seeds", f"{run.metrics['seed']} for training and evaluation, {run.metrics['sampling']['seed']} for the samples"),
    ]
    if found := run.data.get("fingerprint"):
        rows.append(("Fingerprint of the data", found))
    return web.table(("what", "value"), rows, prose=(0, 1))


def timings(run: Record) -> Html:
    seconds = seconds_by_stage(run.autoencoder) | seconds_by_stage(run.prior)
    rows = [(f"Training: {STAGES[stage]}", web.duration(s)) for stage, s in seconds.items()]
    images, sampling = run.metrics["counts"]["samples"], run.metrics["sampling"]["seconds"]
    rows.append((f"Sampling {images:,} images ({1000 * sampling / images:.3g} ms an image)", web.duration(sampling)))
    rows.append(("Evaluation, with the training of its classifier", web.duration(run.metrics["seconds"])))
    note = (
        "Wall-clock time from the logs, with start, validation and checkpoints. Encoding the images for the prior is not logged."
    )
    return web.figure(web.table(("what", "time"), rows), note)


def configuration(run: Record) -> list[Html]:
    words = OmegaConf.to_yaml(OmegaConf.structured(run.config))
    summary = f"The resolved configuration ({len(config_differences(Config(), run.config))} keys differ from the defaults)"
    versions = web.table(("software", "version"), list(run.metrics["versions"].items()), prose=(0, 1))
    return [web.details(summary, web.preformatted(words)), versions]


if __name__ == "__main__":
    main(report, __doc__)
