"""Benchmark the operations: reference, compiled reference, triton and every installed peer, interleaved in one run.

    python profiling/bench_kernels.py                                  # all operations at their default shapes
    python profiling/bench_kernels.py --op nearest_code --shape N=8192,K=4096,D=64 --dtype float32 --json out.jsonl
    python profiling/bench_kernels.py --op mmd --impl triton --impl reference --plot plots
    python profiling/bench_kernels.py --bars --prepare                 # compiles, in parallel processes, and measures nothing
    python profiling/bench_kernels.py --bars --json out.jsonl          # the shapes that bars.py judges

A case is printed as soon as it is compiled and has run: its time alone. Then all cases of an operation and shape take turns, with
a copy and a matrix product among them, so the ratios of one run hold on a machine whose speed drifts; milliseconds of two runs do
not compare. What is written is of the turns, or, where the run was ended before them (`rounds` is 0), of each case alone:

- forward (including what it saves for the backward), backward, both: median with the 20 % and 80 % quantiles. On a GPU between
  two events, after a write that flushes the L2 cache; on a CPU by the clock, without flushing the cache.
- extra_bytes: peak memory beyond that before the call, results included. On a GPU as allocated by torch; on a CPU the growth of
  the process's resident memory (its peak is reset through /proc, so Linux only), which includes numpy's.
- floor_ms: the greater of flops / (rate of the run's product) and bytes / (rate of the run's copy); times_floor: median / floor.
  Flops and bytes are the minimum for the operation, not those of an implementation. The product "float32" is without tf32, so
  on a GPU a kernel that splits float32 over tensor cores can beat its floor.
- error: against the first case that ran (the reference, unless --impl leaves it out): the share of integers that differ, or
  |a - b| / |b|; of the value for forward, of the gradients for backward.

A peer that is not installed (printed once, written for each case), an implementation that cannot run, a case that fails and a
peer whose result is not the operation's have a line that says so instead of a figure. Cases of an operation stand in
profiling/bench/<operation>.py.
"""

import argparse
import functools
import importlib.util
import itertools
import math
import os
import signal
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from bars import PANELS
from bench_report import HEADER, plot, show
from cases import Case
from measuring import append_row, growth, load_module, machine, measuring_parser, now, quantiles, recorded_event, synchronize
from prepare import OPERATIONS, Panel, prepare, run_once
from torch import Tensor

PACKAGES = (
    "torch", "triton", "numpy", "scipy", "scikit-learn", "geomloss", "pykeops", "POT", "vector-quantize-pytorch", "flash-kmeans",
    "prdc", "flash-sinkhorn", "liger-kernel", "cut-cross-entropy", "quack-kernels",
)  # fmt: skip
WARM_UP, MIN_ROUNDS, MAX_ROUNDS = 2, 3, 100
FOREIGN = 0.1  # a peer whose result or gradients are further than this from the reference's computes something else
TURN_SECONDS = 0.02  # a fast case has several samples per turn
PHASES = {"forward": (0, 1), "backward": (1, -1), "both": (0, -1)}  # from which mark of a step to which
MEASURED = ("ms", "samples", "rounds", "extra_bytes", "gb_per_s", "tflop_per_s", "floor_ms", "times_floor", "error")


class Bench:
    """Warm-up, memory and timing of one case on one device."""

    def __init__(self, case: Case, device: torch.device, flush: Tensor | None):
        self.case, self.device, self.flush = case, device, flush
        self.samples: dict[str, list[float]] = {phase: [] for phase in PHASES if case.leaves or phase == "forward"}
        self.cotangent: Tensor | None = None
        for _ in range(WARM_UP):
            result, gradients, _ = self.step()
        self.results = {"forward": [result.detach().cpu()], "backward": [gradient.cpu() for gradient in gradients]}
        del result, gradients
        self.extra_bytes = self.memory()
        start = time.perf_counter()
        self.step()
        self.turn = max(1, min(20, int(TURN_SECONDS / max(time.perf_counter() - start, 1e-9))))
        self.rounds = 0
        self.take(max(MIN_ROUNDS, self.turn))
        self.alone, self.samples = self.samples, {phase: [] for phase in self.samples}

    def mark(self) -> Any:
        """The current time: an event in the GPU's stream, or the clock."""
        return recorded_event(self.device) or time.perf_counter()

    def forward(self) -> Tensor:
        result = self.case.run()
        return result[0] if isinstance(result, tuple) else result

    def step(self) -> tuple[Tensor, tuple[Tensor, ...], list[Any]]:
        """Result, gradients for a fixed random cotangent if there are leaves, and the marks of PHASES."""
        if self.flush is not None:
            self.flush.zero_()
        marks = [self.mark()]
        result, gradients = self.forward(), ()
        marks.append(self.mark())
        if self.case.leaves:
            if self.cotangent is None:
                generator = torch.Generator(result.device).manual_seed(0)
                self.cotangent = torch.empty_like(result).normal_(generator=generator)
            gradients = torch.autograd.grad(result, self.case.leaves, self.cotangent)
            marks.append(self.mark())
        synchronize(self.device)
        return result, gradients, marks

    def sample(self) -> None:
        self.take(self.turn)
        self.rounds += 1

    def take(self, steps: int) -> None:
        for _ in range(steps):
            marks = self.step()[2]
            for phase, times in self.samples.items():
                a, b = (marks[number] for number in PHASES[phase])
                times.append(a.elapsed_time(b) if self.device.type == "cuda" else 1000 * (b - a))

    def memory(self) -> dict[str, int]:
        """Peak extra bytes of the forward alone and of both, with only the inputs allocated before."""
        grown = growth(self.device)
        if grown is None:
            return {}
        result = self.forward()
        found = {"forward": grown()}
        if self.case.leaves:
            torch.autograd.grad(result, self.case.leaves, self.cotangent)
        return found | {"both": grown()}

    def times(self, phase: str) -> list[float]:
        """Milliseconds of the turns, or, before the first of them is over, of the case alone."""
        return self.samples[phase] if self.rounds else self.alone[phase]

    def rows(self, floors: dict[str, float], first: "Bench") -> Iterator[dict[str, Any]]:
        """A row for each phase; `floors` has flops and bytes per second by product and "copy"."""
        for phase in self.samples:
            times = self.times(phase)
            ms = quantiles(times)
            flops, moved = self.case.minimum(phase)
            floor = 1e3 * max(flops / floors.get(self.case.product, math.inf), moved / floors.get("copy", math.inf)) or None
            row = line(self.case, phase, "ok") | {
                "ms": ms,
                "samples": len(times),
                "rounds": self.rounds,
                "extra_bytes": self.extra_bytes.get(phase),
                "gb_per_s": moved / ms["median"] / 1e6,
                "tflop_per_s": flops / ms["median"] / 1e9,
                "floor_ms": floor,
                "times_floor": ms["median"] / floor if floor else None,
            }
            if phase in self.results and self is not first:
                row["error"] = difference(self.results[phase], first.results[phase])
            yield row


def difference(got: list[Tensor], expected: list[Tensor]) -> float | None:
    """Share of integers that differ, or |got - expected| / |expected| over all tensors; None if shapes or types do not match."""
    if [tensor.shape for tensor in got] != [tensor.shape for tensor in expected]:
        return None
    if not got[0].is_floating_point():
        return (got[0] != expected[0]).double().mean().item()
    away = sum((a.double() - b.double()).square().sum().item() for a, b in zip(got, expected, strict=True))
    size = sum(b.double().square().sum().item() for b in expected)
    return math.sqrt(away / size) if size else math.sqrt(away)


def line(case: Case, phase: str, status: str) -> dict[str, Any]:
    """A row with every field; measured ones are None."""
    flops, moved = case.minimum(phase)
    row = {"op": case.op, "impl": case.impl, "phase": phase, "status": status, "note": case.note, "product": case.product}
    return row | {"flops": flops, "bytes": moved} | dict.fromkeys(MEASURED)


def floors_of(products: set[str], device: torch.device) -> Iterator[Case]:
    """Cases that measure the machine's limits during the run: a copy, and a square matrix product per precision."""
    count = (1 << 28) if device.type == "cuda" else (1 << 25)

    @functools.cache
    def operands(*shape: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
        return [torch.randn(shape, device=device).to(dtype) for _ in range(2)]

    def copy() -> Tensor:
        source, target = operands(count)
        return target.copy_(source)[:1]

    def product(name: str, n: int) -> Tensor:
        a, b = operands(n, n, dtype=torch.float32 if name == "tf32" else getattr(torch, name))
        before = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = name == "tf32"
        result = a @ b
        torch.backends.cuda.matmul.allow_tf32 = before
        return result

    yield Case("floor", "copy", copy, bytes=8 * count)
    for name in sorted(products):
        n = 1024 if device.type != "cuda" else 8192 if name.endswith("16") else 4096
        size = {"float64": 8, "bfloat16": 2, "float16": 2}.get(name, 4)
        yield Case("floor", name, functools.partial(product, name, n), flops=2 * n**3, bytes=3 * size * n * n, product=name)


def failures(case: Case) -> tuple[type[Exception], ...]:
    """What a case may fail with and the others still run: out of memory, a compiler's refusal; anything in a peer's own code."""
    if case.needs:
        return (Exception,)
    known: tuple[type[Exception], ...] = (RuntimeError, ValueError, TypeError, ImportError, AttributeError, AssertionError)
    if importlib.util.find_spec("triton") is None:
        return known
    from triton.runtime.errors import TritonError

    return (*known, TritonError)


def measure(cases: list[Case], device: torch.device, seconds: float) -> Iterator[tuple[dict[str, Any], bool]]:
    """Rows of the cases of one operation and shape, and whether they are final.

    First each case alone, as soon as it has run. Then all in turns, for `seconds` and at least three rounds. Final rows come also
    if the run is ended.
    """
    flush = torch.empty(1 << 28, dtype=torch.int8, device=device) if device.type == "cuda" else None
    benches: list[Bench] = []

    def measured() -> list[Bench]:
        return [bench for bench in benches if bench.case.op != "floor"]

    try:
        for case in itertools.chain(floors_of({case.product for case in cases}, device), cases):
            status = case.obstacle()
            try:
                bench = None if status else Bench(case, device, flush)
            except failures(case) as error:
                bench, status = None, reason(error)
            if bench and case.needs and (status := foreign(bench, measured())):
                bench = None
            if bench is None:
                yield line(case, "forward", status or ""), True
                continue
            benches.append(bench)
            for row in bench.rows(rates_of(benches), (measured() or benches)[0]):
                yield row, False
        start, rounds = time.perf_counter(), 0
        while rounds < MIN_ROUNDS or (rounds < MAX_ROUNDS and time.perf_counter() - start < seconds):
            for bench in list(benches):
                try:
                    bench.sample()
                except failures(bench.case) as error:
                    benches.remove(bench)
                    yield line(bench.case, "forward", reason(error)), True
            rounds += 1
    finally:
        rates = rates_of(benches)
        for bench in benches:
            for row in bench.rows(rates, (measured() or benches)[0]):
                yield row, True


def rates_of(benches: list[Bench]) -> dict[str, float]:
    """Bytes per second of the copy and flops per second of each product among them."""
    rates = {}
    for bench in benches:
        if bench.case.op == "floor":
            work = bench.case.bytes if bench.case.impl == "copy" else bench.case.flops
            rates[bench.case.impl] = work / statistics.median(bench.times("forward")) * 1e3
    return rates


def foreign(bench: Bench, others: list[Bench]) -> str | None:
    """Why a peer's time is no figure: its result or its gradients are not those of the first case."""
    for phase, of in (("forward", "result"), ("backward", "gradients")):
        if not others or not bench.results[phase] or not others[0].results[phase]:
            continue
        away = difference(bench.results[phase], others[0].results[phase])
        if away is None or not away <= FOREIGN:
            far = "other shapes than" if away is None else f"{away:.1e} from"
            return f"not run: {far} the {of} of {others[0].case.impl}"
    return None


def reason(error: Exception) -> str:
    return f"not run: {type(error).__name__}: {str(error).strip()[:300]}"


def shape_of(text: str) -> dict[str, int]:
    try:
        shape = {key: int(size) for key, size in (part.split("=") for part in text.split(","))}
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected N=8192,K=4096,D=64 or the like, got {text!r}") from None
    if min(shape.values()) < 1:
        raise argparse.ArgumentTypeError(f"expected sizes of at least 1, got {text!r}")
    return shape


def refusal_of_shape(operation: str, shape: dict[str, int], defaults: list[dict[str, int]]) -> str | None:
    """Why the operation cannot be measured at this shape: names it does not have, or lacks; None if it has those of a default."""
    if any(shape.keys() == default.keys() for default in defaults):
        return None
    default = defaults[0]
    got, example = (",".join(f"{name}={size}" for name, size in sizes.items()) for sizes in (shape, default))
    faults = ("missing", default.keys() - shape.keys()), ("unknown", shape.keys() - default.keys())
    found = "; ".join(f"{fault}: {', '.join(sorted(names))}" for fault, names in faults if names)
    return f"--shape of {operation} needs {', '.join(default)}, as in {example}, got {got} ({found})"


def main() -> None:
    operations = sorted(path.stem for path in OPERATIONS.glob("*.py"))
    parser = measuring_parser(__doc__)
    parser.add_argument("--op", choices=operations, action="append", help="only this operation (may be repeated)")
    parser.add_argument("--impl", action="append", help="only cases whose name starts so (may be repeated)")
    parser.add_argument("--shape", type=shape_of, action="append", help="for example N=8192,K=4096,D=64 (may be repeated)")
    parser.add_argument("--dtype", choices=["float32", "float16", "bfloat16", "float64"], action="append", help="may be repeated")
    parser.add_argument(
        "--bars", action="store_true", help="the shapes and dtypes that bars.py judges, instead of --shape, --dtype"
    )
    parser.add_argument("--no-compile", action="store_true", help="leave out the cases of torch.compile")
    parser.add_argument("--prepare", action="store_true", help="only compile, in parallel, so that the next call measures only")
    parser.add_argument("--case", type=int, help="only run this case once, counted from 0: what --prepare starts for each")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes of --prepare (default: one per core)")
    parser.add_argument("--seconds", type=float, default=10.0, help="time per operation and shape, after warm-up")
    parser.add_argument("--plot", type=Path, help="write one figure for each operation into this folder (needs matplotlib)")
    arguments = parser.parse_args()
    if arguments.plot and importlib.util.find_spec("matplotlib") is None:
        parser.error("--plot needs matplotlib, which is not installed (pip install matplotlib)")
    if arguments.bars and (arguments.shape or arguments.dtype):
        parser.error("--bars has its own shapes and dtypes: expected no --shape or --dtype beside it")
    if arguments.jobs < 1:
        parser.error(f"--jobs: expected at least 1, got {arguments.jobs}")
    device = torch.device(arguments.device)
    panels: list[Panel] = []
    for operation in arguments.op or operations:
        if arguments.bars:
            panels += [Panel(*panel) for panel in PANELS if panel[0] == operation]
            continue
        module = load_module(OPERATIONS / f"{operation}.py")
        for shape in arguments.shape or []:  # before anything is measured
            if refusal := refusal_of_shape(operation, shape, module.SHAPES[device.type]):
                parser.error(refusal)
        dtypes = arguments.dtype or getattr(module, "DTYPES", {}).get(device.type, ["float32"])
        shapes = arguments.shape or module.SHAPES[device.type]
        panels += [Panel(operation, shape, dtype) for shape, dtype in itertools.product(shapes, dtypes)]
    os.environ.pop("TRITON_INTERPRET", None)  # the interpreter's times say nothing

    def wanted(case: Case) -> bool:
        named = not arguments.impl or case.impl.startswith(tuple(arguments.impl))
        return named and not (arguments.no_compile and case.compiled)

    if arguments.case is not None:
        found = panels[0].cases(device) if len(panels) == 1 else []
        if not 0 <= arguments.case < len(found):
            parser.error(
                f"--case: expected one --op, --shape and --dtype, and less than its {len(found)} cases, got {arguments.case}"
            )
        run_once(found[arguments.case], device)
        return
    if arguments.prepare:
        failed = prepare(panels, wanted, device, arguments.jobs)
        print(f"prepared; {failed} cases did not run")
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # `timeout` ends a run; what it has by then is written
    where, rows, said = machine(device, *PACKAGES) | {"run": now()}, [], set()
    for panel in panels:
        cases = [case for case in panel.cases(device) if wanted(case)]
        print(f"\n{panel.op} {panel.shape} {panel.dtype} on {where['hardware']}\n{HEADER}", flush=True)
        for row, final in measure(cases, device, arguments.seconds):
            row |= {"shape": panel.shape, "dtype": panel.dtype, "for_op": panel.op, "time": now()} | where
            if row["status"] not in said:
                print(show(row) + ("" if final else "   alone"), flush=True)
            if row["status"].startswith("not installed"):
                said.add(row["status"])  # once
            if final:
                rows.append(row)
                append_row(arguments.json, row)
    if arguments.plot:
        plot(rows, arguments.plot)


if __name__ == "__main__":
    main()
