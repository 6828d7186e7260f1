"""The training step, and the small pieces of a training loop."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dae.config import Config, OptimizationConfig
from dae.distributed import sum_over_processes, world_size
from dae.seeding import set_seed
from dae.training.ema import EMA
from dae.training.engine import Engine
from dae.training.graphs import WARM_UP, StepGraphs, check_cuda_graphs
from dae.training.non_finite import NON_FINITE, locate_non_finite
from dae.training.optimization import build_optimizer, build_scheduler
from dae.training.prefetch import Prefetcher, prefetched
from dae.training.signals import averaged
from dae.training.state import TrainingState

if TYPE_CHECKING:
    from dae.data import TrainLoader
    from dae.data.tensors import TensorLoader
    from dae.training.run import Run

log = logging.getLogger(__name__)


class Training:
    """One optimisation: modules, optimisers, schedule, average, and the training step. Subclasses define `micro_step`.

    `step` is the host's part of it: seeds, batches, rates. `compute` is the device's and changes tensors alone, so that it can be
    recorded and replayed (`dae.training.graphs`).

    Args:
        settings: of this optimisation, a section of `config`.
        name: of the stage, or "prior"; in seeds, logs and messages.
        trained: the module whose parameters are optimised and averaged, on the engine's device.
        model: the module that a checkpoint holds, `trained` or what it is a part of.

    Attributes:
        model: `trained` as it is to be called: compiled, in mixed precision, with synchronised gradients.
        ahead: the loader where it fetches the next batch early, on CUDA.
        synchronized: all prepared modules, the gradients of which processes add up at the last micro-step.
        state: all that changes, for checkpoints.
    """

    columns: tuple[str, ...] | None = None  # of a batch that `micro_step` reads; None is all

    def __init__(
        self,
        config: Config,
        settings: OptimizationConfig,
        name: str,
        trained: nn.Module,
        model: nn.Module,
        loader: TrainLoader | TensorLoader,
        engine: Engine,
    ):
        self.config, self.settings, self.name, self.trained, self.engine = config, settings, name, trained, engine
        check_cuda_graphs(config, engine.device, world_size(), **{name: settings})
        self.parameters = list(trained.parameters())  # walking through a small module takes a twentieth of a step
        ema = EMA(trained, settings.ema_decay) if settings.use_ema else None
        optimizer = build_optimizer(trained, settings)
        scheduler = build_scheduler(optimizer, settings)
        if config.compile:
            trained = torch.compile(trained)  # type: ignore[assignment]  # a module again
        self.model, prepared = engine.prepare(trained, optimizer)
        self.synchronized: list[Callable] = [self.model]
        batches = prefetched(loader, engine.device)
        self.ahead = batches if isinstance(batches, Prefetcher) else None
        modules, optimizers = {"model": model}, {"optimizer": prepared}
        self.state = TrainingState(modules, optimizers, scheduler, batches, ema, engine.scalers)  # type: ignore[arg-type]
        self.batches = iter(batches)
        self.batch: dict[str, Tensor] = {}  # of the last micro-step
        self.grad_norm: Tensor | None = None  # of the last step, before it was clipped
        self.graphs: StepGraphs | None = None  # once all that a step works on exists

    def step(self, number: int) -> None:
        """Step `number`: gradients of all micro-steps, then optimisers, codebook, average, schedule."""
        if self.config.cuda_graphs and self.graphs is None:
            self.graphs = StepGraphs(self)
        if self.state.ema:
            self.state.ema.advance()
        for micro in range(self.settings.gradient_accumulation_steps):
            set_seed(self.config.seed, self.name, number, micro)  # the only source of this micro-step's randomness
            self.state.losses.append((self.graphs or self.compute)(self.next_batch(), number, micro))
        self.state.scheduler.step()
        if self.ahead is not None and number + 1 < self.settings.max_train_steps:
            self.ahead.fetch()  # while the device works on this step

    def end(self) -> None:
        """Free what was recorded and prepared: nothing else can use the memory of graphs, and they refer back to this."""
        if self.graphs is not None and not self.graphs.graphs:
            log.info("%s: no CUDA graph was recorded, as none is before step %d", self.name, WARM_UP)
        self.graphs = self.grad_norm = None
        self.batch = {}
        self.engine.free_memory()

    def next_batch(self) -> dict[str, Tensor]:
        """The columns of the next batch that `micro_step` reads, on the device."""
        batch = next(self.batches)
        self.batch = {name: batch[name].to(self.engine.device, non_blocking=True) for name in self.columns or batch}
        return self.batch

    def twin(self, engine: Engine) -> Training:
        """A training of copies of the modules on another engine, eager: what it does reaches nothing of this one."""
        raise NotImplementedError

    def compute(self, batch: dict[str, Tensor], number: int, micro: int) -> Tensor:
        """Micro-step `micro` of step `number`, and after the last one the updates; returns the micro-step's loss, detached."""
        last = self.is_last(micro)
        with self.engine.synchronize(*self.synchronized, when=last):
            loss = self.micro_step(batch, number)
        if last:
            if self.settings.max_grad_norm > 0:
                self.grad_norm = self.engine.clip(
                    self.parameters, self.settings.max_grad_norm, self.state.optimizers["optimizer"]
                )
            self.engine.step(self.state.optimizers.values())
            self.update_codebook()
            if self.state.ema:
                self.state.ema.move(self.trained)
        return loss

    def frozen(self) -> list[nn.Module]:
        """Modules that the step reads and must not change."""
        return []

    def learned_codebook(self) -> nn.Module | None:
        """The bottleneck whose codes the step moves without gradients, if it does."""
        return None

    def signals(self) -> dict[str, float]:
        """What the log holds besides loss and rate, of the last micro-step and all processes; read at steps that are logged."""
        return {} if self.grad_norm is None else averaged({"grad_norm": self.grad_norm})

    def is_last(self, micro: int) -> bool:
        return micro == self.settings.gradient_accumulation_steps - 1

    def phase(self, number: int) -> object:
        """What decides which operations step `number` consists of; equal phases are the same operations."""
        return None

    def micro_step(self, batch: dict[str, Tensor], number: int) -> Tensor:
        """Add the gradients of a batch; returns its loss for the log, detached."""
        raise NotImplementedError

    def update_codebook(self) -> None:
        """Called after the optimisers' step, for codes that are learned without gradients."""

    def backward(self, loss: Tensor, optimizer: str = "optimizer") -> None:
        """Add the gradients of a micro-batch's share of the loss of a step of this optimiser."""
        self.engine.backward(loss / self.settings.gradient_accumulation_steps, self.state.optimizers[optimizer])

    def averaged(self) -> AbstractContextManager:
        """Context in which the trained module has its averaged weights (EMA), if it keeps them."""
        return self.state.ema.swapped_in(self.trained) if self.state.ema else contextlib.nullcontext()

    def log(self, done: int, bar: Any, run: Run | None, step_of_run: int) -> None:
        """Record the mean loss since the last entry of the log. FloatingPointError: it is not finite."""
        losses, rate = self.state.losses, self.state.scheduler.get_last_lr()[0]
        loss, self.state.losses = global_mean(losses), []
        if not math.isfinite(loss):
            where = locate_non_finite(self, losses, done, run)
            if run is not None:
                run.warn(step_of_run, self.name, NON_FINITE, f"{self.name}, step {done}: the loss is {loss}. {where}")
            refuse_non_finite(loss, self.name, done, where)
        bar.set_postfix(loss=f"{loss:.4f}")
        if run is not None:
            run.record(step_of_run, {"loss": loss, "lr": rate} | self.signals(), stage=self.name, split="train")


def global_mean(values: list[Tensor]) -> float:
    """Mean over a list of scalars and over all processes: the value of the global batch."""
    mean = torch.stack(values).double().mean()
    total, processes = sum_over_processes(torch.stack([mean, torch.ones_like(mean)])).tolist()
    return total / processes


def refuse_non_finite(loss: float, name: str, step: int, where: str = "") -> None:
    """FloatingPointError if the loss is not finite; it is the same on all processes, so they stop together.

    Args:
        where: sentences on where that arose.
    """
    if not math.isfinite(loss):
        raise FloatingPointError(
            f"{name}: the loss is {loss} at step {step}. {where}{' ' if where else ''}The last checkpoint is from before; lower "
            f"{name}.learning_rate, lengthen {name}.lr_warmup_steps, or use mixed_precision=bf16 or no"
        )


def validation_images(config: Config, settings: OptimizationConfig) -> int:
    """Largest number of images of a validation: as many as all processes trained on since the previous one.

    So a run of few steps is not mostly validation; where validations are far apart, all held-out images are taken.
    """
    steps = min(config.validation_steps, settings.max_train_steps)
    return steps * settings.train_batch_size * settings.gradient_accumulation_steps * world_size()


def is_due(step: int, every: int, last: int) -> bool:
    """Whether `step` is a multiple of `every`, or the last step."""
    return step % every == 0 or step == last
