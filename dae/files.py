"""Files that appear whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path


def write_file(path: Path, data: bytes) -> None:
    """Write `data` beside `path`, force it to the disk, and rename it into place.

    Raises:
        OSError: with the path, the size and the remedy; an earlier file of that name stays as it was.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise _with_remedy(error, data, path) from error


def append_line(path: Path, line: str) -> None:
    """Add `line` to a text file. OSError as in `write_file`; the file may then end in half a line."""
    data = f"{line}\n".encode()
    try:
        with open(path, "ab") as file:
            file.write(data)
    except OSError as error:
        raise _with_remedy(error, data, path) from error


def _with_remedy(error: OSError, data: bytes, path: Path) -> OSError:
    what = f"could not save {len(data):,} bytes ({error.strerror}); free space or choose another output_dir"
    return OSError(error.errno, what, str(path))


def sync_folder(folder: Path) -> None:
    """Force a folder's entries (renames, new files) to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
