"""Rotary positions: pairs of entries turned by angles that grow with the position."""

from __future__ import annotations

import torch
from torch import Tensor

from dae_kernels.checks import as_integer, as_number
from dae_kernels.transformer_layers.checks import check_operands, wider


def rotary_table(length: int, head_dim: int, base: float = 10000.0) -> Tensor:
    """Cosine and sine of the angles of `length` positions: position p turns pair i by p * base^(-2i / head_dim).

    Args:
        length: number of positions.
        head_dim: D, even.
        base: the greatest wavelength is about 2 pi base positions.

    Returns:
        [2, length, D / 2] float32, from angles in float64, on torch's default device.

    Raises:
        ValueError: a negative length, an odd head dimension, or base <= 0.
        TypeError: a length or head dimension that is no int, or a base that is no number.

    Source: Su et al. 2021, arXiv 2104.09864, section 3.2.2.
    """
    length = as_size("rotary_table", "length", length)
    head_dim, base = as_turns("rotary_table", head_dim, 2, base)
    return table_of(torch.arange(length, dtype=torch.float64)[:, None] * frequencies(head_dim, base))


def rotary_table_2d(height: int, width: int, head_dim: int, base: float = 10000.0) -> Tensor:
    """The table of a grid, its positions row by row: the first half of the pairs turns by the row, the second by the column.

        pair i < D / 4 by row * base^(-4i / D), pair D / 4 + i by column * base^(-4i / D)

    Args:
        height, width: of the grid; position p is at row p // width, column p % width.
        head_dim: D, a multiple of 4.
        base: as in `rotary_table`.

    Returns:
        [2, height * width, D / 2] float32, from angles in float64, on torch's default device.

    Raises:
        ValueError: a negative height or width, a head dimension that 4 does not divide, or base <= 0.
        TypeError: a size that is no int, or a base that is no number.

    Source: Heo et al. 2024, arXiv 2403.13298, section 3.1 (axial frequencies).
    """
    height, width = as_size("rotary_table_2d", "height", height), as_size("rotary_table_2d", "width", width)
    head_dim, base = as_turns("rotary_table_2d", head_dim, 4, base)
    row, column = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in (height, width)), indexing="ij")
    turns = frequencies(head_dim // 2, base)
    return table_of(torch.cat([row.reshape(-1, 1) * turns, column.reshape(-1, 1) * turns], dim=1))


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Turn the pairs (x_i, x_{i + D/2}) of each position by the angles of a table.

        out_i = x_i cos - x_{i + D/2} sin,    out_{i + D/2} = x_i sin + x_{i + D/2} cos

    Args:
        x: [..., L, D], floating.
        table: [2, L, D / 2], by `rotary_table` or `rotary_table_2d`, or a part of its positions.

    Returns:
        The shape and dtype of x, computed in float32 (float64 for float64); differentiable.

    Raises:
        TypeError: an operand is not a floating point tensor.
        ValueError: shapes or devices that do not fit.

    Source: Su et al. 2021, arXiv 2104.09864, with the halves for the pairs, as in GPT-NeoX.
    """
    check_operands("rotate", x=x, table=table)
    if x.dim() < 2 or table.shape != (2, x.shape[-2], x.shape[-1] // 2) or x.shape[-1] % 2:
        raise ValueError(
            f"rotate needs x [..., L, D] with an even D and a table [2, L, D / 2], got {list(x.shape)} and {list(table.shape)}"
        )
    cos, sin = table.to(wider(x))
    a, b = x.to(wider(x)).chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1).to(x.dtype)


def frequencies(head_dim: int, base: float) -> Tensor:
    return base ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)


def table_of(angles: Tensor) -> Tensor:
    return torch.stack([angles.cos(), angles.sin()]).float()


def as_size(operation: str, name: str, got: int) -> int:
    size = as_integer(operation, name, got)
    if size < 0:
        raise ValueError(f"{operation} needs {name} to be at least 0, got {size}")
    return size


def as_turns(operation: str, head_dim: int, divisor: int, base: float) -> tuple[int, float]:
    head_dim, base = as_size(operation, "head_dim", head_dim), as_number(operation, "base", base)
    if not base > 0:
        raise ValueError(f"{operation} needs a positive base, got {base}")
    if head_dim < divisor or head_dim % divisor:
        raise ValueError(f"{operation} needs a head_dim that {divisor} divides, got {head_dim}")
    return head_dim, base
