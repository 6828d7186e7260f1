"""Read a finished run from its folder, for pages."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from dae.config import Config, load_config
from dae.data.sources import source_title
from dae.hub import fingerprint
from dae.priors import PriorFamily
from dae.quantizers import bottleneck_class
from dae.reporting.measures import measured_family
from dae.training.run import Run, recorded_data


@dataclass
class Record:
    """A run that was trained, sampled and evaluated."""

    config: Config  # as trained, see `trained_configuration`
    metrics: dict  # metrics.json of recipes/evaluate.py
    images: np.ndarray  # uint8 [N, H, W, C], the samples
    labels: np.ndarray  # int64 [N], their classes
    pictures: dict[str, np.ndarray]  # by name, the images saved by recipes/evaluate.py
    autoencoder: list[dict]  # rows of its log, oldest first; empty if there is no log
    prior: list[dict]  # likewise
    tables: list[list[tuple[str, str]]]  # of `dae.data.Summary`, one per data set; empty in earlier versions
    measured_on: datetime.date  # the day metrics.json was written
    contradictions: list[str]  # sentences on files newer than the measurements

    @classmethod
    def load(cls, config: Config) -> Record:
        """Read the run in `config.output_dir`.

        Raises:
            FileNotFoundError: the run has no samples or no metrics.json yet; the message names the recipe to run.
            ValueError: one of the files is damaged; so does this message.
        """
        output = Path(config.output_dir)
        samples_file, metrics_file = output / "samples" / "samples.npz", output / "metrics.json"
        for file, recipe in ((samples_file, "sample"), (metrics_file, "evaluate")):
            if not file.is_file():
                raise FileNotFoundError(f"no {file}: run `python recipes/{recipe}.py` with the same configuration first")
        pictures_file, sampling_file = output / "evaluation" / "pictures.npz", output / "samples" / "sampling.json"
        with _undamaged(metrics_file, "evaluate"):
            metrics = dict(json.loads(metrics_file.read_text()))
            metrics.setdefault("guidance_sweep", metrics.pop("trade", []))  # its name in earlier versions
        with _undamaged(samples_file, "sample"):
            samples = dict(np.load(samples_file))
            images, labels = samples["arr_0"], samples["arr_1"]
        with _undamaged(pictures_file, "evaluate"):
            pictures = dict(np.load(pictures_file)) if pictures_file.is_file() else {}
        with _undamaged(sampling_file, "sample"):
            contradicted = contradictions(output, metrics)
        runs = [Run(config, name) for name in ("autoencoder", "prior")]
        autoencoder, prior = (run.history() if run.history_file.is_file() else [] for run in runs)
        read = {data["fingerprint"]: data["table"] for run in runs if (data := recorded_data(run.folder))}
        day = datetime.date.fromtimestamp(metrics_file.stat().st_mtime)
        parts = trained_configuration(config), metrics, images, labels, pictures, autoencoder, prior
        return cls(*parts, list(read.values()), day, contradicted)

    @property
    def data(self) -> dict:
        """The data's description by evaluate.py; empty in runs of earlier versions."""
        return self.metrics.get("data") or {}

    @property
    def data_name(self) -> str:
        """Name of the data set, without the folders of a local one."""
        if "title" in self.data:
            return str(self.data["title"])
        name = str(self.data.get("name") or source_title(self.config.data))  # for runs of earlier versions
        return Path(name).name if name.startswith(("/", ".", "~")) else name

    @property
    def labelled(self) -> bool:
        return self.metrics["generation"]["recognised"] is not None

    @property
    def family(self) -> PriorFamily:
        """The family of the prior."""
        return measured_family(self.metrics)

    @property
    def num_codes(self) -> int:
        """K of a token latent; 0 for a continuous one, whose bits evaluate.py measures."""
        autoencoder = self.config.autoencoder
        return 0 if self.metrics.get("latent") else bottleneck_class(autoencoder).num_codes(autoencoder)


@contextlib.contextmanager
def _undamaged(file: Path, recipe: str) -> Iterator[None]:
    """Turn errors of reading a damaged file into a ValueError that names the recipe to run."""
    try:
        yield
    except (ValueError, TypeError, KeyError, EOFError, BadZipFile) as error:
        remedy = f"run `python recipes/{recipe}.py` with the same configuration again"
        raise ValueError(f"{file} is damaged ({error}): {remedy}") from error


def trained_configuration(config: Config) -> Config:
    """The configuration as trained: each training recipe saves its own, and these may differ."""
    folder = Path(config.output_dir)
    saved = {name: load_config(p) for name in ("", "autoencoder", "prior") if (p := folder / name / "config.yaml").is_file()}
    trained = saved.get("", config)
    if "autoencoder" in saved:
        keys = ("method", "data", "autoencoder", "auxiliary_decoder", "stage1", "stage2")
        trained = dataclasses.replace(trained, **{key: getattr(saved["autoencoder"], key) for key in keys})
    return dataclasses.replace(trained, prior=saved["prior"].prior) if "prior" in saved else trained


def contradictions(output: Path, metrics: dict) -> list[str]:
    """Sentences on files newer than the measurements, for which a page would mix two runs."""
    found, sampling = [], output / "samples" / "sampling.json"
    if sampling.is_file() and json.loads(sampling.read_text()) != metrics["sampling"]:
        found.append("The samples shown were drawn after the measurements: run evaluate.py again, then report.py.")
    for name in ("prior", "autoencoder"):
        model, drawn_from = output / name / "model.safetensors", metrics["sampling"].get(name)  # earlier versions: of the prior
        if model.is_file() and drawn_from is not None and fingerprint(model.parent) != drawn_from:
            found.append(
                f"The {name} was trained anew after the measurements: run sample.py and evaluate.py again, then report.py."
            )
    return found


def seconds_by_stage(history: list[dict]) -> dict[str, float]:
    """Seconds per stage; the clock of a resumed run restarts at 0, which shows as a decrease."""
    seconds: dict[str, float] = {}
    before = 0.0
    for row in history:
        passed = row["seconds"] - before if row["seconds"] >= before else row["seconds"]
        seconds[row["stage"]] = seconds.get(row["stage"], 0.0) + passed
        before = row["seconds"]
    return seconds
