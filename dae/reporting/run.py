"""The page of a run: one function per section, in their order on the page."""

from __future__ import annotations

import numpy as np

from dae.config import Config
from dae.data.pictures import grid
from dae.quantizers import bottleneck_class
from dae.reporting import elements as web
from dae.reporting.charts import Line, in_words, line_chart
from dae.reporting.elements import Html, number, paragraph, percent, strip
from dae.reporting.measures import DECODERS, headline, measurements, provenance
from dae.reporting.record import Record, seconds_by_stage
from dae.training.run import WARNING

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
    "refit": (
        "Autoencoder with a refitted decoder",
        "The encoder is that of an autoencoder that was there before; it was frozen, and a decoder was trained on its {codes}.",
    ),
}
PRETRAINED = (
    "Representation autoencoder",
    "The encoder is a pretrained network, {encoder}, which was not trained any further; a decoder was trained on its {codes}.",
)
STAGES = {
    "stage1": "stage 1, weak decoder", "stage2": "stage 2, real decoder", "joint": "one stage",
    "finetune": "decoder fine-tuned", "prior": "prior",
}  # fmt: skip
CLASSES_SHOWN = 20
TOKENS = ("{tokens} tokens, each one of {codes:,} codes", "writes tokens, and the decoder turns them into pixels")
LATENT = (
    "a latent: {values:,} numbers ({channels} channels of {size} × {size}){noise}",
    "draws a latent, and the decoder turns it into pixels",
)
SETTINGS = {
    "cfg_scale": "guidance scale {:g}, ", "temperature": "temperature {:g}, ", "top_k": "top-k {:g}, ", "top_p": "top-p {:g}, ",
    "num_inference_steps": "{} steps from noise to latent, ",
}  # fmt: skip


def run_page(run: Record) -> web.Page:
    """Build the page from the record; measures nothing."""
    page = web.Page(f"{method(run)[0]} on {run.data_name}", lead(run))
    page.section("In numbers", web.tiles(headline(run.metrics, run.num_codes)))
    page.section("Samples", sample_grid(run))
    page.section("Reconstructions", reconstructions(run))
    if run.tables:
        page.section("Data", *data_tables(run))
    page.section("Training", autoencoder_curves(run.autoencoder, run.config), prior_curves(run))
    page.section("Warnings", warnings([*run.autoencoder, *run.prior]))
    if run.num_codes:
        page.section("Codebook", codebook(run.metrics.get("codebook")))
    else:
        page.section("Latent", latent(run.metrics["latent"]))
    page.section("Copies?", *copies(run), *guidance_table(run))
    measured = web.table(("measure", "value", "what it means"), measurements(run.metrics), prose=(0, 2))
    origin = web.table(("what", "value"), provenance(run.metrics), prose=(0, 1))
    page.section("All measurements", measured, web.element("h3", "What was measured"), origin)
    page.section("Time", timings(run))
    versions = web.table(("software", "version"), list(run.metrics["versions"].items()), prose=(0, 1))
    page.section("Configuration and versions", web.configuration(run.config), versions)
    ours = "; all hyper-parameters are ours, and no number here is the paper's."
    page.footer = [paragraph("The method as publicly described in ", web.PAPER, ours, " Written by recipes/report.py.")]
    return page


def lead(run: Record) -> list[Html]:
    _, height, width, channels = run.images.shape
    classes, prior = run.data.get("num_classes") or int(run.labels.max()) + 1, run.family
    kind = f"{height} × {width} pixels, {'grey' if channels == 1 else 'colour'}"
    kind += f", {classes:,} classes" if classes > 1 else ", without classes"
    kind += ", which this prior does not know" if classes > 1 and prior.fitted else ""
    train, heldout = run.data.get("train", run.metrics["counts"]["train"]), run.metrics["counts"]["heldout"]
    images = "a stream of" if train is None else f"{train:,}"
    what = f"{how_it_works(run)} Both learned from {images} training images of the data set “{run.data_name}” ({kind})."
    trained = method(run)[1].format(codes=codes(run), encoder=run.config.autoencoder.encoder)
    if run.config.stage2.loss.adversarial > 0:
        trained += " The final decoder also learned to deceive a discriminator, as the generator of a GAN does."
    logs = {"autoencoder": run.autoencoder, "prior": run.prior}
    spent = [f"{web.duration(sum(seconds_by_stage(rows).values()))} for the {name}" for name, rows in logs.items() if rows]
    when = f"Training took {' and '.join(spent)}. " if spent else ""
    when += f"The run was measured on {run.measured_on.day} {run.measured_on:%B %Y}, against {heldout:,} held-out images. "
    stopped = run.config.prior.early_stopping and not prior.fitted
    chosen = "; they did choose the step at which the prior stops" if stopped else ""
    when += f"No weight was trained on them{chosen}."
    notices = [paragraph(notice, class_="notice") for notice in run.contradictions]
    return [paragraph(what), paragraph(trained, " See ", web.PAPER, "."), paragraph(when), *notices]


def method(run: Record) -> tuple[str, str]:
    """Title and sentence on how the autoencoder was trained."""
    return PRETRAINED if run.config.autoencoder.encoder else METHODS[run.config.method]


def codes(run: Record) -> str:
    return "tokens" if run.num_codes else "latents"


def how_it_works(run: Record) -> str:
    written, drawn = TOKENS if run.num_codes else LATENT
    facts = {"tokens": run.metrics["prior"]["tokens_an_image"], "codes": run.num_codes} | (run.metrics.get("latent") or {})
    values = facts["channels"] * facts["size"] ** 2 if "channels" in facts else 0
    noise = "" if bottleneck_class(run.config.autoencoder).keeps_features else ", each with a little noise on it"
    written = written.format(**facts, values=values, noise=noise)
    learned = run.family.learned.format(components=run.config.prior.num_components)
    return f"An autoencoder learned to write an image as {written}; {learned}. To make a new image, the prior {drawn}."


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
    heeded = [key for key in run.family.sampling_knobs if settings[key] is not None]
    how = "".join(SETTINGS[key].format(settings[key]) for key in heeded)
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
    same = "stage 1" in rebuilt and run.config.stage2.codebook == "frozen"
    why = f"Both decoders read the same {codes(run)}, so what differs is the decoder's doing. " if same else ""
    quality = ", ".join(f"{DECODERS[n]} {number(v['psnr'], 1)}\u00a0dB (SSIM {number(v['ssim'], 3)})" for n, v in rebuilt.items())
    caption = f"Held-out images, encoded into {codes(run)} and decoded again. {why}PSNR over all held-out images: {quality}."
    return web.figure(web.strips(rows), caption)


def data_tables(run: Record) -> list[Html]:
    sentences = ["What training read, as it said before the first step:"]
    if len(run.tables) > 1:
        sentences = ["What training of the autoencoder read, as it said before the first step:"]
        sentences.append("The prior was trained on other data:")
    pairs = zip(sentences, run.tables, strict=True)
    return [part for words, table in pairs for part in (paragraph(words), web.table(("what", "read"), table, prose=(0, 1)))]


def autoencoder_curves(history: list[dict], config: Config) -> Html:
    """Loss and PSNR of an autoencoder's stages, of the rows of its log."""
    charts: list[Html] = []
    stages: dict[str, list[dict]] = {}
    for row in history:
        stages.setdefault(row["stage"], []).append(row)
    decoder_kept = "finetune" in stages or config.auxiliary_decoder.keep
    words = "encoder frozen" if decoder_kept else "encoder frozen, new decoder"
    switch = [(rows[-1]["step"], words) for rows in list(stages.values())[:-1]]
    learning = "only the real decoder learns" if config.stage2.codebook == "frozen" else "only decoder and codebook learn"
    rule = f" The rule marks the switch: from there on, {learning}." if switch else ""
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
    prior, step = run.family, run.metrics["prior"]["step"]
    if not seen or not heldout:
        return paragraph("This run has no prior/logs/history.jsonl.")
    if prior.fitted:
        fitted, new = (number(rows[-1]["bits_per_image"], 1) for rows in (seen, heldout))
        return paragraph(
            f"The prior is fitted at once, not in steps. It needs {fitted} bits to write down the latent of a training image and "
            f"{new} for a held-out one. Where the second is much larger than the first, the prior has memorised training images."
        )
    lines = [
        Line("training", [r["step"] for r in seen], [r["loss"] / prior.loss_unit for r in seen]),
        Line("held-out", [r["step"] for r in heldout], [r[prior.criterion] for r in heldout], "second", dashed=True),
    ]
    svg = line_chart(lines, x="step", y=prior.loss_name, marks=[(step, f"used: step {step:,}")])
    marked = f"the step with the {prior.best}, whose weights are" if run.config.prior.early_stopping else "the weights that are"
    words = (
        f"{prior.loss_meaning} Where the training line falls while the held-out line rises, the prior memorises. The training "
        "line is measured with dropout and with some classes hidden, so it can lie above the other."
    )
    caption = f"Prior: {prior.loss_name}; lower is better. The rule marks {marked} used."
    return web.side_by_side(web.figure(web.chart(svg, in_words(lines, "step", prior.loss_name)), caption), paragraph(words))


def warnings(log: list[dict]) -> Html:
    """What the doctor said while the models were trained: rows of their histories, see `dae.diagnostics.doctor`."""
    if not (found := [row for row in log if row["split"] == WARNING]):
        return paragraph("Nothing in the log of training looked wrong." if log else "This run has no log of its training.")
    rows = [(STAGES.get(row["stage"], row["stage"]), row["message"]) for row in found]
    return web.table(("while training", "warning"), rows, prose=(0, 1))


def latent(found: dict) -> Html:
    by_channel = sorted(found["gaussian_bits_by_channel"], reverse=True)
    most, least, total = (number(bits, 1) for bits in (by_channel[0], by_channel[-1], found["gaussian_bits"]))
    caption = f"What each of the {found['channels']} channels of the latent tells of a held-out image, most telling first."
    meaning = (
        "The encoder does not say one number but a range, a mean and the noise about it. The wider the means of different images "
        f"lie apart beside that noise, the more bits the latent carries: {total} bits per image here, if its values were "
        "independent Gaussians. A channel of nearly no bits is capacity left idle."
    )
    alt = f"Bars from {most} bits for the most telling channel to {least} for the least"
    return web.ranked_bars(by_channel, "channel, by rank", "bits per image", alt, caption, meaning)


def codebook(found: dict | None) -> Html:
    if not found:
        return paragraph("No codes were counted: the latent of this run is continuous.")
    perplexity = number(found["perplexity"], 1)
    meaning = (
        f"Of {len(found['counts']):,} codes, {percent(found['usage'])} occur at all. The perplexity is {perplexity}: the tokens "
        f"are as varied as {perplexity} codes in equal parts would be. A code that is never used is capacity left idle."
    )
    return web.code_usage(found["counts"], meaning)


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


def guidance_table(run: Record) -> list[Html]:
    """Effects of guidance and training length; empty for a prior with neither."""
    prior = run.family
    if not run.metrics.get("guidance_sweep"):
        return []
    columns = {
        "guidance": lambda r: f"{r['cfg_scale']:g}", "prior step": lambda r: f"{r['prior_step']:,}",
        f"held-out {prior.criterion.replace('_', ' ')}": lambda r: number(r[f"heldout_{prior.criterion}"], 3),
        "recognised": lambda r: percent(r["recognised"]), "Fréchet ratio": lambda r: number(r["frechet_ratio"]),
        "precision": lambda r: number(r["precision"]), "recall": lambda r: number(r["recall"]),
        "near-copies": lambda r: percent(r["memorised"]),
    }  # fmt: skip
    if not run.labelled:
        del columns["recognised"]
    shown = (run.metrics["sampling"]["cfg_scale"], run.metrics["prior"]["step"])
    marked = [i for i, row in enumerate(run.metrics["guidance_sweep"]) if (row["cfg_scale"], row["prior_step"]) == shown]
    copies_seen, stopping = run.config.prior.num_augmentations or "no", "with" if run.config.prior.early_stopping else "without"
    bold = "The row in bold has the settings of the samples above; it is another draw, so its numbers differ a little."
    words = (
        "Stronger guidance and longer training usually make samples easier to recognise, at the price of variety (recall) and, "
        f"past the step with the {prior.best}, of copies; augmenting the images and stopping at that step work "
        f"against copies, for some fidelity. This prior saw {copies_seen} further encodings of each training image and was "
        f"trained {stopping} early stopping. {bold if marked else ''}"
    )
    rows = [[cell(row) for cell in columns.values()] for row in run.metrics["guidance_sweep"]]
    return [web.element("h3", "What fidelity costs"), paragraph(words), web.table(list(columns), rows, prose=(), marked=marked)]


def samples_beside_originals(run: Record) -> np.ndarray:
    """Enlarged picture, uint8 [H, W, C]: at most 32 held-out images on the left, as many samples on the right."""
    factor, both = max(1, web.PICTURE_SIDE // max(run.images.shape[1:3])), (run.pictures["originals"], run.images)
    shown = min(32, *map(len, both))
    left, right = (grid(x[:shown].repeat(factor, 1).repeat(factor, 2), 8, gap=2, background=255) for x in both)
    return np.concatenate([np.pad(left, ((0, 0), (0, web.PICTURE_SIDE // 2), (0, 0)), constant_values=255), right], 1)


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
