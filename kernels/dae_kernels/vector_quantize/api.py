"""`vector_quantize`: checks, search and gradients."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from dae_kernels.checks import as_number, check_choice, check_tensors
from dae_kernels.clouds import convention
from dae_kernels.nearest_code import nearest_code
from dae_kernels.vector_quantize.reference import commitment, rotated, straight_through, unit_length


class VectorQuantized(NamedTuple):
    """What `vector_quantize` returns: quantized [..., D], indices [...] int64, and the weighted commitment loss, a scalar."""

    quantized: Tensor
    indices: Tensor
    loss: Tensor


@convention(
    value="squared",
    cost="of the search |x - e|^2, or 1 - cosine; the loss is commitment_weight times the mean over elements of (x - e)^2",
    bias="none: exact in the vectors it is given",
)
def vector_quantize(
    x: Tensor,
    codebook: Tensor,
    *,
    gradient: str = "ste",
    commitment_weight: float = 0.25,
    metric: str = "l2",
    precision: str = "exact",
    impl: str = "auto",
) -> VectorQuantized:
    """The nearest code e of every vector x, with a gradient for x, and the commitment loss.

        quantized = e in the forward pass, to the bit
        "ste":       d quantized / d x = 1, straight through
        "rotation":  d quantized / d x = |e| / |x| R, with R = 1 - 2 w w^T + 2 e^ x^^T, x^ = x / |x|, e^ = e / |e|,
                     w = (x^ + e^) / |x^ + e^|: the rotation of x onto e in their plane; it and |e| / |x| are held constant
        loss = commitment_weight * mean |x - sg(e)|^2, the mean over all elements, so N D of them

    With the cosine metric x and e are divided by their lengths before all of this, so `quantized` has length 1.

    Where x = 0 there is no direction to rotate and its gradient is passed straight through; where e = 0, |e| / |x| is 0. With
    the cosine metric a vector x = 0 has quantized = e^ and no gradient. Values and gradients are finite as long as |x|^2, |e|^2
    and |e| / |x| are.

    The codebook gets no gradient: it follows the averages of `codebook_statistics`. To train it by gradients
    instead, add `F.mse_loss(codebook[indices], x.detach())` (one codebook).

    The search is `nearest_code` with its kernel. The rest is a few operations on [N, D], which torch.compile fuses.
    16-bit operands are rotated and compared in float32.

    Args:
        x: [..., D], or [..., H, D] for H codebooks, floating; any strides.
        codebook: [K, D] with K, D >= 1, or [H, K, D], one for each head of `x`; floating.
        gradient: "ste" or "rotation".
        commitment_weight: finite and not negative.
        metric, precision, impl: as in `nearest_code`.

    Returns:
        quantized: x.shape, of the wider dtype of the operands.
        indices: x.shape[:-1] int64.
        loss: scalar, float32, or float64 if an operand is; 0 without vectors.

    Raises:
        ValueError: shapes or devices disagree, K = 0 or D = 0, an unknown option, a bad weight, or `impl` cannot run here.
        TypeError: an operand is not a floating point tensor, or the weight is not a number.

    Source: van den Oord et al. 2017, arXiv 1711.00937, equation 3 without its codebook term; rotation: Fifty et al. 2024,
    arXiv 2410.06424, sections 4.1 and 4.2; cosine: Yu et al. 2022, arXiv 2110.04627, section 3.2.
    """
    check_choice("gradient", gradient, ("ste", "rotation"))
    check_tensors("vector_quantize", x=x, codebook=codebook)
    commitment_weight = as_number("vector_quantize", "commitment_weight", commitment_weight)
    if not (math.isfinite(commitment_weight) and commitment_weight >= 0):
        raise ValueError(f"commitment_weight must be finite and not negative, got {commitment_weight}")
    indices, _ = nearest_code(x, codebook, metric=metric, precision=precision, impl=impl)
    dtype = torch.promote_types(x.dtype, codebook.dtype)
    wide = torch.promote_types(dtype, torch.float32)
    codes = codebook.detach()
    code = codes[indices] if codebook.dim() == 2 else codes[torch.arange(len(codes), device=x.device), indices]
    x_, code = x.to(wide), code.to(wide)
    if metric == "cosine":
        x_, code = unit_length(x_), unit_length(code)
    turn = rotated if gradient == "rotation" else straight_through
    return VectorQuantized(turn(x_, code).to(dtype), indices, commitment_weight * commitment(x_, code))
