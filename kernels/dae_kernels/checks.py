"""Options of all operations: numbers and flags as Python's, or one line on what was got.

A number may come as Python's, as NumPy's (a scalar or an array of one element) or as a tensor of one element, as from
`x.std()` or `np.median(d)`. A tensor is read, which on a GPU waits for it.
"""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dae_kernels.dispatch import differentiated, values_readable


def as_number(operation: str, name: str, got: Any) -> float:
    """`got` as a float (or what torch.compile has in its place).

    Raises:
        TypeError: no real number; a truth value is none.
        ValueError: too large for a float, or a tensor that cannot be read here or asks for a gradient.
    """
    if isinstance(got, torch.SymInt | torch.SymFloat):
        return got
    value = unwrapped(operation, name, got)
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{operation} needs {name} as a number, got {described(got)}")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{operation} needs {name} as a number that a float can hold, got one beyond 1e308") from None


def as_integer(operation: str, name: str, got: Any) -> int:
    """`got` as an int (or what torch.compile has in its place); errors as `as_number`, beyond 64 bits too. 2.0 is no integer."""
    if isinstance(got, torch.SymInt):
        return got
    value = unwrapped(operation, name, got)
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{operation} needs {name} as an int, got {described(got)}")
    if not -(2**63) <= value < 2**63:
        raise ValueError(f"{operation} needs {name} as an int of 64 bits, got one beyond 9e18")
    return int(value)


def as_flag(operation: str, name: str, got: Any) -> bool:
    """`got` as a bool; errors as `as_number`. 0 and 1 are none."""
    value = unwrapped(operation, name, got)
    if not isinstance(value, bool):
        raise TypeError(f"{operation} needs {name} as a bool, got {described(got)}")
    return value


def as_numbers(operation: str, name: str, got: Any) -> tuple[float, ...]:
    """A sequence, 1-D array or 1-D tensor of numbers as a tuple of floats; errors as `as_number`."""
    if getattr(got, "ndim", None) == 1:  # of NumPy or torch
        got = list(got)
    if isinstance(got, str | bytes) or not isinstance(got, Sequence):
        raise TypeError(f"{operation} needs {name} as a sequence of numbers, e.g. (0.5, 1.0, 2.0), got {described(got)}")
    return tuple(as_number(operation, name, number) for number in got)


def unwrapped(operation: str, name: str, got: Any) -> Any:
    """What Python has for a tensor, array or NumPy scalar of one element; `got` itself otherwise."""
    if isinstance(got, bool | int | float):  # first, as torch.compile asks no more of the symbols that it makes of them
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
    """Its type, with the value of a number or text, or the shape that keeps an array from being a number."""
    kind = type(got).__name__
    if isinstance(got, bool | int | float | str):
        return f"{kind} {got!r:.60}"
    return f"{kind} {list(got.shape)}" if getattr(got, "shape", ()) else kind
