"""Reliability of predictors: how well each ranked the latents of a comparison."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple

from dae.config import Config
from dae.diagnostics.report_card import PREDICTORS
from dae.statistics import RankCorrelation, rank_correlation

SHARED = ("data.dataset_name", "data.train_files", "data.resolution", "autoencoder.bottleneck")  # between a latent and the trials


class Ranking(NamedTuple):
    """How well each predictor ranked the trials of one comparison, and over how many seeds."""

    found: dict[str, RankCorrelation]
    seeds: int


def rank_predictors(records: Sequence[dict], *, seed: int = 0) -> dict[str, RankCorrelation]:
    """Rank correlation of each predictor with the generation distance, over the latents of finished trials.

    Spearman's rank correlation over the measuring (not tuning) trials at the configuration's own rate, as predictors otherwise
    follow the rate, with its bootstrap interval over whole seeds (`dae.statistics.rank_correlation`). 1: a larger value always
    has a larger distance.

    Args:
        records: of one comparison, one data set and one bottleneck: distances of two do not compare.
        seed: for the bootstrap.

    Returns:
        By name, the strongest correlation first; without predictors that have a value in fewer than 3 trials; NaN for constant
        predictors.
    """
    found = {}
    for name in PREDICTORS:
        rows = [
            (value, distance, record["seed"])
            for record in _with_card(records)
            if (value := record["card"].get(name)) is not None
            and math.isfinite(value)
            and math.isfinite(distance := record["priors"][0]["frechet"])
        ]
        if len(rows) >= 3:
            x, y, groups = zip(*rows, strict=True)
            found[name] = rank_correlation(x, y, groups=groups, seed=seed)
    return dict(sorted(found.items(), key=lambda item: -abs(item[1].rho) if math.isfinite(item[1].rho) else 1))


def _with_card(records: Sequence[dict]) -> list[dict]:
    return [r for r in records if r["purpose"] == "measure" and r["rate"] is None and r["card"]]


def rank_comparisons(config: Config, latent: Config) -> dict[Path, Ranking]:
    """A ranking for each folder of `measure.compare_folders`, and for the run's own folder if it holds trials.

    Args:
        config: names the folders and the seed.
        latent: the configuration that trained the autoencoder.

    Raises:
        FileNotFoundError: a folder without trials.
        ValueError: a damaged file, or trials with other data or another bottleneck than the latent's.
    """
    folders = [Path(name) for name in config.measure.compare_folders]
    for folder in folders:
        if not (folder / "trials").is_dir():
            raise FileNotFoundError(
                f"measure.compare_folders: {folder} holds no trials/; expected the output_dir of recipes/compare.py"
            )
    own = Path(config.output_dir)
    if (own / "trials").is_dir() and own not in folders:
        folders.append(own)
    rankings = {}
    for folder in folders:
        records = read_trials(folder, latent)
        rankings[folder] = Ranking(rank_predictors(records, seed=config.seed), len({r["seed"] for r in _with_card(records)}))
    return rankings


def read_trials(folder: Path, latent: Config) -> list[dict]:
    """The records of the trials that finished; those that diverged have none. ValueError: as `rank_comparisons`."""
    records = []
    ours = {key: attrgetter(key)(latent) for key in SHARED}
    for path in sorted((folder / "trials").glob("*.json")):
        try:
            saved = json.loads(path.read_text())
            settings = {"data.train_files": []} | saved["settings"]  # missing in trials of earlier versions
            record, theirs = saved["record"], {key: settings[key] for key in ours}
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is damaged ({error}): delete it and run recipes/compare.py again") from error
        differences = [f"{k} is {theirs[k]!r} there and {ours[k]!r} of the latent" for k in ours if theirs[k] != ours[k]]
        if differences:
            raise ValueError(
                f"the trials in {folder} cannot tell which line of this card to trust: {'; '.join(differences)}; "
                "give a comparison of the same data and bottleneck"
            )
        if record is not None:
            records.append(record)
    return records
