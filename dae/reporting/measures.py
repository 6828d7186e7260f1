"""Name, value and meaning of each number in a run's metrics.json."""

from __future__ import annotations

import math
from typing import Any

from dae.priors import PRIORS, PriorFamily
from dae.reporting.elements import number, percent, spread

DECODERS = {"stage 1": "stage 1, weak decoder", "final": "final decoder"}
Row = tuple[str, str, str]


def measured_family(metrics: dict) -> PriorFamily:
    """The family of the measured prior; `ar` in runs of earlier versions."""
    return PRIORS[metrics["prior"].get("family", "ar")]


def bits_per_image(metrics: dict) -> float:
    """Held-out code length per image under the prior; runs of earlier versions have it per token."""
    prior = metrics["prior"]
    if "heldout_bits_per_image" in prior:
        return prior["heldout_bits_per_image"]
    return prior["heldout_bits_per_token"] * prior["tokens_an_image"]


def headline(metrics: dict, num_codes: int) -> list[Row]:
    """The most important numbers, each as (value, name, comparison)."""
    g, floor, rebuilt = metrics["generation"], metrics["floor"]["frechet"], metrics["reconstruction"]
    psnr = {stage: f"{number(found['psnr'], 1)}\u00a0dB" for stage, found in rebuilt.items()}
    weak = f"weak decoder of stage 1: {psnr['stage 1']}" if "stage 1" in psnr else "mean of held-out images"
    entries = [
        (percent(g["recognised"]), "Samples recognised as their class",
         f"real held-out images: {percent(metrics['extractor']['heldout_accuracy'])}"),
        (number(g["frechet"]), "Fréchet distance to held-out images",
         f"{number(g['frechet_ratio'])} × that of real training images ({number(floor)})"),
        (percent(g["memorised"]), "Near-copies of training images", f"real held-out images: {percent(g['memorised_heldout'])}"),
        _prior_bits(metrics, num_codes),
        (psnr["final"], "PSNR of reconstructions", weak),
    ]  # fmt: skip
    return entries if g["recognised"] is not None else entries[1:]


def _prior_bits(metrics: dict, num_codes: int) -> Row:
    image = number(bits_per_image(metrics), 1)
    if latent := metrics.get("latent"):
        plain = number(latent["gaussian_bits"], 1)
        return image, "Bits per image, held-out images", f"{plain} if the prior were one plain Gaussian"
    known = f"{number(math.log2(num_codes))} if all codes were equally likely"
    if codebook := metrics.get("codebook"):
        known = f"{number(math.log2(codebook['perplexity']))} if only the frequency of each code is known"
    token = number(metrics["prior"]["heldout_bits_per_token"])
    return token, "Bits per token, held-out images", f"{known}; {image} a whole image"


def measurements(metrics: dict) -> list[Row]:
    """All available numbers, each as (name, value, meaning)."""
    g, floor, prior = metrics["generation"], metrics["floor"], metrics["prior"]
    codebook, latent = metrics.get("codebook") or {}, metrics.get("latent") or {}
    task = "telling by how many quarter turns one was rotated"
    if g["recognised"] is not None:
        task = "what “recognised” is to be held against"
    elif (metrics.get("data") or {}).get("labelled"):
        task = "telling their classes apart"
    given = "" if measured_family(metrics).fitted else ", given the class"
    # Name, value or (mean, deviation) or None for what was not measured, digits or unit, meaning.
    rows: list[tuple[str, Any, int | str, str]] = []
    for stage, found in metrics["reconstruction"].items():
        of = DECODERS[stage]
        rows += [
            (f"PSNR, {of}", found["psnr"], "dB", "Pixel error of reconstructions, logarithmic; higher is better."),
            (f"SSIM, {of}", found["ssim"], 3, "Likeness of local structure in reconstructions; 1 is identical."),
            (f"Fréchet distance, {of}", found["frechet"], 2, "Of reconstructions to held-out images; 0 is no difference."),
        ]
    rows += [
        ("Codebook usage", codebook.get("usage"), "%", "Share of the codes that occur in held-out images."),
        ("Codebook perplexity", codebook.get("perplexity"), 1, "Effective number of codes: exponential of their entropy."),
        ("Held-out bits per token", prior.get("heldout_bits_per_token"), 3,
         "Code length under the prior, given the class; lower is better."),
        ("Held-out bits per image", bits_per_image(metrics), 1,
         f"Code length of the latent under the prior{given}, less that of its noise; lower is better." if latent
         else "The same for all tokens; compares priors of one autoencoder only."),
        ("The same, plain Gaussian", latent.get("gaussian_bits"), 1,
         "If all values of the latent were independent Gaussians: what a prior has to beat."),
        ("Held-out loss", prior.get("heldout_loss"), 4, "Flow matching's squared error; compares steps of one prior only."),
        ("Recognised", g["recognised"], "%", "Samples that the classifier takes for the class they were sampled as."),
        ("Fréchet distance", (g["frechet"], g["frechet_std"]), 2,
         "Of samples to held-out images, as Gaussians of features; lower is better."),
        ("Fréchet distance, floor", (floor["frechet"], floor["frechet_std"]), 2,
         "Of real training images to held-out images, at equal counts."),
        ("Kernel distance", *_kernel_distance(g, "samples")),
        ("Kernel distance, floor", *_kernel_distance(floor, "real training images")),
        ("Fréchet ratio", g["frechet_ratio"], 2, "The distance over its floor; 1 is as near as real images are."),
        ("Precision", g["precision"], 3,
         "Share of samples that lie among held-out images (inside open balls about their features): fidelity."),
        ("Recall", g["recall"], 3,
         "Share of held-out images that lie among samples (inside open balls about their features): variety."),
        ("Near-copies", g["memorised"], "%", "Samples nearer to a training image than 99\u00a0% of held-out images are."),
        ("Near-copies, held-out", g["memorised_heldout"], "%", "The same share of the held-out images themselves."),
        ("Near-copies, threshold", g["memorised_threshold"], 3, "RMS difference per pixel; black and white are 2 apart."),
        ("Classifier's accuracy", metrics["extractor"]["heldout_accuracy"], "%", f"On held-out images: {task}."),
    ]  # fmt: skip
    return [(name, _shown(value, digits), meaning) for name, value, digits, meaning in rows if value is not None]


def _kernel_distance(of: dict, what: str) -> tuple[tuple[float, float] | None, int, str]:
    if "kernel_distance" not in of:  # not measured by earlier versions
        return None, 4, ""
    subsets = f"{of['kernel_subsets']} random subsets of {of['kernel_subset_size']:,} per side"
    meaning = f"KID's formula in our features: of {what} to held-out images; {subsets}."
    return (of["kernel_distance"], of["kernel_distance_std"]), 4, meaning


def _shown(value: Any, digits: int | str) -> str:
    if isinstance(digits, str):
        return percent(value) if digits == "%" else f"{number(value)}\u00a0{digits}"
    return spread(value[0], value[1], digits) if isinstance(value, tuple) else number(value, digits)


def provenance(metrics: dict) -> list[tuple[str, str]]:
    """Number of images, feature extractor and seeds of the measurements, each as (what, value)."""
    count, extractor = metrics["counts"], metrics["extractor"]
    rows = [
        ("Training images, for the floor and the copies", f"{count['train']:,}"),
        ("Held-out images", f"{count['heldout']:,}"),
        ("Samples", f"{count['samples']:,}"),
        ("Images per side in a Fréchet distance", f"{count['frechet']:,}; ± is the deviation between disjoint sets of so many"),
        ("Extractor of the features", f"{extractor['id']} ({extractor['note']})"),
        ("Seeds", f"{metrics['seed']} for training and evaluation, {metrics['sampling']['seed']} for the samples"),
    ]
    fingerprint = (metrics.get("data") or {}).get("fingerprint")
    return [*rows, ("Fingerprint of the data", fingerprint)] if fingerprint else rows
