"""Hook-based timing of a training step of `dae.training` by phase and block."""

import dataclasses
import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from measuring import recorded_event
from torch import Tensor, nn
from training_steps import TrainingStep

from dae.models import Autoencoder
from dae.training.autoencoder import StageTraining
from dae.training.engine import LocalEngine
from dae.training.prior import PriorTraining


@dataclass
class Stamp:
    """Time from this stamp to the next counts to this phase and block; the last stamp of a step has no block."""

    phase: str
    block: str
    seconds: float  # host clock
    event: Any  # in the GPU's stream, or None


class Clock:
    """Splits a step's time into phases (data, forward, backward, update) and blocks of the model.

    `enter` marks a boundary of the forward pass, after which time counts to the named block; in the backward pass the gradient
    crossing it switches to the previous block. So the times add up to the whole step: a forward pre-hook per module is enough,
    and code between modules counts to the last block entered. The first block ends the phase `data`.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.phase, self.block = "", ""
        self.stamps: list[Stamp] = []

    def stamp(self, phase: str, block: str) -> None:
        self.phase, self.block = phase, block
        self.stamps.append(Stamp(phase, block, time.perf_counter(), recorded_event(self.device)))

    def enter(self, block: str, x: Any) -> Any:
        """Begin `block` in the forward pass; returns x, whose gradient ends the block's backward pass."""
        if self.phase == "data":
            self.stamp("forward", block)
            return x
        # Other phases: layers recomputed by gradient checkpointing count to their block's backward pass.
        if self.phase != "forward":
            return x
        before = self.block
        self.stamp("forward", block)
        if isinstance(x, Tensor) and x.requires_grad:
            x = x.view_as(x)  # a separate tensor, whose gradient does not wait for other users of x
            x.register_hook(lambda _: self._leave(before))
        return x

    def _leave(self, before: str) -> None:
        if self.phase == "backward":  # not in the small backward passes of the adaptive weight
            self.stamp("backward", before)

    def watch(self, module: nn.Module, block: str) -> None:
        """Enter `block` whenever the module is called."""
        module.register_forward_pre_hook(lambda _, args: (self.enter(block, args[0]), *args[1:]))

    def times(self, owner: Any, method: str, phase: str, block: str) -> None:
        """Count `owner.method`, and what follows up to the next stamp, to this block."""
        original = getattr(owner, method)

        def timed(*args: Any) -> Any:
            self.stamp(phase, block)
            return original(*args)

        setattr(owner, method, timed)

    def take(self) -> list[Stamp]:
        stamps, self.stamps = self.stamps, []
        return stamps


def seconds_of(stamps: list[Stamp]) -> dict[tuple[str, str], float]:
    """Seconds per (phase, block) of one step, in order of their first stamps; on CUDA from the stream's events."""
    if stamps[-1].event is not None:
        stamps[-1].event.synchronize()
    found: dict[tuple[str, str], float] = {}
    for a, b in itertools.pairwise(stamps):
        spent = b.seconds - a.seconds if a.event is None else a.event.elapsed_time(b.event) / 1000
        found[a.phase, a.block] = found.get((a.phase, a.block), 0.0) + spent
    return found


def phases_of(stamps: list[tuple[str, str, float]]) -> Iterator[tuple[str, float, float]]:
    """(phase, begin, end) of each contiguous phase in stamps of (phase, block, time)."""
    for phase, group in itertools.groupby(itertools.pairwise(stamps), key=lambda pair: pair[0][0]):
        pairs = list(group)
        yield phase, pairs[0][0][2], pairs[-1][1][2]


def watch_encoder(clock: Clock, autoencoder: Autoencoder) -> None:
    watch_levels(clock, autoencoder.encoder, "encoder", lambda level: autoencoder.resolution >> level)
    clock.watch(autoencoder.bottleneck, "bottleneck")


def watch_decoder(clock: Clock, autoencoder: Autoencoder) -> None:
    watch_levels(clock, autoencoder.decoder, "decoder", lambda level: autoencoder.latent_size << level)


def watch_levels(clock: Clock, coder: Any, name: str, size: Callable[[int], int]) -> None:
    """Watch each level of an encoder or decoder, named by its resolution, and what follows the last as one more block.

    A network without levels is one block.
    """
    if not hasattr(coder, "levels"):
        clock.watch(coder, name)
        return
    for level, layers in [(0, coder.conv_in), *enumerate(coder.levels)]:
        clock.watch(layers, f"{name} {size(level)}x{size(level)}")
    clock.watch(coder.norm_out, f"{name} out")


def watch_prior(clock: Clock, prior: Any) -> None:
    clock.watch(prior, "embedding")
    for block in prior.blocks:
        clock.watch(block.norm_attention, "attention")
        clock.watch(block.norm_mlp, "MLP")
    clock.watch(prior.norm, "head and loss")


class ClockedEngine(LocalEngine):
    """An engine that stamps the start of backward pass, clipping and optimisers."""

    def __init__(self, clock: Clock, mixed_precision: str | None):
        super().__init__(clock.device, mixed_precision)
        self.clock = clock

    def prepare(self, module: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[Callable, torch.optim.Optimizer]:
        call, optimizer = super().prepare(module, optimizer)
        compiled = isinstance(module, torch._dynamo.OptimizedModule)  # a compiled graph has no blocks to watch

        def clocked(*args: Any, **options: Any) -> Any:
            if compiled:
                args = (self.clock.enter("compiled", args[0]), *args[1:])
            result = call(*args, **options)
            if isinstance(result, Tensor) and result.ndim == 4:
                return self.clock.enter("losses", result)
            if hasattr(result, "sample"):
                return dataclasses.replace(result, sample=self.clock.enter("losses", result.sample))
            return result

        return clocked, optimizer

    def backward(self, loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
        self.clock.stamp("backward", self.clock.block)
        super().backward(loss, optimizer)
        self.clock.stamp("forward", "losses")

    def clip(self, parameters: Iterable[Tensor], max_norm: float, optimizer: torch.optim.Optimizer) -> Tensor:
        self.clock.stamp("update", "gradient clipping")
        return super().clip(parameters, max_norm, optimizer)

    def step(self, optimizers: Iterable[torch.optim.Optimizer]) -> None:
        self.clock.stamp("update", "AdamW")
        super().step(optimizers)


class ClockedStep(TrainingStep):
    """A training step with a clock."""

    def __init__(self, training: StageTraining | PriorTraining, clock: Clock, settings: Any):
        super().__init__(training)
        self.clock, self.settings, self.device = clock, settings, clock.device
        training.batches = self._clocked(training.batches)
        if training.ahead is not None:
            clock.times(training.ahead, "fetch", "data", "data")
        compiled = training.config.compile
        if training.state.ema:
            clock.times(training.state.ema, "move", "update", "average of weights")
        if isinstance(training, PriorTraining):
            if not compiled:
                watch_prior(clock, training.prior)
            return
        autoencoder = training.autoencoder
        if training.stage.trains_decoder_alone or not compiled:
            watch_encoder(clock, autoencoder)
        if not compiled:
            watch_decoder(clock, autoencoder)
        if training.learns_codebook:
            for method in ("observe", "update_codebook"):
                clock.times(autoencoder.bottleneck, method, "update", "codebook")
        if training.perceptual is not None:
            clock.watch(training.perceptual, "perceptual loss")
        if training.adversary is not None:
            clock.watch(training.adversary.discriminator, "discriminator")

    def _clocked(self, batches: Iterator[dict]) -> Iterator[dict]:
        while True:
            self.clock.stamp("data", "data")
            yield next(batches)

    def __call__(self) -> Tensor:
        loss = super().__call__()
        self.clock.stamp("", "")
        return loss
