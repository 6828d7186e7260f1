"""How fast the operations are: reference, torch.compile of it, triton and every installed peer, taking turns in one run.

    python profiling/bench_kernels.py                                  # all operations at their default shapes
    python profiling/bench_kernels.py --op nearest_code --shape N=8192,K=4096,D=64 --dtype float32 --json out.jsonl
    python profiling/bench_kernels.py --op mmd --impl triton --impl reference --plot plots

All cases of an operation and shape take turns, with a copy and a matrix product among them, so the ratios of one run hold on a
machine whose speed drifts; milliseconds of two runs do not compare. What is written:

- forward (with what the backward keeps), backward, both: median with the 20 % and 80 % quantiles. On a GPU between two events,
  behind a write that empties the L2 cache; on a CPU by the clock, with whatever the cache holds.
- extra_bytes: the most memory beyond what was there before the call, results included. On a GPU what torch allocated; on a CPU
  the growth of the process's resident memory (its peak is reset through /proc, so Linux only), which sees numpy's as well.
- floor_ms: the greater of flops / (rate of the run's product) and bytes / (rate of the run's copy); times_floor: how often the
  floor fits into the median. Flops and bytes are the least the operation needs, not what an implementation does. The product
  "float32" is without tf32, so on a GPU a kernel that splits float32 over tensor cores can come in under its floor.
- error: to the first case that ran (the reference, unless --impl leaves it out): the share of integers that differ, or
  |a - b| / |b|; of the value for forward, of the gradients for backward. A fast wrong result is no result.

A peer that is not installed, an implementation that cannot run and a case that fails have a line that says so. Cases of an
operation stand in profiling/bench/<operation>.py.
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from bench_report import HEADER, plot, show
from torch import Tensor

OPERATIONS = Path(__file__).with_name("bench")
PACKAGES = (
    "torch",
    "triton",
    "numpy",
    "scipy",
    "scikit-learn",
    "geomloss",
    "pykeops",
    "POT",
    "vector-quantize-pytorch",
    "flash-kmeans",
    "prdc",
)
WARM_UP, MIN_ROUNDS, MAX_ROUNDS = 2, 3, 100
TURN_SECONDS = 0.02  # a fast case has several samples a turn
PHASES = ("forward", "backward", "both")


@dataclass
class Case:
    """One way to compute an operation at one shape.

    Args:
        op: the operation.
        impl: "reference", "compile", "triton", or the peer's name.
        make: called once; returns `run`, which computes and returns the result anew at each call, and the tensors whose
            gradients are wanted (none: forward only).
        flops, bytes: the least that the forward needs.
        backward_flops, backward_bytes: the same for the backward.
        product: the product whose rate bounds the flops: "float32", "tf32", "bfloat16", "float16", "float64".
        needs: the module it imports, "" for none.
        refusal: why it cannot run here, or None.
        note: what differs from the operation (half the value, random directions), if anything.
    """

    op: str
    impl: str
    make: Callable[[], tuple[Callable[[], Any], list[Tensor]]]
    flops: float
    bytes: float
    backward_flops: float = 0.0
    backward_bytes: float = 0.0
    product: str = "float32"
    needs: str = ""
    refusal: str | None = None
    note: str = ""

    def least(self, phase: str) -> tuple[float, float]:
        forward, backward = (self.flops, self.bytes), (self.backward_flops, self.backward_bytes)
        return {"forward": forward, "backward": backward, "both": (forward[0] + backward[0], forward[1] + backward[1])}[phase]


class Bench:
    """Warm-up, memory and timing of one case on one device."""

    def __init__(self, case: Case, device: torch.device, flush: Tensor | None):
        self.case, self.device, self.flush = case, device, flush
        self.samples: list[tuple[float, ...]] = []
        self.run, self.leaves = case.make()
        self.cotangent: Tensor | None = None
        for _ in range(WARM_UP):
            result, gradients, _ = self.step()
        self.result, self.gradients = keep(result), [keep(gradient) for gradient in gradients]
        del result, gradients
        self.extra_bytes = self.memory()
        start = time.perf_counter()
        self.step()
        self.turn = max(1, min(20, int(TURN_SECONDS / max(time.perf_counter() - start, 1e-9))))

    def mark(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def step(self) -> tuple[Tensor, list[Tensor], list[Any]]:
        """One forward and, if there is something to differentiate, one backward under a fixed random cotangent."""
        if self.flush is not None:
            self.flush.zero_()
        marks = [self.mark()]
        result = self.run()
        result = result[0] if isinstance(result, tuple) else result
        marks.append(self.mark())
        gradients: list[Tensor] = []
        if self.leaves:
            if self.cotangent is None:
                generator = torch.Generator(result.device).manual_seed(0)
                self.cotangent = torch.empty_like(result).normal_(generator=generator)
                marks[-1] = self.mark()
            gradients = list(torch.autograd.grad(result, self.leaves, self.cotangent))
            marks.append(self.mark())
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return result, gradients, marks

    def sample(self) -> None:
        for _ in range(self.turn):
            marks = self.step()[2]
            if self.device.type == "cuda":
                times = [marks[i].elapsed_time(marks[j]) for i, j in ((0, 1), (1, -1), (0, -1))]
            else:
                times = [1000 * (marks[j] - marks[i]) for i, j in ((0, 1), (1, -1), (0, -1))]
            self.samples.append(tuple(times))

    def memory(self) -> dict[str, int | None]:
        """Peak extra bytes of the forward alone and of both, with the inputs, but nothing else, there before."""
        grown = growth(self.device)
        if grown is None:
            return {"forward": None, "both": None}
        result = self.run()
        found = {"forward": grown()}
        if self.leaves:
            result = result[0] if isinstance(result, tuple) else result
            torch.autograd.grad(result, self.leaves, self.cotangent)
        return found | {"both": grown()}

    def rows(self, floors: dict[str, float], first: Bench) -> Iterator[dict[str, Any]]:
        for number, phase in enumerate(PHASES if self.leaves else ("forward",)):
            times = [sample[number] for sample in self.samples]
            low, *_, high = statistics.quantiles(times, n=5, method="inclusive")
            median = statistics.median(times)
            flops, moved = self.case.least(phase)
            floor = 1e3 * max(flops / floors.get(self.case.product, math.inf), moved / floors.get("copy", math.inf)) or None
            row = line(self.case, phase, "ok") | {
                "ms": {"p20": low, "median": median, "p80": high},
                "samples": len(times),
                "extra_bytes": self.extra_bytes.get(phase),
                "gb_per_s": moved / median / 1e6,
                "tflop_per_s": flops / median / 1e9,
                "floor_ms": floor,
                "times_floor": median / floor if floor else None,
            }
            if phase == "forward" and self is not first:
                row["error"] = difference([self.result], [first.result])
            if phase == "backward" and self is not first:
                row["error"] = difference(self.gradients, first.gradients)
            yield row


def keep(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu()


def growth(device: torch.device) -> Callable[[], int] | None:
    """Peak bytes allocated since this call, as a function; None where they cannot be known."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        return lambda: torch.cuda.max_memory_allocated() - before
    if sys.platform == "linux" and os.access("/proc/self/clear_refs", os.W_OK):
        ctypes.CDLL(None).malloc_trim(0)  # freed memory that the process still holds would hide new memory
        before = resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        return lambda: resident("VmHWM") - before
    return None


def resident(field: str) -> int:
    """Bytes of this process by /proc: VmRSS now, VmHWM at the most."""
    found = [row for row in Path("/proc/self/status").read_text().splitlines() if row.startswith(field + ":")]
    return 1024 * int(found[0].split()[1])


def difference(got: list[Tensor], expected: list[Tensor]) -> float | None:
    """Share of integers that differ, or |got - expected| / |expected| over all tensors; None if they do not compare."""
    if [tensor.shape for tensor in got] != [tensor.shape for tensor in expected]:
        return None
    if not got[0].is_floating_point():
        return (got[0] != expected[0]).double().mean().item()
    away = sum((a.double() - b.double()).square().sum().item() for a, b in zip(got, expected, strict=True))
    size = sum(b.double().square().sum().item() for b in expected)
    return math.sqrt(away / size) if size else math.sqrt(away)


def line(case: Case, phase: str, status: str) -> dict[str, Any]:
    """A row with every field; measured ones are None."""
    flops, moved = case.least(phase)
    row = {"op": case.op, "impl": case.impl, "phase": phase, "status": status, "note": case.note, "product": case.product}
    row |= {"flops": flops, "bytes": moved}
    measured = ("ms", "samples", "extra_bytes", "gb_per_s", "tflop_per_s", "floor_ms", "times_floor", "error")
    return row | dict.fromkeys(measured)


def floors_of(products: set[str], device: torch.device) -> list[Case]:
    """A copy, and a product of square matrices in each precision: the two ceilings of the machine, as it is during the run."""
    count = (1 << 28) if device.type == "cuda" else (1 << 25)

    def copy() -> tuple[Callable, list]:
        source, target = torch.randn(count, device=device), torch.empty(count, device=device)
        return (lambda: target.copy_(source)[:1]), []

    def product(name: str, n: int) -> Callable:
        def make() -> tuple[Callable, list]:
            dtype = torch.float32 if name == "tf32" else getattr(torch, name)
            a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))

            def run() -> Tensor:
                before = torch.backends.cuda.matmul.allow_tf32
                torch.backends.cuda.matmul.allow_tf32 = name == "tf32"
                result = a @ b
                torch.backends.cuda.matmul.allow_tf32 = before
                return result

            return run, []

        return make

    cases = [Case("floor", "copy", copy, flops=0, bytes=8 * count)]
    for name in sorted(products):
        n = 1024 if device.type != "cuda" else 8192 if name.endswith("16") else 4096
        size = {"float64": 8, "bfloat16": 2, "float16": 2}.get(name, 4)
        cases.append(Case("floor", name, product(name, n), flops=2 * n**3, bytes=3 * size * n * n, product=name))
    return cases


def failures() -> tuple[type[Exception], ...]:
    """What a case may fail with and the others still run: out of memory, a compiler's refusal, a peer's own checks."""
    known: tuple[type[Exception], ...] = (RuntimeError, ValueError, TypeError, ImportError, AttributeError, AssertionError)
    if importlib.util.find_spec("triton") is None:
        return known
    from triton.runtime.errors import TritonError

    return (*known, TritonError)


def measure(cases: list[Case], device: torch.device, seconds: float) -> Iterator[dict[str, Any]]:
    """The cases of one operation and shape in turns, for `seconds` and at least three rounds; rows also if it is stopped."""
    flush = torch.empty(1 << 28, dtype=torch.int8, device=device) if device.type == "cuda" else None
    benches: list[Bench] = []
    for case in [*cases, *floors_of({case.product for case in cases}, device)]:
        missing = case.needs and importlib.util.find_spec(case.needs) is None
        status = f"not installed: {case.needs}" if missing else case.refusal and f"cannot run: {case.refusal}"
        if not status:
            try:
                benches.append(Bench(case, device, flush))
                continue
            except failures() as error:
                status = f"failed: {type(error).__name__}: {str(error).strip()[:300]}"
        yield line(case, "forward", status)
    try:
        start, rounds = time.perf_counter(), 0
        while rounds < MIN_ROUNDS or (rounds < MAX_ROUNDS and time.perf_counter() - start < seconds):
            for bench in benches:
                bench.sample()
            rounds += 1
    finally:
        ran = [bench for bench in benches if len(bench.samples) > 1]
        rates = {}
        for bench in ran:
            if bench.case.op == "floor":
                rate = bench.case.bytes if bench.case.impl == "copy" else bench.case.flops
                rates[bench.case.impl] = rate / statistics.median(sample[0] for sample in bench.samples) * 1e3
        for bench in ran:
            yield from bench.rows(rates, ran[0])


def machine(device: torch.device) -> dict[str, Any]:
    cpu = f"{platform.machine().replace('_', '-')} CPU, {os.cpu_count()} cores"
    hardware = f"{torch.cuda.get_device_name(device)}, {cpu}" if device.type == "cuda" else cpu
    versions = {"python": platform.python_version(), "cuda": torch.version.cuda or torch.version.hip}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    # Absolute paths say where it ran, not what ran.
    arguments = [Path(word).name if Path(word).is_absolute() else word for word in sys.argv[1:]]
    command = " ".join(["python profiling/bench_kernels.py", *arguments])
    return {"hardware": hardware, "threads": torch.get_num_threads(), "versions": versions, "command": command}


def operation_module(operation: str) -> Any:
    """profiling/bench/<operation>.py: SHAPES and DTYPES by device type, and `cases(Case, shape, dtype, device)`."""
    spec = importlib.util.spec_from_file_location(f"bench_{operation}", OPERATIONS / f"{operation}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def shape_of(text: str) -> dict[str, int]:
    try:
        shape = {key: int(size) for key, size in (part.split("=") for part in text.split(","))}
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected N=8192,K=4096,D=64 or the like, got {text!r}") from None
    if min(shape.values()) < 1:
        raise argparse.ArgumentTypeError(f"expected sizes of at least 1, got {text!r}")
    return shape


def refusal_of_shape(operation: str, shape: dict[str, int], default: dict[str, int]) -> str | None:
    """Why the operation cannot be measured at this shape: names it does not have, or lacks; None if it has just its own."""
    if shape.keys() == default.keys():
        return None
    got, example = (",".join(f"{name}={size}" for name, size in sizes.items()) for sizes in (shape, default))
    faults = ("missing", default.keys() - shape.keys()), ("unknown", shape.keys() - default.keys())
    found = "; ".join(f"{fault}: {', '.join(sorted(names))}" for fault, names in faults if names)
    return f"--shape of {operation} needs {', '.join(default)}, as in {example}, got {got} ({found})"


def main() -> None:
    operations = sorted(path.stem for path in OPERATIONS.glob("*.py"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", choices=operations, action="append", help="only this operation (may be repeated)")
    parser.add_argument("--impl", action="append", help="only cases whose name starts so (may be repeated)")
    parser.add_argument("--shape", type=shape_of, action="append", help="N=8192,K=4096,D=64 for the defaults (may be repeated)")
    parser.add_argument("--dtype", choices=["float32", "float16", "bfloat16", "float64"], action="append", help="may be repeated")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=10.0, help="measuring time of one operation and shape, after warm-up")
    parser.add_argument("--json", type=Path, help="append one JSON object a line to this file, after each operation and shape")
    parser.add_argument("--plot", type=Path, help="write one figure for each operation into this folder (needs matplotlib)")
    arguments = parser.parse_args()
    if arguments.plot and importlib.util.find_spec("matplotlib") is None:
        parser.error("--plot needs matplotlib, which is not installed (pip install matplotlib)")
    device = torch.device(arguments.device)
    modules = {operation: operation_module(operation) for operation in arguments.op or operations}
    for operation, module in modules.items():  # before anything is measured
        for shape in arguments.shape or []:
            if refusal := refusal_of_shape(operation, shape, module.SHAPES[device.type][0]):
                parser.error(refusal)
    os.environ.pop("TRITON_INTERPRET", None)  # the interpreter's times say nothing
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # `timeout` ends a run; what it has by then is written
    where, rows = machine(device), []
    for operation, module in modules.items():
        for shape in arguments.shape or module.SHAPES[device.type]:
            for dtype in arguments.dtype or module.DTYPES[device.type]:
                torch.manual_seed(0)
                torch._dynamo.reset()
                cases = list(module.cases(Case, shape, getattr(torch, dtype), device))
                if arguments.impl:
                    cases = [case for case in cases if case.impl.startswith(tuple(arguments.impl))]
                print(f"\n{operation} {shape} {dtype} on {where['hardware']}")
                print(HEADER, flush=True)
                for row in measure(cases, device, arguments.seconds):
                    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
                    row |= {"shape": shape, "dtype": dtype, "for_op": operation, "time": now} | where
                    rows.append(row)
                    print(show(row), flush=True)
                    if arguments.json:
                        arguments.json.parent.mkdir(parents=True, exist_ok=True)
                        with arguments.json.open("a") as file:
                            file.write(json.dumps(row) + "\n")
    if arguments.plot:
        plot(rows, arguments.plot)


if __name__ == "__main__":
    main()
