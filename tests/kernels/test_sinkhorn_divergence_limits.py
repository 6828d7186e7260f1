"""`sinkhorn_divergence`: its limits, its rates of convergence, its error in float32, and transforms of torch combined."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from dae_kernels.sinkhorn_divergence import sinkhorn_divergence
from torch import Tensor

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import geomloss


pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in the interpreter: lanes that are masked later


def gradients(function, *clouds: Tensor) -> list[Tensor]:
    leaves = [c.detach().clone().requires_grad_() for c in clouds]
    return list(torch.autograd.grad(function(*leaves), leaves))


def clouds(N: int, M: int, D: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(N, D, generator=generator), 0.7 * torch.randn(M, D, generator=generator) + 0.5


@pytest.mark.parametrize("p, D", [(2, 2), (2, 64), (1, 1), (1, 64)])
def test_float32_gradients_err_no_more_than_those_of_geomloss(p, D):
    """A score is C / epsilon, some 1e4 for D = 64, whose float32 rounding the plan and the gradient take over in any library.

    Measured with N = 150, M = 120 and blur 0.05, largest error by the largest entry, medians of 24 gradients, ours and theirs:
    p = 2: 1.0e-5 and 2.3e-5 (D = 2), 2.4e-4 and 3.2e-4 (D = 64); p = 1: 5.2e-7 and 6.8e-7 (D = 1), 5.9e-6 and 5.0e-6 (D = 64).
    In float64 the two agree to 1e-12 (N = 500, M = 400, D = 64), so where they are 1e-3 apart in float32, neither alone errs.
    """

    def distance(x, y):  # theirs is clamped at 1e-4
        return (x[:, :, None] - y[:, None]).square().sum(-1).clamp_min(1e-30).sqrt()

    theirs = geomloss.SamplesLoss("sinkhorn", p=p, backend="tensorized", cost=distance if p == 1 else None)
    errors = {"ours": [], "theirs": []}
    for seed in range(6):
        x, y = clouds(150, 120, D, seed)
        truth = gradients(theirs, x.double(), y.double())
        for name, function in (("ours", lambda x, y: sinkhorn_divergence(x, y, p=p)), ("theirs", theirs)):
            for got, expected in zip(gradients(function, x, y), truth, strict=True):
                errors[name].append(((got - expected).abs().max() / expected.abs().max()).item())
    median = {name: sorted(several)[len(several) // 2] for name, several in errors.items()}
    assert median["ours"] <= 2 * median["theirs"]


def slope(sizes: tuple[int, ...], values: list[Tensor]) -> float:
    log_n, log_value = torch.tensor(sizes).double().log(), torch.stack(values).log()
    return (((log_n - log_n.mean()) * log_value).sum() / (log_n - log_n.mean()).square().sum()).item()


def test_rates_of_convergence():
    """Blur fixed, samples in one dimension: 1 / n for two samples of one law, 1 / sqrt(n) between laws (Genevay et al. 2019)."""
    generator = torch.Generator().manual_seed(0)
    sizes = (16, 64, 256)

    def draw(n: int) -> Tensor:
        return torch.randn(n, 1, dtype=torch.float64, generator=generator)

    equal = [
        torch.stack([sinkhorn_divergence(draw(n), draw(n), blur=2.0, diameter=4.0) for _ in range(80)]).mean() for n in sizes
    ]
    assert abs(slope(sizes, equal) + 1) < 0.1

    def entropic(s: float, t: float, shift: float) -> float:  # Gaussians: Janati et al. 2020, for epsilon = 1 and |x-y|^2 / 2
        d = math.sqrt(4 * s**2 * t**2 + 1)
        return (shift**2 + s**2 + t**2 - d + 1 - math.log(2) + math.log(d + 1)) / 2

    law = entropic(1, 1.5, 0.8) - entropic(1, 1, 0) / 2 - entropic(1.5, 1.5, 0) / 2
    options = {"blur": 1.0, "scaling": 1 - 1e-7, "diameter": 1 + 1.2e-6}  # twelve updates at one epsilon
    apart = [
        torch.stack([sinkhorn_divergence(draw(n), 1.5 * draw(n) + 0.8, **options) - law for _ in range(80)]).abs().mean()
        for n in sizes
    ]
    assert abs(slope(sizes, apart) + 0.5) < 0.1


def test_limit_of_large_blur():
    """Half the squared distance of the means for p = 2, half the energy distance for p = 1; the rest is of order 1 / blur^p."""
    x, y = (c.double() for c in clouds(40, 30, 3, 1))
    means = (x.mean(0) - y.mean(0)).square().sum() / 2
    torch.testing.assert_close(sinkhorn_divergence(x, y, blur=1e3), means, rtol=1e-4, atol=0)
    energy = torch.cdist(x, y).mean() - torch.cdist(x, x).mean() / 2 - torch.cdist(y, y).mean() / 2
    torch.testing.assert_close(sinkhorn_divergence(x, y, p=1, blur=1e5), energy, rtol=1e-3, atol=0)


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_float32_loses_no_digits_where_blur_is_large(p, impl):
    """A logarithm of nearly 1, times epsilon: 8 % of a value at blur 1e3 and p = 2 before it was taken apart."""
    x, y = clouds(20, 15, 2, 5)
    for blur in (12.0, 1e6):

        def divergence(x, y, impl):
            return sinkhorn_divergence(x, y, p=p, blur=blur, impl=impl)  # noqa: B023

        truth = divergence(x.double(), y.double(), "reference")
        assert divergence(x, y, impl).item() == pytest.approx(truth.item(), rel=2e-6)  # the value is a tenth of its terms
        expected = gradients(lambda x, y: divergence(x, y, "reference"), x.double(), y.double())
        for got, true in zip(gradients(lambda x, y: divergence(x, y, impl), x, y), expected, strict=True):
            torch.testing.assert_close(got.double(), true, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("factor", [2.0**-50, 2.0**50])
def test_units_do_not_matter(p, factor):
    """A power of 2 rounds no point; the schedule's exponentials, hence scores, differ in the last digits."""
    x, y = clouds(20, 15, 2, 6)
    value = sinkhorn_divergence(x, y, p=p, blur=0.5)
    scaled = sinkhorn_divergence(x * factor, y * factor, p=p, blur=0.5 * factor)
    torch.testing.assert_close(scaled / factor**p, value, rtol=1e-4, atol=0)


@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize("p, blur", [(1, 0.5), (2, 0.5), (2, 100.0)])
def test_a_far_point_of_weight_0_changes_nothing(impl, p, blur):
    """Nor do its coordinates set the diameter, hence the number of updates. At blur 100 its scores alone are not small."""
    x, y = clouds(12, 15, 2, 7)
    far = torch.cat([x, torch.full((1, 2), 1e4)])
    weights = torch.ones(13)
    weights[12] = 0
    got, expected = (
        [f(x, y), *gradients(f, x, y)]
        for f, x in (
            (lambda x, y: sinkhorn_divergence(x, y, p=p, blur=blur, weights_x=weights, impl=impl), far),
            (lambda x, y: sinkhorn_divergence(x, y, p=p, blur=blur, impl=impl), x),
        )
    )
    # Not flat at blur 100 as the box of all points is large: a few roundings of 1 times epsilon, in each of the potentials.
    rounding = 4 * torch.finfo(torch.float32).eps * max(1.0, blur**p)
    torch.testing.assert_close(got[0], expected[0], rtol=1e-6, atol=rounding)
    torch.testing.assert_close(got[1][:12], expected[1], rtol=1e-5, atol=1e-6)
    assert not got[1][12].any()
    torch.testing.assert_close(got[2], expected[2], rtol=1e-5, atol=1e-6)


def test_extremes_of_float64():
    x, y = (c.double() for c in clouds(6, 5, 2, 8))
    value = sinkhorn_divergence(x, y, blur=0.5)
    for factor in (2.0**-450, 2.0**450):
        scaled = sinkhorn_divergence(x * factor, y * factor, blur=0.5 * factor)
        torch.testing.assert_close(scaled / factor**2, value, rtol=1e-10, atol=0)
    with pytest.raises(ValueError, match=r"costs overflow torch.float64"):
        sinkhorn_divergence(x * 1e200, y * 1e200)
    assert sinkhorn_divergence(x * 1e-200, y * 1e-200).abs() < 1e-12  # no scale to start from


@pytest.mark.parametrize("p", [1, 2])
def test_a_common_offset_costs_its_own_rounding_alone(p):
    x, y = (c.mul(64).round() / 64 for c in clouds(30, 20, 2, 2))  # exact next to 2^14
    value = sinkhorn_divergence(x, y, p=p, blur=0.5)
    torch.testing.assert_close(sinkhorn_divergence(x + 2.0**14, y + 2.0**14, p=p, blur=0.5), value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_precision_of_products_is_not_the_users(precision):
    """On this CPU the setting may change nothing; that it leads to float64 is seen by the last digits, and close it must be."""
    x, y = clouds(40, 30, 8, 3)
    expected = sinkhorn_divergence(x.double(), y.double(), blur=0.5).float()
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        got = sinkhorn_divergence(x, y, blur=0.5, impl="reference")
    finally:
        torch.set_float32_matmul_precision(before)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)  # as float32 is; bfloat16 would err by 1e-2


def test_compile_with_transforms():
    generator = torch.Generator().manual_seed(4)
    x, y = torch.randn(3, 6, 2, generator=generator), torch.randn(5, 2, generator=generator)

    def divergence(x, y):
        return sinkhorn_divergence(x, y, blur=0.5)

    gradient = torch.func.grad(divergence, argnums=(0, 1))
    expected_value, expected_gradient = torch.stack([divergence(k, y) for k in x]), [gradient(k, y) for k in x]

    def compiled(function):
        torch._dynamo.reset()
        return torch.compile(function, fullgraph=True, backend="aot_eager")

    torch.testing.assert_close(compiled(divergence)(x[0], y), expected_value[0])  # nothing requires a gradient
    torch.testing.assert_close(compiled(torch.vmap(divergence, in_dims=(0, None)))(x, y), expected_value)
    torch.testing.assert_close(compiled(gradient)(x[0], y), expected_gradient[0])
    got = compiled(torch.vmap(gradient, in_dims=(0, None)))(x, y)
    torch.testing.assert_close(got, tuple(map(torch.stack, zip(*expected_gradient, strict=True))))
    potentials = compiled(torch.vmap(lambda x, y: sinkhorn_divergence(x, y, blur=0.5, potentials=True), in_dims=(0, None)))(x, y)
    torch.testing.assert_close(potentials[0].mean(1) + potentials[1].mean(1), expected_value)


@pytest.mark.parametrize("compiled", [False, True])
def test_second_derivatives_are_refused(compiled):
    x, y = clouds(4, 5, 2, 9)
    a = torch.rand(4, generator=torch.Generator().manual_seed(0)) + 0.1

    def divergence(x, a):
        return sinkhorn_divergence(x, y, blur=0.5, weights_x=a)

    def penalty(argument):  # inside torch.func the backward of a Function is not seen by Dynamo on its own
        return lambda x, a: torch.func.grad(divergence, argnums=argument)(x, a).square().sum()

    for argument in (0, 1):
        function = torch.func.grad(penalty(argument), argnums=argument)
        if compiled:
            torch._dynamo.reset()
            function = torch.compile(function, fullgraph=True, backend="aot_eager")
        with pytest.raises(Exception, match="sinkhorn_divergence has no second derivative"):  # Dynamo wraps the RuntimeError
            function(x, a)
    leaves = [t.clone().requires_grad_() for t in (x, a)]
    torch._dynamo.reset()
    function = torch.compile(divergence, backend="aot_eager") if compiled else divergence
    first = torch.autograd.grad(function(*leaves), leaves, create_graph=True)
    for gradient in first:
        with pytest.raises(RuntimeError, match=r"no second derivative|not currently support double backward"):
            gradient.square().sum().backward(retain_graph=True)
