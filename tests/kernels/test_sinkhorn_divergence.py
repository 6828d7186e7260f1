"""`sinkhorn_divergence` against closed forms, geomloss, POT, and its own float64."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import warnings

import pytest
import torch
from dae_kernels.sinkhorn_divergence import operators, reference, sinkhorn_divergence
from dae_kernels.sinkhorn_divergence.solver import epsilon_schedule
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import assert_errors
from torch import Tensor

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import geomloss
    import ot

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in the interpreter: lanes that are masked later
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IMPLS = ["reference", "triton"]


def clouds(N: int, M: int, D: int, dtype=torch.float64, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed + N + 100 * M + 10_000 * D)
    x, y = (torch.randn(n, D, generator=generator, dtype=torch.float64) for n in (N, M))
    return x.to(DEVICE, dtype), (0.7 * y + 0.5).to(DEVICE, dtype)


def simplex(N: int, dtype=torch.float64, seed: int = 0) -> Tensor:
    weights = torch.rand(N, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.1
    return (weights / weights.sum()).to(DEVICE, dtype)


def value_and_gradients(function, *tensors: Tensor) -> list[Tensor]:
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    value = function(*leaves)
    return [value.detach(), *torch.autograd.grad(value, leaves)]


def relative(got: Tensor, expected: Tensor) -> float:
    """Largest error, relative to the largest entry."""
    return ((got.double() - expected.double()).abs().max() / expected.double().abs().max()).item()


def converged(blur: float, updates: int = 60) -> dict:
    """So many updates within 1e-6 of one epsilon: what the envelope theorem supposes."""
    step = 1e-6 / updates
    return {"blur": blur, "scaling": 1 - step, "diameter": blur * (1 + step * updates)}


def geomloss_divergence(**options):
    """geomloss in the same terms. It clamps distances at 1e-4 for p = 1, which the cost given here does not."""

    def distance(x, y):
        return (x[:, :, None] - y[:, None]).square().sum(-1).clamp_min(torch.finfo(x.dtype).tiny).sqrt()

    cost = distance if options["p"] == 1 else None
    loss = geomloss.SamplesLoss("sinkhorn", backend="tensorized", cost=cost, **options)
    return lambda x, y, a, b: loss(a, x, b, y)


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("debias", [True, False])
@pytest.mark.parametrize("N, M, D, settings", [
    (63, 60, 2, {}), (1, 5, 3, {}), (40, 33, 17, {"blur": 0.3, "scaling": 0.8}), (20, 21, 1, {"diameter": 9.0}),
    (20, 21, 2, {"blur": 20.0}),
])  # fmt: skip
def test_equals_geomloss(p, debias, N, M, D, settings):
    options = {"p": p, "debias": debias, **settings}
    x, y = clouds(N, M, D)
    a, b = simplex(N, seed=1), simplex(M, seed=2)

    def ours(x, y, a, b):
        return sinkhorn_divergence(x, y, weights_x=a, weights_y=b, **options)

    got, expected = (value_and_gradients(f, x, y, a, b) for f in (ours, geomloss_divergence(**options)))
    # Both are float64 and differ in the order of operations alone; |x|^2 - 2 x.y + |y|^2 over epsilon loses six digits or so.
    for k in range(3):
        assert relative(got[k], expected[k]) < 1e-8
    # Ours is the derivative by weights that are normalised first: the potential less its mean.
    for got_a, expected_a, weights in ((got[3], expected[3], a), (got[4], expected[4], b)):
        torch.testing.assert_close(got_a, expected_a - (weights * expected_a).sum(), rtol=1e-8, atol=1e-8)

    got = sinkhorn_divergence(x, y, weights_x=a, weights_y=b, potentials=True, **options)
    expected = geomloss_divergence(potentials=True, **options)(x, y, a, b)
    for f, g in zip(got, expected, strict=True):
        torch.testing.assert_close(f, g.flatten(), rtol=1e-8, atol=1e-8)


def test_memory_of_the_reference_is_bounded():
    # 2^24 costs would take 64 MiB a pair of clouds in float32, of which there are four with debias.
    script = (
        "import torch; from dae_kernels.sinkhorn_divergence import sinkhorn_divergence\n"
        "peak = lambda: int(open('/proc/self/status').read().split('VmHWM:')[1].split()[0]) // 1024\n"
        "x, y = torch.randn(1 << 12, 2, requires_grad=True), torch.randn(1 << 12, 2)\n"
        "sinkhorn_divergence(x[:300], y[:300]).backward(); before = peak()\n"
        "sinkhorn_divergence(x, y, blur=2.0, diameter=2.0).backward(); print(peak() - before)"
    )
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}  # or glibc's hoard of freed blocks counts as well
    grown = subprocess.run([sys.executable, "-c", script], env=environment, check=True, capture_output=True, text=True).stdout
    assert int(grown) < 40  # MiB


@pytest.mark.parametrize("debias", [True, False])
def test_equals_geomloss_in_float32_with_its_own_cost(debias):
    x, y = clouds(200, 150, 2, torch.float32)
    got = value_and_gradients(lambda x, y: sinkhorn_divergence(x, y, debias=debias), x, y)
    loss = geomloss.SamplesLoss("sinkhorn", backend="tensorized", debias=debias)
    theirs = value_and_gradients(loss, x, y)

    def exact():
        return value_and_gradients(loss, x.double(), y.double())

    assert_errors(got, exact(), theirs, results=exact)


@pytest.mark.parametrize("p", [1, 2])
def test_equals_pot_once_converged(p):
    """POT's `sinkhorn` gives the plan for a cost and KL(P | a b^T) up to a constant; ours adds epsilon KL to sum P C."""
    x, y = clouds(30, 25, 2)
    a, b = simplex(30, seed=1), simplex(25, seed=2)
    epsilon = 0.5
    C = torch.cdist(x, y) ** p / p
    P = ot.bregman.sinkhorn(a, b, C, reg=epsilon, method="sinkhorn_log", stopThr=1e-13, numItermax=10_000)
    expected = (P * C).sum() + epsilon * (P * (P / (a[:, None] * b)).log()).sum()
    x.requires_grad_()
    got = sinkhorn_divergence(x, y, p=p, weights_x=a, weights_y=b, debias=False, **converged(epsilon ** (1 / p), 300))
    # Updates converge linearly, and what is left is of second order in the value, first order in the gradient.
    torch.testing.assert_close(got, expected, rtol=1e-8, atol=0)
    difference = x.detach()[:, None] - y
    expected_gradient = (P[:, :, None] * (difference if p == 2 else difference / C[:, :, None])).sum(1)
    torch.testing.assert_close(torch.autograd.grad(got, x)[0], expected_gradient, rtol=1e-5, atol=1e-7)


def test_tends_to_exact_transport():
    x, y = clouds(40, 40, 2)
    uniform = torch.full((40,), 1 / 40, dtype=torch.float64)
    for p in (1, 2):
        exact = ot.emd2(
            uniform, uniform, (torch.cdist(x, y) ** p / p).cpu()
        )  # POT's cost has no factor of its own: half of |x-y|^2 here
        got = sinkhorn_divergence(x, y, p=p, blur=0.005, scaling=0.99)
        assert abs(got.item() / exact.item() - 1) < 0.01


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("debias", [True, False])
def test_diracs(impl, p, debias):
    x, y = torch.tensor([[0.0, 1.0]], device=DEVICE), torch.tensor([[3.0, 5.0]], device=DEVICE)
    value, gradient, _ = value_and_gradients(lambda x, y: sinkhorn_divergence(x, y, p=p, debias=debias, impl=impl), x, y)
    # |x|^2 / 2 of points centred on (1.5, 3), a few roundings of it
    torch.testing.assert_close(value, torch.tensor(5.0**p / p, device=DEVICE), rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient, (x - y) / (5.0 if p == 1 else 1.0), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_cloud_and_its_translation(impl):
    """For p = 2 a translation by t adds |t|^2 / 2 exactly, and the gradient by x is then -t / N on every point."""
    x, _ = clouds(50, 1, 2, torch.float32)
    t = torch.tensor([0.6, -0.8], device=DEVICE)
    value, gradient, _ = value_and_gradients(lambda x, y: sinkhorn_divergence(x, y, blur=0.5, scaling=0.9, impl=impl), x, x + t)
    # What is left is the schedule, not rounding: scaling=0.9 leaves a lag of some 1e-3 in the potentials.
    assert abs(value.item() - 0.5) < 2e-3
    assert (gradient * 50 + t).abs().max() < 2e-2


def test_gaussians_by_their_closed_form():
    """Entropic transport in one dimension: Gaussians stay Gaussian (Janati et al. 2020, arXiv 2006.02572, theorem 1)."""
    epsilon, s, t, shift = 1.0, 1.0, 1.5, 0.8
    grid = torch.linspace(-9, 9, 301, dtype=torch.float64)[:, None]

    def density(mean, deviation):
        return (-((grid[:, 0] - mean) ** 2) / (2 * deviation**2)).exp()

    def entropic(s, t, shift):  # cost |x-y|^2 / 2: theirs with sigma^2 = epsilon / 2 and halved
        d = math.sqrt(4 * s**2 * t**2 + epsilon**2)
        bures = s**2 + t**2 - d + epsilon * (1 - math.log(2 * epsilon)) + epsilon * math.log(d + epsilon)
        return (shift**2 + bures) / 2

    options = {"weights_x": density(0.0, s), "weights_y": density(shift, t)} | converged(math.sqrt(epsilon))
    raw = sinkhorn_divergence(grid, grid, debias=False, **options).item()
    debiased = sinkhorn_divergence(grid, grid, **options).item()
    # The grid integrates a smooth density to rounding; the schedule's drift is what is left.
    assert raw == pytest.approx(entropic(s, t, shift), rel=1e-5)
    assert debiased == pytest.approx(entropic(s, t, shift) - (entropic(s, s, 0) + entropic(t, t, 0)) / 2, rel=1e-5)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("p", [1, 2])
def test_equal_clouds(impl, p):
    x, _ = clouds(63, 1, 3, torch.float32)
    value, gradient_x, gradient_y = value_and_gradients(lambda x, y: sinkhorn_divergence(x, y, p=p, blur=1.0, impl=impl), x, x)
    assert value == 0 and not gradient_x.any() and not gradient_y.any()  # the same numbers are subtracted
    points = torch.full((4, 2), 1.5, device=DEVICE)
    assert sinkhorn_divergence(points, points[:2], p=p, impl=impl).abs() < 1e-6


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("debias", [True, False])
def test_gradcheck(p, debias):
    x, y = clouds(5, 4, 2)
    a, b = simplex(5), 3 * simplex(4)  # any positive sum

    def function(x, y, a, b):
        options = {"weights_x": a, "weights_y": b} | converged(2.0)
        return sinkhorn_divergence(x, y, p=p, debias=debias, **options)

    assert torch.autograd.gradcheck(function, [t.requires_grad_() for t in (x, y, a, b)])


@pytest.mark.parametrize("p", [1, 2])
def test_gradients_of_potentials_are_row_by_row(p):
    x, y = clouds(7, 6, 2)
    x.requires_grad_(), y.requires_grad_()
    f, g = sinkhorn_divergence(x, y, p=p, potentials=True)
    cotangents = torch.randn_like(f), torch.randn_like(g)
    got = torch.autograd.grad((f, g), (x, y), cotangents)
    by_value = torch.autograd.grad(sinkhorn_divergence(x, y, p=p), (x, y))
    torch.testing.assert_close(got[0], by_value[0] * 7 * cotangents[0][:, None])
    torch.testing.assert_close(got[1], by_value[1] * 6 * cotangents[1][:, None])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("N, M, D", [(63, 60, 2), (1, 1, 1), (66, 5, 17)])
def test_float32_against_float64(impl, p, N, M, D):
    x, y = clouds(N, M, D, torch.float32)
    a, b = simplex(N, torch.float32, 1), simplex(M, torch.float32, 2)
    options = {"p": p, "blur": 0.5, "diameter": 2.0}

    def ours(impl):
        return lambda x, y, a, b: sinkhorn_divergence(x, y, weights_x=a, weights_y=b, impl=impl, **options)

    def theirs(*operands):
        value, *d_points, d_a, d_b = value_and_gradients(geomloss_divergence(**options), *operands)
        return [value, *d_points, *(d - (w * d).sum() for d, w in zip((d_a, d_b), operands[2:], strict=True))]

    wide = [t.double() for t in (x, y, a, b)]
    got, truth = value_and_gradients(ours(impl), x, y, a, b), value_and_gradients(ours("reference"), *wide)
    assert got[0].dtype == torch.float32
    assert_errors(got, truth, theirs(x, y, a, b), results=lambda: theirs(*wide))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("p", [1, 2])
def test_points_of_weight_zero_take_no_part(impl, p):
    x, y = clouds(40, 30, 2, torch.float32)
    a, b = simplex(40, torch.float32), simplex(30, torch.float32)
    a[5:25], b[:7] = 0, 0
    options = {"p": p, "blur": 0.5, "diameter": 8.0, "impl": impl}
    got = value_and_gradients(lambda x, y, a, b: sinkhorn_divergence(x, y, weights_x=a, weights_y=b, **options), x, y, a, b)
    assert all(t.isfinite().all() for t in got)
    expected = value_and_gradients(
        lambda x, y: sinkhorn_divergence(x, y, weights_x=a[a > 0], weights_y=b[b > 0], **options), x[a > 0], y[b > 0]
    )
    # The box around the points, which centres them, differs: the same arithmetic on other roundings.
    torch.testing.assert_close(got[0], expected[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got[1][a > 0], expected[1], rtol=1e-3, atol=1e-5)
    assert not got[1][a == 0].any() and not got[2][b == 0].any()


def test_duplicates_are_weights():
    x, y = clouds(10, 12, 2)
    counts = torch.arange(1, 11)
    got = sinkhorn_divergence(x.repeat_interleave(counts.to(DEVICE), 0), y)
    torch.testing.assert_close(got, sinkhorn_divergence(x, y, weights_x=counts.double().to(DEVICE)), rtol=1e-10, atol=0)


def test_blocks_do_not_show(monkeypatch):
    x, y = clouds(70, 50, 3)
    for p in (1, 2):
        whole = value_and_gradients(lambda x, y: sinkhorn_divergence(x, y, p=p), x, y)  # noqa: B023
        monkeypatch.setattr(reference, "MAX_SCORES", {})
        monkeypatch.setattr(reference, "MAX_SCORES_ELSEWHERE", 1)
        monkeypatch.setattr(reference, "MAX_HELD", 1)
        blocks = value_and_gradients(lambda x, y: sinkhorn_divergence(x, y, p=p), x, y)  # noqa: B023
        monkeypatch.undo()
        for got, expected in zip(blocks, whole, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("impl", IMPLS)
def test_strides_do_not_matter(impl):
    wide = clouds(40, 1, 12, torch.float32)[0]
    for x, y in ((wide[::2, ::3], wide[1::2, 1::3]), (wide[:4].T, wide[4:8].T), (wide[:1].expand(9, 12), wide)):
        got, dense = (
            value_and_gradients(lambda x, y: sinkhorn_divergence(x, y, blur=1.0, diameter=2.0, impl=impl), *pair)
            for pair in ((x, y), (x.contiguous(), y.contiguous()))
        )
        for k in range(3):
            torch.testing.assert_close(got[k], dense[k], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_clouds(impl, dtype):
    x, y = clouds(20, 30, 2, dtype)
    value, *gradients = value_and_gradients(lambda x, y: sinkhorn_divergence(x, y, impl=impl), x, y)
    assert value.dtype == torch.float32 and all(g.dtype == dtype for g in gradients)
    # Computed in float32 from the same points.
    torch.testing.assert_close(value, sinkhorn_divergence(x.float(), y.float(), impl=impl), rtol=0, atol=0)


@pytest.mark.parametrize("impl", IMPLS)
def test_not_finite_points_show(impl):
    x, y = clouds(6, 5, 2, torch.float32)
    for bad in (math.nan, math.inf):
        x[2, 1] = bad
        assert sinkhorn_divergence(x, y, impl=impl).isnan()


@settings(max_examples=15, deadline=None)
@given(N=st.integers(1, 20), M=st.integers(1, 20), D=st.integers(1, 5), p=st.sampled_from([1, 2]))
def test_symmetric_invariant_and_positive(N, M, D, p):
    x, y = clouds(N, M, D)
    value = sinkhorn_divergence(x, y, p=p, scaling=0.8)
    close = {"rtol": 1e-8, "atol": 1e-10}
    torch.testing.assert_close(sinkhorn_divergence(y, x, p=p, scaling=0.8), value, **close)
    order = torch.randperm(N, generator=torch.Generator().manual_seed(N))
    torch.testing.assert_close(sinkhorn_divergence(x[order], y, p=p, scaling=0.8), value, **close)
    torch.testing.assert_close(sinkhorn_divergence(x + 1e3, y + 1e3, p=p, scaling=0.8), value, **close)
    # Scaling: blur has the units of the points.
    torch.testing.assert_close(sinkhorn_divergence(3 * x, 3 * y, p=p, blur=0.15, scaling=0.8), 3**p * value, **close)
    # S >= 0 holds at convergence; the schedule errs by a part of epsilon.
    assert value > -(0.05**p)


def test_schedule():
    assert epsilon_schedule(1.0, 0.1, 0.5, 2) == pytest.approx([1, 1, 1 / 4, 1 / 16, 1 / 64, 0.01])
    assert epsilon_schedule(1.0, 2.0, 0.5, 1) == [1.0, 2.0]
    for nothing in (0.0, math.nan, math.inf):
        assert epsilon_schedule(nothing, 0.5, 0.5, 2) == [0.25, 0.25]


def test_autocast_does_not_touch_the_products():
    x, y = clouds(30, 20, 8, torch.float32)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        value = sinkhorn_divergence(x, y, impl="reference")
    assert torch.equal(value, sinkhorn_divergence(x, y, impl="reference"))


@pytest.mark.parametrize("impl", IMPLS)
def test_operator(impl):
    x, y = clouds(6, 5, 2, torch.float32)
    a, b = simplex(6, torch.float32), simplex(5, torch.float32)
    arguments = (x, y, a, b, 2, 1.0, 0.5, None, None, None, None, True, False, False, impl == "triton")
    torch.library.opcheck(operators.sinkhorn_potentials.op, arguments)


@pytest.mark.parametrize("impl", IMPLS)
def test_compiles_into_one_graph(impl):
    torch._dynamo.reset()

    def loss(x, y, a):
        return 2 * sinkhorn_divergence(x.tanh(), y, blur=1.0, weights_x=a.softmax(0), impl=impl)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for N in (6, 9) if impl == "reference" else (6,):
        arguments = *clouds(N, 5, 2, torch.float32), simplex(N, torch.float32)
        for got, expected in zip(value_and_gradients(compiled, *arguments), value_and_gradients(loss, *arguments), strict=True):
            torch.testing.assert_close(got, expected)


def test_vmap_is_a_loop():
    x, y = (torch.stack([clouds(6, 5, 2, seed=s)[k] for s in range(3)]) for k in range(2))
    got = torch.vmap(sinkhorn_divergence)(x, y)
    expected = torch.stack([sinkhorn_divergence(*pair) for pair in zip(x, y, strict=True)])
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(torch.vmap(sinkhorn_divergence, in_dims=(0, None))(x, y[0])[1], sinkhorn_divergence(x[1], y[0]))
    gradient = torch.vmap(torch.func.grad(sinkhorn_divergence))(x, y)
    torch.testing.assert_close(gradient[2], torch.func.grad(sinkhorn_divergence)(x[2], y[2]))


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("N, M, D, shares, flat", [
    (33, 45, 20, 1, False), (5, 70, 3, 1, False), (66, 150, 3, 2, False), (5, 45, 20, 1, True), (66, 150, 3, 2, True),
])  # fmt: skip
def test_kernels_stay_inside_their_buffers(p, N, M, D, shares, flat):
    """NaN lies around what is read and must not be seen, -7 around what is written and must survive."""
    from dae_kernels.sinkhorn_divergence import fused

    x, y = clouds(N, M, D, torch.float32)
    b, g = simplex(M, torch.float32), torch.randn(M, generator=torch.Generator().manual_seed(3)).to(DEVICE)
    b[: M // 2 + 10] = 0  # for M = 45 and 70 whole blocks of weight 0 come first when p = 1
    guard = 80 * D

    def guarded(inner: Tensor, around: float) -> tuple[Tensor, Tensor]:
        whole = torch.full((inner.numel() + 2 * guard,), around, device=DEVICE)
        middle = whole[guard:-guard].view(inner.shape)
        return whole, middle.copy_(inner)

    average = torch.randn(N, device=DEVICE)
    epsilon = 2e3 if flat else 0.3
    whole_f, f = guarded(torch.zeros(N), -7.0)
    whole_df, df = guarded(torch.zeros(N, D), -7.0)
    whole_mean, mean = guarded(torch.zeros(N), -7.0)
    inner_x, inner_y, log_b, inner_g, inner_average = (guarded(t, math.nan)[1] for t in (x, y, b.log(), g, average))
    update = fused.TritonUpdate(inner_x, inner_y, p, shares)
    update.write(f, df, log_b, inner_g, epsilon, flat, True, None, None)
    update.write(mean, update.nothing, log_b, inner_g, epsilon, flat, False, None, inner_average)
    assert torch.equal(mean, (f + average) / 2)
    for whole in (whole_f, whole_df, whole_mean):
        assert (whole[:guard] == -7).all() and (whole[-guard:] == -7).all()
    expected = reference.ReferenceUpdate(x.double(), y.double(), p)(b.double().log(), g.double(), epsilon, flat, gradient=True)
    # A few roundings of the largest score, |C| / epsilon of 100 or so, which the plan errs by.
    torch.testing.assert_close(f.double(), expected[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(df.double(), expected[1], rtol=1e-4, atol=1e-4)


def test_float64_is_for_the_reference_alone():
    with pytest.raises(ValueError, match="float64"):
        sinkhorn_divergence(*clouds(4, 5, 2), impl="triton")


def test_convention():
    assert sinkhorn_divergence.convention.value == "squared"
    assert "|x - y|^p / p" in sinkhorn_divergence.convention.cost


ERRORS = {
    "p": ({"p": 3}, ValueError, "p must be 1 or 2, got 3"),
    "p none": ({"p": None}, TypeError, "needs p as a number, got NoneType"),
    "p true": ({"p": True}, TypeError, "needs p as a number, got bool True"),
    "blur": ({"blur": 0.0}, ValueError, "blur must be positive and finite, got 0.0"),
    "blur none": ({"blur": None}, TypeError, "needs blur as a number, got NoneType"),
    "blur infinite": ({"blur": math.inf}, ValueError, "blur must be positive and finite, got inf"),
    "scaling": ({"scaling": 1.0}, ValueError, "scaling must be between 0 and 1"),
    "scaling text": ({"scaling": "a"}, TypeError, "needs scaling as a number, got str 'a'"),
    "diameter": ({"diameter": -1.0}, ValueError, "diameter must be positive and finite, got -1.0"),
    "diameter text": ({"diameter": "a"}, TypeError, "needs diameter as a number, got str 'a'"),
    "diameter nan": ({"diameter": math.nan}, ValueError, "diameter must be positive and finite, got nan"),
    "debias": ({"debias": "a"}, TypeError, "needs debias as a bool, got str 'a'"),
    "potentials": ({"potentials": 1}, TypeError, "needs potentials as a bool, got int 1"),
    "span": ({"x": torch.full((3, 2), 1e20)}, ValueError, "costs overflow torch.float32: .* less than 2.31e.17 .*, got 1.41e.20"),
    "span by blur": ({"x": torch.ones(3, 2), "blur": 2e-19}, ValueError, "less than 0.922 for p=2 and blur=2e-19, got 1.41"),
    "impl": ({"impl": "keops"}, ValueError, "impl must be one of"),
    "weights": ({"weights_x": torch.zeros(3)}, ValueError, "weights_x with minimum 0.0 and sum 0.0"),
    "negative": ({"weights_y": torch.tensor([1.0, -1, 1, 1])}, ValueError, "weights_y with minimum -1.0"),
    "number": ({"weights_y": torch.ones(3)}, ValueError, r"weights_y \[4\]"),
    "integers": ({"weights_x": torch.ones(3, dtype=torch.int64)}, TypeError, "floating point weights"),
    "width": ({"y": torch.zeros(4, 3)}, ValueError, r"got x \[3, 2\], y \[4, 3\]"),
    "empty": ({"y": torch.zeros(0, 2)}, ValueError, "at least one point"),
    "dtypes": ({"y": torch.zeros(4, 2, dtype=torch.float64)}, TypeError, "one dtype"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_user_errors(case):
    options, error, message = ERRORS[case]
    with pytest.raises(error, match=message):
        sinkhorn_divergence(**({"x": torch.zeros(3, 2), "y": torch.zeros(4, 2)} | options))
