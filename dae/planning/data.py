"""What is known of a data set before it is read."""

from __future__ import annotations

import glob
import os
from dataclasses import dataclass, field
from typing import Any

from dae.config import Config
from dae.data import load_data
from dae.data.builtin import NAMES
from dae.data.partition import choose_validation
from dae.data.sources import read_splits, source_name

READ_ROWS = 20_000  # sets up to this size are read as a training reads them, so that steps are timed on their images


@dataclass
class KnownData:
    """Numbers of images and classes, None where they are not known.

    Attributes:
        images: the `ImageData`, where steps are to be timed on it.
        lines: what is known and what is not, in words.
    """

    rows: int | None = None
    held_out: int = 0
    classes: int | None = None
    images: Any = None
    lines: list[str] = field(default_factory=list)


def known_data(config: Config) -> KnownData:
    """Nothing is downloaded: a data set of the Hub is not looked up."""
    data, name = config.data, source_name(config.data)
    here = data.train_files or data.dataset_name in NAMES or _exists(data.dataset_name)
    without = "the cache's size, the passes over the data and the time to read images are left out"
    if not here:
        return KnownData(classes=data.num_classes, lines=[f"not known: {name} is not on this machine, so {without}"])
    source = read_splits(data)
    names = {"train": data.train_split, "validation": choose_validation(source.splits, data)}
    sizes = {part: source.splits[split].size for part, split in names.items() if split is not None}
    rows = sizes["train"]
    if rows is None or data.streaming:
        return KnownData(classes=data.num_classes, lines=[f"not known: how many images {name} streams, so {without}"])
    if rows <= READ_ROWS:
        images = load_data(data, config.seed)
        counts = images.describe()
        words = f"{name}: {counts['train']:,} training and {counts['validation']:,} held-out images"
        return KnownData(counts["train"], counts["validation"], images.num_classes, images, [words])
    held_out = sizes.get("validation") or min(data.validation_size, rows // 10)
    if "validation" not in sizes:
        rows -= held_out
    if data.max_train_samples is not None:
        rows = min(rows, data.max_train_samples)
    words = f"{name}: about {rows:,} training and {held_out:,} held-out images, not read: steps are timed on random ones"
    return KnownData(rows, held_out, data.num_classes, None, [words])


def _exists(name: str) -> bool:
    return os.path.exists(os.path.expanduser(name)) or glob.has_magic(name)
