"""Small pieces of a training loop."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from dae.distributed import sum_over_processes, world_size

if TYPE_CHECKING:
    from dae.config import Config, OptimizationConfig


def global_mean(values: list[torch.Tensor]) -> float:
    """Mean over a list of scalars and over all processes: the value of the global batch."""
    mean = torch.stack(values).double().mean()
    total, processes = sum_over_processes(torch.stack([mean, torch.ones_like(mean)])).tolist()
    return total / processes


def refuse_non_finite(loss: float, name: str, step: int) -> None:
    """Stop rather than train on: the loss is the same on all processes, so they stop together."""
    if not math.isfinite(loss):
        raise FloatingPointError(
            f"{name}: the loss is {loss} at step {step}. The last checkpoint is from before; lower {name}.learning_rate, "
            f"lengthen {name}.lr_warmup_steps, or use mixed_precision=bf16 or no"
        )


def validation_images(config: Config, settings: OptimizationConfig) -> int:
    """How many images a validation may take: as many as were trained on since the one before, of all processes.

    So a run of few steps is not mostly validation; where validations are far apart, all held-out images are taken.
    """
    steps = min(config.validation_steps, settings.max_train_steps)
    return steps * settings.train_batch_size * settings.gradient_accumulation_steps * world_size()


def is_due(step: int, every: int, last: int) -> bool:
    """Whether after `step` steps it is time for what happens `every` so many steps, and after the last one."""
    return step % every == 0 or step == last
