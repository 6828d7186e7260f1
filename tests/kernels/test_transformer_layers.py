"""Norms, rotary positions and swiglu: values and gradients against float64.

They are as near as torch's own in that dtype, times two, or as the roundings of the formula (tests/tolerances.py).
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from dae_kernels.transformer_layers import (
    gated_residual,
    layer_norm_modulate,
    qk_norm,
    rms_norm,
    rotary_table,
    rotary_table_2d,
    rotate,
    swiglu,
)
from tolerances import assert_errors
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def draw(*shapes, dtype=torch.float32, mean=0.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    drawn[0] += mean
    return [x.to(DEVICE, dtype).requires_grad_() for x in drawn]


def check(run, exact_run, torch_run, inputs: list[Tensor]) -> None:
    """`run` as near to `exact_run` in float64 as `torch_run` in torch's own functions and that dtype, times two."""
    dtype = inputs[0].dtype
    exact_inputs = [x.detach().double().requires_grad_() for x in inputs]
    out, own = run(*inputs), torch_run(*inputs)
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype)

    def definition():
        out = exact_run(*exact_inputs)
        return [out, *torch.autograd.grad(out, exact_inputs, cotangent.double())]

    got = [out, *torch.autograd.grad(out, inputs, cotangent)]
    theirs = [own, *torch.autograd.grad(own, inputs, cotangent)]
    truth = definition()
    for mine, value in zip(got, truth, strict=True):
        assert mine.dtype == dtype and mine.shape == value.shape
    assert_errors(got, truth, theirs, results=definition)


def layer_norm_formula(x, scale, shift):
    scale, shift = (p[:, None] if p.dim() < x.dim() else p for p in (scale, shift))
    mean, variance = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, correction=0)
    return (x - mean) / (variance + 1e-6).sqrt() * (1 + scale) + shift


def layer_norm_torch(x, scale, shift):
    scale, shift = (p[:, None] if p.dim() < x.dim() else p for p in (scale, shift))
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mean", [0.0, 200.0])
@pytest.mark.parametrize(
    "shape, parameter", [((3, 63), (3, 63)), ((2, 5, 60), (2, 60)), ((2, 5, 33), (2, 5, 33)), ((4, 1, 8), (4, 8))]
)
def test_layer_norm_modulate(shape, parameter, mean, dtype):
    check(layer_norm_modulate, layer_norm_formula, layer_norm_torch, draw(shape, parameter, parameter, dtype=dtype, mean=mean))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape, gate", [((3, 63), (3, 63)), ((2, 5, 60), (2, 60)), ((2, 5, 33), (2, 5, 33))])
def test_gated_residual(shape, gate, dtype):
    formula = lambda x, h, g: x + (g[:, None] if g.dim() < x.dim() else g) * h  # noqa: E731
    check(gated_residual, formula, formula, draw(shape, shape, gate, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mean", [0.0, 200.0])
@pytest.mark.parametrize("shape", [(63,), (3, 60), (2, 5, 4, 33), (7, 1)])
def test_rms_norm(shape, mean, dtype):
    exact = lambda x, w: x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * w  # noqa: E731
    own = lambda x, w: F.rms_norm(x, x.shape[-1:], w, 1e-6)  # noqa: E731
    inputs = draw(shape, shape[-1:], dtype=dtype, mean=mean)
    check(rms_norm, exact, own, inputs)
    torch.testing.assert_close(rms_norm(inputs[0]), rms_norm(inputs[0], torch.ones_like(inputs[1])), rtol=0, atol=0)


def test_rms_norm_is_the_module_of_torch():
    """The same bits, so a model may have either; of two dtypes, the wider."""
    x, weight = draw((4, 5, 32), (32,))
    module = torch.nn.RMSNorm(32, eps=1e-6).to(DEVICE)
    with torch.no_grad():
        module.weight.copy_(weight)
    assert torch.equal(rms_norm(x, weight), module(x))
    mixed = rms_norm(x.bfloat16(), weight)
    assert mixed.dtype == torch.float32
    assert torch.equal(mixed, rms_norm(x.bfloat16().float(), weight))


def test_qk_norm():
    q, k, weight_q, weight_k = draw((2, 3, 5, 8), (2, 1, 7, 8), (8,), (8,))
    normed_q, normed_k = qk_norm(q, k, weight_q, weight_k)
    assert torch.equal(normed_q, rms_norm(q, weight_q)) and torch.equal(normed_k, rms_norm(k, weight_k))
    bounded = qk_norm(1e3 * q, k, torch.ones_like(weight_q), torch.ones_like(weight_k))[0]
    torch.testing.assert_close(bounded.square().mean(-1), torch.ones_like(q[..., 0]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 3, 63, 8), (5, 60), (1, 1, 1, 2)])
def test_rotate(shape, dtype):
    table = rotary_table(shape[-2], shape[-1]).to(DEVICE)

    def turned(x):
        cos, sin = table.to(x.dtype)
        a, b = x.chunk(2, dim=-1)
        z = torch.complex(a, b) * torch.complex(cos, sin) if x.dtype == torch.float64 else None
        return torch.cat([z.real, z.imag] if z is not None else [a * cos - b * sin, a * sin + b * cos], dim=-1)

    check(lambda x: rotate(x, table), turned, turned, draw(shape, dtype=dtype))


def test_rotary_angles():
    table = rotary_table(7, 6, base=100.0)
    assert table.shape == (2, 7, 3) and table.dtype == torch.float32
    for p in range(7):
        for i in range(3):
            angle = p * 100.0 ** (-2 * i / 6)
            assert abs(table[0, p, i] - math.cos(angle)) < 1e-7 and abs(table[1, p, i] - math.sin(angle)) < 1e-7


def test_rotary_2d_is_1d_of_rows_and_of_columns():
    table = rotary_table_2d(3, 5, 12)
    assert table.shape == (2, 15, 6)
    rows, columns = rotary_table(3, 6), rotary_table(5, 6)
    for p in range(15):
        assert torch.equal(table[:, p, :3], rows[:, p // 5]) and torch.equal(table[:, p, 3:], columns[:, p % 5])


def test_rotary_2d_scores_depend_on_relative_positions():
    table = rotary_table_2d(4, 4, 8).double()
    q, k = (x.double().expand(16, 8) for x in draw((1, 8), (1, 8)))
    scores = (rotate(q.cpu(), table) @ rotate(k.cpu(), table).T).view(4, 4, 4, 4)
    for rows, columns in ((1, 0), (0, 2), (-1, 1)):
        pairs = [
            scores[r, c, r + rows, c + columns]
            for r in range(max(0, -rows), 4 - max(0, rows))
            for c in range(max(0, -columns), 4 - max(0, columns))
        ]
        torch.testing.assert_close(torch.stack(pairs), pairs[0].expand(len(pairs)), rtol=1e-5, atol=1e-5)  # the table is fp32


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 126), (2, 5, 60), (2,)])
def test_swiglu(shape, dtype):
    def formula(x):
        gate, up = x[..., : shape[-1] // 2], x[..., shape[-1] // 2 :]
        return gate * gate.sigmoid() * up

    check(swiglu, formula, formula, draw(shape, dtype=dtype))


LAYERS = {
    "layer_norm_modulate": (layer_norm_modulate, ((2, 3, 6), (2, 6), (2, 6))),
    "gated_residual": (gated_residual, ((2, 3, 6), (2, 3, 6), (2, 6))),
    "rms_norm": (rms_norm, ((2, 3, 6), (6,))),
    "rotate": (lambda x: rotate(x, rotary_table(3, 6).to(x.device)), ((2, 3, 6),)),
    "swiglu": (swiglu, ((2, 3, 6),)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_gradcheck_vmap_and_strides(name):
    layer, shapes = LAYERS[name]
    inputs = [x.detach().double().requires_grad_() for x in draw(*shapes)]
    assert torch.autograd.gradcheck(layer, inputs) and torch.autograd.gradgradcheck(layer, inputs)
    expected = layer(*inputs)
    if name != "rotate":
        batched = torch.vmap(layer)(*(torch.stack([x, 2 * x]) for x in inputs))
        torch.testing.assert_close(batched, torch.stack([expected, layer(*(2 * x for x in inputs))]))
    strided = [x.detach().unsqueeze(-1).expand(*x.shape, 2)[..., 0].mT.contiguous().mT if x.dim() > 1 else x for x in inputs]
    torch.testing.assert_close(layer(*strided), expected)
    empty = [x.detach()[:0] if x.dim() > 1 else x for x in inputs]
    assert layer(*empty).shape == (0, *expected.shape[1:])


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYERS)
def test_one_graph(name):
    torch._dynamo.reset()
    layer, shapes = LAYERS[name]
    inputs = draw(*shapes)
    torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(*inputs), layer(*inputs))


X = torch.zeros(2, 3, 6)
P = torch.zeros(2, 6)


@pytest.mark.parametrize(
    "run, error, message",
    [
        (lambda: layer_norm_modulate(X.long(), P, P), TypeError, "needs a floating point tensor x, got torch.int64"),
        (lambda: layer_norm_modulate(X, P, None), TypeError, "tensor shift, got <class 'NoneType'>"),
        (lambda: layer_norm_modulate(X, P[:1], P), ValueError, r"needs scale \[B, C\], or like x \[2, 3, 6\], got \[1, 6\]"),
        (lambda: layer_norm_modulate(X[None], P, P), ValueError, r"\[B, L, C\] with C >= 1, got \[1, 2, 3, 6\]"),
        (lambda: layer_norm_modulate(X, P, P, eps=0), ValueError, "positive eps, got 0"),
        (lambda: layer_norm_modulate(X, P.to("meta"), P), ValueError, "x on cpu, scale on meta, shift on cpu"),
        (lambda: gated_residual(X, X[:1], P), ValueError, r"h of its shape, got \[2, 3, 6\] and \[1, 3, 6\]"),
        (lambda: gated_residual(X, X, P[:, :5]), ValueError, r"needs gate \[B, C\], or like x \[2, 3, 6\], got \[2, 5\]"),
        (lambda: rms_norm(X, P), ValueError, r"rms_norm needs weight \[6\] for x \[2, 3, 6\], got \[2, 6\]"),
        (lambda: rms_norm(X, eps=-1.0), ValueError, "positive eps, got -1.0"),
        (lambda: rms_norm(X[..., :0]), ValueError, r"with C >= 1, got \[2, 3, 0\]"),
        (lambda: qk_norm(X, X.long(), X[0, 0], X[0, 0]), TypeError, "rms_norm needs a floating point tensor x, got torch.int64"),
        (lambda: rotate(X, rotary_table(4, 6)), ValueError, r"got \[2, 3, 6\] and \[2, 4, 3\]"),
        (lambda: rotate(X[..., :5], rotary_table(3, 4)), ValueError, "with an even D"),
        (lambda: rotary_table(3, 5), ValueError, "a head_dim that 2 divides, got 5"),
        (lambda: rotary_table_2d(3, 3, 6), ValueError, "a head_dim that 4 divides, got 6"),
        (lambda: rotary_table(-1, 8), ValueError, "rotary_table needs length to be at least 0, got -1"),
        (lambda: rotary_table(2.5, 8), TypeError, "rotary_table needs length as an int, got float 2.5"),
        (lambda: rotary_table(3, "x"), TypeError, "rotary_table needs head_dim as an int, got str 'x'"),
        (lambda: rotary_table(3, 8, base=0.0), ValueError, "rotary_table needs a positive base, got 0.0"),
        (lambda: rotary_table(3, 8, base=None), TypeError, "rotary_table needs base as a number, got NoneType"),
        (lambda: rotary_table_2d(3, -1, 8), ValueError, "rotary_table_2d needs width to be at least 0, got -1"),
        (lambda: swiglu(X[..., :5]), ValueError, r"needs \[..., 2 F\], got \[2, 3, 5\]"),
    ],
)  # fmt: skip
def test_bad_input(run, error, message):
    with pytest.raises(error, match=message):
        run()
