"""Keep float32 where it is needed, whatever the module's casts and the caller's torch modes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, ClassVar, Self

import torch
from torch import Tensor


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype to compute values of `dtype` in: float32 for 16 bits, else `dtype` itself."""
    return torch.promote_types(dtype, torch.float32)


class WideBuffers:
    """`nn.Module` mixin: `.to(dtype)`, `.half()` etc. cast parameters, but the module's own buffers only to `buffer_dtypes`.

    These buffers are statistics and tables: in 16 bits an average that moves by a thousandth of its value stalls, and the phase
    of a position of some hundreds is off by a radian.
    """

    _buffers: dict[str, Tensor | None]
    buffer_dtypes: ClassVar[tuple[torch.dtype, ...]] = (torch.float32, torch.float64)  # else float32

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = dict(self._buffers)
        super()._apply(fn, recurse)  # type: ignore[misc]  # of nn.Module
        for name, buffer in before.items():
            cast = self._buffers[name]
            if buffer is not None and cast is not None and buffer.is_floating_point() and cast.dtype not in self.buffer_dtypes:
                self._buffers[name] = buffer.to(cast.device, torch.float32)
        return self


DEVICES_WITH_AUTOCAST = ("cpu", "cuda", "mps", "xpu")


@contextmanager
def own_modes(gradients: bool | None) -> Iterator[None]:
    """torch's default modes: no autocast, float32 as default dtype, the CPU as default device.

    `gradients`: whether to record them, also within inference mode; None keeps the caller's setting of both.
    """
    with ExitStack() as stack:
        if (dtype := torch.get_default_dtype()) != torch.float32:
            torch.set_default_dtype(torch.float32)
            stack.callback(torch.set_default_dtype, dtype)
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        for device in DEVICES_WITH_AUTOCAST:
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        if gradients is not None:
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.set_grad_enabled(gradients))
        yield


def own_arithmetic(*, gradients: bool | None) -> Callable[[Callable], Callable]:
    """Decorator that runs a function in `own_modes`, so that the caller's modes do not change its values.

    Not for functions that call the caller's model, which may be meant to run under autocast. Arguments made in inference mode
    are copied, as autograd cannot record them.
    """

    def decorate(function: Callable) -> Callable:
        @functools.wraps(function)
        def inside(*args: Any, **options: Any) -> Any:
            with own_modes(gradients):
                args, options = ordinary(args), ordinary(options)
                return function(*args, **options)

        return inside

    return decorate


def ordinary(value: Any) -> Any:
    """Copy tensors made in inference mode, also in lists, tuples and dictionaries; a no-op within that mode.

    Under torch.compile values are returned unchanged: it cannot trace the check, and rejects such tensors itself.
    """
    if torch.compiler.is_compiling():
        return value
    if isinstance(value, Tensor):
        return value.clone() if value.is_inference() and not torch.is_inference_mode_enabled() else value
    if type(value) in (list, tuple):
        return type(value)(ordinary(each) for each in value)
    return {key: ordinary(each) for key, each in value.items()} if type(value) is dict else value
