"""Image folders: a file's split and class, read from its folders, not from its name."""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass, field

from dae.data.files import LeftOut, Place, few

SPLITS = ("train", "validation", "val", "test")
SPLIT_WORDS = {*SPLITS, "training", "valid", "dev", "testing", "eval", "evaluation", "heldout"}  # may mean a split
STRAY = 10  # files outnumbered by this factor are left out and counted; otherwise the folder is refused

Classes = dict[str, str | None]  # class per file


@dataclass
class FolderLayout:
    """Files per split and class per file (None without classes); `notes` say how the folders were read."""

    splits: dict[str, Classes]
    notes: list[str] = field(default_factory=list)


def read_layout(
    places: list[Place],
    level: int,
    left_out: LeftOut,
    *,
    part: str | None = None,
    labelled: bool | None = None,
    wanted: tuple[str | None, ...] = (),
) -> FolderLayout:
    """Splits and classes of images from their folders.

    Top-level folders are splits if all of them are named `train`, `validation`, `val` or `test`. Below the split, or from
    the top if there is none, the folder at level `level` is the class; deeper folders do not matter. If there is at most
    one such folder, there are no classes.

    Args:
        places: the folders, with the paths of their images only.
        level: 1 is the first level below the split; 0 reads no classes.
        left_out: collects the files that do not fit the layout.
        part: the split for which the user gave these files; their folders are then classes.
        labelled: whether there must be classes, as in the training split; None decides by the folders.
        wanted: splits that must not be left out.

    ValueError: the folders can be read in two ways that would train on different images or classes.
    """
    read: dict[tuple[str, str], Classes] = {}
    deeper: set[str] = set()
    notes: list[str] = []
    for place in places:
        where = str(place.root)
        splits, said = ({"": place.files}, []) if part and not place.whole else _read_splits(place.files, where, left_out)
        notes += said
        if part and len(splits) > 1:
            raise ValueError(f"{where!r} holds the splits {few(splits)}: name one, as data.{part}_files={where}/{part}")
        for split, files in splits.items():
            depth = level + (split != "")
            classes = _read_classes(files, depth, where, left_out) if level else dict.fromkeys(files)
            deeper.update(file.split("/")[depth] for file in classes if level and file.count("/") > depth)
            absolute = {place.absolute(file): name for file, name in classes.items()}
            read.setdefault((part or split or "train", where), {}).update(absolute)
    if level:
        notes += _decide_on_classes(read, level, sorted(deeper), left_out, labelled, wanted)
    merged: dict[str, Classes] = {}
    for (split, _), classes in read.items():
        merged[split] = classes | merged.get(split, {})
    return FolderLayout(merged, notes)


def _read_splits(files: list[str], where: str, left_out: LeftOut) -> tuple[dict[str, list[str]], list[str]]:
    """Files by split, or all under the empty name if the folder has no splits."""
    by_top: dict[str, list[str]] = {}
    for file in files:
        by_top.setdefault(file.split("/")[0] if "/" in file else "", []).append(file)
    beside = by_top.pop("", [])
    named = [split for split in SPLITS if split in by_top]
    if named and len(named) == len(by_top):
        inside = sum(map(len, by_top.values()))
        remedy = f"data.train_files={where}/** reads all as one set"
        _leave_out(beside, inside, "beside the split folders", where, remedy, left_out)
        return {split: by_top[split] for split in named}, [f"splits {', '.join(named)}: the top-level folders"]
    words = named + [top for top in by_top if top not in named and top.lower() in SPLIT_WORDS]
    first = next((word for word in words if word.lower() in ("train", "training")), None)
    if first and (len(words) > 1 or (first == "train" and any(file.count("/") > 1 for file in by_top["train"]))):
        others = [name for name in by_top if name not in words]
        raise ValueError(
            f"{where!r} has the folders {few(words)}{f' beside {few(others)}' if others else ''}: splits or classes? Say "
            f"data.train_files={where}/{first} (and data.validation_files=...) to read splits, or data.train_files='{where}/*' "
            "to read them all as classes"
        )
    several = [top for top, inside in by_top.items() if _holds_splits(inside)]
    if several:
        raise ValueError(
            f"{where!r} holds folders with splits of their own: {few(several)}. Name one of them, as data.dataset_name="
            f"{where}/{several[0]}, or read them as classes with data.train_files='{where}/*/train' data.validation_files=..."
        )
    notes = [f"the folder {named[0]!r} is a class, as it stands beside other classes"] if named else []
    return {"": files}, notes


def _holds_splits(files: list[str]) -> bool:
    inner = {file.split("/")[1] for file in files if file.count("/") > 1}
    return "train" in inner and len(inner.intersection(SPLITS)) > 1


def _read_classes(files: list[str], depth: int, where: str, left_out: LeftOut) -> Classes:
    """Each file's folder at `depth`; files that are not as deep have none and, if few, are left out."""
    classes = {file: _folder(file, depth) if file.count("/") >= depth else None for file in files}
    beside = [file for file, name in classes.items() if name is None]
    if beside and len(beside) < len(classes):
        remedy = "data.label_level=0 reads all images without classes"
        _leave_out(beside, len(classes) - len(beside), "beside the class folders", where, remedy, left_out)
        classes = {file: name for file, name in classes.items() if name is not None}
    return classes


def _folder(file: str, depth: int) -> str:
    return unicodedata.normalize("NFC", file.split("/")[depth - 1])


def _decide_on_classes(
    read: dict[tuple[str, str], Classes],
    level: int,
    deeper: list[str],
    left_out: LeftOut,
    labelled: bool | None,
    wanted: tuple[str | None, ...],
) -> list[str]:
    """Decide for all splits and places together whether there are classes; edits `read` in place and returns notes."""
    names = {key: {name for name in classes.values() if name is not None} for key, classes in read.items()}
    together = sorted(set().union(*names.values()))
    trained_on = [key for key in read if key[0] == "train"] or list(read)
    if labelled is None and len(together) == 1 and deeper:
        raise ValueError(
            f"{next(iter(read))[1]!r}: all images lie in one folder {together[0]!r}, which holds the folders {few(deeper)}. Name "
            "that folder, or set data.label_level (2: these are the classes; 0: there are no classes)"
        )
    if level > 1 and not together:
        raise ValueError(
            f"{next(iter(read))[1]!r}: data.label_level={level}, but no image lies in so many folders; choose a lower one, "
            "or 0 to read no classes"
        )
    if labelled is None:
        labelled = len(together) > 1 and any(names[key] for key in trained_on)
    if not labelled:
        for key, classes in read.items():
            read[key] = dict.fromkeys(classes)
        only = len(together) == 1
        return [f"no classes: {f'{together[0]!r} is the only class folder' if only else 'no class folders to train on'}"]
    for key in [key for key in read if not names[key]]:
        split, where = key
        if key in trained_on or split in wanted:
            raise ValueError(
                f"{where!r}, split {split!r}: no class folders, other images have; data.label_level=0 reads all without classes"
            )
        left_out.add(f"the split {split!r} has no class folders, and the images to train on have", *read.pop(key))
    return [f"classes: the folders of level {level}"]


def _leave_out(few: list[str], many: int, reason: str, where: str, remedy: str, left_out: LeftOut) -> None:
    if len(few) * STRAY > many:
        raise ValueError(f"{where!r}: {len(few):,} images lie {reason}, as {few[0]}, which hold {many:,}; move them, or {remedy}")
    left_out.add(reason, *few)
