"""A short table of a run's data, printed before training and in the model card."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np

from dae.data.columns import label_values
from dae.data.images import open_image
from dae.data.rows import ImageDataset, ImageStream, RowDecoder, unbroken
from dae.data.skipping import RowError

if TYPE_CHECKING:
    from dae.data.load import ImageData

LOOKED_AT = 32  # rows sampled for size, channels and time
SHOWN = 10  # classes listed with their counts


@dataclass
class Summary:
    """Facts about a loaded data set; None if a stream would have to be read for them.

    Attributes:
        rows: training rows and held-out rows.
        splits: rows per split.
        held_out: origin of the held-out rows.
        classes: training rows per class; None without labels.
        images: counts per kind of image, such as `RGB 640x480`.
        milliseconds: time to decode one row in this process.
        notes, left_out: how files were read, and which were not.
    """

    name: str
    rows: dict[str, int | None]
    splits: dict[str, int | None]
    held_out: str
    classes: dict[str, int | None] | None
    images: dict[str, int]
    milliseconds: float
    notes: list[str]
    left_out: list[str]

    def lines(self) -> list[str]:
        """The table, one line per fact."""
        return [f"{what:<9} {fact}" for what, fact in self.table()]

    def table(self) -> list[tuple[str, str]]:
        """(name, value) of each fact."""
        count = {part: "unknown" if rows is None else f"{rows:,}" for part, rows in self.rows.items()}
        found = ", ".join(f"{split} {'unknown' if rows is None else f'{rows:,}'}" for split, rows in self.splits.items())
        kinds = ", ".join(f"{kind} ({n})" if len(self.images) > 1 else kind for kind, n in list(self.images.items())[:6])
        more = f" and {len(self.images) - 6} more kinds" if len(self.images) > 6 else ""
        table = [("data", self.name), ("rows", f"{count['train']} to train on, {count['validation']} held out")]
        table += [("found", found), ("held out", self.held_out), ("classes", self._classes())]
        table += [("images", f"{kinds}{more}; {sum(self.images.values())} looked at")]
        table += [("time", f"{self.milliseconds:.1f} ms to decode a row"), *(("read as", note) for note in self.notes)]
        table += [("left out", line) for line in self.left_out or ["nothing"]]
        return [(what, " ".join(fact.split())) for what, fact in table]

    def _classes(self) -> str:
        if self.classes is None:
            return "none"
        shown = [name if rows is None else f"{name} {rows:,}" for name, rows in list(self.classes.items())[:SHOWN]]
        unknown = "; counts not known before the stream is read" if None in self.classes.values() else ""
        empty = sum(rows == 0 for rows in self.classes.values())
        never = f"; {empty:,} of them without a row to train on" if empty else ""
        return f"{len(self.classes)}: {', '.join(shown)}{', ...' if len(self.classes) > SHOWN else ''}{unknown}{never}"


def summarize_data(data: ImageData) -> Summary:
    """Facts about a loaded data set, from metadata and a few rows; no full read."""
    parts = {"train": data.train, "validation": data.validation}
    sample, began = _sample(data.train), time.perf_counter()
    decoder, decoded = data.train.decoder, 0
    for row in sample:
        try:
            decoder.decode(row, 0, "a row")
        except RowError:
            continue  # verification or training decides whether to stop
        decoded += 1
    milliseconds = 1000 * (time.perf_counter() - began) / max(decoded, 1)
    kinds = Counter(_kind(row[decoder.image_column], decoder) for row in sample)
    return Summary(
        name=data.name,
        rows={part: len(rows) if isinstance(rows, ImageDataset) else None for part, rows in parts.items()},
        splits=data.splits,
        held_out=data.held_out,
        classes=_classes(data),
        images=dict(kinds.most_common()),
        milliseconds=milliseconds,
        notes=data.notes,
        left_out=data.left_out + (data.train.skipped.lines() if data.train.skipped is not None else []),
    )


def _sample(dataset: ImageDataset | ImageStream) -> list[dict]:
    if isinstance(dataset, ImageStream):
        return list(islice(unbroken(dataset.rows, dataset.decoder.origin), LOOKED_AT))
    chosen = np.unique(np.linspace(0, len(dataset) - 1, min(LOOKED_AT, len(dataset))).astype(int))
    return [dataset.rows[int(i)] for i in chosen]


def _kind(source: object, decoder: RowDecoder) -> str:
    if isinstance(source, list):
        return "array " + "x".join(map(str, np.asarray(source).shape))
    try:
        image = open_image(source, decoder.folder)
    except (ValueError, OSError):
        return "unreadable"
    return f"{image.mode} {image.width}x{image.height}"


def _classes(data: ImageData) -> dict[str, int | None] | None:
    decoder = data.train.decoder
    if decoder.labels.column is None:
        return None
    if isinstance(data.train, ImageStream):
        return dict.fromkeys(data.class_names)
    values = label_values(data.train.rows, decoder.labels.column, decoder.origin)
    counts = np.bincount(decoder.labels.numbers(values), minlength=data.num_classes)
    return dict(zip(data.class_names, counts.tolist(), strict=True))
