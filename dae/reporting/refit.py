"""The page of recipes/refit.py: is it the same latent, and is the new decoder better?"""

from __future__ import annotations

from typing import Any

import numpy as np

from dae.config import Config
from dae.evaluation.refit import Refitted
from dae.reporting import elements as web
from dae.reporting.elements import LARGEST_SIDE, PAPER, Html, number, strip
from dae.reporting.prose import paragraphs, read_prose
from dae.reporting.run import autoencoder_curves, warnings

PROSE = read_prose(__file__)
# name, unit, digits, which is better, what it is
MEASURES = {
    "psnr": ("PSNR", "\u00a0dB", 2, "higher", "peak signal-to-noise ratio"),
    "ssim": ("SSIM", "", 4, "higher", "structural similarity, 1 is equal"),
    "lpips": ("LPIPS", "", 4, "lower", "distance in the features of VGG16, image by image"),
    "frechet": ("Fréchet distance", "", 3, "lower", "between the features of all images and of all reconstructions"),
}
PARTS = {"encoder": "weights of the encoder", "bottleneck": "weights of the bottleneck", "latents": "latents of held-out images"}
FRAME = (255, 0)  # a white line about a black one, seen on any picture


def refit_page(found: Refitted, history: list[dict], config: Config, table: list[tuple[str, str]]) -> web.Page:
    """Build the page.

    Args:
        history: rows of the training's log.
        config: as trained.
        table: of `dae.data.Summary`.
    """
    facts = found.facts
    count = {"heldout": f"{facts['held_out_images']:,}"}
    page = web.Page(f"A better decoder for a latent: {facts['data']['title']}", _lead(facts, count["heldout"]))
    page.section("In numbers", web.tiles(_headline(facts)))
    sums = facts["checksums"]
    proof = [(PARTS[name], _wrapped(sums["before"][name]), _wrapped(sums["after"][name]), "equal") for name in sums["before"]]
    equal = web.table(("what", "SHA-256 before", "after", ""), proof, prose=(0, 1, 2, 3))
    page.section("The latent is the same", *paragraphs(PROSE["same latent"], **count), equal)
    page.section("Originals, before, after", _pictures(found))
    page.section("Under the magnifier", _magnifier(found))
    page.section("All measurements", *_measurements(facts))
    page.section("Training", autoencoder_curves(history, config))
    page.section("Warnings", warnings(history))
    page.section("Data", web.table(("what", "read"), table, prose=(0, 1)))
    versions = web.table(("software", "version"), list(facts["versions"].items()), prose=(0, 1))
    page.section("Configuration and versions", web.configuration(config), versions)
    ours = "; all hyper-parameters are ours, and no number here is the paper's."
    page.footer = [web.paragraph("The method as publicly described in ", PAPER, ours, " Written by recipes/refit.py.")]
    return page


def lines(found: Refitted) -> list[str]:
    """What the recipe prints: the proof, then both decoders by each measure."""
    sums = found.facts["checksums"]
    proof = [f"{name:<12}{sums['before'][name][:16]} before, {sums['after'][name][:16]} after: equal" for name in sums["before"]]
    return proof + [
        f"{_name(found.facts, key):<17}{_value(key, each['first'])} before, {_value(key, each['second'])} after, "
        f"{_difference(key, each['difference'])} ({MEASURES[key][3]} is better)"
        for key, each in found.facts["measures"].items()
    ]


def _wrapped(digest: str) -> str:
    """In groups of 16 digits, between which a narrow page may break the line."""
    return " ".join(digest[i : i + 16] for i in range(0, len(digest), 16))


def _lead(facts: dict[str, Any], heldout: str) -> list[Html]:
    train = facts["data"].get("train")
    start = PROSE[facts["decoder"]].format(steps=f"{facts['steps']:,}")
    values = {"train": "a stream of" if train is None else f"{train:,}", "title": facts["data"]["title"], "paper": PAPER}
    return paragraphs(PROSE["lead"], **values, start=start, heldout=heldout)


def _headline(facts: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Short numbers, for narrow pages."""
    return [
        (
            number(each["second"]["mean"], 3 if key in ("ssim", "lpips") else 2),
            f"{_name(facts, key)}{MEASURES[key][1] and ' in' + MEASURES[key][1]}, {MEASURES[key][3]} is better",
            f"before {_value(key, {'mean': each['first']['mean']})}: {_difference(key, each['difference'])}",
        )
        for key, each in facts["measures"].items()
    ]


def _measurements(facts: dict[str, Any]) -> list[Html]:
    rows = [
        (
            _name(facts, key),
            _value(key, each["first"]),
            _value(key, each["second"]),
            _difference(key, each["difference"]),
            MEASURES[key][4],
        )
        for key, each in facts["measures"].items()
    ]
    words = paragraphs(PROSE["measurements"], repeats=facts["measures"]["frechet"]["repeats"], features=facts["features"])
    missing = [] if "lpips" in facts["measures"] else paragraphs(PROSE["no lpips"])
    origin = [
        ("Latent", facts["latent"]), ("Autoencoder", facts["source"]), ("Seed", facts["seed"]),
        ("Measured", f"{facts['measured']['at']}, {facts['measured']['device']}"),
    ]  # fmt: skip
    return [
        *words,
        web.table(("measure", "before", "after", "difference", "what it means"), rows, prose=(0, 4)),
        *missing,
        web.table(("what", "value"), origin, prose=(0, 1)),
    ]


def _pictures(found: Refitted) -> Html:
    columns = web.per_row(max(found.pictures["originals"].shape[1:3]))
    rows = [
        (name, strip(found.pictures[name][:columns], f"{name} of held-out images")) for name in ("originals", "before", "after")
    ]
    return web.figure(web.strips(rows), *paragraphs(PROSE["pictures"], tag="span", largest=LARGEST_SIDE))


def _magnifier(found: Refitted) -> Html:
    columns, side = web.per_row(LARGEST_SIDE), found.crop
    places = found.places[:columns]
    rows = [("where", strip(_framed(found.pictures["worst originals"][:columns], found), "images with a frame about a square"))]
    for name in ("originals", "before", "after"):
        crops = [
            image[place.top : place.top + side, place.left : place.left + side]
            for image, place in zip(found.pictures[f"worst {name}"], places, strict=False)
        ]
        factor = max(1, LARGEST_SIDE // side)
        rows.append((name, strip(np.stack(crops).repeat(factor, 1).repeat(factor, 2), f"{name}, magnified")))
    return web.figure(web.strips(rows), *paragraphs(PROSE["worst"], tag="span", crop=side))


def _framed(images_NHWC: np.ndarray, found: Refitted) -> np.ndarray:
    """Colour pictures with a frame about each crop, as wide as is seen after reduction."""
    factor = max(1, LARGEST_SIDE // max(images_NHWC.shape[1:3]))  # enlarged first, so that the frame hides little
    framed = np.broadcast_to(images_NHWC, (*images_NHWC.shape[:3], 3)).repeat(factor, 1).repeat(factor, 2)
    width = max(1, round(max(framed.shape[1:3]) / LARGEST_SIDE))
    for image, place in zip(framed, found.places, strict=False):
        top, left, side = place.top * factor, place.left * factor, found.crop * factor
        inside = image[top : top + side, left : left + side].copy()
        for colour, out in zip(FRAME, (2 * width, width), strict=True):
            image[max(0, top - out) : top + side + out, max(0, left - out) : left + side + out] = colour
        image[top : top + side, left : left + side] = inside
    return framed


def _name(facts: dict[str, Any], key: str) -> str:
    return facts["perceptual"] if key == "lpips" else MEASURES[key][0]


def _value(key: str, interval: dict[str, float]) -> str:
    _, unit, digits, *_ = MEASURES[key]
    between = f" [{number(interval['low'], digits)}, {number(interval['high'], digits)}]" if "low" in interval else ""
    return f"{number(interval['mean'], digits)}{unit}{between}"


def _difference(key: str, interval: dict[str, float]) -> str:
    _, unit, digits, *_ = MEASURES[key]
    low, high = (f"{interval[end]:+,.{digits}f}" for end in ("low", "high"))
    return f"{interval['mean']:+,.{digits}f}{unit} [{low}, {high}]"
