"""Which latent needs the simplest generator? Measures the generator-induced distance D^G of latents, and writes a page on it.

    python recipes/measure_latent.py --config recipes/configs/digits.yaml \\
        'measure.latents=[gaussian,pca,autoencoder:runs/digits/autoencoder,my_module:encode]'

For each latent, generators of growing strength are trained to make the training images from it, and the distance that remains
on held-out rows is measured. A CPU will do. Writes <output_dir>/measure/latents.html, latents.json and *.png.
"""

from __future__ import annotations

import datetime
import difflib
import json
import math
import re
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from dae.cli import main
from dae.complexity.curves import complexity_curve
from dae.complexity.distances import ADVERSARIAL, PLAIN, check_name, make_distance
from dae.complexity.estimate import Estimate, pooled_error
from dae.complexity.fitting import Fitting, fit, generated_by, measure_by_jackknife, split_rows
from dae.complexity.gromov_wasserstein import gromov_wasserstein
from dae.complexity.latents import AUTOENCODERS, Latent, load_latent, rehearse_training, saved_autoencoder
from dae.config import Config
from dae.data import in_memory, load_data
from dae.data.pictures import grid, to_uint8, write_png
from dae.files import announce, replaced_folder, write_file
from dae.lock import writes
from dae.reporting import elements as web
from dae.reporting.charts import Panel, frontier_panel, save_png
from dae.reporting.latents import DISTANCES, FAMILIES, Measured, axes_of, build, series_of
from dae.training import one_process
from dae.training.run import refuse_other_data

BATCH_SIZE = 128  # rows a training step of a generator


@writes("measure", makes_folder=True)
def measure_latent(config: Config) -> Path:
    """Measure the latents and write the page; returns its path."""
    started, device, settings = time.monotonic(), one_process(config), config.measure
    check(config)
    options = Fitting(steps=settings.steps, batch_size=BATCH_SIZE)

    # Images, and one code of each latent for every image.
    data = load_data(config.data, config.seed)
    for spec in settings.latents:
        if (folder := saved_autoencoder(spec)) is not None:
            refuse_other_data(folder, config.data, data.fingerprint)
    data.list_skipped(config.output_dir)
    images, labels = collect(data.train, config)
    labels = labels if data.labelled else None
    latents = load_latents(images, labels, config)

    # Divided by one number, each latent varies as much as the images, summed over a code's values: a bound on the stretch of a
    # generator then means the same for all, and a latent gains nothing by repeating itself.
    scales = [math.sqrt(total_variance(latent.codes) / total_variance(images)) for latent in latents]
    codes = {
        latent.name: (latent.codes.double() / scale).float().to(device) for latent, scale in zip(latents, scales, strict=True)
    }
    images = images.to(device)

    # D^G: for each seed, generators are fitted on half of the rows and measured on the other half.
    curves = {}
    jobs = [(d, f, a) for d in settings.distances for f in settings.families for a in latents]
    jobs = [(d, f, a) for d, f, a in jobs if a.paired or d != "reconstruction"]  # noise belongs to no image
    if without := sorted({*settings.distances} - {d for d, _, _ in jobs}):
        raise ValueError(
            f"measure.distances: {without[0]} needs a latent that is computed from images, got {', '.join(settings.latents)}; "
            "add one such as pca, or leave it out"
        )
    with tqdm(jobs, desc="curves", mininterval=0.5) as bar:
        for distance, name, latent in bar:
            bar.set_postfix_str(f"{distance}, {name}, {latent.name}")
            curves[distance, name, latent.name] = complexity_curve(
                codes[latent.name], images, FAMILIES[name].family, FAMILIES[name].capacities, distance,
                seeds=settings.seeds, steps=settings.steps, batch_size=BATCH_SIZE,
            )  # fmt: skip
    measured = Measured(
        config=config,
        data=data.describe(),
        images=images,
        latents=latents,
        scales=scales,
        curves=curves,
        yardsticks={d: yardsticks(images, d, settings.seeds, options) for d in tqdm(settings.distances, desc="yardsticks")},
        gromov=gromov(codes, images, settings.seeds),
        pictures={a.name: pictures(a, codes[a.name], images, config, options) for a in tqdm(latents, desc="pictures")},
        at=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        seconds=time.monotonic() - started,
    )

    folder = Path(config.output_dir) / "measure"
    with replaced_folder(folder) as new:
        write_file(new / "latents.json", json.dumps(measured.to_dict(), indent=2).encode())
        pngs = draw(measured, new)
        build(measured).write(new / "latents.html")
    show(measured)
    announce(folder, ["latents.html", "latents.json", *pngs], f"/latents.html after {web.duration(measured.seconds)}")
    return folder / "latents.html"


def check(config: Config) -> None:
    """ValueError for what is wrong in the section `measure`, before anything is loaded."""
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


def collect(dataset, config: Config) -> tuple[Tensor, Tensor]:
    """Images and labels of the training split in memory, or `measure.max_images` of them, chosen at random."""
    options = {"seed": config.seed, "batch_size": config.evaluation.batch_size, "knob": "measure.max_images"}
    return in_memory(dataset, config.measure.max_images, **options)


def total_variance(cloud: Tensor) -> float:
    """E|z - mean|^2 of [N, ...]: the variances of the values of a row, summed."""
    cloud = cloud.flatten(1).double()  # squares of small codes are 0 in float32
    return (cloud - cloud.mean(0)).square().sum(1).mean().item()


def load_latents(images: Tensor, labels: Tensor | None, config: Config) -> list[Latent]:
    """The latents, those that have to be trained last: what is wrong with any of them shows before."""
    for spec in config.measure.latents:
        if (shape := rehearse_training(spec, config, len(images))) is not None:
            require_maps(spec, shape, images, config)
    found = {}
    for spec in tqdm(sorted(config.measure.latents, key=lambda spec: spec in AUTOENCODERS), desc="latents"):
        found[spec] = load_latent(spec, images, labels, config, config.seed)
        require_maps(spec, tuple(found[spec].codes.shape[1:]), images, config)
    return [found[spec] for spec in config.measure.latents]


def require_maps(latent: str, shape: tuple[int, ...], images: Tensor, config: Config) -> None:
    """ValueError if a family of `measure.families` has no map from codes of this shape to images."""
    for name in config.measure.families:
        try:
            with torch.random.fork_rng(devices=[]):
                FAMILIES[name].family.build(shape, tuple(images.shape[1:]))
        except ValueError as error:
            raise ValueError(f"measure.families: {name!r} cannot map the latent {latent!r}: {error}") from error


def yardsticks(images: Tensor, distance: str, seeds: list[int], options: Fitting) -> dict[str, Estimate]:
    """What D^G is to be held against: real images and the average image in the place of those made, against the held-out ones."""
    # Images in the place of latents: where rows are not paired, no image meets itself.
    if distance in ADVERSARIAL:
        from dae.complexity.adversarial import adversarial_distance

        splits = [split_rows(images, images, seed, False, options).measure for seed in seeds]
        found = [
            adversarial_distance(rows.latents.flatten(1), rows.data.flatten(1), distance, seeds=(seed,))
            for seed, rows in zip(seeds, splits, strict=True)
        ]
        facts = {key: getattr(found[0], key) for key in ("bound", "distance", "convention", "family", "capacity", "counts")}
        facts["standard_error"] = pooled_error([each.standard_error for each in found])
        return {"real": Estimate.over([each.value for each in found], seeds, **facts)}
    plain = make_distance(distance, images)
    values: dict[str, list[tuple[float, float | None]]] = {"real": [], "average": []}
    for seed in seeds:
        split = split_rows(images, images, seed, plain.paired, options)
        values["real"].append(measure_by_jackknife(nn.Identity(), split.measure, plain, seed))
        values["average"].append(measure_by_jackknife(Average(split.fit.data.mean(0)), split.measure, plain, seed))
    held_out = len(split.measure.data)
    facts = {"bound": "exact", "distance": distance, "convention": plain.convention, "family": None, "capacity": None}
    return {
        name: Estimate.over(
            [v for v, _ in found], seeds, counts=(held_out, held_out), standard_error=pooled_error([e for _, e in found]), **facts
        )
        for name, found in values.items()
    }


class Average(nn.Module):
    """One image, whatever the latent."""

    def __init__(self, image_CHW: Tensor):
        super().__init__()
        self.image_CHW = image_CHW

    def forward(self, latents: Tensor) -> Tensor:
        return self.image_CHW.expand(len(latents), *self.image_CHW.shape)


def gromov(codes: dict[str, Tensor], images: Tensor, seeds: list[int]) -> dict[str, Estimate] | None:
    """Gromov-Wasserstein distance of each latent and the images; None, and a line that says so, without POT."""
    try:
        return {
            name: gromov_wasserstein(latents, images, seeds=seeds, num_points=128, normalize=True)
            for name, latents in tqdm(codes.items(), desc="Gromov-Wasserstein")
        }
    except ImportError as error:
        print(f"left out: {error}")
        return None


def pictures(latent: Latent, codes: Tensor, images: Tensor, config: Config, options: Fitting) -> list[tuple[str, np.ndarray]]:
    """Rows of pictures from held-out codes, by generators of the first seed."""
    seed, shown = config.measure.seeds[0], web.per_row(max(images.shape[2:]))
    last = FAMILIES[config.measure.families[-1]]
    as_a_set = next((name for name in config.measure.distances if name in PLAIN[1:]), "sinkhorn")
    jobs = [
        (name, capacity, as_a_set)
        for name in config.measure.families
        for capacity in FAMILIES[name].capacities[:: len(FAMILIES[name].capacities) - 1]
    ]
    rows = []
    if latent.paired:
        held_out = split_rows(codes, images, seed, True, options).measure.data[:shown]
        rows.append(("real images", to_uint8(held_out)))
        jobs.insert(0, (config.measure.families[-1], last.capacities[-1], "reconstruction"))
    for name, capacity, aim in jobs:
        choice, distance = FAMILIES[name], make_distance(aim, images)
        split = split_rows(codes, images, seed, distance.paired, options)
        generator, _ = fit(choice.family.at(capacity), split, distance, seed, options)
        strength = "strongest" if capacity == choice.capacities[-1] else "weakest"
        label = f"{'given back' if distance.paired else 'made'} by the {strength} {choice.name}"
        with torch.no_grad():
            rows.append((label, to_uint8(generated_by(generator, split.measure.latents[:shown]))))
    return rows


def draw(measured: Measured, folder: Path) -> list[str]:
    """Write curves-<distance>.png and pictures-<latent>.png; returns their names."""
    names = []
    for distance in measured.yardsticks:
        panels: list[Panel] = [
            frontier_panel(series, **axes_of(measured, distance, name))
            for name in measured.config.measure.families
            if (series := series_of(measured, distance, name))
        ]
        names.append(f"curves-{file_name(distance)}.png")
        save_png(panels, [3.6] * len(panels), folder / names[-1])
    for latent, rows in measured.pictures.items():
        sheets = [grid(images, len(images)) for _, images in rows]
        factor = max(1, 64 // max(measured.images.shape[2:]))
        sheet = torch.cat([torch.from_numpy(each) for each in sheets]).numpy().repeat(factor, 0).repeat(factor, 1)
        names.append(f"pictures-{file_name(latent)}.png")
        write_png(folder / names[-1], sheet)
    return names


def file_name(name: str) -> str:
    return re.sub(r"\W+", "-", name).strip("-")


def show(measured: Measured) -> None:
    if len(measured.config.measure.seeds) == 1:
        print("one seed tells no spread: how sure these numbers are is not known (measure.seeds)")
    for (distance, name, latent), curve in measured.curves.items():
        values = ", ".join(f"{c:g}: {e}" for c, e in zip(curve.capacities, curve.estimates, strict=True))
        print(f"{DISTANCES[distance][0]}, {latent}, {FAMILIES[name].knob} of {FAMILIES[name].name}\n    {values}")
    for distance, marks in measured.yardsticks.items():
        print(f"{DISTANCES[distance][0]}, " + ", ".join(f"{name}: {estimate.value:.4g}" for name, estimate in marks.items()))


if __name__ == "__main__":
    main(measure_latent, __doc__)
