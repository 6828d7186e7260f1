"""Measure D^G of several latents of one data set, over families, capacities and distances, with baselines."""

from __future__ import annotations

import datetime
import difflib
import math
import time
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dae.complexity.adversarial import adversarial_distance
from dae.complexity.curves import ComplexityCurve, complexity_curve
from dae.complexity.distances import ADVERSARIAL, PLAIN, check_name, make_distance
from dae.complexity.estimate import Estimate, pooled_error
from dae.complexity.families import ConvDecoders, DropoutNetworks, GeneratorFamily, LinearMaps, LipschitzNetworks, MLPs
from dae.complexity.fitting import Fitting, Rows, fit, generated_by, measure_by_jackknife, seeded, split_rows
from dae.complexity.gromov_wasserstein import gromov_wasserstein
from dae.complexity.latents import AUTOENCODERS, Latent, load_latent, rehearse_training, saved_autoencoder
from dae.config import Config
from dae.data import in_memory, load_data
from dae.metrics import versions
from dae.progress import progress_bar, with_progress
from dae.training import one_process
from dae.training.run import refuse_other_data

BATCH_SIZE = 128  # rows per training step of a generator
GAP_CLOSED = 0.75  # required capacity is reported at this share of the gap between the average image and real ones


@dataclass(frozen=True)
class Choice:
    """A family with capacities to measure, words for a page, and whether it bounds the generator's stretch."""

    family: GeneratorFamily
    capacities: tuple[float, ...]
    name: str
    knob: str
    words: str
    stretch: bool = False


FAMILIES = {
    "linear": Choice(
        LinearMaps(), (0.5, 1.0, 2.0), "linear maps", "largest stretch",
        "each pixel is a weighted sum of the latent's numbers; no direction is stretched more than so many times", True,
    ),
    "mlp": Choice(
        MLPs(width=64, depth=2), (8, 64), "small networks", "width",
        "perceptrons with two hidden layers of so many units",
    ),
    "lipschitz": Choice(
        LipschitzNetworks(), (0.5, 1.0, 2.0), "smooth networks", "Lipschitz constant",
        "networks that move an image at most so many times as far as its latent is moved", True,
    ),
    "conv": Choice(
        ConvDecoders(), (0.125, 0.5, 1.0), "convolutional decoders", "width factor",
        "the decoders of this project's autoencoders, with this share of their channels",
    ),
    "dropout": Choice(
        DropoutNetworks(), (0.5, 0.75, 1.0), "networks with dropout", "share of units kept",
        "perceptrons of whose units only this share, drawn anew each time, is at work",
    ),
}  # fmt: skip


@dataclass
class Measurement:
    """Result of `measure_latents`."""

    config: Config
    data: dict  # `ImageData.describe`
    images: Tensor  # [N, C, H, W]
    latents: list[Latent]
    scales: list[float]  # divisor of each latent's codes
    curves: dict[tuple[str, str, str], ComplexityCurve]  # by (distance, family, latent)
    baselines: dict[str, dict[str, Estimate]]  # by distance: of "real" images and, if measured, the "average" image
    gromov: dict[str, Estimate] | None  # Gromov-Wasserstein by latent; None without POT
    generated: dict[str, list[tuple[str, Tensor]]]  # by latent, labelled rows of images [n, C, H, W] from held-out codes
    at: str  # time of measurement
    seconds: float

    def of(self, distance: str, family: str) -> dict[str, ComplexityCurve]:
        """The curves of a distance and family, by latent."""
        return {latent: curve for (d, f, latent), curve in self.curves.items() if (d, f) == (distance, family)}

    def enough(self, distance: str) -> float | None:
        """The distance that closes `GAP_CLOSED` of the gap between the average image and real ones; None if unknown."""
        marks = self.baselines[distance]
        if "average" not in marks:
            return None
        return marks["average"].value + GAP_CLOSED * (marks["real"].value - marks["average"].value)

    def to_dict(self) -> dict:
        """For JSON."""
        settings = self.config.measure
        return {
            "latents": [
                {"name": a.name, "description": a.description, "paired": a.paired, "divided_by": scale, **a.provenance}
                for a, scale in zip(self.latents, self.scales, strict=True)
            ],
            "curves": [
                {"distance": distance, "family": family, "latent": latent, "capacities": list(curve.capacities)} | curve.to_dict()
                for (distance, family, latent), curve in self.curves.items()
            ],
            "yardsticks": {d: {name: e.to_dict() for name, e in marks.items()} for d, marks in self.baselines.items()},
            "enough": {distance: self.enough(distance) for distance in self.baselines},
            "gromov_wasserstein": self.gromov and {name: e.to_dict() for name, e in self.gromov.items()},
            "data": self.data,
            "images": len(self.images),
            "seed": self.config.seed,
            "seeds": list(settings.seeds),
            "steps": settings.steps,
            "versions": versions(),
            "threads": torch.get_num_threads(),
            "measured_at": self.at,
            "seconds": self.seconds,
        }


def measure_latents(config: Config, columns: int) -> Measurement:
    """Measure the latents named in `config.measure` on the training images of its data set.

    Each latent is divided by one number, so that its total variance equals the images': a bound on a generator's stretch then
    means the same for all, and repeating values gives a latent no advantage.

    Args:
        config: measure, data, and architecture and training of autoencoders trained here.
        columns: pictures per row of `generated`.

    Raises:
        ValueError: contradictory settings of `measure`; other errors as `load_latent`.
    """
    started, device, settings = time.monotonic(), one_process(config), config.measure
    check_settings(config)
    options = Fitting(steps=settings.steps, batch_size=BATCH_SIZE)
    data = load_data(config.data, config.seed)
    for spec in settings.latents:
        if (folder := saved_autoencoder(spec)) is not None:
            refuse_other_data(folder, config.data, data.fingerprint)
    data.list_skipped(config.output_dir)
    images, labels = in_memory(
        data.train, settings.max_images, seed=config.seed, batch_size=config.evaluation.batch_size, knob="measure.max_images"
    )
    latents = load_latents(images, labels if data.labelled else None, config)
    scales = [math.sqrt(total_variance(latent.codes) / total_variance(images)) for latent in latents]
    codes = {a.name: (a.codes.double() / scale).float().to(device) for a, scale in zip(latents, scales, strict=True)}
    images = images.to(device)
    return Measurement(
        config=config,
        data=data.describe(),
        images=images,
        latents=latents,
        scales=scales,
        curves=measure_curves(latents, codes, images, config),
        baselines={d: baselines_of(images, d, settings.seeds, options) for d in with_progress(settings.distances, "baselines")},
        gromov=gromov(codes, images, settings.seeds),
        generated={
            a.name: generated_rows(a, codes[a.name], images, config, options, columns) for a in with_progress(latents, "pictures")
        },
        at=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        seconds=time.monotonic() - started,
    )


def check_settings(config: Config) -> None:
    """Check the section `measure` before loading anything. ValueError: it is wrong."""
    settings = config.measure
    for key in ("latents", "distances", "families", "seeds"):
        values = getattr(settings, key)
        if not values or len(set(values)) < len(values):
            raise ValueError(f"measure.{key}: expected at least one and none twice, got {values}")
    for name in settings.distances:
        check_name(name)
    for name in settings.families:
        if name not in FAMILIES:
            near = difflib.get_close_matches(name, FAMILIES, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"measure.families: expected some of {', '.join(FAMILIES)}, got {name!r}{hint}")


def total_variance(cloud: Tensor) -> float:
    """E|z - mean|^2 of [N, ...]: the sum of the variances of a row's values."""
    cloud = cloud.flatten(1).double()  # small squares underflow in float32
    return (cloud - cloud.mean(0)).square().sum(1).mean().item()


def load_latents(images: Tensor, labels: Tensor | None, config: Config) -> list[Latent]:
    """The latents in order; those trained here are computed last, so that errors in others show early."""
    for spec in config.measure.latents:
        if (shape := rehearse_training(spec, config, len(images))) is not None:
            require_maps(spec, shape, images, config)
    found = {}
    for spec in with_progress(sorted(config.measure.latents, key=AUTOENCODERS.__contains__), "latents"):
        found[spec] = load_latent(spec, images, labels, config, config.seed)
        require_maps(spec, tuple(found[spec].codes.shape[1:]), images, config)
    return [found[spec] for spec in config.measure.latents]


def require_maps(latent: str, shape: tuple[int, ...], images: Tensor, config: Config) -> None:
    """Raise ValueError if a family of `measure.families` has no map from codes of this shape to images."""
    for name in config.measure.families:
        try:
            with torch.random.fork_rng(devices=[]):
                FAMILIES[name].family.build(shape, tuple(images.shape[1:]))
        except ValueError as error:
            raise ValueError(f"measure.families: {name!r} cannot map the latent {latent!r}: {error}") from error


def measure_curves(
    latents: list[Latent], codes: dict[str, Tensor], images: Tensor, config: Config
) -> dict[tuple[str, str, str], ComplexityCurve]:
    """Curves by distance, family and latent. ValueError: a distance that applies to no latent."""
    settings = config.measure
    jobs = [(d, f, a) for d in settings.distances for f in settings.families for a in latents]
    jobs = [(d, f, a) for d, f, a in jobs if a.paired or d != "reconstruction"]  # noise is not paired with images
    if without := sorted({*settings.distances} - {d for d, _, _ in jobs}):
        raise ValueError(
            f"measure.distances: {without[0]} needs a latent that is computed from images, got {', '.join(settings.latents)}; "
            "add one such as pca, or leave it out"
        )
    curves = {}
    with progress_bar(len(jobs), 0, "curves") as bar:
        for distance, name, latent in jobs:
            bar.set_postfix_str(f"{distance}, {name}, {latent.name}")
            curves[distance, name, latent.name] = complexity_curve(
                codes[latent.name], images, FAMILIES[name].family, FAMILIES[name].capacities, distance,
                seeds=settings.seeds, steps=settings.steps, batch_size=BATCH_SIZE,
            )  # fmt: skip
            bar.update()
    return curves


def baselines_of(images: Tensor, distance: str, seeds: list[int], options: Fitting) -> dict[str, Estimate]:
    """Distance of "real" images and of the "average" image to held-out ones; with a critic only the former."""
    # Images as latents: unless rows are paired, no image is compared with itself.
    found: dict[str, list[tuple[float, float | None]]] = {}
    if distance in ADVERSARIAL:
        for seed in seeds:
            rows = split_rows(images, images, seed, False, options).measure
            last = adversarial_distance(rows.latents, rows.data, distance, seeds=(seed,))
            found.setdefault("real", []).append((last.value, last.standard_error))
        bound, convention, counts = last.bound, last.convention, last.counts
    else:
        plain = make_distance(distance, images)
        for seed in seeds:
            split = split_rows(images, images, seed, plain.paired, options)
            average = Rows(split.fit.data.mean(0).expand_as(split.measure.data), split.measure.data)
            for name, rows in (("real", split.measure), ("average", average)):
                found.setdefault(name, []).append(measure_by_jackknife(nn.Identity(), rows, plain, seed))
        bound, convention, counts = "exact", plain.convention, (len(rows.data), len(rows.data))
    facts = {"bound": bound, "distance": distance, "convention": convention, "counts": counts}
    return {
        name: Estimate.over([v for v, _ in pairs], seeds, standard_error=pooled_error([e for _, e in pairs]), **facts)
        for name, pairs in found.items()
    }


def gromov(codes: dict[str, Tensor], images: Tensor, seeds: list[int]) -> dict[str, Estimate] | None:
    """Gromov-Wasserstein distance of each latent and the images; None, with a message, without POT."""
    try:
        return {
            name: gromov_wasserstein(latents, images, seeds=seeds, num_points=128, normalize=True)
            for name, latents in with_progress(list(codes.items()), "Gromov-Wasserstein")
        }
    except ImportError as error:
        print(f"left out: {error}")
        return None


def generated_rows(
    latent: Latent, codes: Tensor, images: Tensor, config: Config, options: Fitting, columns: int
) -> list[tuple[str, Tensor]]:
    """Labelled rows of images from held-out codes, by generators of the first seed."""
    seed, families = config.measure.seeds[0], config.measure.families
    as_a_set = next((name for name in config.measure.distances if name in PLAIN[1:]), "sinkhorn")
    ends = [(name, end) for name in families for end in (FAMILIES[name].capacities[0], FAMILIES[name].capacities[-1])]
    jobs = [(name, capacity, as_a_set) for name, capacity in ends]
    rows = []
    if latent.paired:
        rows.append(("real images", split_rows(codes, images, seed, True, options).measure.data[:columns]))
        jobs.insert(0, (*ends[-1], "reconstruction"))
    for name, capacity, aim in jobs:
        choice, distance = FAMILIES[name], make_distance(aim, images)
        split = split_rows(codes, images, seed, distance.paired, options)
        generator, _ = fit(choice.family.at(capacity), split, distance, seed, options)
        strength = "strongest" if capacity == choice.capacities[-1] else "weakest"
        label = f"{'given back' if distance.paired else 'made'} by the {strength} {choice.name}"
        with torch.no_grad(), seeded(images.device, seed, "pictures"):  # dropout networks generate at random
            rows.append((label, generated_by(generator, split.measure.latents[:columns])))
    return rows
