"""What stays in float32 or float64 whatever a module is cast to."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Self

import torch
from torch import Tensor


def wide(dtype: torch.dtype) -> torch.dtype:
    """float32 for 16 bits, and float32 or float64 for themselves: what values of `dtype` are computed in."""
    return torch.promote_types(dtype, torch.float32)


class WideBuffers:
    """Of an `nn.Module`: `.to(dtype)`, `.half()` and the like cast its parameters, but its own buffers to `buffer_dtypes` alone.

    They are statistics and tables: an average that moves by a thousandth of its value stalls in 16 bits, and a position of some
    hundreds is off by a radian.
    """

    buffer_dtypes: ClassVar[tuple[torch.dtype, ...]] = (torch.float32, torch.float64)  # else float32

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            if buffer is not None and buffer.is_floating_point():
                cast = self._buffers[name]
                if cast.dtype not in self.buffer_dtypes:
                    self._buffers[name] = buffer.to(cast.device, torch.float32)
        return self
