"""Inputs of evaluation from a finished run: its samples, its prior's log, and the prior's earlier checkpoints."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Self
from zipfile import BadZipFile

import torch
from tqdm import tqdm

from dae.config import Config
from dae.data import ImageData
from dae.evaluation.judge import Judge
from dae.hub import fingerprint
from dae.memory import require_memory
from dae.models import Autoencoder, Prior
from dae.priors import PriorFamily, family_of
from dae.sampling import balanced_labels, generate
from dae.sampling.chain import knows_classes
from dae.seeding import seed_for
from dae.training import Run

if TYPE_CHECKING:
    import numpy as np


def load_samples(output: Path) -> tuple[np.ndarray, np.ndarray, dict]:
    """The run's uint8 samples [N, H, W, C], their labels [N], and how they were drawn.

    Raises:
        FileNotFoundError: there are none.
        ValueError: they are damaged, from another prior, or do not cover all classes.
    """
    import numpy as np

    folder, remedy = output / "samples", "draw them with recipes/sample.py and the same configuration"
    if not (folder / "samples.npz").is_file() or not (folder / "sampling.json").is_file():
        raise FileNotFoundError(f"no samples in {folder}: {remedy}")
    try:
        sampling, arrays = dict(json.loads((folder / "sampling.json").read_text())), dict(np.load(folder / "samples.npz"))
        made_by, samples, labels = sampling["prior"], arrays["arr_0"], arrays["arr_1"]
        shaped = samples.ndim == 4 and len(samples) == len(labels)
    except (ValueError, TypeError, KeyError, EOFError, BadZipFile) as error:
        raise ValueError(f"the samples in {folder} are damaged ({error}): {remedy}") from error
    if not shaped:
        raise ValueError(f"the samples in {folder} are no images [N, H, W, C] with a label each: {remedy}")
    if made_by != fingerprint(output / "prior"):
        raise ValueError(f"the samples in {folder} are of another prior than {output / 'prior'}: {remedy}")
    if sampling.get("autoencoder", decoded := fingerprint(output / "autoencoder")) != decoded:  # not in earlier versions
        raise ValueError(f"the samples in {folder} are of another decoder than that of {output / 'autoencoder'}: {remedy}")
    if classes := ", ".join(map(str, sampling.get("classes", ()))):
        raise ValueError(f"the samples in {folder} are of {classes} alone, the images held out of all classes: {remedy}")
    return samples, labels, sampling


def require_memory_for_judging(config: Config, data: ImageData, samples: int) -> None:
    """Raise ValueError before measuring, if the images do not fit into memory."""
    limit, resolution, rows = config.evaluation.max_images, config.data.resolution, data.describe()
    train, heldout = (min(rows[part] or limit, limit) for part in ("train", "validation"))
    held = 2 * train + heldout + samples  # as 8 bits; training images twice while concatenating
    held += 0 if data.labelled else 4 * train  # in four rotations
    held += 8 * min(samples, limit)  # of `guidance_sweep`: float32, twice while concatenating
    require_memory(
        held * config.data.channels * resolution**2,
        f"{train:,} training images, {heldout:,} held-out ones and {samples:,} samples of {resolution} x {resolution} pixels",
        "lower evaluation.max_images or sampling.num_samples",
    )


@dataclasses.dataclass
class PriorLog:
    """The training log of a prior.

    Attributes:
        rows: the whole log, oldest first.
        validations: rows with a score.
        chosen: the delivered prior's row.
    """

    run: Run
    family: PriorFamily
    rows: list[dict]
    validations: list[dict]
    chosen: dict

    @classmethod
    def load(cls, config: Config, family: PriorFamily) -> Self:
        """Read the log. FileNotFoundError, ValueError: it is missing or damaged."""
        run = Run(config, "prior")
        remedy = "deliver the prior again with recipes/train_prior.py and resume_from_checkpoint=latest"
        if not run.history_file.is_file():
            raise FileNotFoundError(f"no log of the prior's training, {run.history_file}: {remedy}")
        rows, key = run.history(), family.criterion
        validations = [row for row in rows if row.get("split") == "validation" and key in row]
        if not validations or not any(family.bits_key in row for row in rows if row.get("split") != "train"):
            raise ValueError(f"{run.history_file} holds no validation of the prior: {remedy}")
        best = min(validations, key=lambda row: row[key]) if config.prior.early_stopping else validations[-1]
        return cls(run, family, rows, validations, best)

    def bits_per_image(self, prior: Prior) -> float:
        """Held-out code length per image under the delivered prior."""
        key = self.family.bits_key
        measured = [self.chosen] if key in self.chosen else [r for r in self.rows if r["split"] != "train" and key in r]
        return measured[-1][key] * (self.family.tokens_per_image(prior) or 1)

    def earlier_priors(self, prior: Prior) -> Iterator[tuple[dict, Prior]]:
        """The prior at each kept checkpoint except the delivered one, with that step's validation."""
        for path in self.run.checkpoints.all():
            try:
                checkpoint = self.run.checkpoints.load(str(path))
            except (ValueError, FileNotFoundError) as error:
                print(f"left out of the table of guidance: {error}")
                continue
            for row in self.validations:
                if checkpoint and row["step"] == checkpoint.state["step"] and row != self.chosen:
                    other = type(prior).from_config(prior.to_config()).to(prior.device).eval()
                    other.load_state_dict(checkpoint.tensors["ema" if self.run.config.prior.use_ema else "model"])
                    yield row, other


def guidance_sweep(
    config: Config, judge: Judge, autoencoder: Autoencoder, prior: Prior, history: PriorLog, count: int
) -> list[dict]:
    """Trade-off of guidance and training length: fidelity against variety and copies.

    Returns:
        `Judge.samples` of `count` new samples per prior, delivered or earlier, and scale of `evaluation.cfg_scales`; empty for
        an unconditional prior, which is fitted in one step and has neither guidance nor training length.
    """
    if not knows_classes(prior):
        return []
    priors, found = [(history.chosen, prior), *history.earlier_priors(prior)], []
    labels, criterion = balanced_labels(count, prior.num_classes), family_of(prior).criterion
    cases = list(itertools.product(priors, config.evaluation.cfg_scales))
    for (row, model), cfg_scale in tqdm(cases, desc="guidance", mininterval=0.5):
        settings = dataclasses.replace(config.sampling, cfg_scale=cfg_scale)
        batches = generate(autoencoder, model, labels, settings, seed_for(config.seed, "trade"))
        images = torch.cat([batch.clamp(-1, 1).float().cpu() for batch in batches])
        at = {"prior_step": row["step"], f"heldout_{criterion}": row[criterion], "cfg_scale": cfg_scale}
        found.append(at | judge.samples(images, labels))
    return found
