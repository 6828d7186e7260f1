"""Where images come from: `dataset_name` to a mapping of splits, images still encoded."""

from __future__ import annotations

import contextlib
import glob
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Union

from dae.config import DataConfig
from dae.data import builtin

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

    Rows = Union[Dataset, IterableDataset]

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}
STREAM_SHARDS = 8  # into how many parts a local table is cut when streamed, so that workers and processes can share it
HUB_TIMEOUT_S = 5.0
FORMS = (
    f"{' or '.join(repr(name) for name in builtin.NAMES)} (built in), a folder saved by `save_to_disk`, a folder of images, a "
    "file, folder or glob of .parquet or WebDataset .tar files, or a Hugging Face id such as 'user/name'"
)


def read_splits(config: DataConfig) -> tuple[dict[str, Rows], Path | None]:
    """All splits of the data set that `config` names, and the folder at which relative image paths start.

    Raises:
        FileNotFoundError: nothing of this name, neither here nor on the Hugging Face hub.
        ValueError: it is there but has none of the accepted forms.
    """
    name = config.dataset_name
    if name in builtin.NAMES:
        splits = builtin.load_digits() if name == "digits" else builtin.load_photos(config.resolution)
        return _as_streams(splits, config), None
    path = Path(name).expanduser()
    if path.is_dir():
        return _read_folder(path, config), path
    files = sorted(glob.glob(str(path), recursive=True))
    if files:
        return _read_files([Path(f) for f in files], config), path.parent
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name) or path.suffix in {".parquet", ".tar"}:
        raise FileNotFoundError(f"no file or folder matches dataset_name={name!r}; expected {FORMS}")
    return _read_hub(config), None


def _as_streams(splits: dict[str, Dataset], config: DataConfig) -> dict[str, Rows]:
    if not config.streaming:
        return splits
    return {name: rows.to_iterable_dataset(num_shards=max(1, min(STREAM_SHARDS, len(rows)))) for name, rows in splits.items()}


def _read_folder(path: Path, config: DataConfig) -> dict[str, Rows]:
    from datasets import load_dataset, load_from_disk

    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        with _local(config.dataset_name):
            saved = load_from_disk(str(path))
        return _as_streams(dict(saved) if isinstance(saved, dict) else {"train": saved}, config)
    suffixes = {file.suffix.lower() for file in path.rglob("*") if file.is_file()}
    builder = "parquet" if ".parquet" in suffixes else "webdataset" if ".tar" in suffixes else "imagefolder"
    if builder == "imagefolder" and not suffixes & IMAGE_SUFFIXES:
        raise ValueError(f"the folder {str(path)!r} holds no images ({' '.join(sorted(IMAGE_SUFFIXES))}); expected {FORMS}")
    with _local(config.dataset_name):
        return dict(load_dataset(builder, data_dir=str(path), streaming=config.streaming))


def _read_files(files: list[Path], config: DataConfig) -> dict[str, Rows]:
    from datasets import load_dataset

    suffixes = {file.suffix.lower() for file in files}
    builders = {".parquet": "parquet", ".tar": "webdataset"}
    if len(suffixes) != 1 or not suffixes <= set(builders):
        raise ValueError(f"dataset_name={config.dataset_name!r} matches files of type {sorted(suffixes)}; expected {FORMS}")
    with _local(config.dataset_name):
        return dict(load_dataset(builders[suffixes.pop()], data_files=[str(f) for f in files], streaming=config.streaming))


def _read_hub(config: DataConfig) -> dict[str, Rows]:
    from datasets import load_dataset
    from datasets.exceptions import DatasetNotFoundError

    name, reachable = config.dataset_name, _hub_is_reachable()
    try:
        with contextlib.nullcontext() if reachable else _offline():
            return dict(load_dataset(name, config.dataset_config_name, streaming=config.streaming))
    except (DatasetNotFoundError, FileNotFoundError, ConnectionError) as error:
        offline = "the Hugging Face hub cannot be reached from here, and the data set is not in the local cache"
        reason = str(error) if reachable else offline
        raise FileNotFoundError(f"no data set dataset_name={name!r}: {reason}. Expected {FORMS}") from error
    except (RuntimeError, ValueError) as error:  # a repository that wants to run its own code; a configuration that is not there
        raise ValueError(f"dataset_name={name!r} cannot be read: {error}") from error


def _hub_is_reachable() -> bool:
    """One request with a short time limit: the hub library itself retries for half a minute before it gives up."""
    import urllib.error
    import urllib.request

    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        urllib.request.urlopen(urllib.request.Request(constants.ENDPOINT, method="HEAD"), timeout=HUB_TIMEOUT_S).close()
    except urllib.error.HTTPError:
        return True  # it answered
    except OSError:
        return False
    return True


@contextlib.contextmanager
def _offline() -> Iterator[None]:
    """What HF_HUB_OFFLINE=1 does, which the libraries read only when they are imported."""
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
    """Reading local files: no progress bars, and one kind of error for what cannot be read."""
    import tarfile

    from datasets import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
    from datasets.exceptions import DatasetGenerationError

    silent = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    except (DatasetGenerationError, IndexError, ValueError, tarfile.TarError) as error:  # IndexError: a saved split without rows
        reason = error.__cause__ or error
        kind = type(reason).__name__
        raise ValueError(f"dataset_name={name!r} is broken, or a split of it is empty: {kind}: {reason}") from error
    finally:
        if not silent:
            enable_progress_bars()
