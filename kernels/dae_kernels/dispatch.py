"""Choose implementations and register torch operators.

A named implementation runs or raises; `auto` is resolved here. Triton is imported only when a kernel is launched.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from dae_kernels.checks import check_choice
from dae_kernels.tracing import TAKEN_WHOLE, traced

TRITON_INSTALLED = importlib.util.find_spec("triton") is not None

is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor  # looked up once, as it is asked for each argument

# Types of an operator's arguments that its body takes as they are; subclasses of tensors go through the dispatcher.
PLAIN = frozenset({Tensor, torch.nn.Parameter, type(None), bool, int, float, str, tuple, list, torch.dtype})

KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)

INTERPRETED_BFLOAT16 = False  # True if Triton's interpreter is patched, as in the tests


_cpu_stands_for_cuda = False


@contextlib.contextmanager
def standing_for_cuda() -> Iterator[None]:
    """Inside the block fake tensors on a CPU stand for those of a GPU: operations choose what they would choose there.

    For builds of torch without CUDA, which have no fake tensors on `cuda`. With values, kernels cannot run there.
    """
    global _cpu_stands_for_cuda
    before, _cpu_stands_for_cuda = _cpu_stands_for_cuda, True
    try:
        yield
    finally:
        _cpu_stands_for_cuda = before


def on_cuda(device: torch.device) -> bool:
    """Whether tensors on `device` are, or stand for, those of a GPU."""
    return device.type == "cuda" or (_cpu_stands_for_cuda and device.type == "cpu")


def dtype_refusal(*operands: Tensor) -> str | None:
    """Why no kernel takes operands of these dtypes, or None."""
    for operand in operands:
        if operand.dtype not in KERNEL_DTYPES:
            return f"the kernel takes float16, bfloat16 and float32, got {operand.dtype}"
        if operand.dtype == torch.bfloat16 and operand.device.type == "cpu" and interpreting() and not INTERPRETED_BFLOAT16:
            return "Triton's CPU interpreter computes with the bits of bfloat16 (seen in 3.7.1), so its results are wrong"
    return None


def plain(operand: Any) -> bool:
    """Whether it is a dense tensor of a dtype that `dtype_refusal` lets pass; False where that is not seen at once."""
    if not isinstance(operand, Tensor) or operand.dtype not in KERNEL_DTYPES:
        return False
    if operand.is_nested or operand.layout is not torch.strided:
        return False
    return not (operand.dtype is torch.bfloat16 and operand.is_cpu and interpreting())


def interpreting() -> bool:
    """Whether Triton kernels run in its CPU interpreter (TRITON_INTERPRET=1, read by triton at its first import)."""
    return not _cpu_stands_for_cuda and os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")


def triton_refusal(device: torch.device) -> str | None:
    """Why no Triton kernel can run on `device`, or None if it can."""
    if not TRITON_INSTALLED:
        return "triton is not installed (pip install triton)"
    if device.type == "cuda":
        return gpu_refusal(device) if torch.compiler.is_compiling() else known_gpu_refusal(device)
    if on_cuda(device):
        return None
    if device.type == "cpu" and interpreting():
        return None
    return f"the tensors are on {device}, not on a CUDA device"


def gpu_refusal(device: torch.device) -> str | None:
    if not torch.cuda.is_available():  # fake tensors: what they stand for has a GPU
        return None
    properties = torch.cuda.get_device_properties(device)  # the only such query that Dynamo evaluates
    if torch.version.hip is None and properties.major < 8:
        return f"the kernels need compute capability 8.0 or higher, {properties.name} has {properties.major}.x"
    return None


known_gpu_refusal = functools.cache(gpu_refusal)  # the driver's answers take as long as a launch


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
    if impl == "reference" or (impl == "auto" and not on_cuda(device)):
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


def apply(function: Any, *arguments: Any) -> Any:
    """`function.apply(*arguments)` of an autograd.Function with `setup_context`, at a tenth of its host time.

    torch binds the arguments to the signature of `forward` at each call (45 of 50 us in torch 2.13), for default values that
    the Functions here have not. Where nothing traces or transforms, that is left out (`without_setup`), and where no derivative
    can be taken, `forward` runs alone.
    """
    if traced():
        return function.apply(*arguments)
    wanted = False
    for argument in arguments:
        if isinstance(argument, Tensor):
            if is_wrapped(argument):  # left behind by a transform
                return function.apply(*arguments)
            wanted = wanted or argument.requires_grad
    if forward_ad._current_level >= 0:
        return function.apply(*arguments)
    if wanted and torch.is_grad_enabled():
        return super(torch.autograd.Function, without_setup(function)).apply(*arguments)
    return function.forward(*arguments)


@functools.cache
def without_setup(function: Any) -> Any:
    """The autograd.Function with `setup_context` within `forward`: then no version of torch asks for the signature.

    Of its results the first `used` are outputs, if it says so: `setup_context` alone saves results that nobody else needs, and
    each output takes a microsecond.
    """
    used = getattr(function, "used", None)

    def forward(ctx: Any, *arguments: Any) -> Any:
        results = function.forward(*arguments)
        function.setup_context(ctx, arguments, results)
        return results if used is None else results[:used]

    parts = {"forward": staticmethod(forward), "backward": staticmethod(function.backward), "__module__": function.__module__}
    return types.new_class(function.__name__, (torch.autograd.Function,), exec_body=lambda body: body.update(parts))


def register_op(name: str, body: Callable, fake: Callable) -> Callable:
    """`body` as the torch operator `name` ("dae_kernels::..."), opaque to torch.compile; torch.vmap loops over the batch.

    The operator declares that it writes to none of its operands. With `triton_op` torch decides that by compiling the kernels;
    where this fails, it counts every operand as written, which breaks compiled training (torch 2.11).

    Where nothing traces or transforms and the operands are plain tensors that have values, and not of a subclass (fake tensors,
    DTensor), `body` is called directly, without the dispatcher: an
    operator's first call imports Dynamo, which takes seconds and needs more than torch, and each call costs more than a small
    kernel. The operator itself is the attribute `op` of what is returned.

    It has no derivative: differentiable functions call it from an autograd.Function, the others detach its operands.

    Args:
        body: annotated function of tensors and numbers that returns new tensors.
        fake: the same signature; returns empty tensors of the right shapes, strides, dtypes and devices.
    """
    op = torch.library.custom_op(name, body, mutates_args=())
    op.register_fake(fake)
    op.register_vmap(loop_over_batch(op))

    def call(*arguments: Any) -> Any:
        # The operands of an operation are on one device, so the first says of all whether they have values.
        if traced() or arguments[0].is_meta or not PLAIN.issuperset(map(type, arguments)):
            return op(*arguments)
        return body(*arguments)

    run: Any = call
    run.op = op
    return run


def loop_over_batch(op: Callable) -> Callable:
    """The vmap rule of `op`: sequential calls, which bound memory."""

    def rule(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, Any]:
        calls = []
        for k in range(info.batch_size):
            one = (a.select(d, k) if isinstance(d, int) else a for a, d in zip(arguments, in_dims, strict=True))
            calls.append(op(*one))
        if isinstance(calls[0], Tensor):
            return torch.stack(calls), 0
        results = tuple(torch.stack(result) for result in zip(*calls, strict=True))
        return results, (0,) * len(results)

    return rule
