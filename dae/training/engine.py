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
    scalers: dict[torch.optim.Optimizer, torch.amp.GradScaler]  # of prepared optimisers; none without fp16

    def autocast(self) -> AbstractContextManager:
        """Context of mixed precision."""

    def prepare(self, module: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[Callable, torch.optim.Optimizer]:
        """The callable to use for the module (mixed precision, returned tensors in float32), and the optimiser to step."""

    def synchronize(self, *modules: Any, when: bool) -> AbstractContextManager:
        """Context in which processes sum the gradients of these prepared modules, or only accumulate their own if not `when`."""

    def scaled(self, loss: Tensor, optimizer: torch.optim.Optimizer) -> Tensor:
        """The loss as it is differentiated for a prepared optimiser: in fp16 times the optimiser's scale."""

    def backward(self, loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
        """Add the gradients of the loss to the parameters of a prepared optimiser."""

    def clip(self, parameters: Iterable[Tensor], max_norm: float, optimizer: torch.optim.Optimizer) -> Tensor:
        """Scale the gradients of a prepared optimiser down to a global norm of at most `max_norm`; returns what it was.

        The host waits for no device.
        """

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


class ScaledGradients:
    """One loss scale for each optimiser (Micikevicius et al. 2018, arXiv 1710.03740, section 3.2); none without fp16.

    An optimiser whose gradients overflow leaves out a step and lowers its own scale, whatever the other one does: with a common
    scale the discriminator's overflow would cost the decoder its step, and one optimiser's update of the scale would come before
    the other's division by it.
    """

    device: torch.device

    def __init__(self) -> None:
        self.scalers: dict[torch.optim.Optimizer, torch.amp.GradScaler] = {}

    def scaled(self, loss: Tensor, optimizer: torch.optim.Optimizer) -> Tensor:
        return self.scalers[optimizer].scale(loss) if optimizer in self.scalers else loss

    def backward(self, loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
        self.scaled(loss, optimizer).backward()

    def clip(self, parameters: Iterable[Tensor], max_norm: float, optimizer: torch.optim.Optimizer) -> Tensor:
        if optimizer in self.scalers:
            self.scalers[optimizer].unscale_(getattr(optimizer, "optimizer", optimizer))  # accelerate's is a wrapper
        return nn.utils.clip_grad_norm_(parameters, max_norm)


class AcceleratorEngine(ScaledGradients):
    """An engine on all devices and processes of an Accelerator, which is asked for no more than placement and precision.

    Its own scaler would be one for all optimisers, and `Accelerator.clip_grad_norm_` unscales those of all of them.
    """

    def __init__(self, accelerator: Accelerator):
        super().__init__()
        self.accelerator, self.device, self.autocast = accelerator, accelerator.device, accelerator.autocast

    def prepare(self, module: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[Callable, torch.optim.Optimizer]:
        call, prepared = self.accelerator.prepare(module, optimizer)
        if self.accelerator.scaler is not None:
            self.scalers[prepared] = prepared.scaler = torch.amp.GradScaler(self.device.type)
        return call, prepared

    @contextlib.contextmanager
    def synchronize(self, *modules: nn.Module | None, when: bool):
        with contextlib.ExitStack() as stack:
            for module in modules:
                if module is not None and not when:
                    stack.enter_context(self.accelerator.no_sync(module))
            yield

    def step(self, optimizers: Iterable[torch.optim.Optimizer]) -> None:
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()

    def free_memory(self) -> None:
        self.scalers.clear()
        self.accelerator.free_memory()


class LocalEngine(ScaledGradients):
    """An engine on one device, in one process, with torch alone.

    Args:
        mixed_precision: "no" or None, "bf16" or "fp16", as the knob of the configuration.

    Raises:
        ValueError: fp16 on a CPU, as under accelerate.
    """

    def __init__(self, device: str | torch.device = "cpu", mixed_precision: str | None = None):
        super().__init__()
        self.device = torch.device(device)
        self.dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(mixed_precision or "no")
        if self.dtype == torch.float16 and self.device.type == "cpu":
            raise ValueError("mixed_precision=fp16 has no effect on cpu and would be fp32: use bf16 or no")
        self.scales = self.dtype == torch.float16

    def autocast(self) -> AbstractContextManager:
        return contextlib.nullcontext() if self.dtype is None else torch.autocast(self.device.type, self.dtype)

    def prepare(self, module: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[Callable, torch.optim.Optimizer]:
        if self.scales:
            self.scalers[optimizer] = torch.amp.GradScaler(self.device.type)
        if self.dtype is None:
            return module, optimizer

        def call(*args: Any, **options: Any) -> Any:
            with self.autocast():
                result = module(*args, **options)
            return result.float() if isinstance(result, Tensor) else result

        return call, optimizer

    def synchronize(self, *modules: Any, when: bool) -> AbstractContextManager:
        return contextlib.nullcontext()

    def step(self, optimizers: Iterable[torch.optim.Optimizer]) -> None:
        for optimizer in optimizers:
            if optimizer in self.scalers:
                self.scalers[optimizer].step(optimizer)
                self.scalers[optimizer].update()
            else:
                optimizer.step()
            optimizer.zero_grad()

    def free_memory(self) -> None:
        self.scalers.clear()
