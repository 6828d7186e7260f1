"""Atomic writes of files and folders, and a check that announced outputs exist."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path


def write_file(path: Path, data: bytes) -> None:
    """Write `data` beside `path`, fsync it, and rename it into place.

    Raises:
        OSError: names the path, the size and the remedy; an earlier file is unchanged.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with _remedy(data, path):
        try:
            with open(temporary, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise


def append_line(path: Path, line: str) -> None:
    """Append `line` to a text file. OSError as in `write_file`; the file may then end in a partial line."""
    data = f"{line}\n".encode()
    with _remedy(data, path), open(path, "ab") as file:
        file.write(data)


@contextmanager
def _remedy(data: bytes, path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        what = f"could not save {len(data):,} bytes ({error.strerror}); free space or choose another output_dir"
        raise OSError(error.errno, what, str(path)) from error


def sync_folder(folder: Path) -> None:
    """fsync a folder's entries (renames, new files)."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def replaced_folder(folder: Path) -> Iterator[Path]:
    """`with replaced_folder(folder) as new`: a new folder that replaces `folder` when the block ends without error.

    Until then, and after an error, `folder` is unchanged. Its entries that the new folder lacks are somebody else's and are
    moved into it. Only one process at a time may do this (`dae.lock`); leftovers of a killed one are cleaned up.
    """
    folder = folder.resolve()  # keeps a symbolic link
    new, old = (folder.with_name(f".{folder.name}.{suffix}") for suffix in ("new", "old"))
    if old.exists() and not folder.exists():  # a process was killed between the two renames below
        old.rename(folder)
    _retire(old, folder)
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    try:
        yield new
        sync_folder(new)
        if folder.exists():
            folder.rename(old)
        new.rename(folder)
    except BaseException:
        if old.exists() and not folder.exists():
            old.rename(folder)
        shutil.rmtree(new, ignore_errors=True)
        raise
    sync_folder(folder.parent)
    _retire(old, folder)


@contextmanager
def replaced_files(folder: Path) -> Iterator[Path]:
    """As `replaced_folder`, for some files of a folder: they are moved into it when the block ends without error."""
    new = folder / ".new"
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    try:
        yield new
        for path in new.iterdir():
            os.replace(path, folder / path.name)
        sync_folder(folder)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _retire(old: Path, folder: Path) -> None:
    """Delete the folder `old`, after moving entries that `folder` lacks into it."""
    if old.exists():
        for entry in old.iterdir():
            if not (folder / entry.name).exists():
                entry.rename(folder / entry.name)
        shutil.rmtree(old)


def announce(folder: Path, names: Iterable[str], note: str = "") -> None:
    """Print `saved <folder>`; FileNotFoundError lists which of the files `names` are missing or empty."""
    if missing := [name for name in names if not (folder / name).is_file() or (folder / name).stat().st_size == 0]:
        listed = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
        raise FileNotFoundError(f"{folder} should hold {listed} by now, but does not: was it deleted meanwhile? Run this again")
    print(f"saved {folder}{note}", flush=True)
