"""Sample images: class -> prior -> tokens or latent -> decoder.

    python recipes/sample.py --config recipes/configs/digits.yaml
    python recipes/sample.py --config recipes/configs/digits.yaml sampling.cfg_scale=2 sampling.num_samples=100

Classes in equal parts; a Gaussian mixture is unconditional, and all labels are 0. Writes <output_dir>/samples: samples.npz with
arr_0 [N, H, W, C] uint8 (the format of the ADM evaluator) and arr_1 [N] labels, png/ with one file per image, grid.png with one
row per class, and sampling.json with the settings.
"""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path

import numpy as np
from tqdm import tqdm

from dae.cli import main
from dae.config import Config
from dae.data.columns import resolve_classes
from dae.data.pictures import grid, to_uint8, write_npz, write_png
from dae.files import announce, replaced_folder, write_file
from dae.hub import fingerprint
from dae.lock import writes
from dae.memory import require_memory
from dae.models import Prior
from dae.sampling import balanced_labels, generate, load_chain
from dae.sampling.chain import knows_classes
from dae.seeding import seed_for
from dae.training import one_process
from dae.training.run import recorded_data


@writes("samples")
def sample(config: Config) -> Path:
    """Write samples; returns their folder."""
    settings = config.sampling
    autoencoder, prior = load_chain(config.output_dir, one_process(config), config.kernels)
    # read first: training may replace them while samples are drawn
    drawn_from = {name: fingerprint(Path(config.output_dir) / name) for name in ("prior", "autoencoder")}
    if not knows_classes(prior):
        for key, value, idle in (("classes", settings.classes, []), ("cfg_scale", settings.cfg_scale, 1)):
            if value != idle:
                raise ValueError(f"sampling.{key}={value}: this prior knows no classes; leave it out")
    require_memory(
        2 * settings.num_samples * autoencoder.image_channels * autoencoder.resolution**2,  # twice while concatenating
        f"{settings.num_samples:,} samples of {autoencoder.resolution} x {autoencoder.resolution} pixels",
        "lower sampling.num_samples",
    )
    labels_N = balanced_labels(settings.num_samples, prior.num_classes if knows_classes(prior) else 1, chosen(config, prior))
    started, images = time.monotonic(), []
    with tqdm(total=len(labels_N), desc="sample", unit="image", mininterval=0.5) as bar:
        for batch in generate(autoencoder, prior, labels_N, settings, seed_for(config.seed, "sampling")):
            images.append(to_uint8(batch))
            bar.update(len(batch))
    seconds = time.monotonic() - started

    folder = Path(config.output_dir) / "samples"
    arrays, labels = np.concatenate(images), labels_N.numpy()
    pngs = [f"png/{number:06d}_class{label}.png" for number, label in enumerate(labels)]
    facts = {"seconds": seconds, "seed": config.seed} | drawn_from
    with replaced_folder(folder) as new:
        (new / "png").mkdir()
        for name, array in zip(pngs, arrays, strict=True):
            write_png(new / name, array)
        write_png(new / "grid.png", overview(arrays, labels))
        write_npz(new / "samples.npz", arr_0=arrays, arr_1=labels)
        write_file(new / "sampling.json", json.dumps(dataclasses.asdict(settings) | facts, indent=2).encode())
    images = f"{len(arrays)} image" + "s" * (len(arrays) > 1)
    announce(folder, ["samples.npz", "sampling.json", "grid.png", *pngs], f": {images} in {seconds:.1f} s")
    return folder


def chosen(config: Config, prior: Prior) -> list[int]:
    """Numbers of the classes in `sampling.classes`; empty for all. ValueError: an unknown class."""
    folder = Path(config.output_dir) / "prior"
    data = recorded_data(folder) or {"class_names": [str(c) for c in range(prior.num_classes)]}  # for runs of earlier versions
    if (known := len(data["class_names"])) != prior.num_classes:
        raise ValueError(f"{folder}: data.json tells of {known} classes, the prior knows {prior.num_classes}: train it again")
    return resolve_classes(config.sampling.classes, data["class_names"], data.get("labels"))


def overview(images_NHWC: np.ndarray, labels_N: np.ndarray) -> np.ndarray:
    """One picture: a row for each of the first 20 sampled classes, or up to ten rows of a single class."""
    present = np.unique(labels_N)[:20]
    if len(present) == 1:
        return grid(images_NHWC[:160], columns=min(16, len(images_NHWC)))
    columns = min(16, int(np.bincount(labels_N).max()))
    sheet = np.full((len(present), columns, *images_NHWC.shape[1:]), 128, np.uint8)
    for row, label in zip(sheet, present, strict=True):
        shown = images_NHWC[labels_N == label][:columns]
        row[: len(shown)] = shown
    return grid(sheet.reshape(-1, *images_NHWC.shape[1:]), columns)


if __name__ == "__main__":
    main(sample, __doc__)
