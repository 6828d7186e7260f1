"""`group_norm_silu`: checks and dispatch."""

from __future__ import annotations

import torch
from torch import Tensor

from dae_kernels.checks import as_integer, as_number, check_choice, check_floating
from dae_kernels.dispatch import choose, dtype_refusal, plain
from dae_kernels.group_norm_silu.autograd import group_norm_silu_fused
from dae_kernels.group_norm_silu.reference import group_norm_silu_reference

MAX_GRID = 65535  # limit of a CUDA grid's second and third axis
MAX_POSITIONS = 2**31 - 2**16  # counted in int32, a chunk beyond the last


def group_norm_silu(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    activation: str | None = "silu",
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """Group normalisation, an optional adaptive scale and shift, then SiLU.

        n = (x - mean_g) / sqrt(var_g + eps)                     over the C / num_groups channels of a group and all positions
        h = (n * weight_c + bias_c) * (1 + scale_bc) + shift_bc
        out = h * sigmoid(h)                                     or h itself without activation

    The kernels save x and the mean and 1 / std of each group for the backward pass and recompute h. Statistics are float32 for
    every dtype of x, merged from (mean, sum of squared deviations) of chunks, so a mean far from zero costs no accuracy. The
    gradients of all operands are sums in a fixed order: deterministic.

    Args:
        x: [B, C, *positions], floating, C divisible by num_groups. Contiguous and channels_last are used directly; the kernels
            copy other strides.
        num_groups: groups of adjacent channels.
        weight, bias: [C], floating, or None for 1 and 0.
        eps: added to the variance, > 0.
        activation: "silu" or None.
        scale, shift: [B, C], both or neither: adaptive GroupNorm.
        impl: "auto" is "triton" for CUDA tensors of at most 32 bits where triton is installed, else "reference"; a named
            choice is obeyed or refused.

    Returns:
        The shape and dtype of x, also under autocast, where the statistics stay float32, and its memory layout if that is
        contiguous or channels_last (else either). Differentiable by x, weight, bias, scale and shift; twice, and in forward
        mode, by the reference only (the kernels raise).

    Raises:
        TypeError: x or a parameter that is not a floating point tensor, num_groups or eps that is not a number.
        ValueError: shapes or devices that do not fit, channels that num_groups does not divide, one of scale and shift
            without the other, an unknown activation, or `impl` cannot run here.

    Source: Wu & He 2018, "Group Normalization", arXiv 1803.08494; adaptive: Dhariwal & Nichol 2021, arXiv 2105.05233, section 3;
    merging: Chan, Golub & LeVeque 1979.
    """
    check_choice("activation", activation, ("silu", None))
    silu = activation == "silu"
    if usual(x, num_groups, weight, bias, eps, scale, shift):
        refusal = None
    else:
        num_groups, eps = as_integer("group_norm_silu", "num_groups", num_groups), as_number("group_norm_silu", "eps", eps)
        check_map_and_parameters(x, num_groups, weight, bias, eps, scale, shift)
        refusal = kernel_refusal(x, weight, bias, scale, shift)
    if choose(impl, x.device, refusal) == "reference":
        return group_norm_silu_reference(x, num_groups, weight, bias, eps, silu, scale, shift)
    return group_norm_silu_fused(x, weight, bias, scale, shift, num_groups, eps, silu)


def usual(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    scale: Tensor | None,
    shift: Tensor | None,
) -> bool:
    """Whether the arguments are such as neither the checks nor `kernel_refusal` object to; False where that is not seen at once.

    Together they take longer than a launch, and most calls are of this kind.
    """
    if torch.compiler.is_compiling() or type(num_groups) is not int or type(eps) is not float or not eps > 0:
        return False
    if not plain(x) or x.dim() < 2 or num_groups < 1 or (scale is None) != (shift is None):
        return False
    shape, device = x.shape, x.device
    B, C = shape[0], shape[1]
    if C % num_groups or B > MAX_GRID or C > MAX_GRID or not 0 < x.numel() < MAX_POSITIONS:
        return False
    for parameter in (weight, bias):
        if parameter is not None and not (plain(parameter) and parameter.shape == (C,) and parameter.device == device):
            return False
    for parameter in (scale, shift):
        if parameter is not None and not (plain(parameter) and parameter.shape == (B, C) and parameter.device == device):
            return False
    return True


def kernel_refusal(x: Tensor, *parameters: Tensor | None) -> str | None:
    """Why the kernels do not take these operands, or None."""
    if max(x.shape[:2]) > MAX_GRID or x.shape[2:].numel() > MAX_POSITIONS:
        return f"the kernel takes at most {MAX_GRID} images and channels and {MAX_POSITIONS} positions, got x {list(x.shape)}"
    if x.numel() == 0:
        return f"the kernel needs at least one element, got x {list(x.shape)}"
    return dtype_refusal(x, *(parameter for parameter in parameters if parameter is not None))


def check_map_and_parameters(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    scale: Tensor | None,
    shift: Tensor | None,
) -> None:
    operation = "group_norm_silu"
    for name, operand in (("x", x), ("weight", weight), ("bias", bias), ("scale", scale), ("shift", shift)):
        if operand is None and name != "x":
            continue
        check_floating(operation, name, operand)
    if x.dim() < 2:
        raise ValueError(f"{operation} needs x [B, C, *positions], got {list(x.shape)}")
    B, C = x.shape[:2]
    if num_groups < 1 or C % num_groups:
        raise ValueError(f"{operation} needs channels divisible by num_groups, got {C} channels and num_groups={num_groups}")
    if not eps > 0:
        raise ValueError(f"{operation} needs a positive eps, got {eps}")
    if (scale is None) != (shift is None):
        raise ValueError(f"{operation} needs scale and shift, or neither, got only {'shift' if scale is None else 'scale'}")
    for name, parameter, shape in (
        ("weight", weight, (C,)),
        ("bias", bias, (C,)),
        ("scale", scale, (B, C)),
        ("shift", shift, (B, C)),
    ):
        if parameter is None:
            continue
        if tuple(parameter.shape) != shape:
            raise ValueError(f"{operation} needs {name} {list(shape)} for x {list(x.shape)}, got {list(parameter.shape)}")
        if parameter.device != x.device:
            raise ValueError(f"{operation} needs {name} on {x.device}, where x is, got {parameter.device}")
