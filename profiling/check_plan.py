"""Compare what `--plan` says of memory and time with what profile_step.py measures, for the trainings of configurations.

    python profiling/check_plan.py digits digits-kl photos photos-gan
    python profiling/check_plan.py cifar10_vq --rounds 9 --json out.jsonl

Memory is the peak of a step: planned by a trace on tensors without values, measured by torch's record of allocations. Times are
taken in turns within one process: `--rounds` times two steps and more as the plan times them, and four as profile_step.py does.
Printed is the least of each, as other work on the machine only adds, and the ratio, planned / measured. A Diffusion Transformer
is not profiled, a mixture has no steps.
"""

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from bench_report import software
from clock import Clock, ClockedEngine, ClockedStep
from configuration import CONFIGS, read_config
from measuring import append_row, machine, measuring_parser, now
from profile_step import measure, record

from dae.config import Config
from dae.planning.data import KnownData, known_data
from dae.planning.plan import Planned, planned_prior, planned_stages, timed
from dae.planning.tracing import trace
from dae.quantizers import bottleneck_class

STEPS = 4


def trainings(config: Config, known: KnownData) -> Iterator[tuple[Planned, Any]]:
    """Each training with the data that its steps are timed on."""
    for planned in planned_stages(config):
        yield planned, known.images
    if bottleneck_class(config.autoencoder).discrete:
        yield planned_prior(config), known.classes


def compare(config: Config, planned: Planned, data: Any, known: KnownData, rounds: int, device: torch.device) -> dict[str, Any]:
    """Bytes and milliseconds, planned and measured."""
    precision, on_gpu = config.mixed_precision, device.type == "cuda"
    without_images = data if isinstance(data, int) else None
    traced = trace(lambda engine: planned.build(config, engine, without_images), precision, on_gpu=on_gpu)
    clock = Clock(device)
    step = ClockedStep(planned.build(config, ClockedEngine(clock, precision), data), clock, planned.settings)
    seconds, measured = [], []
    for _ in range(rounds):
        taken, note = timed(config, planned, traced, known, device)
        if taken is None:
            sys.exit(note)
        seconds.append(taken)
        measured.append(measure(step, STEPS)["ms"]["median"])
    with tempfile.TemporaryDirectory() as folder:
        peak = record(step, Path(folder) / "trace.json.gz")["peak_bytes"]
    ms = {"planned": 1000 * min(seconds), "measured": min(measured)}
    return {"training": planned.name, "bytes": {"planned": traced.peak, "measured": peak}, "ms": ms, "rounds": rounds}


def main() -> None:
    parser = measuring_parser(__doc__)
    parser.add_argument("configs", nargs="+", metavar="config", help="names in recipes/configs, or YAML files")
    parser.add_argument("--rounds", type=int, default=5, help="default: %(default)s")
    arguments = parser.parse_args()
    if arguments.rounds < 1:
        parser.error(f"--rounds: expected at least 1, got {arguments.rounds}")
    device = torch.device(arguments.device)
    where = machine(device, "torch")
    print(f"{where['hardware']}, {torch.get_num_threads()} threads; {software(where)}\n")
    print(f"| {'training':<22} | MiB planned | measured | ratio | ms planned | measured | ratio |")
    print(f"|{'-' * 24}|------------:|---------:|------:|-----------:|---------:|------:|", flush=True)
    for name in arguments.configs:
        path = Path(name) if name.endswith(".yaml") else CONFIGS / f"{name}.yaml"
        try:
            config = read_config(path, ["mixed_precision=no"])
            known = known_data(config)
        except (ValueError, FileNotFoundError) as error:
            parser.error(" ".join(str(error).split()))
        for planned, data in trainings(config, known):
            found = compare(config, planned, data, known, arguments.rounds, device)
            mib = [found["bytes"][key] / 2**20 for key in ("planned", "measured")]
            ms = [found["ms"][key] for key in ("planned", "measured")]
            row = f"| {f'{path.stem} {planned.name}':<22} | {mib[0]:11.1f} | {mib[1]:8.1f} | {mib[0] / mib[1]:5.2f} "
            print(f"{row}| {ms[0]:10.0f} | {ms[1]:8.0f} | {ms[0] / ms[1]:5.2f} |", flush=True)
            append_row(arguments.json, {"config": path.stem, "time": now()} | found | where)


if __name__ == "__main__":
    main()
