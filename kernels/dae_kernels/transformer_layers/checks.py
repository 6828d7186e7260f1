"""The checks of operands that these layers share."""

from __future__ import annotations

import torch
from torch import Tensor

from dae_kernels.checks import as_number, check_floating


def check_operands(operation: str, **tensors: Tensor) -> None:
    """TypeError unless all are floating point tensors; ValueError unless they are on one device."""
    for name, x in tensors.items():
        check_floating(operation, name, x)
    devices = {name: x.device for name, x in tensors.items()}
    if len(set(devices.values())) > 1:
        raise ValueError(
            f"{operation} needs its tensors on one device, got {', '.join(f'{n} on {d}' for n, d in devices.items())}"
        )


def per_channel(operation: str, name: str, parameter: Tensor, x: Tensor) -> Tensor:
    """`parameter` [B, C] of `x` [B, C] or [B, L, C], or of the shape of `x`, so that it broadcasts to `x`."""
    if parameter.shape == x.shape:
        return parameter
    if x.dim() == 3 and parameter.shape == (x.shape[0], x.shape[2]):
        return parameter[:, None]
    raise ValueError(f"{operation} needs {name} [B, C], or like x {list(x.shape)}, got {list(parameter.shape)}")


def positive_eps(operation: str, got: float) -> float:
    eps = as_number(operation, "eps", got)
    if not eps > 0:
        raise ValueError(f"{operation} needs a positive eps, got {eps}")
    return eps


def wider(x: Tensor) -> torch.dtype:
    """float32, or float64 for float64: in which 16-bit operands are computed, to be rounded once."""
    return torch.promote_types(x.dtype, torch.float32)
