"""Choose implementations and register torch operators.

A named implementation runs or raises; `auto` is resolved here. Triton is imported only when a kernel is launched.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable
from typing import Any

import torch

from dae_kernels.checks import check_choice
from dae_kernels.tracing import TAKEN_WHOLE, traced, valueless

TRITON_INSTALLED = importlib.util.find_spec("triton") is not None

KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)

INTERPRETED_BFLOAT16 = False  # True if Triton's interpreter is patched, as in the tests


def dtype_refusal(*operands: torch.Tensor) -> str | None:
    """Why no kernel takes operands of these dtypes, or None."""
    for operand in operands:
        if operand.dtype not in KERNEL_DTYPES:
            return f"the kernel takes float16, bfloat16 and float32, got {operand.dtype}"
        if operand.dtype == torch.bfloat16 and operand.device.type == "cpu" and interpreting() and not INTERPRETED_BFLOAT16:
            return "Triton's CPU interpreter computes with the bits of bfloat16 (seen in 3.7.1), so its results are wrong"
    return None


def interpreting() -> bool:
    """Whether Triton kernels run in its CPU interpreter (TRITON_INTERPRET=1, read by triton at its first import)."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")


def triton_refusal(device: torch.device) -> str | None:
    """Why no Triton kernel can run on `device`, or None if it can."""
    if not TRITON_INSTALLED:
        return "triton is not installed (pip install triton)"
    if device.type == "cuda":
        if not torch.cuda.is_available():  # fake tensors of a CUDA device
            return None
        properties = torch.cuda.get_device_properties(device)  # the only such query that Dynamo evaluates
        if torch.version.hip is None and properties.major < 8:
            return f"the kernels need compute capability 8.0 or higher, {properties.name} has {properties.major}.x"
        return None
    if device.type == "cpu" and interpreting():
        return None
    return f"the tensors are on {device}, not on a CUDA device"


def choose(impl: str, device: torch.device, refusal: str | None = None) -> str:
    """'reference' or 'triton' for a request of 'auto', 'reference' or 'triton'.

    `auto` uses Triton on CUDA devices if the kernel can run, else the reference (also under the interpreter, which is meant for
    tests).

    Args:
        impl: the caller's request.
        device: device of the operands.
        refusal: the operation's reason why its kernel cannot take these operands (dtype, size), or None.

    Raises:
        ValueError: `impl` is unknown, or 'triton' was requested and cannot run; the message says why.
    """
    check_choice("impl", impl, ("auto", "reference", "triton"))
    if impl == "reference" or (impl == "auto" and device.type != "cuda"):
        return "reference"
    refusal = refusal or triton_refusal(device)
    if refusal is None:
        return "triton"
    if impl == "auto":
        return "reference"
    raise ValueError(f"impl='triton' cannot run here: {refusal}. Use impl='auto' or impl='reference'")


def taken_whole(function: Callable) -> Callable:
    """Decorator of a function with an autograd.Function that Dynamo must not trace into (`allow_in_graph`).

    Dynamo ignores the `backward` of an autograd.Function inside torch.func.grad, vjp and jacrev: the derivative would silently be
    that of the forward pass, or 0 (torch 2.13). With `allow_in_graph` the function is traced below these transforms, as in eager
    mode.
    """
    TAKEN_WHOLE.append(function)

    @functools.wraps(function)
    def run(*arguments: Any) -> Any:
        if torch.compiler.is_compiling():
            import dae_kernels.whole  # noqa: F401
        return function(*arguments)

    return run


def register_op(name: str, body: Callable, fake: Callable) -> Callable:
    """`body` as the torch operator `name` ("dae_kernels::..."), opaque to torch.compile; torch.vmap loops over the batch.

    Without tracing or transforms, on tensors with values, `body` is called directly: an operator's first call imports Dynamo,
    which takes seconds and needs more than torch. The operator itself is the attribute `op` of the returned function.

    It has no derivative: differentiable functions call it from an autograd.Function, the others detach its operands.

    Args:
        body: annotated function of tensors and numbers that returns new tensors.
        fake: the same signature; returns empty tensors of the right shapes, dtypes and devices.
    """
    op = opaque_op(name, body, fake)

    def call(*arguments: Any) -> Any:
        abstract = any(isinstance(argument, torch.Tensor) and valueless(argument) for argument in arguments)
        return op(*arguments) if abstract or traced() else body(*arguments)

    run: Any = call
    run.op = op
    return run


def opaque_op(name: str, body: Callable, fake: Callable) -> Callable:
    op = torch.library.custom_op(name, body, mutates_args=())
    op.register_fake(fake)
    op.register_vmap(loop_over_batch(op))
    return op


def register_triton_op(name: str, launcher: Callable, fake: Callable) -> Callable:
    """Register `launcher` as the torch operator `name` ("dae_kernels::...") for torch.compile.

    A compiled kernel becomes a `triton_op`, whose body Inductor can inspect. The interpreter cannot run on the fake tensors of
    this tracing, so under it the launcher is an opaque operator and `fake` gives the shapes.

    Args:
        launcher: annotated function of tensors and numbers that allocates its outputs and launches through `launchable`.
        fake: the same signature; returns empty tensors of the right shapes, dtypes and devices.
    """
    if interpreting():
        return opaque_op(name, launcher, fake)
    op: Any = torch.library.triton_op(name, launcher, mutates_args=())
    op.register_vmap(loop_over_batch(op))
    return op


def loop_over_batch(op: Callable) -> Callable:
    """The vmap rule of `op`: sequential calls, which bound memory."""

    def rule(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, Any]:
        calls = []
        for k in range(info.batch_size):
            one = (a.select(d, k) if isinstance(d, int) else a for a, d in zip(arguments, in_dims, strict=True))
            calls.append(op(*one))
        if isinstance(calls[0], torch.Tensor):
            return torch.stack(calls), 0
        results = tuple(torch.stack(result) for result in zip(*calls, strict=True))
        return results, (0,) * len(results)

    return rule


def launchable(kernel: Any) -> Any:
    """Wrap `kernel` for calls from a registered launcher: `launchable(kernel)[grid](...)`."""
    return kernel if interpreting() else torch.library.wrap_triton(kernel)
