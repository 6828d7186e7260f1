"""AdamW and the learning-rate schedule."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from dae.config import OptimizationConfig


def build_optimizer(module: nn.Module, config: OptimizationConfig, learning_rate: float | None = None) -> torch.optim.AdamW:
    """AdamW over the trainable parameters; weight decay on matrices and kernels, none on biases and norms.

    Build it when the parameters are on the device that they are trained on: on CUDA the update is one kernel for many tensors
    (torch's `fused`), on a CPU one operation for all (`foreach`, a third less time than one by one, for the same bits).
    """
    parameters = [p for p in module.parameters() if p.requires_grad]
    fused = any(p.device.type == "cuda" for p in parameters)
    rate = config.learning_rate if learning_rate is None else learning_rate
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.adam_weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [g for g in groups if g["params"]],
        lr=_float32(rate) if fused else rate,  # see `Schedule`
        betas=(config.adam_beta1, config.adam_beta2),
        foreach=not fused,
        fused=fused,
    )


class Schedule(LambdaLR):
    """Base rates times a factor of the step.

    Rates of a fused optimiser are float32: so a step computes the same bits whether its kernel gets the rate as a number or, in a
    CUDA graph, reads it from the device.
    """

    def get_lr(self) -> list[float]:  # type: ignore[override]
        factors = [factor(self.last_epoch) for factor in self.lr_lambdas]
        rates = [float(base * factor) for base, factor in zip(self.base_lrs, factors, strict=True)]
        groups = self.optimizer.param_groups
        return [_float32(rate) if group.get("fused") else rate for rate, group in zip(rates, groups, strict=True)]


def build_scheduler(optimizer: torch.optim.Optimizer, config: OptimizationConfig) -> Schedule:
    """Linear warm-up over `lr_warmup_steps`, then constant, or linear or cosine decay to 0 at `max_train_steps`."""
    warmup, total = config.lr_warmup_steps, config.max_train_steps

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        progress = min(1.0, (step - warmup) / max(1, total - warmup))
        return {"constant": 1.0, "linear": 1 - progress, "cosine": 0.5 * (1 + math.cos(math.pi * progress))}[config.lr_scheduler]

    return Schedule(optimizer, factor)


def _float32(value: float) -> float:
    return torch.tensor(value, dtype=torch.float32).item()
