"""Tiles of an operation's kernels by measurement: writes the table that its launcher looks up.

    python profiling/tune_kernels.py --op group_norm_silu                      # on the GPU that the table is for
    python profiling/tune_kernels.py --op nearest_code --dry-run --gpu sm_90   # anywhere: the candidates that survive compilation

Every candidate of profiling/tune/<operation>.py is compiled in parallel processes; those that spill, exceed shared memory or lack
the tensor core's instruction are refused (the gate of inspect_kernels.py). What is left is launched with the operation's own
arguments: medians of events behind an L2 flush, of the kernel alone. The fastest of each shape goes into
kernels/dae_kernels/<operation>/tiles.json, in place of what stood there for this GPU generation; tiles of other GPUs stay.
"""

import argparse
import concurrent.futures
import datetime
import json
import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from inspect_kernels import TARGETS, compiled, faults, resources
from measuring import load_module, machine, quantiles

SPACES = Path(__file__).with_name("tune")
Tile = dict[str, int]
Work = tuple[str, str, dict[str, Any], Tile, str]  # operation, kernel, shape, tile, target


def space_of(operation: str) -> ModuleType:
    return load_module(SPACES / f"{operation}.py")


def refused(work: Work) -> str | None:
    """Why a candidate is out, or None. Runs in a process of its own; what it compiled stays in Triton's cache."""
    operation, kernel, shape, tile, target = work
    os.environ.pop("TRITON_INTERPRET", None)
    variant = space_of(operation).variant(kernel, shape, tile, target)
    try:
        report = resources(compiled(variant, target), target, variant.product) | {"target": target, "product": variant.product}
    except Exception as error:  # the compiler's, of any kind
        return f"does not compile: {' '.join(str(error).split()):.80}"
    return "; ".join(faults(report)) or None


def survivors(works: list[Work], processes: int) -> list[Work]:
    """The candidates that the gate lets pass, with a line for each."""
    passed = []
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(processes, mp_context=context) as pool:
        for work, reason in zip(works, pool.map(refused, works), strict=True):
            print(f"{work[1]:<16}{told(work[2])}  {told(work[3])}  {reason or 'ok'}", flush=True)
            passed += [] if reason else [work]
    return passed


def told(numbers: dict[str, Any]) -> str:
    return " ".join(f"{name}={number}" for name, number in numbers.items())


def launch_of(space: ModuleType, kernel: str, tile: Tile, call: Callable[[], None]) -> Callable[[], None]:
    """The kernel's launch within a call of the operation, with this tile, to be repeated."""
    from triton.runtime.jit import JITFunction

    found: list[Callable[[], None]] = []
    run = JITFunction.run

    def recording(self: Any, *arguments: Any, **options: Any) -> Any:
        if self.fn.__name__ == f"{kernel}_kernel":
            found.append(lambda: run(self, *arguments, **options))
        return run(self, *arguments, **options)

    def looked_up(operation: str, gpu: str | None, name: str, *_: Any) -> Tile | None:
        return tile if name == kernel else None

    with mock.patch.object(space.MODULE, "measured_tile", looked_up), mock.patch.object(JITFunction, "run", recording):
        call()
    return found[0]


def microseconds(launch: Callable[[], None], repeats: int = 30) -> float:
    """Median time of a launch on the GPU, each behind a write that empties the L2 cache."""
    flush = torch.empty(2**28, dtype=torch.int8, device="cuda")
    samples = []
    for _ in range(repeats):
        flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        launch()
        end.record()
        torch.cuda.synchronize()
        samples.append(1e3 * start.elapsed_time(end))
    return quantiles(samples[repeats // 3 :])["median"]


def entries_of(operation: str, works: list[Work]) -> list[dict[str, Any]]:
    """The fastest tile of each kernel and shape, as the table has it."""
    space, device, best = space_of(operation), torch.device("cuda"), {}
    for _, kernel, shape, tile, _ in works:
        us = microseconds(launch_of(space, kernel, tile, space.operation(shape, device)))
        print(f"{kernel:<16}{told(shape)}  {told(tile)}  {us:.1f} us", flush=True)
        place = (kernel, json.dumps(shape))
        if place not in best or us < best[place]["us"]:
            entry = {"kernel": kernel, "when": space.when(shape), "sizes": space.sizes(shape), "tile": tile}
            best[place] = {**entry, "us": round(us, 1)}
    return list(best.values())


def write_table(path: Path, gpu: str, made: dict[str, Any], entries: list[dict[str, Any]]) -> None:
    """`entries` as the tiles of the GPU generation; other generations' stay, with what they were made with."""
    table = json.loads(path.read_text()) if path.exists() else {"tiles": {}}
    table["made"] = {name: of for name, of in table.get("made", {}).items() if name in table["tiles"]} | {gpu: made}
    table["tiles"][gpu] = entries
    aside = path.with_suffix(".part")
    aside.write_text(formatted(table))
    aside.replace(path)


def formatted(table: dict[str, Any]) -> str:
    """The table as JSON with one entry per line."""
    made = ",\n".join(f"  {json.dumps(gpu)}: {json.dumps(what)}" for gpu, what in table["made"].items())
    tiles = ",\n".join(
        f"  {json.dumps(gpu)}: [\n" + ",\n".join(f"   {json.dumps(entry)}" for entry in entries) + "\n  ]"
        for gpu, entries in table["tiles"].items()
    )
    return f'{{\n "made": {{\n{made}\n }},\n "tiles": {{\n{tiles}\n }}\n}}\n'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", required=True, choices=sorted(path.stem for path in SPACES.glob("*.py")))
    parser.add_argument("--dry-run", action="store_true", help="compile and list the candidates, measure and write nothing")
    parser.add_argument("--gpu", choices=list(TARGETS), help="the generation to compile for; default: that of the GPU here")
    parser.add_argument("--kernel", help="only this kernel")
    parser.add_argument("--shapes", type=int, help="only so many of the shapes, the first ones")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="that compile")
    arguments = parser.parse_args()
    from dae_kernels.tiles import FILE, FOLDER, generation

    here = generation(torch.device("cuda", 0)) if torch.cuda.is_available() else None
    gpu = arguments.gpu or here
    if gpu is None or (gpu != here and not arguments.dry_run):
        parser.error(f"tiles are measured on the GPU they are for, and here is {here or 'none'}: use --dry-run with --gpu")
    if gpu not in TARGETS:
        parser.error(f"inspect_kernels.py does not know {gpu}, so its spills cannot be seen: it takes {', '.join(TARGETS)}")
    os.environ.pop("TRITON_INTERPRET", None)
    space = space_of(arguments.op)
    kernels = [kernel for kernel in space.KERNELS if arguments.kernel in (None, kernel)]
    works = [
        (arguments.op, kernel, shape, tile, gpu)
        for kernel in kernels
        for shape in space.SHAPES[: arguments.shapes]
        for tile in space.candidates(kernel, shape)
    ]
    passed = survivors(works, arguments.processes)
    print(f"{len(passed)} of {len(works)} candidates compile for {gpu} without a fault")
    if arguments.dry_run:
        return
    device = torch.device("cuda", 0)
    made = machine(device, "torch", "triton") | {"date": datetime.date.today().isoformat()}
    made["what"] = "medians of the kernels alone, behind an L2 flush"
    write_table(FOLDER / arguments.op / FILE, gpu, made, entries_of(arguments.op, passed))


if __name__ == "__main__":
    main()
