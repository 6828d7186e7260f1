"""Parquet and WebDataset shards: their splits by naming convention, and whether they form one set."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from dae.data.files import few
from dae.data.folders import SPLIT_WORDS, SPLITS

if TYPE_CHECKING:
    from datasets import Features

# train.parquet, train-00000-of-00003.parquet, imagenet-train_0001.tar, test-00000-of-00001-0a1b2c3d4e5f6789.parquet
_CONVENTIONAL = re.compile(
    r"(?:(?P<set>.+)[-_.])?(?P<split>train|validation|val|test)(?:[-_.]?\d+)?(?:[-_.]of[-_.]\d+)?(?:[-_.][0-9a-f]{8,})?"
)
_SHARD = re.compile(r"(?P<split>\w+(?:\.\w+)*)-\d{5}-of-\d{5}(?:-[0-9a-f]{8,})?")  # also other splits, as `unlabeled`
NAME_THEM = "name the files yourself: data.train_files= and data.validation_files= take paths and globs"


def splits_by_name(files: list[str], where: str, *, whole: bool) -> tuple[dict[str, list[str]], list[str]]:
    """Shards by split, and notes on how they were assigned.

    A folder named like a split decides, else a conventional file name: `train-00000-of-00003`, `test.parquet`,
    `imagenet-val_0001.tar`. If no shard has a split, all are `train`; so are shards of a single split that the user named
    one by one or by a glob.

    Args:
        files: paths relative to `where`, sorted.
        where: the folder, for messages.
        whole: the user named the folder rather than the files.

    ValueError: some shards have a split and others do not, or the shards are of several sets.
    """
    _refuse_several_folders(files, where)
    found: dict[str, str] = {}
    sets: dict[str, str] = {}
    for file in files:
        path = PurePosixPath(file)
        folder = next((part for part in path.parts[:-1] if part in SPLITS), None)
        name = _CONVENTIONAL.fullmatch(path.stem)
        if folder:
            found[file] = folder
        elif name:
            found[file] = name["split"]
            sets.setdefault(name["set"] or "", file)
    if len(sets) > 1:
        raise ValueError(f"{where!r} holds files of several sets: {few(sorted(sets.values()))}; {NAME_THEM}")
    if not found:
        _refuse_split_words(files, where)
        return {"train": files}, []
    for file in files:
        if file not in found and (shard := _SHARD.fullmatch(PurePosixPath(file).stem)):
            found[file] = shard["split"]
    if rest := [file for file in files if file not in found]:
        raise ValueError(f"{where!r}: {few(rest)}: of no split, while others are, as {next(iter(found))}; {NAME_THEM}")
    names = sorted(set(found.values()), key=lambda name: (name not in SPLITS, SPLITS.index(name) if name in SPLITS else name))
    splits = {name: [file for file in files if found[file] == name] for name in names}
    if len(splits) == 1 and not whole and "train" not in splits:
        return {"train": files}, [f"trained on as named, though the files are of the split {next(iter(splits))!r}"]
    return splits, [f"splits {', '.join(splits)}: from the names of {'files' if sets else 'folders'}"]


def _refuse_several_folders(files: list[str], where: str) -> None:
    """Raise unless the folders of the shards are numbered, as `part-00`, `part-01`: others are not one set."""
    folders = {tuple(part for part in PurePosixPath(file).parts[:-1] if part not in SPLITS) for file in files}
    if len({tuple(re.sub(r"\d+$", "0", part) for part in folder) for folder in folders}) > 1:
        names = sorted("/".join(folder) or "." for folder in folders)
        raise ValueError(f"{where!r} holds several sets of files, in the folders {few(names)}; name one of them, or {NAME_THEM}")


def _refuse_split_words(files: list[str], where: str) -> None:
    words = {file: SPLIT_WORDS.intersection(re.split(r"[^a-z]+", PurePosixPath(file).stem.lower())) for file in files}
    if len(set(map(frozenset, words.values()))) > 1:
        named = [file for file in files if words[file]]
        raise ValueError(f"{where!r}: names like {few(named)} speak of splits but follow no convention, as train-0; {NAME_THEM}")


def difference(a: Features, b: Features) -> str | None:
    """Why two files with these columns cannot be one set, or None."""
    if set(a) != set(b):
        return f"only one of them has {few(sorted(set(a) ^ set(b)))}"
    for name in a:
        if type(a[name]) is not type(b[name]):
            return f"the column {name!r} is {type(a[name]).__name__} and {type(b[name]).__name__}"
        kinds = {_family(features[name]) for features in (a, b)} - {"null"}
        if len(kinds) > 1:
            return f"the column {name!r} is {getattr(a[name], 'dtype', a[name])} and {getattr(b[name], 'dtype', b[name])}"
        if (classes := getattr(a[name], "names", None)) != (others := getattr(b[name], "names", None)):
            return f"the classes of {name!r} are {few(classes or [])} and {few(others or [])}"
    return None


def _family(feature: object) -> str:
    """The type of a column, ignoring the width of numbers and offsets, which may differ between files."""
    dtype = getattr(feature, "dtype", None) if type(feature).__name__ == "Value" else None
    return re.sub(r"^u?int\d+$|^float\d+$", "number", dtype.removeprefix("large_")) if dtype else ""


@dataclass(frozen=True)
class Footer:
    """The footer of a .parquet file."""

    features: Features
    rows: int


def read_footer(path: str) -> Footer:
    """Read columns and number of rows. Raises ValueError if the file is broken."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    from datasets import Features

    try:
        with pq.ParquetFile(path) as file:
            return Footer(Features.from_arrow_schema(file.schema_arrow), file.metadata.num_rows)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path!r} is broken: {error}") from error
