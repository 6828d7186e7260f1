"""The run: its folder, its processes, its log, its progress bar, its randomness."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dae.config import Config, DataConfig, describe, differing_keys, from_dict, load_config, save_config
from dae.distributed import agree, failing_together, rank, run_on_first_process, world_size
from dae.files import append_line, write_file
from dae.lock import require_lock
from dae.training.checkpoint import STATE, Checkpoint, Checkpoints
from dae.training.stages import plan_stages

if TYPE_CHECKING:
    import numpy as np
    from accelerate import Accelerator

log = logging.getLogger(__name__)
INPUTS = "inputs.json"  # in a run's folder: fingerprints of what it read

# What may change between a checkpoint and its resumption without changing what is computed; batch sizes are compared globally.
FREE_TO_CHANGE = (
    "output_dir", "compile", "report_to", "logged_images", "logging_steps", "checkpointing_steps", "checkpoints_total_limit",
    "resume_from_checkpoint", "push_to_hub", "hub_model_id", "kernels.",
    "data.num_workers", "data.verify_rows", "data.allow_other", "data.on_error", "data.max_skipped",
    "sampling.", "evaluation.", "measure.", "compare.",
)  # fmt: skip


def make_accelerator(config: Config, logging_dir: Path | None = None) -> Accelerator:
    """Hugging Face's Accelerator: devices, mixed precision, data parallelism, trackers (with a `logging_dir`).

    Buffers are not broadcast by DDP: the only ones that change are a codebook's, and all processes update them alike.

    Raises:
        RuntimeError: several processes were started, but accelerate would let each of them train for itself.
        ValueError: they have different configurations.
    """
    from accelerate import Accelerator
    from accelerate.utils import DistributedDataParallelKwargs

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for noisy in ("httpx", "absl", "filelock", "fsspec"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    accelerator = Accelerator(
        # Under torchrun without a GPU, accelerate forms no process group unless it is told that the CPU is meant.
        cpu=not torch.cuda.is_available(),  # nor on a Mac, whose GPU has no float64
        mixed_precision=config.mixed_precision,
        log_with=None if config.report_to == "none" or logging_dir is None else config.report_to,
        project_dir=logging_dir,
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)],
    )
    if (started := int(os.environ.get("WORLD_SIZE", 1))) != accelerator.num_processes:
        raise RuntimeError(f"{started} processes were started, accelerate sees {accelerator.num_processes}: launch with torchrun")
    config.mixed_precision = accelerator.mixed_precision  # also where `accelerate launch` chose it: resuming compares it
    agree({row.key: _look_up(config, row.key) for row in describe() if not row.key.startswith(FREE_TO_CHANGE)})
    return accelerator


def one_process(config: Config) -> torch.device:
    """The device of a recipe that runs in one process; ValueError if several were launched: they would write the same files."""
    accelerator = make_accelerator(config)
    if accelerator.num_processes > 1:
        raise ValueError(f"this recipe runs in one process, {accelerator.num_processes} were launched: start it with `python`")
    return accelerator.device


class Run:
    """A training run in `<output_dir>/<name>`: config.yaml, checkpoint-<step>/, logs/, and the final model at the root.

    Args:
        config: of the whole chain.
        name: subfolder, `autoencoder` or `prior`.
        without_influence: parts of the configuration that this run does not use, so they may change on resuming.
    """

    def __init__(self, config: Config, name: str, *, without_influence: tuple[str, ...] = ()):
        self.config, self.name = config, name
        self.folder = Path(config.output_dir) / name
        self.free = FREE_TO_CHANGE + without_influence
        self.checkpoints = Checkpoints(self.folder, config.checkpoints_total_limit)
        self.history_file = self.folder / "logs" / "history.jsonl"
        self.inputs: dict[str, str] = {}
        self.started = time.monotonic()

    def open(self, accelerator: Accelerator, inputs: dict[str, str] | None = None) -> Checkpoint | None:
        """Claim the folder; return the checkpoint to resume from, if one was asked for and exists.

        Args:
            inputs: fingerprints of what the run reads; a checkpoint that was trained on something else is refused.

        Raises:
            FileExistsError: the folder holds a run, and resuming was not asked for.
            ValueError: the checkpoint belongs to another configuration (all differences are listed), or is damaged; or the
                processes have different inputs, or see different checkpoints.

            What one process raises, all do.
        """
        self.inputs = inputs or {}
        wanted = self.config.resume_from_checkpoint
        with failing_together():
            checkpoint = self.checkpoints.load(wanted) if wanted else None
        agree(self.inputs | {"the checkpoint to resume from": checkpoint and checkpoint.path.name})
        if checkpoint is None or checkpoint.path.resolve().parent != self.folder.resolve():  # not a continuation of what is here
            run_on_first_process(self._refuse_occupied_folder)  # the others might see what it has already written
        if checkpoint:
            with failing_together():
                self._refuse_other_configuration(checkpoint)
            log.info("resuming from %s", checkpoint.path)
        run_on_first_process(lambda: self._prepare_folder(checkpoint))
        if self.config.report_to != "none":
            settings = {row.key: str(_look_up(self.config, row.key)) for row in describe()}
            with failing_together():
                accelerator.init_trackers("decoupled-autoencoder", config=settings)
        return checkpoint

    def _refuse_occupied_folder(self) -> None:
        # An empty history is that of a run which failed in its first step: nothing would be lost.
        occupied = [p.name for p in (self.history_file, self.folder / "model.safetensors") if p.exists() and p.stat().st_size]
        occupied += [p.name for p in self.checkpoints.all()]
        remedy = "continue it with resume_from_checkpoint=latest, or choose another output_dir"
        if self.config.resume_from_checkpoint == "latest":  # killed before its first checkpoint: start over, but spare a model
            occupied = [name for name in occupied if name == "model.safetensors"]
            remedy = "it has no checkpoint to continue from; choose another output_dir, or delete it"
        if occupied:
            raise FileExistsError(f"{self.folder} holds another run ({', '.join(occupied[:3])}): {remedy}")

    def _prepare_folder(self, checkpoint: Checkpoint | None) -> None:
        self.history_file.parent.mkdir(parents=True, exist_ok=True)
        for stale in self.folder.glob(".*.tmp"):  # of a run that was killed while it wrote: under our lock nobody else does
            stale.unlink() if stale.is_file() else shutil.rmtree(stale)
        save_config(self.config, self.folder / "config.yaml")
        save_config(self.config, self.folder.parent / "config.yaml")
        write_file(self.folder / INPUTS, json.dumps(self.inputs, indent=1).encode())
        kept = []
        if checkpoint and self.history_file.exists():  # forget what was logged after the checkpoint
            kept = [row for row in self.history() if row["step"] <= checkpoint.state["step"]]
        write_file(self.history_file, "".join(json.dumps(row) + "\n" for row in kept).encode())

    def _refuse_other_configuration(self, checkpoint: Checkpoint) -> None:
        if (kind := checkpoint.state.get("run", self.name)) != self.name:
            raise ValueError(f"{checkpoint.path} is a checkpoint of the run {kind!r}, this one is {self.name!r}")
        then = from_dict(Config, checkpoint.state["config"])
        differences = [d for d in differing_keys(then, self.config) if not d.startswith(self.free)]
        differences = [d for d in differences if not d.split(":")[0].endswith(".train_batch_size")]
        differences = [d for d in differences if d.split(":")[0] not in self._may_change_length(checkpoint)]
        processes = checkpoint.state["processes"]
        for section in ("stage1", "stage2", "prior"):
            if f"{section}." in self.free:
                continue
            before, now = (getattr(c, section).train_batch_size * w for c, w in ((then, processes), (self.config, world_size())))
            if before != now:
                differences.append(f"{section}: global batch {before} -> {now}")
        seen = checkpoint.state.get("inputs", {})
        differences += [f"another {name} (fingerprint)" for name, now in self.inputs.items() if seen.get(name, now) != now]
        if differences:
            raise ValueError(
                f"{checkpoint.path} was trained with another configuration: {'; '.join(differences)}. Restore these, or start "
                "a new run in another output_dir"
            )

    def _may_change_length(self, checkpoint: Checkpoint) -> tuple[str, ...]:
        """The numbers of steps that may differ from the checkpoint's: of the stage it stands in, and of later ones."""
        stage, done = checkpoint.state["stage"], checkpoint.state["stage_step"]
        if self.name == "prior":
            keys, steps = ("prior.max_train_steps",), self.config.prior.max_train_steps
        else:
            keys = ("stage1.max_train_steps", "stage2.max_train_steps") if stage == "stage1" else ("stage2.max_train_steps",)
            steps = next((s.config.max_train_steps for s in plan_stages(self.config) if s.name == stage), done)
        if steps < done:
            raise ValueError(f"{checkpoint.path} stands at step {done} of {stage}, {keys[0]} now ends it at {steps}")
        return keys

    def save(self, step: int, tensors: dict, state: dict, **where: Any) -> None:
        """Write a checkpoint; configuration, number of processes and `where` the run stands are added to `state`."""
        own = {"run": self.name, "step": step, "processes": world_size(), "inputs": self.inputs}
        own["config"] = dataclasses.asdict(self.config)
        run_on_first_process(self._require_lock)
        self.checkpoints.save(step, tensors, own | where | state)

    def record(self, accelerator: Accelerator, step: int, values: dict[str, Any], **labels: Any) -> None:
        """The first process appends one line to `logs/history.jsonl` and sends the numbers to the trackers; all must call it.

        Raises:
            OSError: on every process, if the first one could not write.
        """
        values = {k: float(v) for k, v in values.items()}

        def write() -> None:
            self._require_lock()
            row = {"step": step, "seconds": round(time.monotonic() - self.started, 2)} | labels | values
            append_line(self.history_file, json.dumps(row))
            if self.config.report_to != "none":
                prefix = "/".join(map(str, labels.values()))
                accelerator.log({f"{prefix}/{k}": v for k, v in values.items()}, step=step)

        run_on_first_process(write)

    def _require_lock(self) -> None:
        require_lock(self.folder.parent, self.name)

    def shows_images(self) -> bool:
        """Whether this process has pictures to make for a tracker."""
        return rank() == 0 and self.config.logged_images > 0 and self.config.report_to != "none"

    def record_picture(self, accelerator: Accelerator, step: int, name: str, picture_HWC: np.ndarray) -> None:
        """Send a picture (uint8) to the trackers that take pictures: tensorboard and wandb."""
        for tracker in accelerator.trackers:
            if tracker.name == "tensorboard":
                tracker.log_images({name: picture_HWC[None]}, step=step, dataformats="NHWC")
            elif tracker.name == "wandb":
                tracker.log_images({name: [picture_HWC]}, step=step)

    def history(self) -> list[dict]:
        """All that `record` wrote, oldest first; half a line, which a crash may leave, is left out."""
        return [json.loads(line) for line in self.history_file.read_text().splitlines() if line.endswith("}")]


def _look_up(config: Any, key: str) -> Any:
    for part in key.split("."):
        config = getattr(config, part)
    return config


def refuse_other_data(folder: Path, config: DataConfig, fingerprint: str) -> None:
    """ValueError if the run in `folder` was trained on other data than those of `fingerprint` (`ImageData.fingerprint`).

    Without effect under `data.allow_other`. For a folder without record, the name of the data set counts.
    """
    file, trained_on = folder / "config.yaml", recorded_inputs(folder).get("data set")
    if config.allow_other or trained_on == fingerprint:
        return
    trained = load_config(file).data if file.is_file() else config
    if trained_on is None and trained.dataset_name == config.dataset_name:
        return
    changed = differing_keys(trained, config, "data.")
    raise ValueError(
        f"{folder} was trained on another data set than the one asked for "
        f"({'; '.join(changed) or 'the files have changed since'}): take the configuration of the run, {file}, or set "
        "data.allow_other=true"
    )


def recorded_inputs(folder: Path) -> dict[str, str]:
    """Fingerprints of what the run in `folder` read; of a run from before they were recorded, those of its newest checkpoint."""
    if (file := folder / INPUTS).is_file():
        return json.loads(file.read_text())
    for checkpoint in Checkpoints(folder).all():
        if (file := checkpoint / STATE).is_file():
            return json.loads(file.read_text()).get("inputs", {})
    return {}
