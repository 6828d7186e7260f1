"""`mmd` with a polynomial kernel against torchmetrics, its definition, and a closed form."""

from __future__ import annotations

import pytest
import torch
from dae_kernels import mmd
from dae_kernels.pairwise import reference
from torch import Tensor
from torchmetrics.image.kid import poly_mmd

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def clouds(N: int = 17, M: int = 17, D: int = 6, dtype=torch.float64) -> list[Tensor]:
    """x, y and weights that do not sum to 1."""
    generator = torch.Generator().manual_seed(N + M)
    x, y = (torch.randn(n, D, generator=generator, dtype=torch.float64) for n in (N, M))
    weights = [torch.rand(n, generator=generator, dtype=torch.float64) + 0.2 for n in (N, M)]
    return [t.to(DEVICE, dtype) for t in (x, y + 0.3, *weights)]


def definition(x, y, a, b, degree, gamma, coef0, unbiased):
    a, b = a / a.sum(), b / b.sum()
    gamma = 1 / x.shape[1] if gamma is None else gamma
    xx, yy, xy = ((gamma * p @ q.T + coef0) ** degree for p, q in ((x, x), (y, y), (x, y)))
    across = 2 * (a[:, None] * b * xy).sum()
    if not unbiased:
        return (a[:, None] * a * xx).sum() + (b[:, None] * b * yy).sum() - across

    def within(k, w):
        pairs = w[:, None] * w * (1 - torch.eye(len(w), dtype=w.dtype, device=w.device))
        return (pairs * k).sum() / pairs.sum()

    return within(xx, a) + within(yy, b) - across


@pytest.mark.parametrize("degree, gamma, coef0", [(3, None, 1.0), (1, 0.5, 0.0), (2, 2.0, -1.0)])
def test_equals_torchmetrics(degree, gamma, coef0):
    x, y, *_ = clouds()
    got = mmd(x, y, kernel="polynomial", degree=degree, gamma=gamma, coef0=coef0)
    # float64 sums of 17 x 17 kernel values of up to 1e3, in two orders
    torch.testing.assert_close(got, poly_mmd(x, y, degree, gamma, coef0), rtol=0, atol=17 * 17 * 1e3 * 2.0**-53)


@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize("degree, gamma, coef0", [(3, None, 1.0), (1, 0.5, 0.0), (4, 0.3, -1.0)])
@pytest.mark.parametrize("N, M, D", [(7, 5, 3), (2, 63, 1)])
def test_values_and_gradients(unbiased, degree, gamma, coef0, N, M, D):
    operands = [t.requires_grad_() for t in clouds(N, M, D)]

    def ours(x, y, a, b):
        options = {"kernel": "polynomial", "degree": degree, "gamma": gamma, "coef0": coef0, "unbiased": unbiased}
        return mmd(x, y, weights_x=a, weights_y=b, **options)

    def theirs(x, y, a, b):
        return definition(x, y, a, b, degree, gamma, coef0, unbiased)

    results = []
    for function in (ours, theirs):
        value = function(*operands)
        results.append([value, *torch.autograd.grad(-1.3 * value, operands)])
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-10)  # float64 sums of some hundred terms below 1e3
    assert torch.autograd.gradcheck(ours, operands)


def test_a_linear_kernel_gives_the_distance_of_the_means():
    x, y, *_ = clouds(9, 14)
    got = mmd(x, y, kernel="polynomial", degree=1, gamma=1.0, coef0=7.0, unbiased=False)
    torch.testing.assert_close(got, (x.mean(0) - y.mean(0)).square().sum(), rtol=1e-12, atol=1e-13)


def test_unbiased_means_zero_between_samples_of_one_law():
    """Over 200 pairs of samples of 8 points; four standard errors of that mean."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda: torch.randn(8, 2, generator=generator, dtype=torch.float64)  # noqa: E731
    values = torch.stack([mmd(draw(), draw(), kernel="polynomial") for _ in range(200)])
    assert values.mean().abs() <= 4 * values.std() / 200**0.5 and values.min() < 0


def test_blocks_do_not_show(monkeypatch):
    x, y, *_ = clouds(23, 19)
    x.requires_grad_()
    whole = mmd(x, y, kernel="polynomial")
    monkeypatch.setattr(reference, "MAX_PAIRS", 60)
    blocks = mmd(x, y, kernel="polynomial")
    for got, expected in ((blocks, whole), (torch.autograd.grad(f, x)[0] for f in (blocks, whole))):
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-12)


def test_sixteen_bits_and_strides():
    x, y, *_ = clouds(9, 14, 8, torch.bfloat16)
    got = mmd(x[:, ::2], y[:, ::2], kernel="polynomial")
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), mmd(x[:, ::2].double(), y[:, ::2].double(), kernel="polynomial"), rtol=1e-6, atol=0)


def test_operator_compile_and_vmap():
    x, y, a, _ = clouds(6, 5)
    torch.library.opcheck(
        reference.polynomial_rows.op, (x, y, torch.rand(5, dtype=torch.float64, device=DEVICE), 3, 0.5, 1.0, False, True)
    )
    function = lambda x, y: mmd(x, y, kernel="polynomial", weights_x=a)  # noqa: E731
    gradient = torch.func.grad(function)
    compiled = torch.compile(gradient, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, y), gradient(x, y))
    pair = torch.stack([x, 2 * x])
    torch.testing.assert_close(torch.vmap(gradient, (0, None))(pair, y)[1], gradient(2 * x, y))


@pytest.mark.parametrize("options, error, message", [
    ({"kernel": "rbf"}, ValueError, "kernel must be one of 'gaussian', 'polynomial', got 'rbf'"),
    ({"bandwidths": (1.0,)}, ValueError, "kernel='polynomial' has no bandwidths, got"),
    ({"degree": 0}, ValueError, "degree of at least 1, got 0"),
    ({"degree": 2.5}, TypeError, "degree"),
    ({"gamma": float("nan")}, ValueError, "a finite gamma, got nan"),
    ({"coef0": "1"}, TypeError, "coef0"),
    ({"impl": "triton"}, ValueError, "the polynomial kernel has no Triton kernel"),
    ({"kernel": "gaussian"}, TypeError, "bandwidths"),
])  # fmt: skip
def test_user_errors(options, error, message):
    x, y, *_ = clouds(6, 5)
    with pytest.raises(error, match=message):
        mmd(x, y, **({"kernel": "polynomial"} | options))
