"""`--plan`: what the trainings of a recipe will take, on this machine or on a named GPU."""

from __future__ import annotations

import dataclasses
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dae.config import Config, OptimizationConfig
from dae.memory import available_memory
from dae.planning.data import KnownData, known_data
from dae.planning.gpus import EFFICIENCY, MEASURED, SECONDS_PER_CALL, USABLE, Gpu, estimated_seconds, find_gpu
from dae.planning.tracing import PARTS, Trace, trace, without_values
from dae.planning.trainings import prior_training, random_cache, stage_training
from dae.priors import prior_family
from dae.progress import duration
from dae.quantizers import bottleneck_class
from dae.training.autoencoder import build_autoencoder
from dae.training.engine import Engine, LocalEngine, backends
from dae.training.loop import Training
from dae.training.stages import plan_stages

TIMED_FLOPS = 5e11  # of a step that is timed on a CPU: larger ones are timed with fewer images
TIMED_SECONDS = 1.0  # two steps are timed, and more while they together take less

Build = Callable[[Config, Engine, Any], Training]


@dataclass
class Planned:
    """A training to plan.

    Attributes:
        name: of its section in the configuration and of its column.
        settings: its section as it is trained; `train_batch_size` images per step and micro-step.
        build: the training by a configuration (this one, perhaps with a smaller batch), an engine, and data or None for random
            images. Called with an engine whose tensors have no values, and where steps are timed.
        sections: of the configuration whose `train_batch_size` `build` reads.
    """

    name: str
    settings: OptimizationConfig
    build: Build
    sections: tuple[str, ...] = ("stage1", "stage2")


@dataclass
class Estimate:
    planned: Planned
    trace: Trace
    step_seconds: float | None
    note: str = ""

    @property
    def images_per_step(self) -> int:
        return self.planned.settings.train_batch_size * self.planned.settings.gradient_accumulation_steps

    @property
    def seconds(self) -> float | None:
        return None if self.step_seconds is None else self.step_seconds * self.planned.settings.max_train_steps


def plan_autoencoder(config: Config, gpu: str) -> list[str]:
    """Lines that say what recipes/train_dae.py will take; `gpu` is a name of `GPUS`, or empty for this machine."""
    return plan_training(config, planned_stages(config), gpu)


def planned_stages(config: Config) -> list[Planned]:
    """The stages of `config.method`."""

    def build(number: int) -> Build:
        def training(config: Config, engine: Engine, data: Any) -> Training:
            stage = plan_stages(config)[number]
            return stage_training(config, stage, build_autoencoder(config, stage), engine, data)

        return training

    return [Planned(stage.name, stage.config, build(number)) for number, stage in enumerate(plan_stages(config))]


def plan_prior(config: Config, gpu: str) -> list[str]:
    """Lines that say what recipes/train_prior.py will take; see `plan_autoencoder`."""
    family = prior_family(config)
    if not family.fitted:
        return plan_training(config, [planned_prior(config)], gpu)
    if gpu:
        find_gpu(gpu)
    known = known_data(config)
    with without_values(on_gpu=False):
        cache = random_cache(config, build_autoencoder(config, plan_stages(config)[-1]), known.classes or 1000, 2)
        numbers = sum(t.numel() for t in family.build(config.prior, cache).state_dict().values())
    fitted = f"the prior ({family.title}, {numbers:,} numbers) is fitted at once and has no steps: its time is not planned"
    return [fitted, *encoding_lines(config, known), *known.lines]


def planned_prior(config: Config) -> Planned:
    """The prior, one that is trained in steps; in place of data it takes the number of classes."""
    stage = plan_stages(config)[-1]

    def build(config: Config, engine: Engine, data: Any) -> Training:
        return prior_training(config, build_autoencoder(config, stage), data or 1000, engine)

    return Planned("prior", config.prior, build, ("prior",))


def plan_training(config: Config, trainings: Sequence[Planned], gpu: str) -> list[str]:
    """Lines that say what trainings take, one after the other: parameters, memory, arithmetic, time, encodings.

    Nothing is trained or written. Memory is that of a step traced on tensors without values; time is measured here, or estimated
    for a GPU (`estimated_seconds`).

    Raises:
        ValueError: an unknown GPU, or what a model or a loss refuses.
    """
    config = dataclasses.replace(
        config,
        mixed_precision=config.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no"),
        compile=False,  # its graphs keep no more
        cuda_graphs=False,
        init_from=None,
    )
    named = find_gpu(gpu) if gpu else None
    known = known_data(config)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu = named is not None or device.type == "cuda"
    found = []
    for planned in trainings:
        data = known.classes if planned.name == "prior" else None
        traced = trace(lambda engine: planned.build(config, engine, data), config.mixed_precision, on_gpu=on_gpu)  # noqa: B023
        if named is not None:
            found.append(Estimate(planned, traced, estimated_seconds(traced.calls, named, config.allow_tf32)))
        else:
            found.append(Estimate(planned, traced, *timed(config, planned, traced, known, device)))
    lines = [*heading(config, named, device), *table(found, known), *verdict(found, named, device)]
    return [*lines, *encoding_lines(config, known), *known.lines]


def timed(config: Config, planned: Planned, traced: Trace, known: KnownData, device: torch.device) -> tuple[float | None, str]:
    """Seconds of a step on `device`, the median of at least two after one of warm-up, and what is to be said of it."""
    batch = planned.settings.train_batch_size
    size = batch if device.type == "cuda" else min(batch, max(1, int(batch * TIMED_FLOPS / max(1, traced.flops))))
    needed = sum(traced.memory.values()) - traced.memory["activations"] * (1 - size / batch)
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_memory()
    if traced.flops * size / batch > 10 * TIMED_FLOPS and device.type == "cpu":
        return None, f"{planned.name}: not timed here, as a single image takes {traced.flops / batch / 1e12:.1f} TFLOP"
    if free is not None and needed > free:
        return None, f"{planned.name}: not timed here, as it needs {needed / 2**30:.1f} GiB and {free / 2**30:.1f} are free"
    smaller = {s: dataclasses.replace(getattr(config, s), train_batch_size=size) for s in planned.sections}
    data = known.classes if planned.name == "prior" else known.images
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), backends(config, device):
        try:
            training = planned.build(dataclasses.replace(config, **smaller), LocalEngine(device, config.mixed_precision), data)
        except FileNotFoundError as error:  # weights of a frozen network
            return None, f"{planned.name}: not timed here: {error}"
        seconds: list[float] = []
        while len(seconds) < 3 or (sum(seconds[1:]) < TIMED_SECONDS and len(seconds) < 50):
            start = time.perf_counter()
            training.step(len(seconds))
            training.state.losses.pop().item()  # waits for the device
            seconds.append(time.perf_counter() - start)
    fewer = f"{planned.name}: timed with {size} images instead of {batch}" if size < batch else ""
    return statistics.median(seconds[1:]) * batch / size, fewer


def heading(config: Config, named: Gpu | None, device: torch.device) -> list[str]:
    precision = {"no": "float32", "bf16": "bf16", "fp16": "fp16"}[config.mixed_precision or "no"]
    if named is not None:
        where = f"one {named.name} (estimate)"
    elif device.type == "cuda":
        where = f"this machine, {torch.cuda.get_device_name(device)}"
    else:
        where = f"this machine, {platform.machine()} CPU, {torch.get_num_threads()} threads"
    side, colour = config.data.resolution, config.data.channels
    return [f"plan for {where}: {side} x {side} x {colour}, {precision}, one process; nothing is trained or written", ""]


def table(found: list[Estimate], known: KnownData) -> list[str]:
    """Parameters, memory, arithmetic and time, a column for each training."""
    rows: list[tuple[str, list[str]]] = [("", [each.planned.name for each in found])]
    parts = dict.fromkeys(part for each in found for part in each.trace.parameters)
    rows.append(("parameters", ["" for _ in found]))
    rows += [(f"  {part}", [f"{each.trace.parameters.get(part, 0):,}" for each in found]) for part in parts]
    rows.append(("  of these trained", [f"{each.trace.trained:,}" for each in found]))
    rows.append(("memory at its peak, MiB", ["" for _ in found]))
    rows += [(f"  {part}", [f"{each.trace.memory[part] / 2**20:,.1f}" for each in found]) for part in PARTS]
    rows.append(("  together", [f"{each.trace.peak / 2**20:,.1f}" for each in found]))
    rows.append(("GFLOP per image", [_number(each.trace.flops / each.images_per_step / 1e9) for each in found]))
    rows.append(("images per step", [f"{each.images_per_step:,}" for each in found]))
    rows.append(("steps", [f"{each.planned.settings.max_train_steps:,}" for each in found]))
    if known.rows:
        images = [each.images_per_step * each.planned.settings.max_train_steps for each in found]
        rows.append(("passes over the data", [_number(count / known.rows) for count in images]))
    speeds = [None if each.step_seconds is None else each.images_per_step / each.step_seconds for each in found]
    rows.append(("images per second", ["not known" if speed is None else _number(speed) for speed in speeds]))
    rows.append(("time", ["not known" if each.seconds is None else duration(each.seconds) for each in found]))
    width = max(len(label) for label, _ in rows) + 2
    columns = [max(len(row[1][i]) for row in rows) + 3 for i in range(len(found))]
    lines = (label.ljust(width) + "".join(map(str.rjust, cells, columns)) for label, cells in rows)
    return [line.rstrip() for line in lines]


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def verdict(found: list[Estimate], named: Gpu | None, device: torch.device) -> list[str]:
    """The whole time, where it is from, and whether the memory is enough."""
    lines = [""]
    seconds = [each.seconds for each in found]
    if all(each is not None for each in seconds):
        finish = f"done in about {duration(sum(filter(None, seconds)))}, validations and checkpoints not counted"
        lines.append(f"{finish} (the time of as many steps with all losses on)")
    if named is not None:
        lines.append(
            f"time is an estimate: the data sheet's rates x {EFFICIENCY:g}, measured once ({MEASURED}), and at least "
            f"{SECONDS_PER_CALL * 1e6:g} us per operator"
        )
    lines += [each.note for each in found if each.note]
    memory: float | None
    if named is not None:
        memory, place = (
            named.memory * USABLE,
            f"{named.name}'s {named.memory / 2**30:g} GiB, of which {USABLE:.0%} are counted on",
        )
    elif device.type == "cuda":
        free, whole = torch.cuda.mem_get_info(device)
        memory, place = free, f"the {free / 2**30:.1f} GiB of {whole / 2**30:.1f} that are free"
    else:
        memory = available_memory()
        place = "" if memory is None else f"the {memory / 2**30:.1f} GiB that are free"
    if memory is not None:
        largest = max(found, key=lambda each: each.trace.peak)
        needed = f"{largest.trace.peak / 2**30:.2f} GiB ({largest.planned.name})"
        if largest.trace.peak <= memory:
            lines.append(f"memory: {needed} fit into {place}")
        else:
            lines.append(
                f"memory: {needed} do not fit into {place}: lower train_batch_size (gradient_accumulation_steps keeps the global "
                "batch), set gradient_checkpointing=true, or choose a smaller model"
            )
    return lines


def encoding_lines(config: Config, known: KnownData) -> list[str]:
    """What an image is to the prior, and how large the cache of recipes/encode.py will be."""
    with without_values(on_gpu=False):
        autoencoder = build_autoencoder(dataclasses.replace(config, init_from=None), plan_stages(config)[-1])
        cache = random_cache(config, autoencoder, 1, 1)
        stored = cache.train.values_NC.to(cache.stored)
        size, side = stored.numel() * stored.element_size(), autoencoder.latent_size
    if bottleneck_class(config.autoencoder).discrete:
        codes = bottleneck_class(config.autoencoder).num_codes(config.autoencoder)
        lines = [f"an image is {side**2:,} tokens ({side} x {side}) of {codes:,} codes"]
    else:
        lines = [f"an image is {side} x {side} latents of {config.autoencoder.latent_channels} channels"]
    views = 1 + config.prior.num_augmentations
    if known.rows is None:
        return [*lines, f"cache on disk: {size * views + 4:,} bytes per training image"]
    whole = (known.rows * views + known.held_out) * size + 4 * (known.rows + known.held_out)
    images = f"{known.rows:,} images x {views} {'views' if views > 1 else 'view'} and {known.held_out:,} held out"
    return [*lines, f"cache on disk: {whole / 1e6:,.1f} MB for {images}"]
