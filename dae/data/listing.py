"""List the files that a configuration names, in order and by split, before any is read."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from dae.config import DataConfig
from dae.data import builtin, folders, metadata, shards, webdataset
from dae.data.columns import image_columns
from dae.data.files import (
    ARCHIVE_SUFFIXES,
    IMAGE_SUFFIXES,
    METADATA_NAMES,
    SHARD_SUFFIXES,
    LeftOut,
    Place,
    expand,
    few,
    suffix_of,
    what_is_there,
)
from dae.data.shards import Footer

FILES = "a file, folder or glob of images, .parquet or WebDataset .tar files"
FORMS = (
    f"{' or '.join(repr(name) for name in builtin.NAMES)} (built in), a folder saved by `save_to_disk`, {FILES}, or a Hugging "
    "Face id such as 'user/name'"
)
TITLES = {"images": "image files", "parquet": ".parquet files", "webdataset": ".tar files"}  # kinds, in the order of choice


@dataclass
class Listing:
    """Files to read, by split and in order.

    Attributes:
        kind: `images`, `parquet` or `webdataset`.
        splits: absolute paths, each with the class given by its folder, or None.
        left_out: files that were found but are not read.
        notes: how ambiguous layouts were read.
        footers: rows and columns of each .parquet file.
        described: columns from metadata files, see `metadata.read`.
    """

    kind: str
    splits: dict[str, folders.Classes]
    left_out: LeftOut
    notes: list[str]
    footers: dict[str, Footer] = field(default_factory=dict)
    described: metadata.Described | None = None


def list_files(names: list[str], config: DataConfig, key: str, part: str | None = None, labelled: bool | None = None) -> Listing:
    """The files that the paths and globs `names` stand for, by split.

    Args:
        names: as the user wrote them.
        config: the knobs for reading folders.
        key: the knob they come from, for messages.
        part: the split they were given for; None finds the splits.
        labelled: whether images must have classes; None decides by their folders.

    Raises:
        FileNotFoundError: one of the names matches nothing.
        ValueError: there is nothing to read, or more than one way to read it.
    """
    left_out, places, forms = LeftOut(), [], FILES if part else FORMS
    seen: set[str] = set()
    for name in names:
        if part and is_saved(Path(name)):
            raise ValueError(f"{key}={name!r} was saved by `save_to_disk`: name it by data.dataset_name; here, expected {FILES}")
        place = expand(name, left_out)
        if place is None:
            raise FileNotFoundError(f"no file or folder matches {key}={name!r}: {what_is_there(Path(name))} Expected {forms}")
        real = {file: os.path.join(os.path.realpath(place.root), file) for file in place.files}
        places.append(place.only(file for file in place.files if real[file] not in seen))  # as before if named twice
        seen.update(real.values())
    found = _Found(places, f"{key}={names[0] if len(names) == 1 else names!r}", config.image_column, left_out, forms)
    kind = found.choose_kind()
    for name, others in zip(names, found.kinds(), strict=True):
        if others and kind not in others:
            raise ValueError(
                f"{key}: {name!r} holds {' and '.join(TITLES[each] for each in others)}, and {TITLES[kind]} are read of the "
                "other names; name files of one kind"
            )
    if kind == "images":
        return _list_images(found, config, part, labelled)
    splits: dict[str, folders.Classes] = {}
    notes: list[str] = []
    for place in found.of(kind):
        where, by_split = str(place.root), {part or "": place.files}
        if place.whole or not part:
            by_split, said = shards.splits_by_name(place.files, where, whole=place.whole)
            notes += said
        if part and len(by_split) > 1:
            raise ValueError(f"{where!r} holds the splits {few(by_split)}; {shards.NAME_THEM}")
        for split, files in by_split.items():
            splits.setdefault(part or split, {}).update(dict.fromkeys(map(place.absolute, files)))
    found.refuse_different_columns()
    return Listing(kind, splits, left_out, notes, found.footers)


def is_saved(path: Path) -> bool:
    """Whether `path` is a folder written by `save_to_disk`."""
    return (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()


def _list_images(found: _Found, config: DataConfig, part: str | None, labelled: bool | None) -> Listing:
    places, left_out = found.of("images"), found.left_out
    described = metadata.read(found.of("metadata"), found.image_column, left_out)
    if described is not None:
        for i, place in enumerate(places):
            unnamed = [file for file in place.files if place.absolute(file) not in described.rows]
            left_out.add("image that no metadata file names", *unnamed)
            places[i] = place.only(file for file in place.files if place.absolute(file) in described.rows)
        if not any(place.files for place in places):
            raise ValueError(f"{found.where}: the metadata files name none of the images: {'; '.join(left_out.lines())}")
    has_labels = described is not None and "label" in described.table.column_names
    level = 0 if has_labels or config.label_column == "none" else config.label_level
    wanted = (config.train_split, part or config.validation_split)
    layout = folders.read_layout(places, level, left_out, part=part, labelled=labelled, wanted=wanted)
    if described is not None and described.table.column_names:
        layout.notes.append(f"columns of metadata files: {few(described.table.column_names)}")
    return Listing("images", layout.splits, left_out, layout.notes, described=described)


class _Found:
    """All files that were found, by their kind as told by their names."""

    def __init__(self, places: list[Place], where: str, image_column: str, left_out: LeftOut, forms: str):
        self.places, self.where, self.image_column, self.left_out, self.forms = places, where, image_column, left_out, forms
        self.by_kind: dict[str, list[list[str]]] = {}  # files per place
        for i, place in enumerate(places):
            for file in place.files:
                self.by_kind.setdefault(_kind(file), [[] for _ in places])[i].append(file)
        self.footers: dict[str, Footer] = {}  # of .parquet files

    def of(self, kind: str) -> list[Place]:
        files = self.by_kind.get(kind) or [[] for _ in self.places]
        return [place.only(inside) for place, inside in zip(self.places, files, strict=True) if inside]

    def kinds(self) -> list[list[str]]:
        """The kinds of files in each place."""
        return [[kind for kind in TITLES if kind in self.by_kind and self.by_kind[kind][i]] for i in range(len(self.places))]

    def absolute(self, kind: str) -> list[str]:
        return [place.absolute(file) for place in self.of(kind) for file in place.files]

    def choose_kind(self) -> str:
        """The kind of file that holds the images; files of other kinds are counted as left out.

        Loose images win over shards with no more images (an archive of the same ones), shards over a few loose images
        (a picture for the README).
        """
        present = [kind for kind in TITLES if kind in self.by_kind]
        self._read_footers(only=present == ["parquet"])
        known = {"images": len(self.absolute("images")), "parquet": sum(footer.rows for footer in self.footers.values())}
        enough = folders.STRAY * max(known.values()) or 1  # images in .tar files, which must be read to count them
        known["webdataset"] = webdataset.count_images(self.absolute("webdataset"), enough)
        counts = {kind: known[kind] for kind in present if known[kind]}
        first = next(filter(self.by_kind.get, present), "")  # broken files do not count
        kind = max(counts, key=lambda kind: (counts[kind], kind == "images"), default=first)
        others = [other for other in counts if other != kind]
        if others and kind != "images" and counts[kind] < folders.STRAY * max(counts[other] for other in others):
            found = " and ".join(f"{count:,} in {TITLES[each]}" for each, count in counts.items())
            raise ValueError(f"{self.where} holds images of several kinds, {found}: which are meant? {shards.NAME_THEM}")
        for other in self.by_kind:
            if other != kind and not (kind == "images" and other == "metadata"):
                for file in (file for place in self.of(other) for file in place.files):
                    self.left_out.add(_reason(file, kind), file)
        if not kind:
            found = "; ".join(self.left_out.lines()) or "it is empty"
            raise ValueError(f"{self.where} holds no images: {found}. Expected {self.forms}")
        return kind

    def refuse_different_columns(self) -> None:
        for path, footer in self.footers.items():
            first, reference = next(iter(self.footers.items()))
            if difference := shards.difference(reference.features, footer.features):
                raise ValueError(f"{first!r} and {path!r} cannot be one set: {difference}; {shards.NAME_THEM}")

    def _read_footers(self, only: bool) -> None:
        """Read rows and columns of the .parquet files; broken ones and those without images are left out if there are others."""
        found = list(zip(self.places, self.by_kind.pop("parquet", []), strict=False))
        read: dict[str, Footer] = {}
        for place, file in ((place, file) for place, files in found for file in files):
            try:
                footer = shards.read_footer(place.absolute(file))
            except ValueError as error:
                if only:
                    raise
                self.left_out.add(f"broken .parquet file ({error.__cause__})", file)
                continue
            if footer.rows:
                read[place.absolute(file)] = footer
            else:
                self.left_out.add(".parquet file without rows", file)
        with_images = {
            path: footer
            for path, footer in read.items()
            if self.image_column in footer.features or image_columns(footer.features)
        }
        self.footers = with_images if with_images or not only else read
        plain = read.keys() - self.footers.keys()
        for place, files in found:
            self.left_out.add(".parquet file without images", *(file for file in files if place.absolute(file) in plain))
        kept = [[file for file in files if place.absolute(file) in self.footers] for place, files in found]
        if any(kept):
            self.by_kind["parquet"] = kept


def _kind(file: str) -> str:
    suffix = suffix_of(file)
    if file.rpartition("/")[2] in METADATA_NAMES:
        return "metadata"
    return "images" if suffix in IMAGE_SUFFIXES else SHARD_SUFFIXES.get(suffix, "other")


def _reason(file: str, kind: str) -> str:
    """Why a file is not read when files of `kind` are."""
    suffix = suffix_of(file)
    if suffix in IMAGE_SUFFIXES:
        return f"image beside {TITLES[kind]}"
    if kind == "images" and suffix in ARCHIVE_SUFFIXES:
        return f"archive beside images, not opened ({suffix})"
    if suffix in SHARD_SUFFIXES:
        return f"{suffix} file beside {TITLES[kind]}"
    return f"suffix {suffix} is not read" if suffix else "no suffix"
