"""Host time of each operation's call with the launch of its Triton kernels replaced by nothing: checks, autograd, launchers.

    python profiling/host_overhead.py --json out.jsonl                # all operations; on a GPU also with the real launch
    python profiling/host_overhead.py --op group_norm_silu

Without a GPU the operands are on the CPU and take the path of the kernels all the same, as no kernel runs. Operands are small, so
what torch's own operators (sums, products, copies) compute costs little. `kernels` and `torch` count the launches of both kinds;
`launches us` is the time of these alone, the same calls one after the other, and `beside us` the operation without them.
"both" is forward and backward with `torch.autograd.grad`; what that takes for a Function that does nothing, with as many operands
as the call has leaves, is torch's own and not in `beside us`. The row "an empty Function" has three.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest import mock

import dae_kernels as k
import torch
from bench_report import software
from dae_kernels.dispatch import apply
from measuring import append_row, machine, measuring_parser, now, quantiles, synchronize
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

HEADER = (
    f"{'operation':<34}{'phase':<10}{'us':>9}{'p20':>9}{'p80':>9}{'kernels':>9}{'torch':>7}{'launches us':>12}{'beside us':>10}"
)
PEERS = ("torch", "triton", "numpy")
# Torch's operators that launch nothing: views, and memory that nobody writes to.
NO_LAUNCH = (
    *("empty", "new_empty", "view", "_unsafe_view", "_reshape_alias", "expand", "detach", "alias", "select", "slice", "split"),
    *("unbind", "unsqueeze", "squeeze", "transpose", "permute", "as_strided", "is_same_size", "promote_types"),
)


@dataclass
class Call:
    """One operation: run() returns a tensor or several, the first of which is differentiated by `leaves`."""

    name: str
    run: Callable[[], Any]
    leaves: list[Tensor]
    ones: Tensor | None = None

    def forward(self) -> Any:
        with torch.no_grad():
            return self.run()

    def both(self) -> Any:
        out = self.run()
        out = out if isinstance(out, Tensor) else out[0]
        return torch.autograd.grad(out, self.leaves, self.cotangent(out))

    def cotangent(self, out: Tensor) -> Tensor:
        """Ones, made once: `grad` would fill them at each call."""
        if self.ones is None:
            self.ones = torch.ones_like(out)
        return self.ones


class Empty(torch.autograd.Function):
    """Nothing, forward and backward, of some operands: what torch's own autograd costs."""

    @staticmethod
    def forward(*operands: Tensor) -> Tensor:
        return operands[0].detach()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor, ...]:
        return d, *ctx.saved_tensors[1:]


def calls(device: torch.device) -> Iterator[Call]:
    """Every operation with kernels, on its kernels, and the commonest of the others."""

    def make(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, device=device, dtype=dtype).requires_grad_()

    x = make(2, 64, 128, 128, dtype=torch.bfloat16)
    last = x.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    w, b, scale, shift = make(64), make(64), make(2, 64), make(2, 64)
    yield Call("an empty Function", partial(apply, Empty, x, w, b), [x, w, b])
    norm = partial(k.group_norm_silu, impl="triton")
    yield Call("group_norm_silu", partial(norm, last, 32, w, b), [last, w, b])
    small = make(2, 64, 16, 16)
    yield Call("group_norm_silu 16x16", partial(norm, small, 32, w, b), [small, w, b])
    yield Call("group_norm_silu contiguous", partial(norm, x, 32, w, b), [x, w, b])
    yield Call("group_norm_silu adaptive", partial(norm, x, 32, w, b, scale=scale, shift=shift), [x, w, b, scale, shift])
    rows, codes = make(256, 32, dtype=torch.bfloat16), make(64, 32, dtype=torch.bfloat16)
    for precision in ("exact", "fast"):
        search = partial(k.nearest_code, rows, codes, precision=precision, impl="triton")
        yield Call(f"nearest_code {precision}", search, [])
    yield Call("vector_quantize", partial(k.vector_quantize, rows, codes, impl="triton"), [rows])
    one, two, channels = make(2, 64, 8, 8), make(2, 64, 8, 8), make(64)
    yield Call("lpips", partial(k.lpips, one, two, channels, impl="triton"), [one, two])
    hidden, matrix, targets = make(64, 32), make(128, 32), torch.randint(128, (64,), device=device)
    yield Call("linear_cross_entropy", partial(k.linear_cross_entropy, hidden, matrix, targets, impl="triton"), [hidden, matrix])
    p, q = make(64, 8), make(64, 8)
    yield Call("mmd", partial(k.mmd, p, q, bandwidths=(1.0,), impl="triton"), [p])
    yield Call("energy_distance", partial(k.energy_distance, p, q, impl="triton"), [p])
    sinkhorn = partial(k.sinkhorn_divergence, p, q, blur=0.5, diameter=1.0, impl="triton")
    yield Call("sinkhorn_divergence", sinkhorn, [p])
    indices = torch.randint(64, (256,), device=device)
    yield Call("codebook_statistics", partial(k.codebook_statistics, rows.detach().float(), indices, 64), [])
    tokens, factor, term = make(2, 16, 32), make(2, 32), make(2, 32)
    yield Call("layer_norm_modulate", partial(k.layer_norm_modulate, tokens, factor, term), [tokens, factor, term])
    yield Call("rms_norm", partial(k.rms_norm, tokens, make(32)), [tokens])
    heads = make(2, 4, 16, 8)
    yield Call("attention", partial(k.attention, heads, heads, heads, impl="sdpa"), [heads])


@contextmanager
def no_launch(launches: list[Callable] | None = None) -> Iterator[None]:
    """Kernels that do nothing, on any device, as if they could run there; their launches are appended to the list."""
    from triton.runtime.jit import JITFunction

    def run(self: Any, *arguments: Any, **options: Any) -> None:
        if launches is not None:
            given = {name: option for name, option in options.items() if name not in ("grid", "warmup")}
            launches.append(partial(self[options["grid"]], *arguments, **given))

    def indices_inside(*arguments: Any, **options: Any) -> tuple[Tensor, Tensor]:
        index, distance = k.nearest_code(*arguments, **options)
        return index.zero_(), distance  # what no kernel wrote would lie anywhere

    patches = (
        mock.patch.object(JITFunction, "run", run),
        mock.patch("dae_kernels.dispatch.triton_refusal", lambda device: None),
        mock.patch("dae_kernels.dispatch.interpreting", lambda: False),  # which is asked on CPUs alone
        mock.patch("dae_kernels.vector_quantize.api.nearest_code", indices_inside),
    )
    with patches[0], patches[1], patches[2], patches[3]:
        yield


class Recorded(TorchDispatchMode):
    """The launches of a call: of Triton's kernels, and of torch's operators but those that launch nothing on a GPU."""

    def __init__(self, run: Callable[[], Any]) -> None:
        super().__init__()
        self.kernels: list[Callable] = []
        self.operators: list[Callable] = []
        untraced = mock.patch("dae_kernels.dispatch.traced", lambda: False)  # the path of a call without a mode
        with no_launch(self.kernels), untraced, self:
            run()

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        if not function.name().removeprefix("aten::").startswith(NO_LAUNCH):
            self.operators.append(partial(function, *arguments, **(options or {})))
        return function(*arguments, **(options or {}))

    def replay(self) -> None:
        for launch in self.kernels:
            launch()
        for launch in self.operators:
            launch()


def microseconds(run: Callable[[], Any], device: torch.device, seconds: float) -> list[float]:
    """Host time of single calls, as many as fit into the time; on a GPU its queue is emptied now and then."""
    for _ in range(10):
        run()
    samples: list[float] = []
    end = time.perf_counter() + seconds
    while len(samples) < 20 or time.perf_counter() < end:
        if len(samples) % 100 == 0:
            synchronize(device)
        start = time.perf_counter_ns()
        run()
        samples.append((time.perf_counter_ns() - start) / 1e3)
    return samples


def measured(call: Call, phase: str, real: bool, device: torch.device, seconds: float, engine_us: float) -> dict[str, Any]:
    """A row: the call's host time, and with kernels that do nothing the number of its launches and the time without them.

    Of "both", `engine_us` is taken off, too: what torch's autograd takes for a Function that does nothing.
    """
    run = call.both if phase == "both" else call.forward
    if real:
        return {"op": call.name, "phase": f"{phase} real", "us": quantiles(microseconds(run, device, seconds))}
    with no_launch():
        run()
    record = Recorded(run)
    with no_launch():
        times = quantiles(microseconds(run, device, seconds))
        with torch.no_grad():
            launches_us = quantiles(microseconds(record.replay, device, seconds / 2))["median"]
    engine_us = engine_us if phase == "both" else 0.0
    found = {
        "kernels": len(record.kernels),
        "torch_operators": len(record.operators),
        "launches_us": launches_us,
        "engine_us": engine_us,
    }
    return {"op": call.name, "phase": phase, "us": times, **found, "beside_us": times["median"] - launches_us - engine_us}


def show(row: dict[str, Any]) -> str:
    times = "".join(f"{row['us'][name]:>9.1f}" for name in ("median", "p20", "p80"))
    if "kernels" not in row:
        return f"{row['op']:<34}{row['phase']:<10}{times}"
    rest = f"{row['kernels']:>9}{row['torch_operators']:>7}{row['launches_us']:>12.1f}{row['beside_us']:>10.1f}"
    return f"{row['op']:<34}{row['phase']:<10}{times}{rest}"


def main() -> None:
    parser = measuring_parser(__doc__)
    parser.add_argument("--op", action="append", help="only operations whose name begins with this (may be repeated)")
    parser.add_argument("--seconds", type=float, default=1.0, help="time for each row")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    torch.set_num_threads(1)
    where = machine(device, *PEERS)
    print(f"{where['hardware']}, {software(where)}\n{where['command']}\n\n{HEADER}")
    engine_us: dict[int, float] = {}
    for call in calls(device):
        if call.leaves and len(call.leaves) not in engine_us:
            nothing = Call("", partial(apply, Empty, *call.leaves), call.leaves)
            engine_us[len(call.leaves)] = measured(nothing, "both", False, device, arguments.seconds, 0.0)["us"]["median"]
    nothing = next(calls(device))
    for call in calls(device):
        if call.name != nothing.name and arguments.op and not call.name.startswith(tuple(arguments.op)):
            continue
        for phase in ("forward", "both") if call.leaves else ("forward",):
            for real in (False, True) if device.type == "cuda" else (False,):
                row = measured(call, phase, real, device, arguments.seconds, engine_us.get(len(call.leaves), 0.0))
                print(show(row), flush=True)
                append_row(arguments.json, row | where | {"time": now()})


if __name__ == "__main__":
    main()
