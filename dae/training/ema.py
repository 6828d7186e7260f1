"""Exponential moving average of weights, by `torch.optim.swa_utils.AveragedModel`."""

from __future__ import annotations

from contextlib import contextmanager

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel


class EMA:
    """average <- d * average + (1 - d) * weights, with d = min(decay, (1 + n) / (10 + n)) after n updates.

    The warm-up lets short runs forget their initial weights. Buffers (a codebook) are copied, not averaged.
    """

    def __init__(self, module: nn.Module, decay: float):
        self.decay, self.updates = decay, 0
        self.average = AveragedModel(module, multi_avg_fn=self._lerp)
        self.average.requires_grad_(False)
        self.average.n_averaged.fill_(1)  # the first update averages with the initial weights: no special case

    @torch.no_grad()
    def _lerp(self, averages: list, weights: list, _: object) -> None:
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(averages, weights, 1 - decay)

    def update(self, module: nn.Module) -> None:
        self.average.update_parameters(module)
        self.updates += 1

    def state_dict(self) -> dict:
        """Weights under the averaged module's own names."""
        return self.average.module.state_dict()

    def load_state_dict(self, weights: dict, updates: int) -> None:
        self.average.module.load_state_dict(weights)
        self.updates = updates

    @contextmanager
    def swapped_in(self, module: nn.Module):
        """`module` carries the averaged weights inside the block, and its own again after it."""
        own = {k: v.clone() for k, v in module.state_dict().items()}
        module.load_state_dict(self.state_dict())
        try:
            yield
        finally:
            module.load_state_dict(own)
