"""Exponential moving average of weights."""

from __future__ import annotations

import copy
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from dae.precision import wide


class EMA:
    """average <- d * average + (1 - d) * weights, with d = min(decay, (1 + n) / (10 + n)) after n updates.

    The warm-up lets short runs forget their initial weights. Buffers (a codebook) are copied, not averaged. The average of a
    module of 16 bits is float32, where steps of 1 - d do not round to nothing.
    `torch.optim.swa_utils.AveragedModel` would do, but it walks through both modules at each step, which in a small model costs
    more than the optimiser does.
    """

    def __init__(self, module: nn.Module, decay: float):
        self.decay, self.updates = decay, 0
        self.rate: float | Tensor = 0.0  # 1 - d of the next `move`
        self.average = copy.deepcopy(module).requires_grad_(False)
        for parameter in self.average.parameters():
            parameter.data = parameter.data.to(wide(parameter.dtype))
        self._source: nn.Module | None = None

    def update(self, module: nn.Module) -> None:
        """`advance`, then `move`."""
        self.advance()
        self.move(module)

    def keep_rate_on(self, device: torch.device) -> None:
        """From now on `move` reads its rate from the device, so that it can be recorded and replayed."""
        self.rate = torch.zeros((), dtype=torch.float64, device=device)

    def advance(self) -> None:
        """Set the rate of the next `move`, and count it: the host's part of an update."""
        rate = 1 - min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        if isinstance(self.rate, Tensor):
            self.rate.fill_(rate)
        else:
            self.rate = rate

    @torch.no_grad()
    def move(self, module: nn.Module) -> None:
        """Move towards the weights of `module`, whose tensors must stay the same objects from one update to the next."""
        if self._source is not module:
            self._source = module
            self._weights: tuple[list[Tensor], list[Tensor]] = list(self.average.parameters()), list(module.parameters())
            self._narrow = any(a.dtype != b.dtype for a, b in zip(*self._weights, strict=True))
            self._buffers = list(self.average.buffers()), list(module.buffers())
        averages, weights = self._weights
        if self._narrow:
            weights = [weight.to(average.dtype) for average, weight in zip(averages, weights, strict=True)]
        if isinstance(self.rate, Tensor):
            dtypes = {average.dtype for average in averages}
            rates = {dtype: self.rate.to(dtype) for dtype in dtypes}  # one launch, not one a tensor
            for average, weight in zip(averages, weights, strict=True):
                average.lerp_(weight, rates[average.dtype])
        else:
            torch._foreach_lerp_(averages, weights, self.rate)
        for own, new in zip(*self._buffers, strict=True):
            own.copy_(new)

    def state_dict(self) -> dict:
        """Weights under the averaged module's own names."""
        return self.average.state_dict()

    def load_state_dict(self, weights: dict, updates: int) -> None:
        self.average.load_state_dict(weights)
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
