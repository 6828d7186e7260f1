"""A training run: its folder, its checkpoints, its log, and what may differ when it is resumed."""

from __future__ import annotations

import dataclasses
import json
import logging
import operator
import os
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from dae.config import Config, DataConfig, Difference, config_differences, from_dict, knobs, load_config, save_config
from dae.data.sources import source_name
from dae.distributed import agree, failing_together, rank, run_on_first_process, world_size
from dae.files import append_line, replaced_folder, write_file
from dae.hub import CONFIG, LATENT, MODEL_FILES, WEIGHTS, holds_model
from dae.lock import require_lock
from dae.training.checkpoint import STATE, Checkpoint, Checkpoints
from dae.training.non_finite import NON_FINITE
from dae.training.stages import DISCRIMINATOR, Stage, plan_stages

if TYPE_CHECKING:
    import numpy as np
    from accelerate import Accelerator

log = logging.getLogger(__name__)
WARNING = "warning"  # split of a row in the history, with `condition` and `message` in place of numbers
INPUTS = "inputs.json"  # in a run's folder: fingerprints of what it read
DATA = "data.json"  # likewise: the data set in words and numbers, see `recorded_data`


class Warns(Protocol):
    """A warning of an observer, as of `dae.diagnostics.doctor`."""

    @property
    def condition(self) -> str: ...
    @property
    def message(self) -> str: ...


Observer = Callable[[dict[str, Any]], Sequence[Warns]]


class Run:
    """A training run in `<output_dir>/<name>`: config.yaml, checkpoint-<step>/, logs/, and the final model at the root.

    Args:
        config: of the whole chain.
        name: subfolder, `autoencoder` or `prior`.
        observer: called with each row of the history, by the first process, and with the earlier ones of a resumed run; its
            warnings become rows, too, and are logged.
    """

    def __init__(self, config: Config, name: str, observer: Observer | None = None):
        self.config, self.name, self.observer = config, name, observer
        self.folder = Path(config.output_dir) / name
        self.checkpoints = Checkpoints(self.folder, config.checkpoints_total_limit)
        self.history_file = self.folder / "logs" / "history.jsonl"
        self.inputs: dict[str, str] = {}
        self.started = time.monotonic()

    def open(
        self,
        accelerator: Accelerator,
        inputs: dict[str, str] | None = None,
        stages: Sequence[Stage] = (),
        data: dict | None = None,
    ) -> Checkpoint | None:
        """Claim the folder; return the checkpoint to resume from, if one was asked for and exists.

        Args:
            inputs: fingerprints of what the run reads; a checkpoint that was trained on something else is refused.
            stages: of the run, in their order; each but the last leaves its model in a folder of its name.
            data: description of the data set, for `recorded_data`.

        Raises:
            FileExistsError: the folder holds a run, and resuming was not asked for.
            FileNotFoundError: the model of a stage before that of the checkpoint is lost.
            ValueError: the checkpoint belongs to another configuration (all differences are listed), or is damaged; or the
                processes have different inputs, or see different checkpoints.
            RuntimeError: the tracker cannot start.

            What one process raises, all do.
        """
        self.accelerator, self.inputs = accelerator, inputs or {}
        wanted = self.config.resume_from_checkpoint
        with failing_together():
            checkpoint = self.checkpoints.load(wanted) if wanted else None
        agree(self.inputs | {"the checkpoint to resume from": checkpoint and checkpoint.path.name})
        if checkpoint is None or checkpoint.path.resolve().parent != self.folder.resolve():  # not a continuation of what is here
            run_on_first_process(self._refuse_occupied_folder)  # the others might see what it has already written
        if checkpoint:
            with failing_together():
                self._refuse_other_configuration(checkpoint)
            run_on_first_process(lambda: self._keep_earlier_stages(checkpoint, [stage.name for stage in stages]))
            log.info("resuming from %s", checkpoint.path)
        run_on_first_process(lambda: self._prepare_folder(checkpoint, data))
        if self.config.report_to != "none":
            settings = {key: str(operator.attrgetter(key)(self.config)) for key in knobs()}
            with failing_together():
                start_tracker(accelerator, self.config.report_to, settings)
        return checkpoint

    def _refuse_occupied_folder(self) -> None:
        # A history without numbers is that of a run which failed in its first steps: nothing would be lost.
        there = {self.history_file: self._has_numbers(), (model := self.folder / "model.safetensors"): model.exists()}
        occupied = [file.name for file, found in there.items() if found and file.stat().st_size]
        occupied += [p.name for p in self.checkpoints.all()]
        remedy = "continue it with resume_from_checkpoint=latest, choose another output_dir, or delete it"
        # Killed before its first checkpoint: start over, but never overwrite a finished model.
        if self.config.resume_from_checkpoint == "latest":
            occupied = [name for name in occupied if name == "model.safetensors"]
            remedy = "it has no checkpoint to continue from; choose another output_dir, or delete it"
        if occupied:
            raise FileExistsError(f"{self.folder} holds another run ({', '.join(occupied[:3])}): {remedy}")

    def _has_numbers(self) -> bool:
        """Whether the history holds more than warnings; a damaged one may."""
        try:
            return self.history_file.exists() and {row.get("split") for row in self.history()} != {WARNING}
        except ValueError:
            return True

    def _keep_earlier_stages(self, checkpoint: Checkpoint, stages: list[str]) -> None:
        """Copy the models of earlier stages, which a checkpoint does not hold, from its run into this one."""
        for name in stages[: stages.index(checkpoint.state["stage"])] if stages else []:
            source, target = checkpoint.path.parent / name, self.folder / name
            if not holds_model(target) and holds_model(source):
                with replaced_folder(target) as new:
                    for part in ("", DISCRIMINATOR):
                        if holds_model(source / part):
                            (new / part).mkdir(exist_ok=True)
                            for file in (WEIGHTS, CONFIG, LATENT):
                                if (source / part / file).is_file():  # an autoencoder of earlier versions has no latent.json
                                    shutil.copyfile(source / part / file, new / part / file)
            if not holds_model(target):
                raise FileNotFoundError(
                    f"{target} holds no model, and {checkpoint.path}, of a later stage, cannot restore it: resume from one of "
                    f"{name} (resume_from_checkpoint=<path>), or start a new run in another output_dir"
                )

    def _prepare_folder(self, checkpoint: Checkpoint | None, data: dict | None) -> None:
        self.history_file.parent.mkdir(parents=True, exist_ok=True)
        # left by a run that was killed while it wrote; under our lock nobody else writes
        for stale in [*self.folder.glob(".*.tmp"), *self.folder.glob("*/.*.tmp")]:
            stale.unlink() if stale.is_file() else shutil.rmtree(stale, ignore_errors=True)  # perhaps with the one before it
        save_config(self.config, self.folder / "config.yaml")
        save_config(self.config, self.folder.parent / "config.yaml")
        write_file(self.folder / INPUTS, json.dumps(self.inputs, indent=1).encode())
        if data is not None:
            write_file(self.folder / DATA, json.dumps(data, indent=1).encode())
        kept = []
        if checkpoint and self.history_file.exists():  # forget what was logged after the checkpoint
            ends = (
                row for row in self.history() if row["step"] <= checkpoint.state["step"] or row.get("condition") == NON_FINITE
            )
            kept = list(ends)  # what broke the run is remembered
        write_file(self.history_file, "".join(json.dumps(row) + "\n" for row in kept).encode())
        for row in kept if self.observer else ():
            self.observer(row)  # type: ignore[misc]

    def _refuse_other_configuration(self, checkpoint: Checkpoint) -> None:
        if (kind := checkpoint.state.get("run", self.name)) != self.name:
            raise ValueError(f"{checkpoint.path} is a checkpoint of the run {kind!r}, this one is {self.name!r}")
        then = from_dict(Config, checkpoint.state["config"])
        lengths, same_data = self._may_change_length(checkpoint), self._same_data(checkpoint, then)

        def matters(difference: Difference) -> bool:
            role = knobs()[difference.key].role
            if not self._depends_on(difference.key) or role == "batch":
                return False
            return not (role == "place" and same_data) and difference.key not in lengths

        found = [str(each) for each in config_differences(then, self.config) if matters(each)]
        processes = checkpoint.state["processes"]
        for section in ("stage1", "stage2", "prior"):
            if not self._depends_on(f"{section}.train_batch_size"):
                continue
            before, now = (getattr(c, section).train_batch_size * w for c, w in ((then, processes), (self.config, world_size())))
            if before != now:
                found.append(f"{section}: global batch {before} -> {now}")
        seen = checkpoint.state.get("inputs", {})
        found += [f"another {name} (fingerprint)" for name, now in self.inputs.items() if seen.get(name, now) != now]
        if found:
            raise ValueError(
                f"{checkpoint.path} was trained with another configuration: {'; '.join(found)}. Restore these, or start "
                f"a new run: in another output_dir, or in this one after {self.folder} was deleted"
            )

    def _depends_on(self, key: str) -> bool:
        """Whether the result of this run depends on a knob."""
        knob = knobs()[key]
        return knob.role not in ("free", "judging") and knob.run in (None, self.name)

    def _same_data(self, checkpoint: Checkpoint, then: Config) -> bool:
        """Whether the data is known to be the same, whatever its path; of a stream only a part is known, so its path counts."""
        seen, names = checkpoint.state.get("inputs", {}), ("data set", "data")
        known = any(name in self.inputs and seen.get(name) == self.inputs[name] for name in names)
        return known and (not self.config.data.streaming or _places(then) == _places(self.config))

    def _may_change_length(self, checkpoint: Checkpoint) -> tuple[str, ...]:
        """Keys of the numbers of steps that may differ from the checkpoint's: those of its stage and of later stages."""
        stage, done = checkpoint.state["stage"], checkpoint.state["stage_step"]
        keys: tuple[str, ...]
        if self.name == "prior":
            keys, steps = ("prior.max_train_steps",), self.config.prior.max_train_steps
        else:
            keys = ("stage1.max_train_steps", "stage2.max_train_steps") if stage == "stage1" else ("stage2.max_train_steps",)
            steps = next((s.config.max_train_steps for s in plan_stages(self.config) if s.name == stage), done)
        if steps < done:
            raise ValueError(f"{checkpoint.path} stands at step {done} of {stage}, {keys[0]} now ends it at {steps}")
        return keys

    def save(self, step: int, tensors: dict, state: dict, **where: Any) -> None:
        """Write a checkpoint; configuration, number of processes and `where` are added to `state`."""
        own = {"run": self.name, "step": step, "processes": world_size(), "inputs": self.inputs}
        own["config"] = dataclasses.asdict(self.config)
        run_on_first_process(self._require_lock)
        self.checkpoints.save(step, tensors, own | where | state)

    def record(self, step: int, values: dict[str, Any], **labels: Any) -> None:
        """Append one line to `logs/history.jsonl` and send the numbers to the trackers, on the first process; all must call it.

        Raises:
            OSError: on every process, if the first one could not write.
        """
        values = {k: float(v) for k, v in values.items()}

        def write() -> None:
            self._require_lock()
            row = {"step": step, "seconds": round(time.monotonic() - self.started, 2)} | labels | values
            append_line(self.history_file, json.dumps(row))
            for warning in self.observer(row) if self.observer else ():
                log.warning("%s", warning.message)
                append_line(self.history_file, json.dumps(self._warning(row, warning.condition, warning.message)))
            if values and self.config.report_to != "none":
                prefix = "/".join(map(str, labels.values()))
                self.accelerator.log({f"{prefix}/{k}": v for k, v in values.items()}, step=step)

        run_on_first_process(write)

    def warn(self, step: int, stage: str, condition: str, message: str) -> None:
        """Append a warning to the history, on the first process; all must call it."""
        row = {"step": step, "seconds": round(time.monotonic() - self.started, 2), "stage": stage}
        line = json.dumps(self._warning(row, condition, message))
        run_on_first_process(lambda: append_line(self.history_file, line))

    def _warning(self, row: dict, condition: str, message: str) -> dict:
        place = {key: row[key] for key in ("step", "seconds", "stage")}
        return place | {"split": WARNING, "condition": condition, "message": message}

    def _require_lock(self) -> None:
        require_lock(self.folder.parent, self.name)

    def shows_images(self) -> bool:
        """Whether this process makes pictures for a tracker."""
        return rank() == 0 and self.config.logged_images > 0 and self.config.report_to != "none"

    def record_picture(self, step: int, name: str, picture_HWC: np.ndarray) -> None:
        """Send a picture (uint8) to the trackers that take pictures: tensorboard and wandb."""
        for tracker in self.accelerator.trackers:
            if tracker.name == "tensorboard":
                tracker.log_images({name: picture_HWC[None]}, step=step, dataformats="NHWC")
            elif tracker.name == "wandb":
                tracker.log_images({name: [picture_HWC]}, step=step)

    def outputs(self, *stages: str) -> list[str]:
        """The files, relative to `folder`, that are there when the run and the models of its earlier `stages` are finished."""
        own = [LATENT] if self.name == "autoencoder" else []
        return [*MODEL_FILES, *own, "config.yaml", *(f"{s}/{file}" for s in stages for file in (CONFIG, WEIGHTS))]

    def history(self) -> list[dict]:
        """All that `record` wrote, oldest first; half a line, which a crash may leave, is left out.

        ValueError: another line is damaged.
        """
        try:
            lines = self.history_file.read_text().splitlines()
            return [dict(json.loads(line)) for line in lines if line.endswith("}")]
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"{self.history_file} is damaged ({error}): restore it, or delete it and take resume_from_checkpoint=latest"
            ) from error


def start_tracker(accelerator: Accelerator, name: str, settings: dict[str, str]) -> None:
    """accelerate's `init_trackers`, before the first step.

    Raises:
        RuntimeError: the tracker raised whatever it raises if it cannot start: not logged in, no connection, a full disk.
    """
    try:
        accelerator.init_trackers("decoupled-autoencoder", config=settings)
    except Exception as error:  # of classes of its own, of which we import none
        words = " ".join(f"{type(error).__name__}: {error}".split())
        remedy = "log in with `wandb login`, set WANDB_MODE=offline" if name == "wandb" else "see that it can write and connect"
        raise RuntimeError(f"report_to={name} cannot start ({words}): {remedy}, or set report_to=none") from error


def refuse_other_data(folder: Path, config: DataConfig, fingerprint: str) -> None:
    """ValueError if the run in `folder` was trained on other data than those of `fingerprint` (`ImageData.fingerprint`).

    Without effect under `data.allow_other`. For a folder without record, the name of the data set counts.
    """
    file, trained_on = folder / "config.yaml", recorded_inputs(folder).get("data set")
    if config.allow_other or trained_on == fingerprint:
        return
    trained = load_config(file).data if file.is_file() else config
    if trained_on is None and source_name(trained) == source_name(config):
        return
    changed = map(str, config_differences(trained, config, "data."))
    raise ValueError(
        f"{folder} was trained on another data set than the one asked for "
        f"({'; '.join(changed) or 'the files have changed since'}): take the configuration of the run, {file}, or set "
        "data.allow_other=true"
    )


def _places(config: Config) -> list[str]:
    names = (config.data.dataset_name, *config.data.train_files, *config.data.validation_files)
    return [os.path.realpath(os.path.expanduser(name)) for name in names]


def recorded_data(folder: Path) -> dict | None:
    """What the run in `folder` read: `ImageData.describe` and, as `table`, `Summary.table`; None of a run of earlier versions.

    ValueError: the file is damaged.
    """
    if not (file := folder / DATA).is_file():
        return None
    try:
        data = dict(json.loads(file.read_text()))
        table = [(what, fact) for what, fact in data["table"]]
        return data | {"class_names": list(data["class_names"]), "fingerprint": str(data["fingerprint"]), "table": table}
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{file} is damaged ({error}): resume the run, which writes it anew, or delete it") from error


def recorded_inputs(folder: Path) -> dict[str, str]:
    """Fingerprints of what the run in `folder` read; of a run from before they were recorded, those of its newest checkpoint."""
    if (file := folder / INPUTS).is_file():
        try:
            return dict(json.loads(file.read_text()))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{file} is damaged ({error}): delete it, the newest checkpoint holds the same") from error
    for checkpoint in Checkpoints(folder).all():
        try:
            return dict(json.loads((checkpoint / STATE).read_text())).get("inputs", {})
        except (OSError, ValueError, TypeError):
            continue  # damaged: whoever loads it says so
    return {}
