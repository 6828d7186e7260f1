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
    if torch.compiler.is_compiling():
        return False
    if torch._C._len_torch_dispatch_stack() and any(torch._C._get_dispatch_mode(mode) is not None for mode in TRACING_MODES):
        return False
    for tensor in tensors:
        if tensor.is_cuda and torch.cuda.is_current_stream_capturing():
            return False
        if valueless(tensor):
            return False
        wrapped = torch._C._functorch.is_functorch_wrapped_tensor(tensor)
        if wrapped and (batched(tensor) or any(valueless(level) for level in transform_levels(tensor))):
            return False
    return True


def valueless(tensor: torch.Tensor) -> bool:
    return tensor.is_meta or isinstance(tensor, FakeTensor)


def batched(*tensors: torch.Tensor) -> bool:
    """Whether torch.vmap has wrapped one of these."""
    return any(torch._C._functorch.is_batchedtensor(level) for tensor in tensors for level in transform_levels(tensor))


def differentiated(*tensors: torch.Tensor) -> bool:
    """Whether one of these may be differentiated, also by a torch.func transform outside a torch.vmap."""
    if not torch.is_grad_enabled():
        return False
    for tensor in tensors:
        if tensor.requires_grad:
            return True
        if torch._C._functorch.is_functorch_wrapped_tensor(tensor) and any(
            level.requires_grad for level in transform_levels(tensor)
        ):
            return True
    return False


def transform_levels(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """`tensor` and the tensors that transforms of torch.func wrapped in it."""
    yield tensor
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
        yield tensor


def without_autocast(device: torch.device) -> AbstractContextManager:
    """Autocast off, for operations that choose their own precision: it would cast float32 down again.

    Nothing where it is off already, but for what is compiled, which may be called where it is on.
    """
    if not has_autocast(device.type):
        return nullcontext()
    if not torch.compiler.is_compiling() and not torch.is_autocast_enabled(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def has_autocast(device_type: str) -> bool:
    """Whether torch knows autocast on such devices; it does not on meta. Dynamo of torch 2.11 cannot trace torch's own answer."""
    if device_type in ("cpu", "cuda", "meta"):
        return device_type != "meta"
    return torch.amp.is_autocast_available(device_type)
