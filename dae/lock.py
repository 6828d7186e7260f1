"""A lock per part of an output folder: one writer at a time.

`<output_dir>/.<part>.lock` names its holder as JSON: host, process id, start time of the process, command. The kernel's lock
on that file decides (POSIX `fcntl`; NFS, Lustre, GPFS and the containers of a machine share it). It ends with its process, so the
file of a killed run does not block. On a file system without locks a file blocks while the process that it names is alive.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import json
import logging
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

log = logging.getLogger(__name__)
_HELD: dict[Path, FolderLock] = {}  # by this process; closing a second descriptor of the file would drop the kernel's lock
RANKS = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")  # torchrun and accelerate, MPI's launchers
SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
LAUNCHED = {"ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID"}  # set by `accelerate launch`, by torchrun
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)


def writes(part: str, *, makes_folder: bool = False) -> Callable:
    """Decorator of a recipe `f(config, ...)` that locks this part of `config.output_dir` while it runs.

    Only the first of several processes takes the lock. With `makes_folder` a missing folder is made, and deleted if left empty.
    """

    def decorate(recipe: Callable) -> Callable:
        @functools.wraps(recipe)
        def locked(config: Any, *args: Any, **options: Any) -> Any:
            folder = Path(config.output_dir)
            with contextlib.ExitStack() as stack:
                if _launched_first() and (makes_folder or folder.is_dir()):
                    stack.enter_context(FolderLock(folder, part))
                return recipe(config, *args, **options)

        return locked

    return decorate


def require_lock(folder: Path, part: str) -> None:
    """Raise FileExistsError if this process's lock file was deleted, since another run may have started there."""
    if (lock := _HELD.get(_path(folder, part))) and not lock.is_own():
        deleted = f"{lock.path} was deleted while this run was writing {folder}"
        raise FileExistsError(f"{deleted}: another run may write there now, so this one stops")


class FolderLock:
    """Context manager: exclusive right of this process to write `<folder>/<part>`.

    Raises:
        FileExistsError: another process holds it; the message says which, since when, and what to do.
        OSError: the folder cannot be made or written.
    """

    def __init__(self, folder: Path, part: str):
        self.folder, self.part, self.path = Path(folder), part, _path(folder, part)
        self.made: list[Path] = []  # folders that were created, innermost first
        self.descriptor = -1
        self.holder: dict[str, Any] = {}

    def __enter__(self) -> FolderLock:
        if other := _HELD.get(self.path):
            self._refuse(other.holder)
        self.made = [p for p in (self.path.parent, *self.path.parent.parents) if not p.exists()]
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            while not self._take():
                pass
        except BaseException as error:
            self._remove_empty_folders()
            if isinstance(error, OSError) and error.strerror:  # from the system, not our own
                what = f"the output_dir cannot be written ({error.strerror}); choose another one, or make room for it there"
                raise OSError(error.errno, what, str(self.folder)) from error
            raise
        _HELD[self.path] = self
        return self

    def __exit__(self, *_: object) -> None:
        if self.holder["pid"] != os.getpid():
            return  # a forked worker unwinding its parent's stack
        del _HELD[self.path]
        if self.is_own():
            self.path.unlink(missing_ok=True)  # while locked, so that others who opened it notice, see `_take`
        os.close(self.descriptor)
        self._remove_empty_folders()

    def is_own(self) -> bool:
        """Whether the path is still the file that this process opened."""
        try:
            return os.path.samestat(os.stat(self.path), os.fstat(self.descriptor))
        except FileNotFoundError:
            return False

    def _take(self) -> bool:
        """Lock the file and write the holder; False if another process replaced it meanwhile: try again."""
        try:
            self.descriptor, new = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666), True
        except FileExistsError:
            try:
                self.descriptor, new = os.open(self.path, os.O_RDWR), False
            except FileNotFoundError:
                return False
        with contextlib.ExitStack() as unless_taken:
            unless_taken.callback(os.close, self.descriptor)
            before = self._read()
            try:
                fcntl.lockf(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in (errno.EACCES, errno.EAGAIN):
                    self._refuse(before)
                if error.errno not in _NO_LOCKS:
                    raise
                if not new:
                    self._take_away(before)
                    return False
            if not self.is_own():  # its holder deleted it after we had opened it
                return False
            if lives(before := self._read()):  # it lost the lock, as closing any descriptor of the file drops it
                self._refuse(before)
            if before:
                log.info("%s: taking over its %s from %s, which has ended", self.folder, self.part, _describe(before))
            self.holder = _myself()
            os.ftruncate(self.descriptor, 0)
            os.pwrite(self.descriptor, json.dumps(self.holder).encode(), 0)
            unless_taken.pop_all()
        return True

    def _take_away(self, found: dict) -> None:
        """Without kernel locks: delete the file of a dead holder; only one of several processes succeeds."""
        if found.get("machine") != machine():
            self._refuse(found, known=False)
        if lives(found):
            self._refuse(found)
        stale = self.path.with_name(f"{self.path.name}.{os.getpid()}")
        with contextlib.suppress(FileNotFoundError):
            os.rename(self.path, stale)
            if os.path.samestat(os.stat(stale), os.fstat(self.descriptor)):
                stale.unlink()
            else:  # another process was faster, and this file is its own
                os.rename(stale, self.path)

    def _read(self) -> dict:
        """The holder in the open file; {} if none. Reads by descriptor: closing another would drop our lock."""
        try:
            holder = json.loads(os.pread(self.descriptor, 1 << 16, 0))
        except ValueError:
            return {}
        return holder if isinstance(holder, dict) and isinstance(holder.get("pid"), int) else {}

    def _refuse(self, holder: dict, known: bool = True) -> NoReturn:
        launcher = holder.get("launcher") if holder.get("machine") == machine() else None
        orphaned = launcher is not None and parent_of(holder["pid"]) not in (None, launcher)
        told = f", whose launcher is gone: end it with `kill {holder['pid']}`" if orphaned else ": wait for it or end it"
        if not known:
            told += f"; if that process is gone, delete {self.path}"
        by = f"{self.folder}: its {self.part} is being written by {_describe(holder)}"
        raise FileExistsError(f"{by}{told}, or choose another output_dir")

    def _remove_empty_folders(self) -> None:
        for folder in self.made:
            with contextlib.suppress(OSError):
                folder.rmdir()


def _launched_first() -> bool:
    """Whether this is the first process of its launch, before there is a process group."""
    rank = next((os.environ[name] for name in RANKS if name in os.environ), "0")
    return rank == "0" or all(os.environ.get(name, "1") == "1" for name in SIZES)  # a stale RANK, e.g. of the shell


def _path(folder: Path, part: str) -> Path:
    where = (Path(folder) / part).resolve()  # lock the target of a symbolic link
    return where.with_name(f".{where.name}.lock")


def _myself() -> dict:
    return {
        "host": platform.node(),
        "machine": machine(),
        "pid": os.getpid(),
        "launcher": os.getppid() if LAUNCHED & os.environ.keys() else None,  # a shell may exit before its `nohup python ... &`
        "process": process_start(os.getpid()),
        "since": time.strftime("%Y-%m-%d %H:%M:%S %Z"),
        "command": " ".join(sys.argv),
    }


def _describe(holder: dict) -> str:
    """Readable description of a holder."""
    if not holder:
        return "a process that has just begun"
    command = f" ({holder['command']})" if holder.get("command") else ""
    return f"process {holder['pid']}{command} on {holder.get('host')}, since {holder.get('since')}"


def machine() -> str:
    """Scope of a process id: one boot of one machine, and one namespace of its containers."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return platform.node()  # not Linux


def lives(holder: dict) -> bool:
    """Whether a holder is still running on this machine: same process id and start time."""
    here = holder.get("machine") == machine() and holder.get("process") is not None
    return here and process_start(holder["pid"]) == holder["process"]


def process_start(pid: int) -> str | None:
    """Start time of the local process `pid`, as the system prints it; None if there is no such process."""
    if Path("/proc/self/stat").exists():
        fields = _stat(pid)
        return None if not fields or fields[0] == "Z" else fields[19]  # clock ticks since boot; a zombie has ended
    shown = subprocess.run(["ps", "-o", "lstart=", "-p", str(pid)], capture_output=True, text=True)
    return shown.stdout.strip() or None


def parent_of(pid: int) -> int | None:
    """The parent of process `pid`; None if unknown."""
    return int(fields[1]) if (fields := _stat(pid)) else None


def _stat(pid: int) -> list[str]:
    """/proc/<pid>/stat from the third field on (the second, a name, may hold spaces); [] if there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []
