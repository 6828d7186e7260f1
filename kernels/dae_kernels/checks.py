"""Argument checks shared by operations: options become Python numbers and flags, operands must be dense floating point.

Numbers may be Python's, NumPy's (a scalar or an array of one element) or a tensor of one element, as from `x.std()` or
`np.median(d)`. Reading a tensor synchronises with a GPU.
"""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dae_kernels.tracing import differentiated, values_readable

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def as_number(operation: str, name: str, got: Any) -> float:
    """`got` as a float, or as torch.compile's symbol for it.

    Raises:
        TypeError: not a real number; a bool is refused, too.
        ValueError: too large for a float, or a tensor that cannot be read here or requires a gradient.
    """
    if type(got) is float or isinstance(got, torch.SymInt | torch.SymFloat):
        return got  # type: ignore[return-value]
    value = unwrapped(operation, name, got)
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{operation} needs {name} as a number, got {described(got)}")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{operation} needs {name} as a number that a float can hold, got one beyond 1e308") from None


def as_integer(operation: str, name: str, got: Any) -> int:
    """`got` as an int, or torch.compile's symbol in its place; errors as `as_number`, also for 2.0 and beyond 64 bits."""
    if isinstance(got, torch.SymInt) or (type(got) is int and -(2**63) <= got < 2**63):
        return got  # type: ignore[return-value]
    value = unwrapped(operation, name, got)
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{operation} needs {name} as an int, got {described(got)}")
    integer = int(value)
    if not -(2**63) <= integer < 2**63:
        raise ValueError(f"{operation} needs {name} as an int of 64 bits, got one beyond 9e18")
    return integer


def as_flag(operation: str, name: str, got: Any) -> bool:
    """`got` as a bool; errors as `as_number`, also for 0 and 1."""
    if type(got) is bool:
        return got
    value = unwrapped(operation, name, got)
    if not isinstance(value, bool):
        raise TypeError(f"{operation} needs {name} as a bool, got {described(got)}")
    return value


def as_numbers(operation: str, name: str, got: Any) -> tuple[float, ...]:
    """A sequence, 1-D array or 1-D tensor of numbers as a tuple of floats; errors as `as_number`."""
    if type(got) is tuple and {*map(type, got)} == {float}:
        return got
    if getattr(got, "ndim", None) == 1:  # of NumPy or torch
        got = list(got)
    if isinstance(got, str | bytes) or not isinstance(got, Sequence):
        raise TypeError(f"{operation} needs {name} as a sequence of numbers, e.g. (0.5, 1.0, 2.0), got {described(got)}")
    return tuple(as_number(operation, name, number) for number in got)


def unwrapped(operation: str, name: str, got: Any) -> Any:
    """The Python number of a tensor, array or NumPy scalar of one element; `got` itself otherwise."""
    if isinstance(got, bool | int | float):  # first, because under torch.compile they may be symbols
        return got
    if isinstance(got, Tensor) and got.numel() == 1:
        if not values_readable(got) or got.is_meta:
            raise ValueError(f"{operation} needs {name} where it can be read, got a traced tensor; pass a Python number")
        if differentiated(got):
            raise ValueError(f"{operation} has no gradient by {name}, got a tensor that requires one; pass {name}.item()")
        return got.item()
    if not isinstance(got, Tensor) and hasattr(got, "item") and getattr(got, "size", None) == 1:
        return got.item()
    return got


def described(got: Any) -> str:
    """`got` in an error message: its type, with the value of a number or text, or the shape of an array."""
    kind = type(got).__name__
    if isinstance(got, bool | int | float | str):
        return f"{kind} {got!r:.60}"
    return f"{kind} {list(got.shape)}" if getattr(got, "shape", ()) else kind


def check_choice(name: str, got: Any, choices: Sequence[str | None]) -> None:
    """ValueError unless `got` is one of `choices`."""
    if type(got) is str and got in choices:
        return
    if not isinstance(got, str | None) or got not in choices:  # an array would compare by element
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {' '.join(repr(got).split()):.80}")


def check_dense(operation: str, name: str, operand: Any) -> None:
    """TypeError unless `operand` is a dense tensor: sparse and nested ones support few operations."""
    if not isinstance(operand, torch.Tensor):
        raise TypeError(f"{operation} needs {name} as a torch.Tensor, got {type(operand).__name__}")
    if operand.is_nested or operand.layout != torch.strided:
        got = "a nested one" if operand.is_nested else operand.layout
        raise TypeError(f"{operation} needs {name} as a dense tensor, got {got}")


def check_tensors(operation: str, **operands: Tensor) -> None:
    """TypeError unless all operands are dense tensors."""
    for name, operand in operands.items():
        check_dense(operation, name, operand)


def check_floating(operation: str, name: str, operand: Any, remedy: str | None = None) -> None:
    """TypeError unless `operand` is a dense tensor of 16, 32 or 64 bits floating point; torch has no arithmetic for 8 bits."""
    if not isinstance(operand, torch.Tensor) or operand.dtype not in FLOAT_DTYPES:
        got = operand.dtype if isinstance(operand, torch.Tensor) else type(operand)
        takes = ", ".join(str(dtype).removeprefix("torch.") for dtype in FLOAT_DTYPES)
        raise TypeError(f"{operation} needs a floating point tensor {name}, got {got}; {remedy or f'it takes {takes}'}")
    check_dense(operation, name, operand)


def check_operands(operation: str, **tensors: Tensor) -> None:
    """TypeError unless all are floating point tensors; ValueError unless they are on one device."""
    for name, x in tensors.items():
        check_floating(operation, name, x)
    devices = {name: x.device for name, x in tensors.items()}
    if len(set(devices.values())) > 1:
        raise ValueError(
            f"{operation} needs its tensors on one device, got {', '.join(f'{n} on {d}' for n, d in devices.items())}"
        )


def check_clouds(operation: str, x: Tensor, y: Tensor) -> None:
    """Check two clouds x [N, D] and y [M, D], N, M, D >= 1, floating, of one dtype and on one device.

    Raises:
        TypeError: not tensors, not floating point, or two dtypes.
        ValueError: other shapes, an empty cloud, or two devices.
    """
    check_dense(operation, "x", x)
    check_dense(operation, "y", y)
    for name, cloud in (("x", x), ("y", y)):
        if cloud.dtype not in FLOAT_DTYPES:
            raise TypeError(f"{operation} needs floating point clouds, got {name} of {cloud.dtype}")
    if x.dim() != 2 or y.dim() != 2 or x.shape[1] != y.shape[1]:
        raise ValueError(f"{operation} needs clouds x [N, D] and y [M, D], got x {list(x.shape)}, y {list(y.shape)}")
    if x.numel() == 0 or y.numel() == 0:
        shapes = f"got x {list(x.shape)}, y {list(y.shape)}"
        raise ValueError(f"{operation} needs at least one point and one dimension in each cloud, {shapes}")
    if x.dtype != y.dtype:
        raise TypeError(f"{operation} needs clouds of one dtype, got x {x.dtype}, y {y.dtype}")
    if x.device != y.device:
        raise ValueError(f"{operation} needs clouds on one device, got x on {x.device}, y on {y.device}")


def check_weights(operation: str, name: str, weights: Tensor | None, cloud: Tensor) -> None:
    """Check weights [N] of a cloud [N, D]: floating, finite, not negative, with a positive sum; None for equal weights.

    Reading the values synchronises with a GPU. They cannot be read under torch.compile and torch.vmap or in fake tensors: there
    bad values give a meaningless result.

    Raises:
        TypeError: not a tensor, or not floating point.
        ValueError: another shape or device, a negative or not finite weight, or a sum that is not positive.
    """
    if weights is None:
        return
    check_tensors(operation, **{name: weights})
    if weights.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{operation} needs floating point weights, got {name} of {weights.dtype}")
    if weights.shape != cloud.shape[:1]:
        raise ValueError(f"{operation} needs {name} [{cloud.shape[0]}], one weight a point, got {list(weights.shape)}")
    if weights.device != cloud.device:
        raise ValueError(f"{operation} needs {name} on {cloud.device}, where the cloud is, got {weights.device}")
    if not values_readable(weights):
        return
    # float64, as the sum of float16 weights need not be one
    total, minimum = weights.detach().sum(dtype=torch.float64).item(), weights.detach().min().item()
    if not (minimum >= 0 and 0 < total < float("inf")):
        raise ValueError(
            f"{operation} needs weights that are not negative and sum to a positive number, "
            f"got {name} with minimum {minimum} and sum {total}"
        )
