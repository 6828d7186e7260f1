"""Resolve the names in a configuration to the rows of each split, images still encoded."""

from __future__ import annotations

import contextlib
import functools
import glob
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Union

import numpy as np

from dae.config import DataConfig
from dae.data import builtin, webdataset
from dae.data.columns import table_column
from dae.data.files import LeftOut, few, nearest_name, what_is_there
from dae.data.listing import FORMS, Listing, is_saved, list_files

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset, IterableDataset

    Rows = Union[Dataset, IterableDataset]

log = logging.getLogger(__name__)

STREAM_SHARDS = 8  # parts of a streamed local table, for workers and processes to share
HUB_TIMEOUT_S = 5.0


@dataclass
class SourceSplit:
    """The rows of a split, and what is known without reading images.

    Attributes:
        rows: a table or, with `streaming`, a stream.
        folder: base of relative image paths.
        column: `column(name)` returns all values of a column; None for a stream that would have to be read.
        size: number of rows, if known.
        files: the files it is read from, if they were listed.
    """

    rows: Rows
    folder: Path | None = None
    column: Callable[[str], pa.ChunkedArray] | None = None
    size: int | None = None
    files: list[str] = field(default_factory=list)


@dataclass
class Source:
    """A data set: its splits, notes on how ambiguous files were read, and what was left out."""

    splits: dict[str, SourceSplit]
    notes: list[str] = field(default_factory=list)
    left_out: LeftOut = field(default_factory=LeftOut)


def read_splits(config: DataConfig) -> Source:
    """All splits of the data set that `config` names.

    `data.train_files` takes the place of `data.dataset_name`; `data.validation_files` becomes the split `validation`.

    Raises:
        FileNotFoundError: nothing of this name exists, neither locally nor on the Hugging Face hub.
        ValueError: it exists but in no accepted form, or it can be read in more than one way.
    """
    if config.train_files:
        source = _from_listing(list_files(config.train_files, config, "data.train_files", "train"), config)
    else:
        source = _read_named(config)
    if config.validation_files:
        if config.validation_split is not None:
            raise ValueError(f"data.validation_files and data.validation_split={config.validation_split!r}: expected one of them")
        trained_on = source.splits.get(config.train_split)
        labelled = None if trained_on is None else "label" in (trained_on.rows.features or {})
        listing = list_files(config.validation_files, config, "data.validation_files", "validation", labelled)
        held_out = _from_listing(listing, config)
        _refuse_common_files(trained_on, held_out.splits["validation"])
        source.splits |= held_out.splits
        source.notes += [f"validation: {note}" for note in held_out.notes]
        for reason, count in held_out.left_out.counts.items():
            source.left_out.add(reason, *[held_out.left_out.examples[reason]] * count)
    return source


def source_name(config: DataConfig) -> str:
    """The data set's name in messages and records, as the user gave it."""
    return ", ".join(config.train_files) or config.dataset_name


def source_title(config: DataConfig) -> str:
    """`source_name` for headings: local paths without their parent folders, and only the first of many."""
    return few([_without_folders(name) for name in config.train_files or [config.dataset_name]])


def _without_folders(name: str) -> str:
    if not name.startswith(("/", ".", "~")):
        return name  # a Hub id, or relative and short
    path = os.path.abspath(os.path.expanduser(name))
    parts, end = Path(path).parts, len(Path(path).parts)
    if not os.path.exists(path):  # `faces/*.png` says more than `*.png`
        end = next((i for i, part in enumerate(parts) if glob.has_magic(part)), end)
    return os.path.join(*parts[end - 1 :])


def _refuse_common_files(trained_on: SourceSplit | None, held_out: SourceSplit) -> None:
    known = {os.path.realpath(file) for file in (trained_on.files if trained_on else ())}
    if common := [file for file in held_out.files if os.path.realpath(file) in known]:
        raise ValueError(f"data.validation_files: {len(common):,} of these files are trained on: {few(common)}")


def _read_named(config: DataConfig) -> Source:
    name = config.dataset_name
    if name in builtin.NAMES:
        splits = builtin.load_digits() if name == "digits" else builtin.load_photos(config.resolution)
        return Source({split: _from_table(rows, config) for split, rows in splits.items()})
    path = Path(os.path.expanduser(name))
    if name and (path.exists() or glob.has_magic(name)):
        if is_saved(path):
            return _read_saved(path, config)
        return _from_listing(list_files([name], config, "data.dataset_name"), config)
    if not _may_be_on_the_hub(name):
        raise FileNotFoundError(f"no file or folder matches data.dataset_name={name!r}: {what_is_there(path)} Expected {FORMS}")
    return _read_hub(config)


def _may_be_on_the_hub(name: str) -> bool:
    """Whether a name looks like a Hub id and does not begin with a local folder."""
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name) or Path(name).suffix.lower() in {".parquet", ".tar"}:
        return False
    return "/" not in name or not Path(name.partition("/")[0]).exists()


def _from_table(rows: Dataset, config: DataConfig, folder: Path | None = None, files: list[str] | None = None) -> SourceSplit:
    """A split from a table, cut into shards if it is streamed."""
    shards = max(1, min(STREAM_SHARDS, len(rows)))
    read = rows.to_iterable_dataset(num_shards=shards) if config.streaming else rows
    return SourceSplit(read, folder, functools.partial(table_column, rows), len(rows), files or [])


def _read_saved(path: Path, config: DataConfig) -> Source:
    from datasets import load_from_disk

    with _local(source_name(config)):
        saved = load_from_disk(str(path))
    splits = dict(saved) if isinstance(saved, dict) else {"train": saved}
    return Source({split: _from_table(rows, config, path) for split, rows in splits.items()})


def _from_listing(listing: Listing, config: DataConfig) -> Source:
    """The rows of listed files. If only one of the two names is used, `val` is renamed `validation`, as on the hub."""
    builders = {"images": _read_images, "parquet": _read_parquet, "webdataset": _read_webdataset}
    splits = builders[listing.kind](listing, config)
    if "val" in splits and "validation" not in splits and "val" not in (config.train_split, config.validation_split):
        splits = {"validation" if name == "val" else name: split for name, split in splits.items()}
    return Source(splits, listing.notes, listing.left_out)


def _read_images(listing: Listing, config: DataConfig) -> dict[str, SourceSplit]:
    import pyarrow as pa
    from datasets import Dataset, Features, Image, Value

    splits, described = {}, listing.described
    image_column = "image" if described is None else described.image_column
    for split, classes in listing.splits.items():
        images = [(file, row) for file in classes for row in ([0] if described is None else described.rows[file])]
        if config.streaming:  # files are sorted by class: a shuffle buffer would hold one class at a time
            images = [images[i] for i in np.random.default_rng(0).permutation(len(images))]
        files = [file for file, _ in images]
        encoded = [pa.nulls(len(files), pa.binary()), pa.array(files, pa.string())]
        columns, features = {image_column: pa.StructArray.from_arrays(encoded, ["bytes", "path"])}, {}
        if described is not None:
            table = described.table.take([row for _, row in images])
            columns |= zip(table.column_names, table.columns, strict=True)
            features = Features.from_arrow_schema(table.schema)
        if files and classes[files[0]] is not None and "label" not in columns:
            columns["label"], features["label"] = pa.array([classes[file] for file in files]), Value("string")
        rows = Dataset.from_dict(columns, features=Features({image_column: Image(decode=False)} | features))
        splits[split] = _from_table(rows, config, _common_folder(files), files)
    return splits


def _read_parquet(listing: Listing, config: DataConfig) -> dict[str, SourceSplit]:
    import pyarrow as pa
    import pyarrow.parquet as pq
    from datasets import load_dataset

    def column(files: list[str], name: str) -> pa.ChunkedArray:
        found = [pq.read_table(file, columns=[name])[name] for file in files]
        try:  # unify, for instance, integer widths
            found = [values.cast(found[0].type) for values in found]
        except pa.ArrowException as error:
            raise ValueError(f"the column {name!r} is not of one type in {few(files)}: {error}") from error
        return pa.chunked_array([chunk for values in found for chunk in values.chunks], found[0].type)

    for file in (file for files in listing.splits.values() for file in files if "::" in file):
        raise ValueError(f"{file!r}: `datasets` takes `::` in a path for a chain of URLs; rename it")
    escaped = {split: [glob.escape(file) for file in files] for split, files in listing.splits.items()}
    with _local(source_name(config)):
        read = load_dataset("parquet", data_files=escaped, streaming=config.streaming)
    splits = {}
    for split, files in ((split, list(files)) for split, files in listing.splits.items()):
        size = sum(listing.footers[file].rows for file in files)
        splits[split] = SourceSplit(read[split], _common_folder(files), functools.partial(column, files), size, files)
    return splits


def _common_folder(files: Iterable[str]) -> Path:
    return Path(os.path.commonpath([os.path.dirname(file) for file in files]))


def _read_webdataset(listing: Listing, config: DataConfig) -> dict[str, SourceSplit]:
    scanned = {
        split: webdataset.scan(list(files), webdataset.PEEK if config.streaming else None, listing.left_out)
        for split, files in listing.splits.items()
    }
    fields = webdataset.common_fields([fields for fields, _ in scanned.values()])
    inside = sorted(set().union(*(folders for _, folders in scanned.values())))
    if len(inside) > 1:
        listing.notes.append(f"folders inside .tar files are no classes: {few([folder or '.' for folder in inside])}")
    splits = {}
    for split, files in ((split, list(files)) for split, files in listing.splits.items()):
        with _local(source_name(config)):
            rows = webdataset.read_shards(files, fields, config.streaming)
        folder = _common_folder(files)
        of_stream = SourceSplit(rows, folder, files=files)
        splits[split] = of_stream if config.streaming else _from_table(rows, config, folder, files)
    return splits


def _read_hub(config: DataConfig) -> Source:
    from datasets import load_dataset
    from datasets.exceptions import DatasetNotFoundError

    name = config.dataset_name
    log.info("no file or folder %r here: looking for a data set of this name on the Hugging Face hub", name)
    reachable = _hub_is_reachable()
    try:
        with contextlib.nullcontext() if reachable else _offline():
            read = load_dataset(name, config.dataset_config_name, streaming=config.streaming)
    except (DatasetNotFoundError, FileNotFoundError, ConnectionError) as error:
        offline = "the Hugging Face hub cannot be reached from here, and the data set is not in the local cache"
        reason = str(error) if reachable else offline
        near = nearest_name(name, [*builtin.NAMES, *(entry for entry in os.listdir() if not entry.startswith("."))])
        hint = f" Did you mean {near!r}?" if near else ""
        raise FileNotFoundError(f"no data set data.dataset_name={name!r}: {reason}.{hint} Expected {FORMS}") from error
    except (RuntimeError, ValueError) as error:  # a repository with its own code; a missing configuration
        raise ValueError(f"dataset_name={name!r} cannot be read: {error}") from error
    if not config.streaming:
        return Source({split: _from_table(rows, config) for split, rows in read.items()})
    sizes = {split: getattr((rows.info.splits or {}).get(split), "num_examples", None) for split, rows in read.items()}
    return Source({split: SourceSplit(rows, size=sizes[split] or None) for split, rows in read.items()})


def _hub_is_reachable() -> bool:
    """Try one request with a short timeout: the hub library retries for half a minute before it gives up."""
    import urllib.error
    import urllib.request

    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        urllib.request.urlopen(urllib.request.Request(constants.ENDPOINT, method="HEAD"), timeout=HUB_TIMEOUT_S).close()
    except OSError as error:
        return isinstance(error, urllib.error.HTTPError)  # it answered
    return True


@contextlib.contextmanager
def _offline() -> Iterator[None]:
    """Act as HF_HUB_OFFLINE=1, which the libraries read only on import."""
    import datasets
    from huggingface_hub import constants

    before = datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE = before


@contextlib.contextmanager
def _local(name: str) -> Iterator[None]:
    """Context for reading local files: no progress bars, one error class for unreadable ones."""
    from datasets import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
    from datasets.exceptions import DatasetGenerationError

    silent = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    except (DatasetGenerationError, IndexError, ValueError) as error:  # IndexError: a saved empty split
        reason = error.__cause__ or error
        kind = type(reason).__name__
        raise ValueError(f"dataset_name={name!r} is broken, or a split of it is empty: {kind}: {reason}") from error
    finally:
        if not silent:
            enable_progress_bars()
