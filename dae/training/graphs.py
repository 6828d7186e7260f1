"""A training step as CUDA graphs: its kernels are recorded once and then started by one call (`cuda_graphs=true`).

What a step does on the device is recorded: forward and backward pass, clipping, optimisers, codebook, average of weights. What it
does on the host stays there and reaches the recording through tensors that keep their place: the batch, the learning rates, the
rate of the average; the random state is the device generator's, which a replay reads. So a run computes what it computes without.

Validations and checkpoints read values on the host and run between replays, without a graph.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from dae.config import Config, OptimizationConfig, StageConfig
from dae.cuda_graphs import Recorder

if TYPE_CHECKING:
    from dae.training.loop import Training

log = logging.getLogger(__name__)
WARM_UP = 3  # steps without a graph: they choose algorithms, compile, and make the optimisers' state


class Replayable(Protocol):
    def replay(self) -> Tensor: ...


def check_cuda_graphs(config: Config, device: torch.device, processes: int, **sections: OptimizationConfig) -> None:
    """ValueError if `cuda_graphs` is set and a step cannot be recorded, with the reason.

    Args:
        sections: by name, the optimisations that are to be recorded.
    """
    if not config.cuda_graphs:
        return
    reason = None
    if device.type != "cuda":
        reason = f"needs a CUDA device, this run is on {device.type}"
    elif processes > 1:
        reason = f"needs one process, this run has {processes}: they agree on codes and read numbers on the host in each step"
    elif config.mixed_precision == "fp16":
        reason = "needs mixed_precision=bf16 or no: with fp16 the host reads in each step whether a gradient overflowed"
    elif recomputed := [name for name, settings in sections.items() if settings.gradient_checkpointing]:
        reason = f"excludes {recomputed[0]}.gradient_checkpointing=true, which sets the random state within the step"
    elif penalised := [name for name, settings in sections.items() if isinstance(settings, StageConfig) and settings.loss.r1 > 0]:
        reason = f"excludes {penalised[0]}.loss.r1, whose steps are not all alike"
    if reason:
        raise ValueError(f"cuda_graphs=true {reason}; change it or leave cuda_graphs out")


class StepGraphs:
    """The device's part of a training step, `training.compute`, from graphs.

    One graph for each kind of micro-step: with accumulation the first sets the gradients, those between add to them, the last
    updates the weights. They are recorded after `WARM_UP` steps, and anew when `training.phase` changes.

    Args:
        training: its modules, optimisers and batches must keep their tensors.
        recorder: makes a graph of a function; tests pass one that runs on a CPU.
    """

    def __init__(self, training: Training, recorder: Callable[[], Recorder] | None = None):
        self.training, self.device = training, training.engine.device
        self.make_recorder = recorder or functools.partial(Recorder, self.device)  # not a closure of self: see `Training.end`
        self.recorder = self.make_recorder()
        self.batch: dict[str, Tensor] = {}
        self.graphs: dict[tuple[bool, bool], Replayable] = {}
        self.phase: object = None
        self.steps = 0  # of this phase
        groups = [group for optimizer in training.state.optimizers.values() for group in optimizer.param_groups]
        self.rates = [(group, torch.zeros((), device=self.device)) for group in groups]
        if training.state.ema:
            training.state.ema.keep_rate_on(self.device)

    def __call__(self, batch: dict[str, Tensor], number: int, micro: int) -> Tensor:
        """`training.compute` of these arguments. ValueError: a batch of another shape or dtype than the first."""
        if micro == 0:
            self._begin_step(number)
        self._take(batch)
        if self.steps <= WARM_UP:
            return self.recorder.warm_up(lambda: self.training.compute(self.batch, number, micro))
        kind = micro > 0, self.training.is_last(micro)
        if kind not in self.graphs:
            self.graphs[kind] = self.recorder.record(lambda: self._with_device_rates(number, micro))
        for group, rate in self.rates:
            rate.fill_(group["lr"])
        return self.graphs[kind].replay().clone()

    def _begin_step(self, number: int) -> None:
        phase, name = self.training.phase(number), self.training.name
        if phase != self.phase and self.graphs:
            log.info("%s: step %d computes otherwise; it is recorded anew after %d steps without a graph", name, number, WARM_UP)
        if phase != self.phase:
            self.graphs.clear()
            self.phase, self.steps, self.recorder = phase, 0, self.make_recorder()
        self.steps += 1
        if self.steps == WARM_UP + 1:
            log.info("%s: recorded as a CUDA graph from step %d; validations and checkpoints run without", name, number)

    def _take(self, batch: dict[str, Tensor]) -> None:
        if not self.batch:
            self.batch = {name: torch.empty_like(column) for name, column in batch.items()}
        for name, column in self.batch.items():
            if batch[name].shape != column.shape or batch[name].dtype != column.dtype:
                raise ValueError(
                    f"cuda_graphs=true needs batches of one shape and type: {name} was {list(column.shape)} of {column.dtype}, "
                    f"now it is {list(batch[name].shape)} of {batch[name].dtype}; leave cuda_graphs out"
                )
            column.copy_(batch[name])

    def _with_device_rates(self, number: int, micro: int) -> Tensor:
        with self._device_rates():
            return self.training.compute(self.batch, number, micro)

    @contextmanager
    def _device_rates(self) -> Iterator[None]:
        """Optimisers read their learning rate from the device while they are recorded; afterwards their groups are as before."""
        before = [(group["lr"], group["capturable"]) for group, _ in self.rates]
        for group, rate in self.rates:
            group["lr"], group["capturable"] = rate, True
        try:
            yield
        finally:
            for (group, _), (rate, capturable) in zip(self.rates, before, strict=True):
                group["lr"], group["capturable"] = rate, capturable
