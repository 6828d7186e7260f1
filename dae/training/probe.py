"""Look inside training steps: an engine that keeps losses and gradients, and hooks that find where a value stops being finite."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dae.seeding import set_seed
from dae.training.engine import LocalEngine

if TYPE_CHECKING:
    from dae.training.loop import Training


class ProbeEngine(LocalEngine):
    """One device, without a loss scaler of its own; what passes through it is kept.

    Attributes:
        dtype: of autocast, None for float32; it may be changed between steps.
        scale: of the losses while gradients are computed; they are divided by it before they are used.
        losses: given to `backward`, detached.
        reached: by parameter of an optimiser that has stepped, the largest of its gradients: 0 is one of zeros, and a parameter
            without gradient is not there.
    """

    def __init__(self, device: str | torch.device = "cpu", dtype: torch.dtype | None = None):
        super().__init__(device)
        self.dtype, self.scale, self._unscaled = dtype, 1.0, False
        self.optimizers: list[torch.optim.Optimizer] = []
        self.losses: list[Tensor] = []
        self.reached: dict[nn.Parameter, float] = {}

    def prepare(self, module: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[Callable, torch.optim.Optimizer]:
        self.optimizers.append(optimizer)

        def call(*args: Any, **options: Any) -> Any:
            with self.autocast():
                result = module(*args, **options)
            return result.float() if isinstance(result, Tensor) else result

        return call, optimizer

    def scaled(self, loss: Tensor, optimizer: torch.optim.Optimizer) -> Tensor:
        return loss * self.scale

    def backward(self, loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
        self.losses.append(loss.detach().float())
        super().backward(loss, optimizer)

    def parameters(self) -> list[nn.Parameter]:
        """All that the optimisers hold."""
        return [p for optimizer in self.optimizers for group in optimizer.param_groups for p in group["params"]]

    def clip(self, parameters: Iterable[Tensor], max_norm: float, optimizer: torch.optim.Optimizer) -> Tensor:
        self._unscale()
        return super().clip(parameters, max_norm, optimizer)

    def step(self, optimizers: Iterable[torch.optim.Optimizer]) -> None:
        optimizers = list(optimizers)
        self._unscale()
        for optimizer in optimizers:
            for p in (p for group in optimizer.param_groups for p in group["params"] if p.grad is not None):
                self.reached[p] = max(self.reached.get(p, 0.0), p.grad.abs().max().item() if p.grad.numel() else 0.0)
        super().step(optimizers)
        self._unscaled = False

    def _unscale(self) -> None:
        """Once in a step."""
        if self.scale != 1 and not self._unscaled:
            for p in self.parameters():
                if p.grad is not None:
                    p.grad /= self.scale
        self._unscaled = True


@dataclasses.dataclass
class Gradients:
    """Of one micro-step, at the weights as they are."""

    losses: Tensor  # [terms given to `backward`]
    values: dict[nn.Parameter, Tensor]  # float32, of the optimisers' parameters that got one

    @property
    def finite(self) -> bool:
        return bool(self.losses.isfinite().all()) and all(bool(g.isfinite().all()) for g in self.values.values())

    def distance(self, other: Gradients) -> float:
        """Norm of the difference; a parameter without gradient counts as one of zeros."""
        none = torch.zeros(())
        both = self.values | other.values
        pairs = ((self.values.get(p, none.to(x)), other.values.get(p, none.to(x))) for p, x in both.items())
        return sum(float((a - b).square().sum()) for a, b in pairs) ** 0.5


def gradients(training: Training, batch: dict[str, Tensor], number: int) -> Gradients:
    """Of micro-step 0 of step `number`, on a training whose engine is a `ProbeEngine`.

    Weights, gradients and buffers are as before afterwards.
    """
    engine = training.engine
    if not isinstance(engine, ProbeEngine):
        raise TypeError(f"gradients needs a training on a ProbeEngine, got {type(engine).__name__}")
    buffers = [(b, b.clone()) for module in training.state.modules.values() for b in module.buffers()]
    engine.losses.clear()
    set_seed(training.config.seed, training.name, number, 0)
    scale = engine.scale
    try:
        training.micro_step(batch, number)
        found = {p: p.grad.float() / scale for p in engine.parameters() if p.grad is not None}
        return Gradients(torch.stack(engine.losses), found)
    finally:
        for p in engine.parameters():
            p.grad = None
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)


@dataclasses.dataclass
class NonFinite:
    """Where a value that is not finite arose: the module that finished first with one, and the rows of the batch it is in."""

    module: str
    rows: list[int]  # of the batch; empty if the output has no rows of the batch
    rows_in_batch: int
    of_input: bool = False  # what the module was given is not finite either

    def __str__(self) -> str:
        rows = f", in {rows_in_words(self.rows)} of the batch's {self.rows_in_batch}" if self.rows else ""
        return f"{self.module}{', whose input is not finite already' if self.of_input else ''}{rows}"


def rows_in_words(rows: list[int], shown: int = 8) -> str:
    """`row 3`, `rows 1, 2, 5`, or the first of many and their number."""
    listed = ", ".join(map(str, rows[:shown])) + (f" and {len(rows) - shown} more" if len(rows) > shown else "")
    return f"row{'s' if len(rows) > 1 else ''} {listed}"


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Floating-point tensors in a value: itself, or in tuples, lists, dictionaries and dataclasses."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, dict):
        for each in value.values():
            yield from tensors_in(each)
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from tensors_in(each)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from tensors_in(getattr(value, field.name))


def broken_rows(values: Iterable[Tensor], rows_in_batch: int) -> list[int] | None:
    """Rows of the batch in which one of these values is not finite, [] if none has its rows; None if all are finite."""
    broken, rows = False, set()
    for x in values:
        wrong = ~x.detach().isfinite()
        if wrong.any():
            broken = True
            if x.ndim and rows_in_batch and len(x) % rows_in_batch == 0 and len(x):  # [B, ...], or [B T, ...] in raster order
                rows.update(wrong.reshape(rows_in_batch, -1).any(1).nonzero().flatten().tolist())
    return sorted(rows) if broken else None


@contextlib.contextmanager
def watched(modules: dict[str, nn.Module], rows_in_batch: int) -> Iterator[list[NonFinite]]:
    """Context in which the first module whose output is not finite is put into the list; what is inside ends before it."""
    found: list[NonFinite] = []
    seen: set[nn.Module] = set()

    def watch(name: str) -> Callable:
        def hook(module: nn.Module, args: Any, kwargs: dict, output: Any) -> None:
            if not found and (rows := broken_rows(tensors_in(output), rows_in_batch)) is not None:
                given = broken_rows(tensors_in([args, kwargs]), rows_in_batch) is not None
                found.append(NonFinite(f"{name} ({type(module).__name__})", rows, rows_in_batch, given))

        return hook

    with contextlib.ExitStack() as stack:
        for file, whole in modules.items():
            for name, module in whole.named_modules():
                if module not in seen:
                    seen.add(module)
                    handle = module.register_forward_hook(watch(f"{file}.{name}".rstrip(".")), with_kwargs=True)
                    stack.callback(handle.remove)
        yield found
