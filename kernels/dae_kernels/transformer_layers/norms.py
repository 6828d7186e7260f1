"""LayerNorm with an adaptive scale and shift, RMSNorm, and the gated residual that closes an adaptive block."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dae_kernels.transformer_layers.checks import check_operands, per_channel, positive_eps, wider


def layer_norm_modulate(x: Tensor, scale: Tensor, shift: Tensor, eps: float = 1e-6) -> Tensor:
    """LayerNorm without parameters of its own, scaled and shifted by what depends on the sample (adaLN).

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
    scale, shift = (per_channel(operation, name, p, x).to(wider(x)) for name, p in (("scale", scale), ("shift", shift)))
    return (F.layer_norm(x.to(wider(x)), x.shape[-1:], eps=eps) * (1 + scale) + shift).to(x.dtype)


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
    gate = per_channel(operation, "gate", gate, x).to(wider(x))
    return (x.to(wider(x)) + gate * h.to(wider(x))).to(x.dtype)


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
    if weight is not None:
        if weight.shape != x.shape[-1:]:
            raise ValueError(f"rms_norm needs weight [{x.shape[-1]}] for x {list(x.shape)}, got {list(weight.shape)}")
        if weight.dtype != x.dtype:  # or else torch warns, and takes its unfused form
            wide = torch.promote_types(x.dtype, weight.dtype)
            x, weight = x.to(wide), weight.to(wide)
    return F.rms_norm(x, x.shape[-1:], weight, eps)


def qk_norm(q: Tensor, k: Tensor, weight_q: Tensor, weight_k: Tensor, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """`rms_norm` of queries and keys over each head: the scores of attention then do not grow with the width of the model.

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
