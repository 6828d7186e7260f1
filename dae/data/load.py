"""`load_data`: the training and validation set that a configuration describes, checked before training."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dae.config import DataConfig
from dae.data import columns
from dae.data.files import few
from dae.data.partition import choose_validation, split_stream, split_table
from dae.data.rows import ImageDataset, ImageStream, RowDecoder
from dae.data.sources import SourceSplit, read_splits, source_name, source_title


@dataclass
class ImageData:
    """A training and a validation set of images; see `load_data`."""

    train: ImageDataset | ImageStream
    validation: ImageDataset | ImageStream
    class_names: list[str]
    labelled: bool
    fingerprint: str
    name: str
    title: str = ""  # name in headings
    labels: list | None = None  # the label column's value for each class; None: 0 to num_classes - 1
    columns: dict[str, Any] = field(default_factory=dict)
    splits: dict[str, int | None] = field(default_factory=dict)
    held_out: str = ""
    notes: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def list_skipped(self, folder: str | Path) -> None:
        """With `data.on_error=skip`: from now on list skipped rows in `folder`/skipped.jsonl."""
        if self.train.skipped is not None:
            self.train.skipped.list_in(folder)

    def skipped_note(self) -> str:
        """The last line of a recipe on skipped rows; empty if there are none."""
        return "" if self.train.skipped is None else self.train.skipped.describe()

    def describe(self) -> dict:
        """A JSON-able description of the data for model cards and reports. Sizes of streams are None."""
        facts = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        parts = {"train": self.train, "validation": self.validation}
        sizes = {name: None if isinstance(part, ImageStream) else len(part) for name, part in parts.items()}
        return facts | sizes | {"num_classes": self.num_classes}


def load_data(config: DataConfig, seed: int) -> ImageData:
    """Find, check, split and wrap the data set that `config` names.

    The held-out rows do not depend on `seed`, so that runs with different seeds are validated on the same rows (see
    `dae.data.survey`); `seed` only chooses the table rows that `max_train_samples` keeps.

    Raises:
        FileNotFoundError: the data set does not exist or cannot be reached.
        ValueError: a split or column does not exist, a split is empty, a label is out of range, an image cannot be read.
        TypeError: a column has a type that cannot be used.
        ImportError: `photos` without its packages.
    """
    if config.channels not in (1, 3):
        raise ValueError(f"data.channels: expected 1 or 3, got {config.channels}")
    for key in ("resolution", "validation_size", "num_classes", "max_train_samples"):
        if (value := getattr(config, key)) is not None and value < 1:
            raise ValueError(f"data.{key}: expected at least 1, got {value}")
    source = read_splits(config)
    names = {"train": config.train_split, "validation": choose_validation(source.splits, config)}
    splits = {part: source.splits[name] for part, name in names.items() if name is not None}
    wanted = {part: split.rows for part, split in splits.items()}
    features = wanted["train"].features
    if features is None:
        raise ValueError(f"{source_name(config)}: the columns of this stream are not known; use streaming=false")
    image_column = columns.find_image_column(features, config.image_column)
    used = {"image": image_column, "label": columns.find_label_column(features, config.label_column)}
    others = [name for name in features if name not in used.values() and not name.startswith("__")]
    _require_same_labels(wanted, used["label"], source_name(config))
    origins = {part: f"{source_name(config)}, split {name or config.train_split!r}" for part, name in names.items()}
    wanted = {part: _encoded(rows, used, origins[part]) for part, rows in wanted.items()}
    labels = _resolve_labels(splits, used["label"], origins, config)
    decoded = config.resolution, config.channels, config.center_crop
    decoders = {
        part: RowDecoder(origin, image_column, labels, *decoded, folder=splits.get(part, splits["train"]).folder)
        for part, origin in origins.items()
    }
    split = split_stream if config.streaming else split_table
    train, validation, contents = split(wanted, decoders, config, seed)
    recipe = [contents, names, used, labels.class_names, *decoded]
    fingerprint = hashlib.blake2b(json.dumps(recipe).encode(), digest_size=16).hexdigest()
    if train.skipped is not None:
        train.skipped.fingerprint = fingerprint
    return ImageData(
        train=train,
        validation=validation,
        class_names=labels.class_names,
        labelled=labels.column is not None,
        fingerprint=fingerprint,
        name=source_name(config),
        title=source_title(config),
        labels=labels.values,
        columns=used,
        splits={name: split.size for name, split in source.splits.items()},
        held_out=_held_out_rule(names["validation"], config),
        notes=source.notes + ([f"columns that are not read: {few(others)}"] if others else []),
        left_out=source.left_out.lines(),
    )


def _held_out_rule(split: str | None, config: DataConfig) -> str:
    if config.validation_files:
        return "data.validation_files"
    if split is not None:
        return f"the split {split!r}"
    return "rows taken out of training by a digest of their images, each class in proportion"


def _resolve_labels(
    splits: dict[str, SourceSplit], column: str | None, origins: dict[str, str], config: DataConfig
) -> columns.Labels:
    """The classes of the training split; checks every label that can be read without the images."""
    found = {
        part: columns.label_values(split.column(column), column, origins[part])
        for part, split in splits.items()
        if column is not None and split.column is not None
    }
    labels = columns.resolve_labels(
        column, splits["train"].rows.features, config.num_classes, found.get("train"), found.get("validation")
    )
    for part, values in found.items():
        for row in np.flatnonzero(labels.numbers(values) < 0)[:1]:
            try:
                labels.number(values.tolist()[row])
            except ValueError as error:
                raise ValueError(f"{origins[part]}, row {row}: {error}") from error
    return labels


def _require_same_labels(parts: dict[str, Any], column: str | None, name: str) -> None:
    features = [(rows.features or {}).get(column) for rows in parts.values()]
    if column is not None and None not in features and any(feature != features[0] for feature in features):
        raise ValueError(f"{name}: the label column {column!r} differs between the splits: {' and '.join(map(str, features))}")


def _encoded(rows: Any, used: dict[str, str | None], origin: str) -> Any:
    """The columns in use, with the images left encoded: we decode them ourselves."""
    from datasets import Image

    features = rows.features or {}
    for key, column in used.items():
        if column is not None and column not in features:
            raise ValueError(f"{origin}: no {key} column {column!r}; the columns are {columns.describe_columns(features)}")
    rows = rows.select_columns(list(dict.fromkeys(column for column in used.values() if column is not None)))
    return rows.cast_column(used["image"], Image(decode=False)) if isinstance(rows.features[used["image"]], Image) else rows
