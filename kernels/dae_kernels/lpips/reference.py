"""One layer's term of LPIPS in eager torch: the definition."""

from __future__ import annotations

import torch
from torch import Tensor


def unit_vectors(x: Tensor, eps: float) -> Tensor:
    """x / (|x| + eps) along dim 1; if |x|^2 is 0 the result and its gradient (of order 1 / eps) are 0."""
    squares = x.square().sum(dim=1, keepdim=True)
    present = squares != 0  # written so that NaN counts as present
    norm = torch.where(present, squares, 1).sqrt()  # the root has no gradient at 0
    return torch.where(present, x / (norm + eps), 0)


def lpips_reference(a: Tensor, b: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """mean over positions of sum_c weight_c (a_c / (|a| + eps) - b_c / (|b| + eps))^2, [B] float32 (float64 for float64)."""
    wide = torch.promote_types(a.dtype, torch.float32)
    if a.stride() != b.stride():  # layouts would otherwise change the order of summation
        a, b = a.contiguous(), b.contiguous()
    squares = (unit_vectors(a.to(wide), eps) - unit_vectors(b.to(wide), eps)).square()
    if weight is not None:
        squares = squares * weight.to(wide).view(-1, *[1] * (a.dim() - 2))
    return squares.sum(dim=1).flatten(1).mean(dim=1) if a.dim() > 2 else squares.sum(dim=1)
