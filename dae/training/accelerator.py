"""Hugging Face's Accelerator, and a comparison of what was asked for with what was obtained.

`accelerate launch`, its configuration files and ACCELERATE_* variables reach into a training: they divide gradients, compile,
choose devices and precision, and start one process where two were meant. What is left to accelerate is compared right after the
Accelerator is built; what a knob of this project does is refused when accelerate is asked for it.
"""

from __future__ import annotations

import logging
import operator
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import distributed

from dae.config import Config, knobs
from dae.distributed import agree
from dae.lock import RANKS, SIZES
from dae.optional import optional
from dae.training.engine import set_backends
from dae.training.graphs import check_cuda_graphs

if TYPE_CHECKING:
    from accelerate import Accelerator

log = logging.getLogger(__name__)
UNSUPPORTED = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism_config",
    "ACCELERATE_USE_SAGEMAKER": "SageMaker",
}
TRUE = ("1", "true", "yes", "on", "y", "t")  # accelerate's words
TRACKERS = {"tensorboard": "tensorboard", "wandb": "wandb", "trackio": "trackio"}  # knob: package


def make_accelerator(config: Config, logging_dir: Path | None = None) -> Accelerator:
    """Hugging Face's Accelerator: devices, mixed precision, data parallelism, trackers.

    Buffers are not broadcast by DDP: the only ones that change are a codebook's, and all processes update them alike.
    A recipe that trains gets `cudnn_benchmark` and `allow_tf32` as well (`dae.training.engine.set_backends`); others do not.

    Args:
        config: `mixed_precision` of it becomes what accelerate chose, where it left that open: resuming compares it.
        logging_dir: of the trackers; given by the recipes that train, and what concerns training alone is checked only then.

    Raises:
        ValueError: something was asked of accelerate that it cannot do here, or that a knob of this project does instead; or the
            processes have different configurations.
        ImportError: the package of the tracker is missing or broken.
        RuntimeError: several processes were started, but each of them would train for itself.
    """
    from accelerate import Accelerator
    from accelerate.utils import DistributedDataParallelKwargs, GradientAccumulationPlugin

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for noisy in ("httpx", "absl", "filelock", "fsspec"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    trains, tracker = logging_dir is not None, None if logging_dir is None or config.report_to == "none" else config.report_to
    _refuse_unsupported()
    if trains:
        _refuse_what_knobs_do(config)
    if tracker:
        _import_tracker(tracker)
    try:
        accelerator = Accelerator(
            # Under torchrun without a GPU, accelerate forms no process group unless it is told that the CPU is meant.
            cpu=not torch.cuda.is_available(),  # nor on a Mac, whose GPU has no float64
            mixed_precision=config.mixed_precision,
            log_with=tracker,
            project_dir=logging_dir,
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),  # the recipes accumulate by themselves
            dynamo_backend="no",
            kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)],
        )
    except (ValueError, ImportError, NotImplementedError) as error:
        raise ValueError(f"accelerate cannot do what it is asked for: {error}") from error
    _compare(accelerator, config, tracker, trains)
    config.mixed_precision = accelerator.mixed_precision
    agree({key: operator.attrgetter(key)(config) for key, knob in knobs().items() if knob.role not in ("free", "judging")})
    if trains:
        check_cuda_graphs(config, accelerator.device, accelerator.num_processes)
        set_backends(config, accelerator.device)
    if trains and accelerator.is_main_process:
        processes = f"{accelerator.num_processes} process" + ("es" if accelerator.num_processes > 1 else "")
        precision = accelerator.mixed_precision.replace("no", "fp32")
        log.info("training on %s, %s, %s", accelerator.device.type, processes, precision)
    return accelerator


def end_training(accelerator: Accelerator) -> None:
    """Close trackers and the process group; the last line of a recipe that trains.

    A worker thread of gloo drops the tensors of its last operation after the caller has gone on, and needs the interpreter's lock
    to do it. If Python ends meanwhile, the process aborts: exit code -6 after all was saved, seen in a third of launches
    (https://github.com/pytorch/pytorch/pull/179291). Half a second without the lock is ample.
    """
    gloo = accelerator.num_processes > 1 and distributed.is_initialized() and "gloo" in distributed.get_backend()
    accelerator.end_training()
    if gloo:
        time.sleep(0.5)


def one_process(config: Config) -> torch.device:
    """The device of a recipe that runs in one process; ValueError if several were launched: they would write the same files."""
    accelerator = make_accelerator(config)
    if accelerator.num_processes > 1:
        raise ValueError(f"this recipe runs in one process, {accelerator.num_processes} were launched: start it with `python`")
    return accelerator.device


def _refuse_unsupported() -> None:
    for variable, name in UNSUPPORTED.items():
        if os.environ.get(variable, "").lower() in TRUE:
            raise ValueError(
                f"{variable}={os.environ[variable]}: {name} is not supported, several GPUs train data parallel (MULTI_GPU); "
                "unset it, or give `accelerate launch` another --config_file such as recipes/accelerate/eight_gpus_bf16.yaml"
            )


def _refuse_what_knobs_do(config: Config) -> None:
    steps = os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    if steps != "1":
        raise ValueError(
            f"ACCELERATE_GRADIENT_ACCUMULATION_STEPS={steps}: unset it and set stage1.gradient_accumulation_steps, "
            "stage2.gradient_accumulation_steps and prior.gradient_accumulation_steps"
        )
    if (backend := os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no")).lower() != "no":
        raise ValueError(f"accelerate is asked to compile (dynamo_backend {backend}): leave that out and set compile=true")
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()  # `no` is what the launcher says unasked
    if launched != "no" and config.mixed_precision not in (None, launched):
        raise ValueError(
            f"mixed_precision={config.mixed_precision} is configured, `accelerate launch` was told {launched}: set one of them"
        )


def _import_tracker(name: str) -> None:
    """accelerate leaves a tracker out without a word if its package is missing, and fails in mid-run if it is broken."""
    with optional(TRACKERS[name], f"report_to={name}", "or choose another tracker, or report_to=none"):
        if name == "wandb":
            import wandb  # noqa: F401
        elif name == "trackio":
            import trackio  # noqa: F401
        else:
            import torch.utils.tensorboard  # noqa: F401  # `from torch.utils` takes what an earlier import left there


def _compare(accelerator: Accelerator, config: Config, tracker: str | None, trains: bool) -> None:
    device = accelerator.device.type
    if device not in ("cpu", "cuda") or (device == "cuda" and not torch.cuda.is_available()):
        raise ValueError(
            f"{accelerator.device} is asked for (ACCELERATE_TORCH_DEVICE?), expected the CPU or a CUDA GPU that torch sees"
        )
    if os.environ.get("ACCELERATE_USE_CPU", "").lower() in TRUE and device != "cpu":
        raise ValueError(f"the CPU is asked for (ACCELERATE_USE_CPU), accelerate chose {accelerator.device}: unset one of them")
    started = max(int(os.environ.get(name, 1)) for name in SIZES)
    if started != accelerator.num_processes:
        raise RuntimeError(f"{started} processes were started, accelerate sees {accelerator.num_processes}: launch with torchrun")
    if _launcher_meant_several() and accelerator.num_processes == 1:
        raise RuntimeError(
            "`accelerate launch` was asked for several processes and started one (without as many GPUs it does): set "
            "--num_processes 1, or use torchrun --standalone --nproc_per_node N recipes/..."
        )
    if trains and accelerator.mixed_precision != "no" and not accelerator.native_amp:
        raise ValueError(
            f"mixed_precision={accelerator.mixed_precision} has no effect on {device} and would be fp32: use bf16 or no"
        )
    if tracker and [str(each) for each in accelerator.log_with] != [tracker]:
        raise ImportError(f"report_to={tracker}: accelerate cannot use it; install it, choose another tracker, or report_to=none")


def _launcher_meant_several() -> bool:
    """Whether `accelerate launch` started this one process for a run of several.

    It then tells the address of a process group, but no rank. The address may also be in the environment of everything that a
    cluster starts: only what the launcher has added counts, which Linux shows.
    """
    launched, address = "ACCELERATE_MIXED_PRECISION" in os.environ, os.environ.get("MASTER_PORT")
    if not launched or not address or any(name in os.environ for name in RANKS):
        return False
    try:
        before = Path(f"/proc/{os.getppid()}/environ").read_bytes().split(b"\0")
    except OSError:
        return False
    return not any(entry.startswith(b"MASTER_PORT=") for entry in before)
