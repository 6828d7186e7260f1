"""What the tests of group_norm_silu share: operands, the formula, and the comparison with it."""

import pytest
import torch
import torch.nn.functional as F
from dae_kernels import group_norm_silu
from dae_kernels.dispatch import triton_refusal
from tolerances import assert_errors

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
needs_triton = pytest.mark.skipif(triton_refusal(DEVICE) is not None, reason="no Triton here")
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}

GRADIENT_LAYOUTS = {
    "contiguous": lambda t: t.contiguous(),
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "expanded": lambda t: t[:, :, :1, :1].expand(t.shape),
    "of a sum": lambda t: torch.ones((), device=t.device).expand(t.shape),
    "every other column": lambda t: t.repeat_interleave(2, dim=3)[:, :, :, ::2],
    "transposed": lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
}


def operands(shape, layout="contiguous", dtype=torch.float32, affine=True, adaptive=False, mean=0.0, seed=0):
    """x in a layout, and weight, bias, scale, shift or None."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *size: torch.randn(*size, generator=generator)  # noqa: E731
    B, C = shape[:2]
    x = (draw(*shape) + mean).to(DEVICE, dtype)
    x = x.contiguous(memory_format=LAYOUTS[layout]) if len(shape) == 4 else x
    parameters = [1 + 0.3 * draw(C), draw(C)] if affine else [None, None]
    parameters += [0.3 * draw(B, C), draw(B, C)] if adaptive else [None, None]
    return [x, *(p if p is None else p.to(DEVICE) for p in parameters)]


def by_hand(x, weight, bias, scale, shift, groups, eps, activation):
    """The formula, in float64, written with means."""
    B, C = x.shape[:2]
    x, weight, bias, scale, shift = (t if t is None else t.double() for t in (x, weight, bias, scale, shift))
    g = x.reshape(B, groups, -1)
    n = ((g - g.mean(2, keepdim=True)) / (g.var(2, keepdim=True, correction=0) + eps).sqrt()).view(B, C, -1)
    h = n if weight is None else n * weight[:, None]
    h = h if bias is None else h + bias[:, None]
    h = h if scale is None else h * (1 + scale[..., None]) + shift[..., None]
    return (h * torch.sigmoid(h) if activation == "silu" else h).view(x.shape)


def run(function, values, cotangent):
    """Result and gradients of all operands that there are."""
    leaves = [t if t is None else t.detach().requires_grad_() for t in values]
    y = function(*leaves)
    y.backward(cotangent.to(y.dtype))
    return [y.detach(), *(t.grad for t in leaves if t is not None)]


def call(impl, groups, eps=1e-6, activation="silu"):
    return lambda x, w, b, s, t: group_norm_silu(x, groups, w, b, eps, activation, scale=s, shift=t, impl=impl)


def check(values, groups, impl, activation="silu", cotangent=None):
    """Twice the error of torch in the dtype of x, measured against float64, or that of the formula's roundings."""
    x = values[0]
    cotangent = torch.randn(x.shape, generator=torch.Generator().manual_seed(9)).to(x) if cotangent is None else cotangent
    wide = [t if t is None else t.double() for t in values]

    def definition():
        return run(lambda *v: by_hand(*v, groups, 1e-6, activation), wide, cotangent)

    def torch_alone(x, w, b, s, t):
        cast = lambda p: p if p is None else p.to(x.dtype)  # noqa: E731
        y = F.group_norm(x, groups, cast(w), cast(b), 1e-6)
        if s is not None:
            per_channel = (*s.shape, *[1] * (x.dim() - 2))
            y = y * (1 + cast(s).view(per_channel)) + cast(t).view(per_channel)
        return F.silu(y) if activation else y

    # On CPUs torch's statistics of channels_last are its worse ones: the kernels are held against the better.
    plain = run(torch_alone, [x.contiguous(), *values[1:]] if impl == "triton" else values, cotangent)
    got = run(call(impl, groups, activation=activation), values, cotangent)
    assert got[0].stride() == torch.empty_like(x).stride() and got[0].dtype == x.dtype
    assert_errors(got, definition(), plain, results=definition, dtype=x.dtype)
    return got


class Counted:
    def __init__(self, kernel, counts):
        self.kernel, self.counts = kernel, counts

    def __getitem__(self, grid):
        self.counts.append(grid)
        return self.kernel[grid]
