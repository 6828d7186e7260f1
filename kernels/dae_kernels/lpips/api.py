"""`lpips`: checks and dispatch."""

from __future__ import annotations

import warnings
from typing import Any

from torch import Tensor

from dae_kernels.checks import as_number, check_floating
from dae_kernels.dispatch import choose, dtype_refusal
from dae_kernels.lpips.autograd import lpips_fused
from dae_kernels.lpips.reference import lpips_reference

# A tile of the kernel holds all channels of a position.
MAX_CHANNELS = 2048
MAX_POSITIONS = 2**31 - 2**16  # counted in int32, a chunk beyond the last


def lpips(a: Tensor, b: Tensor, weight: Tensor | None = None, *, eps: float = 1e-10, impl: str = "auto") -> Tensor:
    """One layer's term of LPIPS: the weighted squared distance of two feature maps' unit vectors, averaged over positions.

        u = a / (|a| + eps), v = b / (|b| + eps)              norms over the channels of one position
        out = mean over positions of sum_c weight_c (u_c - v_c)^2

    The kernels read a and b once forward and once backward, recomputing the norms; they save only a, b and weight.
    All sums are float32 in a fixed order: deterministic. Equal a and b give exactly 0 and gradients of exactly 0.
    A position whose vector is zero (its squared norm is 0 in float32) has the unit vector 0 and no gradient: the formula's own
    would be of the order of 1 / eps, and the lpips package's is NaN. NaN at a position makes its image's distance NaN.

    Args:
        a, b: [B, C, *positions], floating of 16 to 64 bits, of one shape, dtype and device. Contiguous, channels_last or one of
            each are used directly; other strides are copied unless positions are evenly spaced.
        weight: [C], floating, or None for ones.
        eps: added to each norm, >= 0.
        impl: "auto" is "triton" for CUDA tensors of at most 32 bits and 2048 channels where triton is installed, else
            "reference"; a named choice is obeyed or refused.

    Returns:
        [B], float32 (float64 for float64 a). Differentiable by a, b and weight, each gradient in the layout of its tensor and
        computed only if wanted; twice by the reference only (the kernels raise).

    Raises:
        TypeError: an operand that is not a floating point tensor of 16 to 64 bits, or a and b of two dtypes.
        ValueError: shapes or devices that do not fit, no channels or positions, a negative eps, or `impl` cannot run here.

    Source: Zhang et al. 2018, "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric", arXiv 1801.03924, eq. 1;
    eps as in the lpips package.
    """
    eps = as_number("lpips", "eps", eps)
    check_maps(a, b, weight, eps)
    refusal = dtype_refusal(a) if weight is None else dtype_refusal(a, weight)
    if a.shape[1] > MAX_CHANNELS:
        refusal = f"the kernel takes at most {MAX_CHANNELS} channels, got {a.shape[1]}"
    if a.shape[2:].numel() > MAX_POSITIONS:
        refusal = f"the kernel takes at most {MAX_POSITIONS} positions, got {list(a.shape)}"
    if a.numel() == 0:
        refusal = f"the kernel needs at least one element, got {list(a.shape)}"
    if choose(impl, a.device, refusal) == "reference":
        return lpips_reference(a, b, weight, eps)
    return lpips_fused(a, b, weight, eps)


def perceptual_tap(*arguments: Any, **options: Any) -> Tensor:
    """The old name of `lpips`, which goes with the next release."""
    warnings.warn(
        "dae_kernels.perceptual_tap is now dae_kernels.lpips; the old name goes with the next release", FutureWarning, 2
    )
    return lpips(*arguments, **options)


def check_maps(a: Tensor, b: Tensor, weight: Tensor | None, eps: float) -> None:
    operation = "lpips"
    for name, operand in ({"a": a, "b": b} | ({} if weight is None else {"weight": weight})).items():
        check_floating(operation, name, operand)
        if operand.device != a.device:
            raise ValueError(f"{operation} needs {name} on {a.device}, where a is, got {operand.device}")
    if a.dim() < 2 or a.shape != b.shape:
        raise ValueError(f"{operation} needs a and b [B, C, *positions] of one shape, got a {list(a.shape)}, b {list(b.shape)}")
    if a.dtype != b.dtype:
        raise TypeError(f"{operation} needs a and b of one dtype, got a {a.dtype}, b {b.dtype}")
    if 0 in a.shape[1:]:
        raise ValueError(f"{operation} needs at least one channel and one position, got {list(a.shape)}")
    if weight is not None and tuple(weight.shape) != (a.shape[1],):
        raise ValueError(f"{operation} needs weight [{a.shape[1]}] for a {list(a.shape)}, got {list(weight.shape)}")
    if not eps >= 0:
        raise ValueError(f"{operation} needs an eps that is not negative, got {eps}")
