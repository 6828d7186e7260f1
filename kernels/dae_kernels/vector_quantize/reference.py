"""The gradients of vector quantization in eager torch: the definition, used on every device.

They are element-wise operations and sums over D, without a kernel of their own.
"""

from __future__ import annotations

from torch import Tensor


def unit_length(x: Tensor) -> Tensor:
    """x / |x|, and 0 with a gradient of 0 for a zero vector."""
    length = x.norm(dim=-1, keepdim=True)
    zero = length == 0
    return (x / length.masked_fill(zero, 1.0)).masked_fill(zero, 0.0)


def straight_through(x: Tensor, code: Tensor) -> Tensor:
    """`code` to the bit, with the gradient of `x`."""
    return code - (x.detach() - x)  # not code + 0, which makes 0.0 of -0.0


def rotated(x: Tensor, code: Tensor) -> Tensor:
    """`code` to the bit, with the gradient of |code| / |x| R x for constant |code| / |x| and R (see `vector_quantize`).

    R maps x / |x| onto code / |code| also where they are opposite and w is 0: it is the reflection then.
    """
    from_, to = unit_length(x.detach()), unit_length(code)
    w = unit_length(from_ + to)
    turned = x - 2 * w * (w * x).sum(dim=-1, keepdim=True) + 2 * to * (from_ * x).sum(dim=-1, keepdim=True)
    length = x.detach().norm(dim=-1, keepdim=True)
    # For a zero vector, w = to and from = 0 would give a reflection times an invalid ratio.
    zero = length == 0
    scale = code.norm(dim=-1, keepdim=True) / length.masked_fill(zero, 1.0)
    return straight_through((scale * turned).where(~zero, x), code)


def commitment(x: Tensor, code: Tensor) -> Tensor:
    """mean |x - code|^2 over all elements, 0 if there are none."""
    return (x - code).square().sum() / max(1, x.numel())
