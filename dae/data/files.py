"""Expand the paths and globs of a configuration to files, count those left out, and suggest names for missing ones."""

from __future__ import annotations

import difflib
import fnmatch
import glob
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

IMAGE_SUFFIXES = frozenset(
    [
        *(".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".avif", ".avifs", ".gif", ".bmp", ".dib"),
        *(".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm"),
    ]
)
SHARD_SUFFIXES = {".parquet": "parquet", ".tar": "webdataset"}
ARCHIVE_SUFFIXES = frozenset([".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".zst", ".7z", ".rar"])
METADATA_NAMES = frozenset({"metadata.csv", "metadata.jsonl", "metadata.parquet"})


@dataclass
class LeftOut:
    """Files that were found but not read: per reason their number and the first of them."""

    counts: dict[str, int] = field(default_factory=dict)
    examples: dict[str, str] = field(default_factory=dict)

    def add(self, reason: str, *paths: str) -> None:
        if paths:
            self.counts[reason] = self.counts.get(reason, 0) + len(paths)
            self.examples.setdefault(reason, paths[0])

    def lines(self) -> list[str]:
        """One line per reason, such as `3 files: no image (.txt), as notes.txt`."""
        return [
            f"{count:,} {'file' if count == 1 else 'files'}: {reason}, {'as ' if count > 1 else ''}{self.examples[reason]}"
            for reason, count in self.counts.items()
        ]


@dataclass(frozen=True)
class Place:
    """The files below a folder that one name in the configuration expands to, see `expand`.

    Attributes:
        root: the folder from which split and class levels are counted: the folder itself, or where the glob begins.
        files: paths relative to `root`, sorted.
        whole: the user named a folder rather than files.
    """

    root: Path
    files: list[str]
    whole: bool

    def absolute(self, file: str) -> str:
        return os.path.join(os.getcwd(), self.root, file)

    def only(self, files: Iterable[str]) -> Place:
        return Place(self.root, list(files), self.whole)


def expand(name: str, left_out: LeftOut) -> Place | None:
    """The files that a path or a glob stands for, or None if nothing matches.

    A name that exists is taken literally, whatever characters it has; only others are patterns. A folder, named or
    matched, stands for all files below it. Symbolic links are followed.
    """
    path = Path(os.path.expanduser(name))
    if path.is_dir():
        return Place(path, find_files(path, left_out), whole=True)
    if path.is_file():
        return Place(path.parent, [path.name], whole=False)
    root, pattern = _fixed_part(path)
    if not pattern or not root.is_dir():
        return None
    if "**" in pattern:
        files = [file for file in find_files(root, left_out) if _is_below_match(tuple(file.split("/")), pattern)]
        return Place(root, files, whole=False) if files else None
    matches = sorted(glob.glob(str(Path(*pattern)), root_dir=root))
    found: set[str] = set()
    for match in matches:
        if os.path.isdir(root / match):
            found.update(f"{match}/{file}" for file in find_files(root / match, left_out))
        elif os.path.isfile(root / match):
            found.add(match)
        else:
            left_out.add("broken symbolic link" if (root / match).is_symlink() else "neither file nor folder", match)
    return Place(root, sorted(found), whole=False) if matches else None


def _fixed_part(path: Path) -> tuple[Path, tuple[str, ...]]:
    """The part of a path before its first pattern, and the remaining components."""
    parts = path.parts
    for i, part in enumerate(parts):
        if glob.has_magic(part) and not Path(*parts[: i + 1]).exists():
            return Path(*parts[:i]), parts[i:]
    return path, ()


def _is_below_match(parts: tuple[str, ...], pattern: tuple[str, ...]) -> bool:
    """Whether the pattern matches a file or one of its parent folders; `**` is any number of folders."""
    if not pattern:
        return True
    if pattern[0] == "**":
        return any(_is_below_match(parts[i:], pattern[1:]) for i in range(len(parts) + 1))
    return bool(parts) and fnmatch.fnmatchcase(parts[0], pattern[0]) and _is_below_match(parts[1:], pattern[1:])


def find_files(folder: Path, left_out: LeftOut) -> list[str]:
    """Paths of the files below `folder`, relative to it and sorted; links are followed, link loops are not.

    Hidden files and folders (`.name`, `__MACOSX`) and unreadable ones are counted in `left_out`.
    """
    found: list[str] = []
    pending = [(str(folder), "", frozenset({os.stat(folder)[1:3]}))]  # with inode and device of the folders above
    while pending:
        path, relative, above = pending.pop()
        try:
            entries = sorted(os.scandir(path), key=lambda entry: entry.name)
        except OSError as error:
            left_out.add(f"folder that cannot be read ({error.strerror})", relative or path)
            continue
        for entry in entries:
            inside = f"{relative}{entry.name}"
            if entry.name.startswith(".") or entry.name == "__MACOSX":
                left_out.add("hidden file or folder", inside)
            elif entry.name.encode(errors="replace").decode() != entry.name:
                left_out.add("name that is not UTF-8", inside.encode(errors="backslashreplace").decode())
            elif _is(entry.is_dir):
                if (identity := os.stat(entry.path)[1:3]) in above:
                    left_out.add("link to a folder that it lies in", inside)
                else:
                    pending.append((entry.path, f"{inside}/", above | {identity}))
            elif _is(entry.is_file):
                found.append(inside)
            else:
                left_out.add("broken symbolic link" if entry.is_symlink() else "neither file nor folder", inside)
    return sorted(found)


def _is(kind: Callable[[], bool]) -> bool:
    try:
        return kind()
    except OSError:  # a link to itself
        return False


def suffix_of(path: str) -> str:
    return PurePosixPath(path).suffix.lower()


def what_is_there(path: Path) -> str:
    """A hint for a missing `path`: `did you mean ...?`, or the first names in its folder."""
    there = path
    while not there.is_dir() and there != there.parent:
        there = there.parent
    missing = path.relative_to(there).parts
    names = sorted(entry for entry in os.listdir(there) if not entry.startswith(".")) if os.access(there, os.R_OK) else []
    if missing and missing[0] in names:
        return f"{str(there / missing[0])!r} is no {'folder' if len(missing) > 1 else 'file or folder, but a broken link'}."
    if missing and (near := nearest_name(missing[0], names)):
        return f"did you mean {str(there.joinpath(near, *missing[1:]))!r}?"
    return f"the folder {str(there)!r} holds {few(names) or 'nothing'}."


def nearest_name(wanted: str, names: list[str]) -> str | None:
    """The closest spelling of `wanted` among `names`, ignoring case; None if none is close."""
    by_lower = {name.lower(): name for name in reversed(names)}
    near = difflib.get_close_matches(wanted.lower(), by_lower, 1, 0.6)
    return by_lower[near[0]] if near else None


def few(names: Iterable[str]) -> str:
    """The first names of many, for a message."""
    names = list(names)
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
