"""Norms, rotary positions, the gated residual and the gated activation of Transformer blocks: checks."""

from __future__ import annotations

from torch import Tensor

from dae_kernels.checks import as_integer, as_number, check_operands
from dae_kernels.transformer_layers.reference import (
    gated_residual_reference,
    layer_norm_modulate_reference,
    rms_norm_reference,
    rotary_table_2d_reference,
    rotary_table_reference,
    rotate_reference,
    swiglu_reference,
)


def layer_norm_modulate(x: Tensor, scale: Tensor, shift: Tensor, eps: float = 1e-6) -> Tensor:
    """LayerNorm without learned parameters, with per-sample scale and shift (adaLN).

        out = (x - mean(x)) / sqrt(var(x) + eps) * (1 + scale) + shift       mean and var over C

    Args:
        x: [B, C] or [B, L, C], floating.
        scale, shift: [B, C], the same for all L positions, or of the shape of x.
        eps: added to the variance, > 0.

    Returns:
        The shape and dtype of x, computed in float32 (float64 for float64); differentiable.

    Raises:
        TypeError: an operand is not a floating point tensor.
        ValueError: shapes or devices that do not fit, or eps <= 0.

    Source: Peebles & Xie 2023, arXiv 2212.09748, section 3.2; LayerNorm: Ba et al. 2016, arXiv 1607.06450.
    """
    operation = "layer_norm_modulate"
    check_operands(operation, x=x, scale=scale, shift=shift)
    eps = positive_eps(operation, eps)
    if x.dim() not in (2, 3) or x.shape[-1] == 0:
        raise ValueError(f"{operation} needs x [B, C] or [B, L, C] with C >= 1, got {list(x.shape)}")
    scale, shift = (per_channel(operation, name, p, x) for name, p in (("scale", scale), ("shift", shift)))
    return layer_norm_modulate_reference(x, scale, shift, eps)


def gated_residual(x: Tensor, h: Tensor, gate: Tensor) -> Tensor:
    """The residual of an adaptive block: out = x + gate * h.

    Args:
        x: [B, C] or [B, L, C], floating.
        h: the shape of x.
        gate: [B, C], the same for all L positions, or of the shape of x.

    Returns:
        The shape and dtype of x, computed in float32 (float64 for float64); differentiable.

    Raises:
        TypeError: an operand is not a floating point tensor.
        ValueError: shapes or devices that do not fit.

    Source: Peebles & Xie 2023, arXiv 2212.09748, section 3.2.
    """
    operation = "gated_residual"
    check_operands(operation, x=x, h=h, gate=gate)
    if x.dim() not in (2, 3) or h.shape != x.shape:
        raise ValueError(f"{operation} needs x [B, C] or [B, L, C] and h of its shape, got {list(x.shape)} and {list(h.shape)}")
    return gated_residual_reference(x, h, per_channel(operation, "gate", gate, x))


def rms_norm(x: Tensor, weight: Tensor | None = None, eps: float = 1e-6) -> Tensor:
    """out = x / sqrt(mean(x^2) + eps) * weight, the mean over the last dimension.

    `torch.nn.functional.rms_norm` with float32 inside, also where x and weight have two dtypes.

    Args:
        x: [..., C], floating.
        weight: [C], floating, or None for 1.
        eps: added to the mean square, > 0.

    Returns:
        The shape of x, in the dtype that x and weight promote to, as torch's own does; differentiable.

    Raises:
        TypeError: an operand is not a floating point tensor.
        ValueError: shapes or devices that do not fit, or eps <= 0.

    Source: Zhang & Sennrich 2019, arXiv 1910.07467.
    """
    check_operands("rms_norm", x=x, **({} if weight is None else {"weight": weight}))
    eps = positive_eps("rms_norm", eps)
    if x.dim() < 1 or x.shape[-1] == 0:
        raise ValueError(f"rms_norm needs x [..., C] with C >= 1, got {list(x.shape)}")
    if weight is not None and weight.shape != x.shape[-1:]:
        raise ValueError(f"rms_norm needs weight [{x.shape[-1]}] for x {list(x.shape)}, got {list(weight.shape)}")
    return rms_norm_reference(x, weight, eps)


def qk_norm(q: Tensor, k: Tensor, weight_q: Tensor, weight_k: Tensor, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """`rms_norm` of queries and keys over each head: attention scores then do not grow with the model's width.

    Args:
        q, k: [..., D], floating.
        weight_q, weight_k: [D].
        eps: added to the mean squares, > 0.

    Returns:
        The normalised queries and keys, as `rms_norm` gives them.

    Raises:
        As `rms_norm`.

    Source: Henry et al. 2020, arXiv 2010.04245 (there with the Euclidean norm).
    """
    return rms_norm(q, weight_q, eps), rms_norm(k, weight_k, eps)


def rotary_table(length: int, head_dim: int, base: float = 10000.0) -> Tensor:
    """Cosine and sine of the angles of `length` positions: position p turns pair i by p * base^(-2i / head_dim).

    Args:
        length: number of positions.
        head_dim: D, even.
        base: the longest wavelength is about 2 pi base positions.

    Returns:
        [2, length, D / 2] float32, from angles in float64, on torch's default device.

    Raises:
        ValueError: a negative length, an odd head dimension, or base <= 0.
        TypeError: a length or head dimension that is not an int, or a base that is not a number.

    Source: Su et al. 2021, arXiv 2104.09864, section 3.2.2.
    """
    length = as_size("rotary_table", "length", length)
    head_dim, base = as_turns("rotary_table", head_dim, 2, base)
    return rotary_table_reference(length, head_dim, base)


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
        TypeError: a size that is not an int, or a base that is not a number.

    Source: Heo et al. 2024, arXiv 2403.13298, section 3.1 (axial frequencies).
    """
    height, width = as_size("rotary_table_2d", "height", height), as_size("rotary_table_2d", "width", width)
    head_dim, base = as_turns("rotary_table_2d", head_dim, 4, base)
    return rotary_table_2d_reference(height, width, head_dim, base)


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
    return rotate_reference(x, table)


def swiglu(gate_up: Tensor) -> Tensor:
    """out = silu(gate) * up, for the two halves of one matrix product's output.

    Args:
        gate_up: [..., 2 F], floating; the gate comes first.

    Returns:
        [..., F] in the dtype of `gate_up`; differentiable.

    Raises:
        TypeError: not a floating point tensor.
        ValueError: an odd last dimension.

    Source: Shazeer 2020, arXiv 2002.05202.
    """
    check_operands("swiglu", gate_up=gate_up)
    if gate_up.dim() < 1 or gate_up.shape[-1] % 2:
        raise ValueError(f"swiglu needs [..., 2 F], got {list(gate_up.shape)}")
    return swiglu_reference(gate_up)


def per_channel(operation: str, name: str, parameter: Tensor, x: Tensor) -> Tensor:
    """`parameter` [B, C] of `x` [B, C] or [B, L, C], or of the shape of `x`, so that it broadcasts to `x`."""
    if parameter.shape == x.shape:
        return parameter
    if x.dim() == 3 and parameter.shape == (x.shape[0], x.shape[2]):
        return parameter[:, None]
    raise ValueError(f"{operation} needs {name} [B, C], or like x {list(x.shape)}, got {list(parameter.shape)}")


def positive_eps(operation: str, got: float) -> float:
    """`got` as a number. ValueError: it is not positive."""
    eps = as_number(operation, "eps", got)
    if not eps > 0:
        raise ValueError(f"{operation} needs a positive eps, got {eps}")
    return eps


def as_size(operation: str, name: str, got: int) -> int:
    """`got` as an int. ValueError: it is negative."""
    size = as_integer(operation, name, got)
    if size < 0:
        raise ValueError(f"{operation} needs {name} to be at least 0, got {size}")
    return size


def as_turns(operation: str, head_dim: int, divisor: int, base: float) -> tuple[int, float]:
    """Head dimension and base as numbers. ValueError: head_dim is not a multiple of the divisor, or base is not positive."""
    head_dim, base = as_size(operation, "head_dim", head_dim), as_number(operation, "base", base)
    if not base > 0:
        raise ValueError(f"{operation} needs a positive base, got {base}")
    if head_dim < divisor or head_dim % divisor:
        raise ValueError(f"{operation} needs a head_dim that {divisor} divides, got {head_dim}")
    return head_dim, base
