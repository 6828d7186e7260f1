"""WebDataset: a sample is the run of consecutive files in a .tar that share the name up to the first dot.

`datasets` reads these too, but requires the same suffixes in all samples and does not unpack JSON.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import operator
import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any, cast

from dae.data.files import IMAGE_SUFFIXES, LeftOut, few

if TYPE_CHECKING:
    from datasets import Dataset, Features, IterableDataset

TEXTS = frozenset(["cls", "cls2", "txt", "text", "transcript", "caption", "index", "inx", "id", "label", "labels", "class"])
JSONS = frozenset({"json", "jsn"})
PEEK = 64  # samples of a stream that determine its columns
MOST_IMAGES = 16  # per sample: more means that the .tar is no WebDataset
READER_VERSION = 1  # part of the key in the cache of `datasets`

Sample = dict[str, bytes]


@dataclass(frozen=True)
class Fields:
    """The columns: images, texts (`cls`, `txt`), and values of JSON objects, such as `json.label`. All but images are text."""

    images: tuple[str, ...]
    texts: tuple[str, ...]

    @property
    def features(self) -> Features:
        from datasets import Features, Image, Value

        images = {name: Image(decode=False) for name in self.images}
        return Features(images | {name: Value("string") for name in (*self.texts, "__key__")})


def read_samples(path: str, contents: bool = True, left_out: LeftOut | None = None) -> Iterator[tuple[str, Sample]]:
    """(name, {suffix: bytes}) of each sample in a .tar; without `contents` images are empty. `left_out` counts other members.

    Raises:
        ValueError: the files of a sample are not consecutive, or two have one name.
        tarfile.TarError: it is not a .tar, or damaged.
    """
    seen: set[str] = set()
    with tarfile.open(path, "r:") as tar:
        for key, files in itertools.groupby(_files(tar, path, left_out), key=operator.itemgetter(0)):
            if key in seen:
                raise ValueError(f"{path!r}: the files of sample {key!r} do not stand together; pack with `tar --sort=name`")
            seen.add(key)
            sample: Sample = {}
            for _, field, member in files:
                if field in sample:
                    raise ValueError(f"{path!r}: two files of sample {key!r} end in .{field}")
                read = contents or not is_image(field)
                sample[field] = cast(IO[bytes], tar.extractfile(member)).read() if read else b""
            yield key, sample


def _files(tar: tarfile.TarFile, path: str, left_out: LeftOut | None) -> Iterator[tuple[str, str, tarfile.TarInfo]]:
    """Sample name, suffix and header of each file in a sample; `left_out` counts the others."""
    for member in tar:
        tar.members = []  # type: ignore[attr-defined]  # would keep every file's header
        folder, _, name = member.name.removeprefix("./").rpartition("/")
        stem, _, field = name.partition(".")
        hidden = not stem or "__MACOSX" in folder.split("/")
        if not hidden and member.isfile() and field:
            yield f"{folder}/{stem}".removeprefix("/"), field.lower(), member
        elif left_out is not None and not member.isdir():
            reason = "hidden file" if hidden else "file without a suffix" if member.isfile() else "link"
            left_out.add(f"{reason} in a .tar", f"{path}: {member.name}")


def is_image(field: str) -> bool:
    return f".{field.rpartition('.')[2]}" in IMAGE_SUFFIXES


def count_images(paths: list[str], limit: int) -> int:
    """Count samples with an image, up to `limit`; unreadable files count as none."""
    count = 0
    for path in paths:
        with contextlib.suppress(tarfile.TarError, ValueError):
            for _, sample in read_samples(path, contents=False):
                count += any(map(is_image, sample))
                if count >= limit:
                    return count
    return count


def scan(paths: list[str], limit: int | None, left_out: LeftOut) -> tuple[Fields, set[str]]:
    """The columns and inner folders of these files, from the first `limit` samples of the first file, or from all.

    ValueError: there are no images, samples have too many, or a file is broken.
    """
    images: dict[str, None] = {}
    texts: dict[str, None] = {}
    inside: set[str] = set()
    several, seen = False, 0
    for path in paths:
        try:
            for key, sample in read_samples(path, contents=False, left_out=left_out):
                found = [field for field in sample if is_image(field)]
                seen += 1
                if found:
                    images |= dict.fromkeys(found)
                    texts |= dict.fromkeys(_texts(sample, path, key))
                    inside.add(key.rpartition("/")[0])
                    several |= len(found) > 1
                    for field in (field for field in sample if field not in found):
                        if (suffix := field.rpartition(".")[2]) not in TEXTS | JSONS:
                            left_out.add(f"suffix .{suffix} is not read in a .tar", f"{path}: {key}.{field}")
                else:
                    left_out.add("sample of a .tar without an image", f"{path}: {key}.{next(iter(sample))}")
                if seen == limit:
                    break
        except tarfile.TarError as error:
            raise ValueError(f"{path!r} is broken: {error}") from error
        if limit is not None and images:
            break
    if not images:
        raise ValueError(f"no sample of {few(paths)} has an image ({', '.join(sorted(IMAGE_SUFFIXES))})")
    if several and len(images) > MOST_IMAGES:
        raise ValueError(
            f"{few(paths)}: the images of samples end in {len(images):,} ways, {few(images)}: what follows the first dot "
            "of a name tells the files of a sample apart; leave no other dots in the names"
        )
    names = tuple(images) if several or len(images) == 1 else ("image",)
    return Fields(names, tuple(texts)), inside


def _texts(sample: Sample, path: str, key: str) -> dict[str, str | None]:
    """The text columns of a sample."""
    found: dict[str, str | None] = {}
    for field, data in sample.items():
        suffix = field.rpartition(".")[2]
        if suffix not in TEXTS | JSONS:
            continue
        try:
            value = json.loads(data) if suffix in JSONS else data.decode().strip()
        except ValueError as error:  # from JSON or UTF-8
            raise ValueError(f"{path!r}: {key}.{field} cannot be read: {error}") from error
        if isinstance(value, dict):
            found |= {f"{field}.{name}": _text(inner) for name, inner in value.items() if not isinstance(inner, (dict, list))}
        elif not isinstance(value, list):
            found[field] = _text(value)
    return found


def _text(value: Any) -> str | None:
    return None if value is None else str(value)


def generate_rows(
    shards: list[tuple[str, int, int]], images: tuple[str, ...], texts: tuple[str, ...], version: int
) -> Iterator[dict]:
    """Rows of the files; size and time are arguments, so that the cache of `datasets` tells changed files apart."""
    for path, *_ in shards:
        for key, sample in read_samples(path):
            if len(images) == 1:
                found = {images[0]: next((field for field in sample if is_image(field)), None)}
            else:
                found = {name: name if name in sample else None for name in images}
            if any(found.values()):
                said = _texts(sample, path, key)
                row = {name: {"bytes": sample[f], "path": f"{key}.{f}"} if f else None for name, f in found.items()}
                yield row | {name: said.get(name) for name in texts} | {"__key__": key}


def read_shards(paths: list[str], fields: Fields, streaming: bool) -> Dataset | IterableDataset:
    """The rows of these files, as a table in the cache of `datasets` or as a stream with one shard per file."""
    from datasets import Dataset, IterableDataset

    stats = [(path, os.stat(path)) for path in paths]
    shards = [(path, status.st_size, status.st_mtime_ns) for path, status in stats]
    arguments = {"shards": shards, "images": fields.images, "texts": fields.texts, "version": READER_VERSION}
    kind = IterableDataset if streaming else Dataset
    return kind.from_generator(generate_rows, features=fields.features, gen_kwargs=arguments)


def common_fields(found: list[Fields]) -> Fields:
    """Columns that cover the files of all splits."""
    several = any(len(fields.images) > 1 for fields in found)
    images = tuple(dict.fromkeys(name for fields in found for name in fields.images))
    names = images if several or len(images) == 1 else ("image",)
    return Fields(names, tuple(dict.fromkeys(name for fields in found for name in fields.texts)))
