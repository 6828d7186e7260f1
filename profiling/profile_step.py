"""Profile time and memory of a training step, for each stage of a recipe's configuration and for its prior.

    python profiling/profile_step.py --config recipes/configs/digits.yaml
    python profiling/profile_step.py --config recipes/configs/photos.yaml --stage stage2 mixed_precision=bf16 channels_last=true
    python profiling/profile_step.py --config recipes/configs/imagenet256.yaml --synthetic mixed_precision=bf16

The step is the recipe's (dae/training), with its losses, layout, precision, kernels and torch.compile; an adversarial loss is on
from the first step, and the codebook starts at random. Printed, and written to --output:

- time by part: data, forward, backward, update (clipping, AdamW, average of weights, codebook).
- time by block: forward hooks mark the start of a block of the model, and the gradient at the same place in the backward pass
  marks its end there, so the blocks add up to the step. On CUDA the marks are events in the stream, without synchronisation.
  Medians over --steps steps without the profiler. A compiled module is one block.
- kept: growth of allocated memory over a block's forward pass, saved for its backward pass (negative: it frees the previous
  block's). From one step under torch.profiler.
- profile.png: both as a picture (needs matplotlib). trace_<stage>.json.gz: that step as a Chrome trace, with the same phases
  and blocks in two extra rows; open it in https://ui.perfetto.dev or chrome://tracing.

With --synthetic images are random, and only torch is needed; the prior's tokens and LPIPS's weights are always random.
Times of different machines, or of one machine under different load, do not compare; shares within a run do.
"""

import gzip
import importlib.util
import itertools
import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from bench_report import software
from clock import Clock, ClockedEngine, ClockedStep, phases_of, seconds_of
from configuration import read_config
from measuring import append_row, machine, measuring_parser, quantiles, synchronize
from step_figure import draw
from torch.profiler import ProfilerActivity, record_function
from training_steps import state_bytes

from dae.config import Config
from dae.planning.trainings import prior_training, stage_training
from dae.quantizers import bottleneck_class
from dae.training import plan_stages
from dae.training.autoencoder import build_autoencoder
from dae.training.engine import set_backends

PHASES = ("data", "forward", "backward", "update")
MARK = "training step"


def steps_of(config: Config, device: torch.device, synthetic: bool, only: list[str] | None) -> Iterator[tuple[str, ClockedStep]]:
    """Yield name and step of each stage, then of the prior, one at a time to keep only one in memory."""
    data = None
    if not synthetic:
        from dae.data import load_data

        data = load_data(config.data, config.seed)
    for stage in plan_stages(config):
        if only and stage.name not in only:
            continue
        clock = Clock(device)
        engine = ClockedEngine(clock, config.mixed_precision)
        training = stage_training(config, stage, build_autoencoder(config, stage), engine, data)
        yield stage.name, ClockedStep(training, clock, stage.config)
    if bottleneck_class(config.autoencoder).discrete and not (only and "prior" not in only):
        clock = Clock(device)
        engine = ClockedEngine(clock, config.mixed_precision)
        autoencoder = build_autoencoder(config, plan_stages(config)[-1])
        training = prior_training(config, autoencoder, data.num_classes if data else 1000, engine)
        yield "prior", ClockedStep(training, clock, config.prior)


def measure(step: ClockedStep, steps: int) -> dict[str, Any]:
    """Milliseconds of a step, its phases and its blocks: medians over `steps` steps after warm-up."""
    samples = []
    warm_up = max(2, steps // 4)
    for number in range(warm_up + steps):
        step()
        spent = seconds_of(step.clock.take())
        if number >= warm_up:
            samples.append({key: 1000 * value for key, value in spent.items()})
    ms = quantiles([sum(sample.values()) for sample in samples])
    blocks: dict[str, dict[str, float]] = {}
    for phase, block in dict.fromkeys(key for sample in samples for key in sample):
        blocks.setdefault(block, {})[phase] = statistics.median(sample.get((phase, block), 0.0) for sample in samples)
    parts = {
        phase: statistics.median(sum(v for key, v in sample.items() if key[0] == phase) for sample in samples) for phase in PHASES
    }
    batch = step.settings.train_batch_size * step.settings.gradient_accumulation_steps
    return {"batch": batch, "ms": ms, "images_per_second": batch / ms["median"] * 1000, "parts": parts, "blocks": blocks}


def record(step: ClockedStep, path: Path) -> dict[str, Any]:
    """Run one step under torch.profiler and write the trace; returns phases and allocated bytes over milliseconds."""
    device, state = step.device, state_bytes(step.training)
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    for _ in range(2):  # the profiler's first step is slow
        step.clock.take()
        synchronize(device)
        with torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
            start = time.perf_counter()
            with record_function(MARK):
                step()
            synchronize(device)
    stamps = [(s.phase, s.block, 1e3 * (s.seconds - start)) for s in step.clock.take()]
    path.parent.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(str(path))
    with gzip.open(path, "rt") as file:
        trace = json.load(file)
    events = trace["traceEvents"]
    zero = next(event["ts"] for event in events if event.get("name") == MARK)  # microseconds
    memory = memory_of(events, zero, device, sum(state.values()))
    blocks = ((a[1], a[2], b[2]) for a, b in itertools.pairwise(stamps))
    for row, spans in (("phases", phases_of(stamps)), ("blocks", blocks)):
        for name, begin, end in spans:
            place = {"pid": MARK, "tid": row, "ts": zero + 1000 * begin, "dur": 1000 * (end - begin)}
            events.append({"ph": "X", "cat": "step", "name": name} | place)
    with gzip.open(path, "wt") as file:
        json.dump(trace, file)
    return {"stamps": stamps, "memory": memory, "state_bytes": state, "peak_bytes": max(size for _, size in memory)}


def memory_of(events: list[dict], zero: float, device: torch.device, state: int) -> list[tuple[float, int]]:
    """(milliseconds, bytes allocated on the device) at every allocation and release.

    CUDA's allocator reports the total. On a CPU torch counts only changes under the profiler; the bytes allocated before,
    `state`, are added.
    """
    kind = 1 if device.type == "cuda" else 0  # c10::DeviceType
    changes = [e for e in events if e.get("name") == "[memory]" and e["args"]["Device Type"] == kind and e["ts"] >= zero]
    changes.sort(key=lambda event: event["ts"])
    if device.type == "cuda":
        return [((e["ts"] - zero) / 1000, e["args"]["Total Allocated"]) for e in changes]
    sizes = itertools.accumulate((e["args"]["Bytes"] for e in changes), initial=state)
    return list(zip([0.0, *((e["ts"] - zero) / 1000 for e in changes)], sizes, strict=True))


def kept_bytes(recorded: dict[str, Any]) -> dict[str, int]:
    """Growth of allocated memory over the forward passes of each block."""
    memory: list[tuple[float, int]] = recorded["memory"]
    found: dict[str, int] = {}

    def at(ms: float) -> int:
        return next((size for when, size in reversed(memory) if when <= ms), memory[0][1])

    for (phase, block, begin), (_, _, end) in itertools.pairwise(recorded["stamps"]):
        if phase == "forward":
            found[block] = found.get(block, 0) + at(end) - at(begin)
    return found


def parts_table(profiles: dict[str, dict]) -> str:
    lines = [f"{'':<8}{'batch':>7}" + "".join(f"{phase:>10}" for phase in PHASES) + f"{'step':>10}{'images/s':>10}"]
    for name, found in profiles.items():
        times = "".join(f"{found['parts'][phase]:>10.2f}" for phase in PHASES)
        lines.append(f"{name:<8}{found['batch']:>7}{times}{found['ms']['median']:>10.2f}{found['images_per_second']:>10.0f}")
    return "\n".join(lines)


def blocks_table(name: str, found: dict) -> str:
    everything = sum(sum(cells.values()) for cells in found["blocks"].values())
    lines = [f"{name:<26}{'forward':>10}{'backward':>10}{'other':>10}{'share':>8}{'kept MiB':>10}"]
    for block, cells in found["blocks"].items():
        other = sum(value for phase, value in cells.items() if phase not in ("forward", "backward"))
        times = [cells.get("forward", 0.0), cells.get("backward", 0.0), other]
        text = "".join(f"{value:>10.2f}" if value else f"{'':>10}" for value in times)
        kept = found["kept_bytes"].get(block)
        end = "" if kept is None else f"{kept / 2**20:>10.1f}"
        lines.append(f"{block:<26}{text}{sum(times) / everything:>8.1%}{end}")
    sizes = ", ".join(f"{key} {size / 2**20:.1f}" for key, size in found["state_bytes"].items())
    lines.append(f"peak {found['peak_bytes'] / 2**20:.1f} MiB, of which kept between steps: {sizes}")
    return "\n".join(lines)


def main() -> None:
    parser = measuring_parser(__doc__)
    parser.add_argument("--config", required=True, help="YAML file of a recipe")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="as for the recipes, for example compile=true")
    parser.add_argument("--steps", type=int, default=20, help="steps that are timed, after a quarter as many of warm-up")
    parser.add_argument("--stage", action="append", help="only this one: stage1, stage2, joint, prior (may be repeated)")
    parser.add_argument("--synthetic", action="store_true", help="random images instead of the data set")
    folder = Path("runs/profile")
    parser.add_argument("--output", type=Path, default=folder, help="folder of picture and traces (default: %(default)s)")
    arguments = parser.parse_intermixed_args()
    if arguments.steps < 1:
        parser.error(f"--steps: expected at least 1, got {arguments.steps}")
    try:
        config = read_config(arguments.config, arguments.overrides)
    except (ValueError, FileNotFoundError) as error:
        parser.error(str(error))
    if config.cuda_graphs:
        parser.error("a CUDA graph has no blocks to time: profile without cuda_graphs, and time the whole step by bench_step.py")
    names = [stage.name for stage in plan_stages(config)] + ["prior"] * bottleneck_class(config.autoencoder).discrete
    if unknown := sorted(set(arguments.stage or []) - set(names)):
        parser.error(f"--stage: expected one of {', '.join(names)}, got {unknown[0]}")

    device = torch.device(arguments.device)
    set_backends(config, device)
    where, title = machine(device, "torch", "triton"), " ".join([Path(arguments.config).name, *arguments.overrides])
    print(f"{title} on {where['hardware']}; {software(where)}\nmilliseconds, medians of {arguments.steps} steps\n", flush=True)
    profiles: dict[str, dict] = {}
    for name, step in steps_of(config, device, arguments.synthetic, arguments.stage):
        found = measure(step, arguments.steps)
        recorded = record(step, arguments.output / f"trace_{name}.json.gz")
        found |= {"kept_bytes": kept_bytes(recorded)} | {key: recorded[key] for key in ("state_bytes", "peak_bytes")}
        print(blocks_table(name, found) + "\n", flush=True)
        append_row(arguments.json, {"stage": name, "config": title, "steps": arguments.steps} | found | where)
        profiles[name] = found | {"recorded": recorded}
        del step
    print(parts_table(profiles))
    print(f"\nwrote {', '.join(str(arguments.output / f'trace_{name}.json.gz') for name in profiles)}")
    if importlib.util.find_spec("matplotlib") is None:
        print("no profile.png: matplotlib is not installed (pip install matplotlib)")
        return
    picture = arguments.output / "profile.png"
    draw(profiles, f"{title} on {where['hardware']}\n{software(where)}, medians of {arguments.steps} steps", picture)
    print(f"wrote {picture}")


if __name__ == "__main__":
    main()
