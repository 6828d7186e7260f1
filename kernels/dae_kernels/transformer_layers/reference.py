"""The layers of a Transformer block in eager torch: the definitions, used on every device.

16-bit operands are computed in float32, and rounded once.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def layer_norm_modulate_reference(x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> Tensor:
    """LayerNorm(x) * (1 + scale) + shift; scale and shift broadcast to x."""
    scale, shift = scale.to(wider(x)), shift.to(wider(x))
    return (F.layer_norm(x.to(wider(x)), x.shape[-1:], eps=eps) * (1 + scale) + shift).to(x.dtype)


def gated_residual_reference(x: Tensor, h: Tensor, gate: Tensor) -> Tensor:
    """x + gate * h; the gate broadcasts to x."""
    gate = gate.to(wider(x))
    return (x.to(wider(x)) + gate * h.to(wider(x))).to(x.dtype)


def rms_norm_reference(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight."""
    if weight is not None and weight.dtype != x.dtype:  # otherwise torch warns and runs unfused
        wide = torch.promote_types(x.dtype, weight.dtype)
        x, weight = x.to(wide), weight.to(wide)
    return F.rms_norm(x, x.shape[-1:], weight, eps)


def rotary_table_reference(length: int, head_dim: int, base: float) -> Tensor:
    """[2, length, D / 2]: cosine and sine of position * base^(-2i / D)."""
    return table_of(torch.arange(length, dtype=torch.float64)[:, None] * frequencies(head_dim, base))


def rotary_table_2d_reference(height: int, width: int, head_dim: int, base: float) -> Tensor:
    """[2, height * width, D / 2]: of the row, then of the column, each with the frequencies of D / 2."""
    row, column = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in (height, width)), indexing="ij")
    turns = frequencies(head_dim // 2, base)
    return table_of(torch.cat([row.reshape(-1, 1) * turns, column.reshape(-1, 1) * turns], dim=1))


def rotate_reference(x: Tensor, table: Tensor) -> Tensor:
    """The pairs (x_i, x_{i + D/2}) turned by the angles of the table."""
    cos, sin = table.to(wider(x))
    a, b = x.to(wider(x)).chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1).to(x.dtype)


def swiglu_reference(gate_up: Tensor) -> Tensor:
    """silu(gate) * up of the two halves."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def frequencies(head_dim: int, base: float) -> Tensor:
    """[D / 2]: base^(-2i / D)."""
    return base ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)


def table_of(angles: Tensor) -> Tensor:
    return torch.stack([angles.cos(), angles.sin()]).float()


def wider(x: Tensor) -> torch.dtype:
    """float32, or float64 for float64."""
    return torch.promote_types(x.dtype, torch.float32)
