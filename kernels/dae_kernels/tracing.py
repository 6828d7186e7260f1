"""Queries of torch's state around a call: tracing, transforms, batching, differentiation, and autocast."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext

import torch
from torch._subclasses.fake_tensor import FakeTensor

MODES = torch._C._TorchDispatchModeKey
TRACING_MODES = (MODES.FAKE, MODES.FUNCTIONAL, MODES.PROXY)

TAKEN_WHOLE: list[Callable] = []  # functions for `allow_in_graph`, see `dispatch.taken_whole`


def traced() -> bool:
    """Whether torch.compile, a transform of torch.func or a dispatch mode (fake tensors) intercepts operators."""
    return (
        torch.compiler.is_compiling()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._len_torch_dispatch_stack() > 0
    )


def values_readable(*tensors: torch.Tensor) -> bool:
    """Whether Python may read the tensors' values.

    Not while torch.compile, torch.export or make_fx traces or a CUDA graph is recorded, nor for meta and fake tensors, nor for
    those batched by torch.vmap.
    """
    if torch.compiler.is_compiling() or any(torch._C._get_dispatch_mode(mode) is not None for mode in TRACING_MODES):
        return False
    if any(tensor.is_cuda for tensor in tensors) and torch.cuda.is_current_stream_capturing():
        return False
    return not (batched(*tensors) or any(valueless(level) for tensor in tensors for level in transform_levels(tensor)))


def valueless(tensor: torch.Tensor) -> bool:
    return tensor.is_meta or isinstance(tensor, FakeTensor)


def batched(*tensors: torch.Tensor) -> bool:
    """Whether torch.vmap has wrapped one of these."""
    return any(torch._C._functorch.is_batchedtensor(level) for tensor in tensors for level in transform_levels(tensor))


def differentiated(*tensors: torch.Tensor) -> bool:
    """Whether one of these may be differentiated, also by a torch.func transform outside a torch.vmap."""
    return torch.is_grad_enabled() and any(level.requires_grad for tensor in tensors for level in transform_levels(tensor))


def transform_levels(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """`tensor` and the tensors that transforms of torch.func wrapped in it."""
    yield tensor
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
        yield tensor


def without_autocast(device: torch.device) -> AbstractContextManager:
    """Autocast off, for operations that choose their own precision: it would cast float32 down again."""
    return torch.autocast(device.type, enabled=False) if has_autocast(device.type) else nullcontext()


def has_autocast(device_type: str) -> bool:
    """Whether torch knows autocast on such devices; it does not on meta. Dynamo of torch 2.11 cannot trace torch's own answer."""
    if device_type in ("cpu", "cuda", "meta"):
        return device_type != "meta"
    return torch.amp.is_autocast_available(device_type)
