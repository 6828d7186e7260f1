"""Contents of a report on a latent: the card of a run's autoencoder, baseline values, and pictures."""

from __future__ import annotations

import dataclasses
import math
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dae.config import Config
from dae.data import ImageData, in_memory, load_data
from dae.diagnostics import predictors as measure
from dae.diagnostics.ranking import Ranking
from dae.diagnostics.report_card import PREDICTORS, Encoded, decode_latents, encode_images, report_card, some_of
from dae.hub import fingerprint
from dae.metrics import versions
from dae.models import Autoencoder, choose_kernels
from dae.seeding import seed_for
from dae.training import one_process
from dae.training.run import refuse_other_data

DISTURBANCES = (measure.PERTURBATION, 0.5, 1.0)
STEPS_BETWEEN, PAIRS = 9, 4  # pictures per interpolation, ends included, and interpolations


class MeasuredLatent(NamedTuple):
    """An autoencoder, the data it was measured on, and its card."""

    config: Config
    method: str  # of its training
    autoencoder: Autoencoder
    data: ImageData
    train: Encoded
    heldout: Encoded
    card: dict[str, float | None]
    baselines: dict[str, float | None]  # from `without_latent`
    seconds: float


def measure_card(config: Config, method: str) -> MeasuredLatent:
    """Load the run's autoencoder, trained by `method`, and its data, and measure the card.

    Raises:
        ValueError: the autoencoder was trained on other data, or there are too few images.
        FloatingPointError: the autoencoder gives NaN.
    """
    device, folder = one_process(config), Path(config.output_dir) / "autoencoder"
    autoencoder = Autoencoder.from_pretrained(folder, device=device)
    choose_kernels(autoencoder, config.kernels)
    autoencoder.refuse_other_data(config.data.channels, config.data.resolution)
    data = load_data(config.data, config.seed)
    refuse_other_data(folder, config.data, data.fingerprint)
    data.list_skipped(config.output_dir)
    (train, train_labels), (heldout, heldout_labels) = (
        in_memory(
            split, config.measure.max_images, seed=seed_for(config.seed, "report card"), knob="measure.max_images",
            batch_size=config.evaluation.batch_size, num_workers=config.data.num_workers,
        )
        for split in (data.train, data.validation)
    )  # fmt: skip
    labels = (train_labels, heldout_labels) if data.labelled else (None, None)
    started = time.monotonic()
    card = report_card(autoencoder, train, labels[0], heldout, labels[1], seed=config.seed)
    seconds = time.monotonic() - started
    encoded = encode_images(autoencoder, train), encode_images(autoencoder, heldout)
    without = without_latent(train, heldout, labels[1], config.seed)
    return MeasuredLatent(config, method, autoencoder, data, *encoded, card, without, seconds)


def without_latent(train: Tensor, heldout: Tensor, labels: Tensor | None, seed: int) -> dict[str, float | None]:
    """Baseline of each predictor: its value without the latent.

    The mean image replaces reconstructions and outputs of linear maps, training images replace interpolations and the set that
    a linear map generates, and the most frequent class replaces the probe's.
    """
    some, count = some_of(heldout)[: len(train)], min(len(train), len(heldout))
    found: dict[str, float | None] = {
        "reconstruction_error": measure.mean_squared_error(train.mean(0).expand_as(heldout), heldout),
        "interpolation_distance": measure.energy_coefficient(train[some_of(train)][: len(some)], heldout[some]),
        "linear_sliced_distance": measure.sliced_distance(train[:count], heldout[:count], seed=seed),
    }
    return found if labels is None else found | {"linear_probe": labels.bincount().max().item() / len(labels)}


def pictures(run: MeasuredLatent, columns: int) -> dict[str, dict[str, Tensor]]:
    """Labelled rows of at most `columns` images [n, C, H, W] in [-1, 1] from held-out images, by name of the picture."""
    decode, size = partial(decode_latents, run.autoencoder), run.autoencoder.factor
    latents, seed, images = run.heldout.latents, run.config.seed, run.heldout.images[:columns]
    _, first, second = measure.midpoints(latents, seed=seed)
    share = torch.linspace(0, 1, STEPS_BETWEEN).view(-1, 1, 1, 1)
    enlarged = as_colours(latents)[:columns].repeat_interleave(size, 2).repeat_interleave(size, 3)
    return {
        "reconstructions": {"original": images, "decoded again": decode(latents[:columns])},
        "disturbances": {"undisturbed": decode(latents[:columns])}
        | {f"disturbed by {s:.0%}": decode(measure.perturb(latents, seed=seed, size=s)[:columns]) for s in DISTURBANCES},
        "interpolations": {
            f"image {a + 1} to {b + 1}": decode(torch.lerp(latents[a], latents[b], share))
            for a, b in zip(first[:PAIRS].tolist(), second[:PAIRS].tolist(), strict=True)
        },
        "map": {"image": images.expand(-1, 3, -1, -1), "its latent": enlarged},
    }


def as_colours(latents_NDhw: Tensor) -> Tensor:
    """[N, 3, h, w] in [-1, 1]: the three principal components of the latent vectors, saturated at 2.5 standard deviations."""
    x_ND = latents_NDhw.double().movedim(1, -1).flatten(0, 2)
    x_ND = x_ND - x_ND.mean(0)
    _, directions_DD = torch.linalg.eigh(x_ND.T @ x_ND)
    main_N3 = x_ND @ directions_DD.flip(1)[:, :3]
    main_N3 = (main_N3 / (2.5 * main_N3.std(0, correction=0).clamp(min=1e-12))).clamp(-1, 1)
    N, _, h, w = latents_NDhw.shape
    padded_N3 = F.pad(main_N3, (0, 3 - main_N3.shape[1]))  # if there are fewer than three channels
    return padded_N3.view(N, h, w, 3).movedim(-1, 1).float()


def to_dict(run: MeasuredLatent, rankings: dict[Path, Ranking]) -> dict:
    """JSON-able results; None where not applicable or unknown."""
    correlations = {
        str(folder): {
            name: {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in r._asdict().items()}
            | {"seeds": ranking.seeds}
            for name, r in ranking.found.items()
        }
        for folder, ranking in rankings.items()
    }
    return {
        "card": run.card,
        "predictors": {name: dataclasses.asdict(predictor) for name, predictor in PREDICTORS.items()},
        "rank_correlations": correlations,
        "autoencoder": fingerprint(Path(run.config.output_dir) / "autoencoder"),
        "method": run.method,
        "data": run.data.describe(),
        "counts": {"train": len(run.train.images), "heldout": len(run.heldout.images)},
        "seed": run.config.seed,
        "versions": versions(),
        "seconds": run.seconds,
    }
