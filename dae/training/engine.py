"""Run a training step under Hugging Face's Accelerator, or on one device without it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from dae.config import Config

if TYPE_CHECKING:
    from accelerate import Accelerator


class Engine(Protocol):
    """What a training step needs of its environment: device, precision, gradients. The step is written once for all engines."""

    device: torch.device
    scaler: torch.amp.GradScaler | None  # of fp16 gradients

    def autocast(self) -> AbstractContextManager:
        """Context of mixed precision."""

    def prepare(self, module: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[Callable, torch.optim.Optimizer]:
        """The callable to use for the module (mixed precision, returned tensors in float32), and the optimiser to step."""

    def synchronize(self, *modules: Any, when: bool) -> AbstractContextManager:
        """Context in which processes sum the gradients of these prepared modules, or only accumulate their own if not `when`."""

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of the loss."""

    def clip(self, parameters: Iterable[Tensor], max_norm: float) -> Tensor:
        """Scale the gradients down to a global norm of at most `max_norm`; the host waits for no device. Returns what it was."""

    def step(self, optimizers: Iterable[torch.optim.Optimizer]) -> None:
        """One step of each, and no gradients afterwards."""

    def free_memory(self) -> None:
        """Release what was prepared."""


def set_backends(config: Config, device: torch.device) -> None:
    """Set cuDNN's search for algorithms and TF32 as `cudnn_benchmark` and `allow_tf32` say; on a CPU nothing is set."""
    if device.type == "cuda":
        _set_backends(config.cudnn_benchmark, config.allow_tf32, config.allow_tf32)


@contextlib.contextmanager
def backends(config: Config, device: torch.device) -> Iterator[None]:
    """Context in which `set_backends` holds; afterwards all is as before."""
    if device.type != "cuda":
        yield
        return
    before = torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    set_backends(config, device)
    try:
        yield
    finally:
        _set_backends(*before)


def _set_backends(benchmark: bool, convolutions: bool, products: bool) -> None:
    torch.backends.cudnn.benchmark = benchmark
    torch.backends.cudnn.allow_tf32 = convolutions
    torch.backends.cuda.matmul.allow_tf32 = products


class AcceleratorEngine:
    """An engine on all devices and processes of an Accelerator."""

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self.device, self.scaler = accelerator.device, accelerator.scaler
        self.autocast, self.backward, self.prepare = accelerator.autocast, accelerator.backward, accelerator.prepare
        self.free_memory = accelerator.free_memory

    @contextlib.contextmanager
    def synchronize(self, *modules: nn.Module | None, when: bool):
        with contextlib.ExitStack() as stack:
            for module in modules:
                if module is not None and not when:
                    stack.enter_context(self.accelerator.no_sync(module))
            yield

    def clip(self, parameters: Iterable[Tensor], max_norm: float) -> Tensor:
        return self.accelerator.clip_grad_norm_(parameters, max_norm)

    def step(self, optimizers: Iterable[torch.optim.Optimizer]) -> None:
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


class LocalEngine:
    """An engine on one device, in one process, with torch alone.

    Args:
        mixed_precision: "no" or None, "bf16" or "fp16", as the knob of the configuration.

    Raises:
        ValueError: fp16 on a CPU, as under accelerate.
    """

    def __init__(self, device: str | torch.device = "cpu", mixed_precision: str | None = None):
        self.device = torch.device(device)
        self.dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(mixed_precision or "no")
        if self.dtype == torch.float16 and self.device.type == "cpu":
            raise ValueError("mixed_precision=fp16 has no effect on cpu and would be fp32: use bf16 or no")
        self.scaler = torch.amp.GradScaler(self.device.type) if self.dtype == torch.float16 else None
        self.optimizers: list[torch.optim.Optimizer] = []

    def autocast(self) -> AbstractContextManager:
        return contextlib.nullcontext() if self.dtype is None else torch.autocast(self.device.type, self.dtype)

    def prepare(self, module: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[Callable, torch.optim.Optimizer]:
        self.optimizers.append(optimizer)
        if self.dtype is None:
            return module, optimizer

        def call(*args: Any, **options: Any) -> Any:
            with self.autocast():
                result = module(*args, **options)
            return result.float() if isinstance(result, Tensor) else result

        return call, optimizer

    def synchronize(self, *modules: Any, when: bool) -> AbstractContextManager:
        return contextlib.nullcontext()

    def backward(self, loss: Tensor) -> None:
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()

    def clip(self, parameters: Iterable[Tensor], max_norm: float) -> Tensor:
        if self.scaler is not None:
            for optimizer in self.optimizers:
                self.scaler.unscale_(optimizer)
        return nn.utils.clip_grad_norm_(parameters, max_norm)

    def step(self, optimizers: Iterable[torch.optim.Optimizer]) -> None:
        for optimizer in optimizers:
            optimizer.step() if self.scaler is None else self.scaler.step(optimizer)
            optimizer.zero_grad()
        if self.scaler is not None:
            self.scaler.update()

    def free_memory(self) -> None:
        self.optimizers.clear()
