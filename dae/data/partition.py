"""Checked training and validation parts of a data set, and digests of their contents."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import logging
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dae.config import DataConfig
from dae.data.columns import label_values
from dae.data.images import decode_image, open_image
from dae.data.rows import ImageDataset, ImageStream, RowDecoder, unbroken
from dae.data.skipping import BadRow, RowError, SkippedRows
from dae.data.sources import source_name
from dae.data.survey import Survey, choose_held_out, read_rows, survey_stream, survey_table, table_of_stream

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

log = logging.getLogger(__name__)

HELD_OUT_NAMES = ("validation", "test", "val")
STREAM_VERIFY_ROWS = 64  # rows of a stream to check: each is read twice
WHOLE_DIGEST_BYTES = 1 << 28  # up to this size digest all bytes, above it all sizes and DIGEST_ROWS rows
DIGEST_ROWS = 2048
STREAM_ROWS = 1000  # assumed size of a stream for the permitted share of bad rows, until more were read


def choose_validation(splits: dict[str, Any], config: DataConfig) -> str | None:
    """Name of the held-out split; None if rows of the training split must be held out.

    ValueError: the training or validation split does not exist, or they are the same.
    """
    for key in ("train_split", "validation_split"):
        name = getattr(config, key)
        if name is not None and name not in splits and (key, name) != ("validation_split", "none"):
            raise ValueError(f"{source_name(config)}: no split {key}={name!r}; the splits are {sorted(splits)}")
    if config.validation_split == config.train_split:
        raise ValueError(f"train_split and validation_split are both {config.train_split!r}; null holds rows out of training")
    if config.validation_split == "none" and "none" not in splits:
        return None
    others = [name for name in HELD_OUT_NAMES if name in splits and name != config.train_split]
    return config.validation_split or next(iter(others), None)


def split_table(
    parts: dict[str, Dataset], decoders: dict[str, RowDecoder], config: DataConfig, seed: int
) -> tuple[ImageDataset, ImageDataset, list]:
    """Map-style training and validation sets, and a list that identifies their contents.

    Args:
        parts: the encoded rows of `train` and, if the data set has a held-out split, `validation`.
        decoders: how to read the rows of `train` and `validation`.
        config: sizes and number of rows to verify.
        seed: chooses the rows that `max_train_samples` keeps.

    ValueError: no rows, too few to hold some out, or a bad row (named).
    """
    contents, bad, survey = [], [], None
    if "validation" not in parts and len(parts["train"]):
        survey = survey_table(parts["train"], decoders["train"])
    for part, rows in parts.items():
        if len(rows) == 0:
            raise ValueError(f"{decoders[part].origin} is empty")
        bad += _verify(_first_rows(rows, len(rows) if config.verify_rows < 0 else config.verify_rows), decoders[part], config)
        contents.append(_table_digest(rows, decoders[part], survey))
    indices = {part: np.arange(len(rows)) for part, rows in parts.items()}
    if survey is not None:
        held_out = _held_out(survey, config, decoders["train"])
        indices["train"] = np.flatnonzero(~np.isin(survey.digests_N, survey.digests_N[held_out]))
        indices["validation"] = np.sort(held_out)
    if config.max_train_samples is not None:
        order = np.random.default_rng(seed).permutation(indices["train"])
        indices["train"] = np.sort(order[: config.max_train_samples])
    made, skipped = {}, _skipped_rows(config, sum(map(len, parts.values())), bad)
    for part, kept in indices.items():
        rows = parts.get(part, parts["train"])
        made[part] = ImageDataset(rows if len(kept) == len(rows) else rows.select(kept), decoders[part], kept, skipped)
        contents.append(hashlib.blake2b(kept.astype(np.int64).tobytes(), digest_size=16).hexdigest())
    return made["train"], made["validation"], contents


def _held_out(survey: Survey, config: DataConfig, decoder: RowDecoder) -> np.ndarray:
    rows = choose_held_out(survey, config.validation_size, decoder.origin)
    if copies := int(np.isin(survey.digests_N, survey.digests_N[rows]).sum()) - len(rows):
        log.info("%s: %d copies of held-out images are left out of training", decoder.origin, copies)
    return rows


def _first_rows(rows: Dataset, limit: int) -> Iterator[tuple[int, dict]]:
    """The first rows, numbered, read in batches."""
    for start in range(0, min(limit, len(rows)), 256):
        batch = rows[start : min(start + 256, limit)]
        for i, values in enumerate(zip(*batch.values(), strict=True), start):
            yield i, dict(zip(batch, values, strict=True))


def _verify(rows: Iterable[tuple[int, dict]], decoder: RowDecoder, config: DataConfig) -> list[BadRow]:
    """The rows whose headers are bad. RowError: there is one, and bad rows are not to be skipped."""
    bad = []
    for number, row in rows:
        try:
            with decoder.naming(row, number, f"row {number}"):
                if config.streaming:  # all rows of a table are verified
                    decoder.label(row)
                if isinstance(row[decoder.image_column], list):
                    decode_image(row[decoder.image_column], decoder.channels)
                else:
                    open_image(row[decoder.image_column], decoder.folder)
        except RowError as error:
            if config.on_error == "raise":
                raise
            key = decoder.key(row) if config.streaming else number
            bad.append(dataclasses.replace(error.bad, key=key))
    return bad


def _skipped_rows(config: DataConfig, rows: int, bad: list[BadRow]) -> SkippedRows | None:
    """The counter of skipped rows, starting with those known already; None if bad rows raise."""
    if config.on_error == "raise":
        return None
    skipped = SkippedRows(config.max_skipped, rows, known=not config.streaming)
    skipped.add(bad)
    return skipped


def _table_digest(rows: Dataset, decoder: RowDecoder, survey: Survey | None) -> str:
    """Digest of the labels and of all images if surveyed, else of image sizes and all or evenly spaced images."""
    digest = hashlib.blake2b(digest_size=16)
    if decoder.labels.column is not None:
        digest.update(repr(label_values(rows, decoder.labels.column, decoder.origin).tolist()).encode())
    if survey is not None:
        digest.update(survey.digests_N.tobytes())
        return digest.hexdigest()
    sizes = _encoded_sizes(rows, decoder.image_column, decoder.folder)
    digest.update(sizes.tobytes())
    chosen = np.arange(len(rows))
    if sizes.sum() > WHOLE_DIGEST_BYTES:
        chosen = np.unique(np.linspace(0, len(rows) - 1, DIGEST_ROWS).astype(np.int64))
    picked = rows if len(chosen) == len(rows) else rows.select(chosen)
    for _, row in _first_rows(picked, len(picked)):
        # Verification or decoding reports unreadable rows.
        with contextlib.suppress(ValueError, OSError):
            digest.update(decoder.encoded(row))
    return digest.hexdigest()


def _encoded_sizes(rows: Dataset, column: str, folder: Path | None) -> np.ndarray:
    """Size in bytes of each encoded image, from the table's offsets or the file system, without reading it."""
    import pyarrow as pa
    import pyarrow.compute as pc

    sizes = []
    for table in rows.select_columns([column]).with_format("arrow").iter(1000):
        images = pa.chunked_array(table.column(column)).combine_chunks()
        if pa.types.is_binary(images.type) or pa.types.is_large_binary(images.type):
            sizes.append(pc.fill_null(pc.binary_length(images), -1).to_numpy(zero_copy_only=False))
            continue
        if not pa.types.is_struct(images.type):
            sizes.append(np.full(len(images), images.nbytes // max(len(images), 1)))
            continue
        known = pc.fill_null(pc.binary_length(images.field("bytes")), -1).to_numpy(zero_copy_only=False).astype(np.int64)
        for i in np.flatnonzero(known < 0):
            path = images.field("path")[int(i)].as_py()
            file = (folder or Path()) / path if path else None
            known[i] = file.stat().st_size if file is not None and file.is_file() else -1
        sizes.append(known)
    return np.concatenate(sizes).astype(np.int64)


def split_stream(
    parts: dict[str, IterableDataset], decoders: dict[str, RowDecoder], config: DataConfig, seed: int
) -> tuple[ImageStream | ImageDataset, ImageStream | ImageDataset, list]:
    """Training and validation stream, and a list that identifies the contents read so far.

    If rows must be held out, the stream is read once to choose them by the same rule as for a table (`survey_stream`), and
    they are kept in memory. Training excludes them by digest, because `skip` would skip other rows once the stream is
    split over workers. The rows for `max_train_samples` are chosen and kept in the same way, or are the first ones if the
    stream is too long for that. `seed` is not used.
    """
    rows, bad = parts["train"], []
    heads = {part: list(islice(unbroken(whole, decoders[part].origin), STREAM_VERIFY_ROWS)) for part, whole in parts.items()}
    for part, head in heads.items():
        if not head:
            raise ValueError(f"{decoders[part].origin} is empty")
        verified = enumerate(head if config.verify_rows < 0 else head[: config.verify_rows])
        bad += _verify(verified, decoders[part], config)
    contents: list = [_digests(head, decoders[part]) for part, head in heads.items()]
    stream = ImageStream(rows, decoders["train"])
    train: ImageStream | ImageDataset = stream
    validation: ImageStream | ImageDataset
    if "validation" in parts:
        validation = ImageStream(parts["validation"], decoders["validation"])
    else:
        stream.survey = survey_stream(rows, decoders["train"])
        digests = stream.survey.digests_N[_held_out(stream.survey, config, decoders["train"])].tolist()
        validation = read_rows(rows, decoders["validation"], stream.survey, digests)
        stream.held_out = frozenset(digests)
        contents.append(sorted(digests))
    if config.max_train_samples is not None:
        contents.append(config.max_train_samples)
        table = table_of_stream(stream, config.max_train_samples)
        if table is not None and len(table) == config.max_train_samples:
            train = table
        elif table is not None:
            first = rows.take(config.max_train_samples + len(stream.held_out))
            train = ImageStream(first, decoders["train"], stream.held_out)
    train.skipped = validation.skipped = _skipped_rows(config, max(len(stream.survey or ()), STREAM_ROWS), bad)
    return train, validation, contents


def _digests(rows: Iterable[dict], decoder: RowDecoder) -> list[int]:
    digests = []
    for i, row in enumerate(rows):
        try:
            digests.append(decoder.digest(row, f"row {i}"))
        except RowError:  # verification or decoding reports it
            digests.append(decoder.key(row))
    return digests
