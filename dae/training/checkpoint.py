"""Checkpoints of a training run: safetensors and JSON, complete or absent, verified on loading.

    checkpoint-<step>/
        <name>.safetensors   one file a component: model, optimizer, ema, ...
        state.json           where the run stands: stage, step, schedules, loader positions, configuration
        manifest.json        SHA-256 of each file above

There is no RNG state: all randomness of a step is seeded by (seed, stage, step), see `dae.seeding.seed_for`.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from dae.distributed import run_on_first_process
from dae.files import sync_folder, write_file

log = logging.getLogger(__name__)
MANIFEST, STATE = "manifest.json", "state.json"


@dataclass
class Checkpoint:
    path: Path
    tensors: dict[str, dict[str, Tensor]]
    state: dict


class Checkpoints:
    """The checkpoints of one run folder; keeps the newest `total_limit`."""

    def __init__(self, folder: Path, total_limit: int = 2):
        if total_limit < 1:
            raise ValueError(f"checkpoints_total_limit must be at least 1, got {total_limit}")
        self.folder, self.total_limit = Path(folder), total_limit

    def all(self) -> list[Path]:
        """Checkpoint folders, newest first; other files and folders are ignored."""
        paths = [p for p in self.folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", p.name) and p.is_dir()]
        return sorted(paths, key=_step, reverse=True)

    def save(self, step: int, tensors: dict[str, dict[str, Tensor]], state: dict) -> None:
        """Write `checkpoint-<step>` on the first process, then delete the oldest beyond the limit.

        Checkpoints of later steps are deleted too: this run went back before them, and `latest` must not return there.

        Raises:
            OSError: on every process, if the first one could not write; earlier checkpoints stay.
        """
        run_on_first_process(lambda: self._write(step, tensors, state))

    def _write(self, step: int, tensors: dict[str, dict[str, Tensor]], state: dict) -> None:
        from safetensors.torch import save

        for stale in self.folder.glob(".checkpoint-*.tmp"):
            shutil.rmtree(stale)
        final, temporary = self.folder / f"checkpoint-{step}", self.folder / f".checkpoint-{step}.tmp"
        temporary.mkdir(parents=True)
        try:
            manifest = {}
            payload = {f"{name}.safetensors": part for name, part in tensors.items()} | {STATE: state}
            for name, content in payload.items():
                data = json.dumps(content, indent=1).encode() if name == STATE else save(_portable(content))
                write_file(temporary / name, data)
                manifest[name] = hashlib.sha256(data).hexdigest()
            write_file(temporary / MANIFEST, json.dumps(manifest, indent=1).encode())
            sync_folder(temporary)
            if final.exists():
                shutil.rmtree(final)
            temporary.rename(final)
            sync_folder(self.folder)
        except OSError:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        kept = [path for path in self.all() if _step(path) <= step][: self.total_limit]
        for path in self.all():
            if path not in kept:
                shutil.rmtree(path)

    def load(self, which: str) -> Checkpoint | None:
        """`latest` (None if there is none at all), or the checkpoint folder at a path.

        A damaged checkpoint is named in the log, and the next older one is taken.

        Raises:
            FileNotFoundError: the path is no checkpoint.
            ValueError: it is damaged, or for `latest` all are: training must not silently start over.
        """
        if which != "latest":
            if not (Path(which) / MANIFEST).is_file():
                raise FileNotFoundError(
                    f"{which} is no checkpoint: it holds no {MANIFEST}. Checkpoints here: {[p.name for p in self.all()]}"
                )
            try:
                return self._read(Path(which))
            except ValueError as error:
                raise ValueError(f"{error}: resume_from_checkpoint=latest takes the newest that can be read") from error
        problems = []
        for path in self.all():
            try:
                return self._read(path)
            except ValueError as error:
                problems.append(str(error))
                log.warning("%s; trying the one before", error)
        if problems:
            raise ValueError(
                f"no checkpoint can be read: {'; '.join(problems)}. Restore one, or start a new run in another output_dir"
            )
        return None

    def _read(self, path: Path) -> Checkpoint:
        from safetensors.torch import load

        try:
            manifest = json.loads((path / MANIFEST).read_text())
            contents = {name: (path / name).read_bytes() for name in [STATE, *manifest]}
        except (OSError, ValueError, TypeError) as error:
            raise ValueError(f"checkpoint {path} is incomplete: {error}") from error
        for name, data in contents.items():
            if hashlib.sha256(data).hexdigest() != manifest.get(name):
                raise ValueError(f"checkpoint {path} is damaged: {name} does not have the SHA-256 of its manifest")
        state = json.loads(contents.pop(STATE))
        return Checkpoint(path, {name.removesuffix(".safetensors"): load(data) for name, data in contents.items()}, state)


def _step(path: Path) -> int:
    return int(path.name.removeprefix("checkpoint-"))


def _portable(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
