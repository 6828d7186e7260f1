"""`mmd` against its formula in float64, the closed form of Gaussians and geomloss, both implementations.

Tolerance of the reference: it computes in float64, so a float32 result is off by its one rounding (2 eps for a margin of two),
and a gradient likewise. Tolerance of the kernel, see `kernel_slack`.
"""

from __future__ import annotations

import pytest
import torch
from dae_kernels.mmd import mmd
from dae_kernels.pairwise import reference
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IMPLS = ["reference", "triton"]
EPS = torch.finfo(torch.float32).eps
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in the interpreter
BANDWIDTHS = (0.7, 1.5, 4)


def formula(
    x: Tensor, y: Tensor, bandwidths, unbiased, weights_x: Tensor | None = None, weights_y: Tensor | None = None
) -> Tensor:
    """The definition with all kernel values in memory, float64; a sum over i != j is a sum over what is off the diagonal."""
    x, y = x.double(), y.double()
    a, b = (
        torch.full_like(c[:, 0], 1 / len(c)) if w is None else w.double() / w.double().sum()
        for c, w in ((x, weights_x), (y, weights_y))
    )

    def mean(p, q, u, v, within):
        square = (p[:, None] - q).square().sum(-1)
        values = sum(torch.exp(-square / (2 * s**2)) for s in bandwidths) * u[:, None] * v
        if within and unbiased:
            return (values.sum() - values.diagonal().sum()) / (1 - u.square().sum())
        return values.sum()

    return mean(x, x, a, a, True) + mean(y, y, b, b, True) - 2 * mean(x, y, a, b, False)


def kernel_slack(x: Tensor, y: Tensor, bandwidths) -> float:
    """What the kernel may err by: |x|^2 + |y|^2 - 2 x.y of centred points is off by a few eps R^2, R the largest radius.

    That moves the exponent r^2 / 2 s^2 by eps R^2 / 2 s^2, and a value is at most 1; 4 terms for each bandwidth.
    """
    radius = (torch.cat([x, y]).double() - torch.cat([x, y]).double().mean(0)).norm(dim=1).max().item()
    return sum(4 * EPS * (2 + radius**2 / s**2) for s in bandwidths)


def clouds(N: int, M: int, D: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    x, y = torch.randn(N, D, generator=g), 1.3 * torch.randn(M, D, generator=g) + 0.5
    return (x / D**0.5).to(DEVICE, dtype), (y / D**0.5).to(DEVICE, dtype)


def check(x, y, impl, unbiased, weights_x=None, weights_y=None, bandwidths=BANDWIDTHS) -> None:
    """Value and gradients to all floating operands, under a random cotangent."""
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in (x, y, weights_x, weights_y)]
    exact = [None if t is None else t.detach().double().clone().requires_grad_() for t in (x, y, weights_x, weights_y)]
    value = mmd(
        leaves[0],
        leaves[1],
        bandwidths=bandwidths,
        unbiased=unbiased,
        weights_x=leaves[2],
        weights_y=leaves[3],
        impl=impl,
    )
    truth = formula(exact[0], exact[1], bandwidths, unbiased, exact[2], exact[3])
    assert value.shape == () and value.dtype == (torch.float64 if x.dtype == torch.float64 else torch.float32)
    slack = kernel_slack(x, y, bandwidths) if impl == "triton" else 1e-14
    assert abs(value.item() - truth.item()) <= 2 * torch.finfo(value.dtype).eps * abs(truth.item()) + slack
    cotangent = torch.randn((), generator=torch.Generator().manual_seed(len(x))).item()
    value.backward(torch.full_like(value, cotangent))
    truth.backward(torch.full_like(truth, cotangent))
    for leaf, expected in zip(leaves, exact, strict=True):
        if leaf is None:
            continue
        assert leaf.grad.dtype == leaf.dtype and leaf.grad.shape == leaf.shape
        largest = expected.grad.abs().max().item()
        error = (leaf.grad.double() - expected.grad).abs().max().item()
        if impl == "triton":  # slopes exp(.) / s^2 times differences of up to 2 R: the same slack a weight, over s^2
            allowed = abs(cotangent) * slack * max(1, 4 / min(bandwidths) ** 2)
            assert error <= 2 * torch.finfo(leaf.dtype).eps * largest + allowed
        else:
            assert error <= 2 * torch.finfo(leaf.dtype).eps * largest + 1e-13


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize("N, M, D", [(63, 60, 8), (2, 60, 1), (63, 2, 17), (65, 40, 68), (1, 1, 3), (1, 60, 3)])
def test_matches_the_formula(impl, unbiased, N, M, D):
    if unbiased and min(N, M) == 1:
        with pytest.raises(ValueError, match="at least two points of positive weight in each cloud, got 1 in x"):
            mmd(*clouds(N, M, D), bandwidths=[1.0], impl=impl)
        return
    x, y = clouds(N, M, D)
    check(x, y, impl, unbiased)
    g = torch.Generator().manual_seed(1)
    a, b = torch.rand(N, generator=g).to(DEVICE) + 0.1, 3 * torch.rand(M, generator=g).to(DEVICE) + 0.1
    check(x, y, impl, unbiased, a, b)
    check(x, y, impl, unbiased, weights_y=b, bandwidths=[2])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes(impl, dtype):
    x, y = clouds(20, 30, 5, dtype=dtype)
    if impl == "triton" and dtype == torch.float64:
        with pytest.raises(ValueError, match="impl='triton' cannot run here: the kernel takes float16, bfloat16 and float32"):
            mmd(x, y, bandwidths=[1.0], impl=impl)
        return
    check(x, y, impl, True)


@pytest.mark.parametrize("impl", IMPLS)
def test_diracs(impl):
    x, y = torch.zeros(1, 2, device=DEVICE), torch.tensor([[3.0, 4.0]], device=DEVICE)
    expected = 2 - 2 * torch.exp(torch.tensor(-25 / 8.0)).item()
    assert mmd(x, y, bandwidths=[2.0], unbiased=False, impl=impl).item() == pytest.approx(expected, rel=1e-6)
    # Two points each, equal within a cloud: unbiased sees pairs of equal points, which only the index keeps from i = j.
    assert mmd(x.repeat(2, 1), y.repeat(2, 1), bandwidths=[2.0], impl=impl).item() == pytest.approx(expected, rel=1e-6)


def test_normal_laws():
    """E k of N(m, v I) and N(n, w I) in d dimensions is (s^2 / t)^(d/2) exp(-|m - n|^2 / 2 t), t = s^2 + v + w."""
    s, d, shift, w = 1.5, 3, 0.8, 2.0

    def mean(square, variance):
        t = s**2 + variance
        return (s**2 / t) ** (d / 2) * torch.exp(torch.tensor(-square / (2 * t))).item()

    expected = mean(0.0, 2.0) + mean(0.0, 2 * w) - 2 * mean(d * shift**2, 1 + w)
    torch.manual_seed(2)
    draws = torch.stack([mmd(torch.randn(500, d), w**0.5 * torch.randn(500, d) + shift, bandwidths=[s]) for _ in range(40)])
    error = draws.std() / 40**0.5
    assert abs(draws.mean() - expected) < 4 * error and error < 0.02 * expected  # unbiased: only chance is left


def test_unbiased_is_zero_in_the_mean():
    torch.manual_seed(3)
    draws = torch.stack([mmd(torch.randn(6, 2), torch.randn(9, 2), bandwidths=BANDWIDTHS) for _ in range(600)])
    assert abs(draws.mean()) < 4 * draws.std() / 600**0.5


def test_peer():
    geomloss = pytest.importorskip("geomloss")
    x, y = clouds(40, 30, 4, dtype=torch.float64)
    a, b = torch.rand(40).double(), torch.rand(30).double()
    half = geomloss.SamplesLoss("gaussian", blur=0.8, backend="tensorized")(a / a.sum(), x, b / b.sum(), y)
    ours = mmd(x, y, bandwidths=[0.8], unbiased=False, weights_x=a, weights_y=b)
    assert ours.item() == pytest.approx(2 * half.item(), rel=1e-9)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("unbiased", [True, False])
def test_far_from_the_origin(impl, unbiased):
    x, y = clouds(50, 40, 6)
    check(x + 1000, y + 1000, impl, unbiased)


@pytest.mark.parametrize("impl", IMPLS)
def test_bandwidths_sum_in_any_order(impl):
    x, y = clouds(20, 30, 5)
    whole = mmd(x, y, bandwidths=BANDWIDTHS, impl=impl)
    assert abs(whole - mmd(x, y, bandwidths=BANDWIDTHS[::-1], impl=impl)) <= kernel_slack(x, y, BANDWIDTHS)
    assert abs(whole - sum(mmd(x, y, bandwidths=[s], impl=impl) for s in BANDWIDTHS)) <= kernel_slack(x, y, BANDWIDTHS)
    tiny = mmd(x, y, bandwidths=[1e-4], unbiased=False, impl=impl).item()  # every point alone
    assert tiny == pytest.approx(1 / 20 + 1 / 30, rel=1e-6)
    assert abs(mmd(x, y, bandwidths=[1e6], unbiased=False, impl=impl)) <= kernel_slack(x, y, [1e6])


@pytest.mark.parametrize("impl", IMPLS)
def test_strides_do_not_matter(impl):
    x, y = clouds(20, 33, 12)
    wide = torch.stack([x, x + 1], dim=2)
    expected = mmd(x, y, bandwidths=BANDWIDTHS, impl=impl)
    assert mmd(wide[..., 0], y.T.contiguous().T, bandwidths=BANDWIDTHS, impl=impl) == expected
    check(x[:1].expand(7, 12), y[::2], impl, True)
    check(x[:, ::3], y[:, ::3], impl, False, torch.ones(1, device=DEVICE).expand(20))


@pytest.mark.parametrize("unbiased", [True, False])
def test_gradcheck(unbiased):
    x, y = clouds(5, 4, 3, dtype=torch.float64)
    a, b = torch.rand(5).double() + 0.1, torch.rand(4).double() + 0.1
    leaves = [t.requires_grad_() for t in (x, y, a, b)]

    def loss(x, y, a, b):
        return mmd(x, y, bandwidths=BANDWIDTHS, unbiased=unbiased, weights_x=a, weights_y=b)

    assert torch.autograd.gradcheck(loss, leaves)


def test_chunks_of_the_reference_do_not_show(monkeypatch):
    x, y = clouds(31, 40, 6)
    whole, pieces = x.clone().requires_grad_(), x.clone().requires_grad_()
    expected = mmd(whole, y, bandwidths=BANDWIDTHS)
    expected.backward()
    monkeypatch.setattr(reference, "MAX_PAIRS", 90)
    value = mmd(pieces, y, bandwidths=BANDWIDTHS)
    value.backward()
    torch.testing.assert_close(value, expected, rtol=EPS, atol=0)
    torch.testing.assert_close(pieces.grad, whole.grad, rtol=2 * EPS, atol=1e-9)


@settings(max_examples=6, deadline=None)
@given(N=st.integers(2, 40), M=st.integers(2, 50), D=st.integers(1, 20), unbiased=st.booleans())
def test_properties_on_any_shape(N, M, D, unbiased):
    x, y = clouds(N, M, D, seed=N + 100 * M + 10_000 * D)
    slack = kernel_slack(x, y, BANDWIDTHS)
    for impl in IMPLS:
        options = {"bandwidths": BANDWIDTHS, "unbiased": unbiased, "impl": impl}
        value = mmd(x, y, **options)
        assert abs(value - mmd(y, x, **options)) <= slack  # symmetric
        assert abs(value - mmd(x[torch.randperm(N)], y, **options)) <= slack
        assert unbiased or value >= -slack
        assert unbiased or abs(mmd(x, x, **options)) <= slack  # zero on itself
        scaled = mmd(2 * x, 2 * y, **(options | {"bandwidths": [2 * s for s in BANDWIDTHS]}))
        assert abs(value - scaled) <= slack
        if not unbiased:
            assert abs(value - mmd(torch.cat([x, x]), y, **options)) <= slack  # a doubled cloud is the same law


def test_biased_falls_as_one_over_n():
    """Two samples of one law: the mean of the V-statistic is exactly c / n; 400 small draws hold the slope to 0.1."""
    torch.manual_seed(4)
    sizes = (8, 32, 128)
    options = {"bandwidths": [1.0], "unbiased": False}
    means = []
    for n in sizes:
        draws = [mmd(torch.randn(n, 2, dtype=torch.float64), torch.randn(n, 2).double(), **options) for _ in range(400)]
        means.append(torch.stack(draws).mean())
    log_n, log_mean = torch.tensor(sizes).double().log(), torch.stack(means).log()
    slope = ((log_n - log_n.mean()) * log_mean).sum() / (log_n - log_n.mean()).square().sum()
    assert abs(slope + 1) < 0.1


@pytest.mark.parametrize("impl", IMPLS)
def test_compiles_into_one_graph(impl):
    torch._dynamo.reset()
    x, y = clouds(9, 7, 3)
    a = torch.rand(9, device=DEVICE) + 0.1

    def step(x, y, a):
        return mmd(x.tanh(), y, bandwidths=BANDWIDTHS, weights_x=a, impl=impl)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for n in (9, 8):  # the second length is compiled for any
        ours, theirs = (x[:n].clone().requires_grad_() for _ in range(2))
        value, expected = compiled(ours, y, a[:n]), step(theirs, y, a[:n])
        value.backward(), expected.backward()
        torch.testing.assert_close(value, expected)
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_convention_is_stated():
    assert (
        mmd.convention.value == "squared" and "factor 1" in mmd.convention.cost and "unbiased=True: none" in mmd.convention.bias
    )


ERRORS = {
    "width": ((3, 4), (5, 6), {}, ValueError, r"got x \[3, 4\], y \[5, 6\]"),
    "impl": ((3, 4), (5, 4), {"impl": "cuda"}, ValueError, "impl must be one of"),
    "no bandwidth": ((3, 4), (5, 4), {"bandwidths": ()}, ValueError, "at least one bandwidth"),
    "negative bandwidth": ((3, 4), (5, 4), {"bandwidths": (1, -2.0)}, ValueError, "positive and finite, .* got -2.0"),
    "nan bandwidth": ((3, 4), (5, 4), {"bandwidths": (float("nan"),)}, ValueError, "positive and finite, .* got nan"),
    "tiny bandwidth": ((3, 4), (5, 4), {"bandwidths": (1e-200,)}, ValueError, "from 1e-150 to 1e150, got 1e-200"),
    "huge bandwidth": ((3, 4), (5, 4), {"bandwidths": (1e200,)}, ValueError, r"from 1e-150 to 1e150, got 1e\+200"),
    "no float": ((3, 4), (5, 4), {"bandwidths": (2**2000,)}, ValueError, "beyond 1e308"),
    "no float32": ((3, 4), (5, 4), {"bandwidths": (1e-20,), "impl": "triton"}, ValueError, "bandwidths from 1e-18 to 1e18"),
    "one number": ((3, 4), (5, 4), {"bandwidths": 1.0}, TypeError, "as a sequence of numbers"),
    "words": ((3, 4), (5, 4), {"bandwidths": ("1",)}, TypeError, "bandwidths as a number, got str"),
    "weights": ((3, 4), (5, 4), {"weights_x": torch.ones(5)}, ValueError, r"weights_x \[3\], one weight a point, got \[5\]"),
    "one weight": ((3, 4), (5, 4), {"weights_x": torch.eye(3)[0]}, ValueError, "two points of positive weight .* got 1 in x"),
    "one with the rest": (
        (3, 4),
        (5, 4),
        {"weights_x": torch.tensor([1, 1e-20, 0])},
        ValueError,
        "weights_x whose pairs have .* at least 1e-9, got 0",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_user_errors(case):
    x_shape, y_shape, options, error, message = ERRORS[case]
    with pytest.raises(error, match=message):
        mmd(torch.zeros(x_shape), torch.zeros(y_shape), **({"bandwidths": [1.0]} | options))
