"""`sinkhorn_divergence` with reach and tolerance, `sinkhorn_transport` and `barycentric_map`: closed forms and peers."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from dae_kernels import barycentric_map, sinkhorn_divergence, sinkhorn_transport
from dae_kernels.sinkhorn_divergence import operators, reference, solver
from torch import Tensor

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import geomloss
    import ot

pytestmark = pytest.mark.filterwarnings("ignore:invalid value|overflow|divide:RuntimeWarning")  # numpy's, in the interpreter
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IMPLS = ["reference", "triton"]
SHORT = {"blur": 1.0, "diameter": 2.0}  # few updates, as the interpreter takes long for each


def clouds(N: int = 12, M: int = 9, D: int = 2, dtype=torch.float64, seed: int = 0) -> list[Tensor]:
    """x, y and weights that do not sum to 1."""
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(n, D, generator=generator, dtype=torch.float64) for n in (N, M))
    weights = [torch.rand(n, generator=generator, dtype=torch.float64) + 0.2 for n in (N, M)]
    return [t.to(DEVICE, dtype) for t in (x, 0.7 * y + 0.5, *weights)]


def cost(x: Tensor, y: Tensor, p: int) -> Tensor:
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist") ** p / p


def geomloss_divergence(p: int, **options):
    """geomloss in the same terms. It clamps distances at 1e-4 for p = 1, which the cost given here does not."""

    def distance(x, y):
        return (x[:, :, None] - y[:, None]).square().sum(-1).clamp_min(torch.finfo(x.dtype).tiny).sqrt()

    loss = geomloss.SamplesLoss("sinkhorn", p=p, backend="tensorized", cost=distance if p == 1 else None, **options)
    return lambda x, y, a, b: loss(a, x, b, y)


def kl(u: Tensor, v: Tensor) -> Tensor:
    return (u * (u / v).log()).sum() - u.sum() + v.sum()


def plan(p: int, blur: float, reach: float | None, x: Tensor, y: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """POT's."""
    options = {"stopThr": 1e-14, "numItermax": 100_000}
    if reach is None:
        return ot.bregman.sinkhorn(a / a.sum(), b / b.sum(), cost(x, y, p), blur**p, method="sinkhorn_log", **options)
    return ot.unbalanced.sinkhorn_unbalanced(a, b, cost(x, y, p), blur**p, reach**p, reg_type="kl", **options)


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("debias", [True, False])
@pytest.mark.parametrize("reach, blur", [(0.5, 0.1), (3.0, 0.1), (1.0, 20.0)])
def test_reach_equals_geomloss(p, debias, reach, blur):
    x, y, a, b = clouds()
    if not debias:  # geomloss has blur^p (sum a + sum b) / 2 for the constant blur^p sum a sum b
        a, b = a / a.sum(), b / b.sum()
    options = {"p": p, "debias": debias, "reach": reach, "blur": blur}
    ours = sinkhorn_divergence(x, y, weights_x=a, weights_y=b, **options)
    # Both are float64; |x|^2 - 2 x.y + |y|^2 over epsilon loses six digits or so.
    torch.testing.assert_close(ours, geomloss_divergence(**options)(x, y, a, b), rtol=1e-8, atol=1e-10)
    got = sinkhorn_divergence(x, y, weights_x=a, weights_y=b, potentials=True, **options)
    expected = geomloss_divergence(potentials=True, **options)(x, y, a, b)
    for f, g in zip(got, expected, strict=True):
        torch.testing.assert_close(f, g.flatten(), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("debias", [True, False])
@pytest.mark.parametrize("reach", [None, 0.8])
def test_gradients_by_finite_differences_once_converged(p, debias, reach):
    operands = [t.requires_grad_() for t in clouds(5, 4)]

    def divergence(x, y, a, b):
        options = {"p": p, "blur": 0.7, "debias": debias, "reach": reach, "tolerance": 1e-12}
        return sinkhorn_divergence(x, y, weights_x=a, weights_y=b, **options)

    assert torch.autograd.gradcheck(divergence, operands)


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("reach", [None, 0.8])
def test_equals_pot_once_converged(p, reach):
    """The value is the plan's own objective, and the product is that with the plan; so is its gradient by the values."""
    x, y, a, b = clouds(15, 11)
    blur = 0.6
    P = plan(p, blur, reach, x, y, a, b)
    if reach is None:
        a, b = a / a.sum(), b / b.sum()
    objective = (P * cost(x, y, p)).sum() + blur**p * kl(P, a[:, None] * b)
    if reach is not None:
        objective += reach**p * (kl(P.sum(1), a) + kl(P.sum(0), b))
    options = {"p": p, "blur": blur, "reach": reach, "tolerance": 1e-13, "weights_x": a, "weights_y": b}
    # Errors are of the order of the tolerance times the condition of a plan of 15 points; the value's of its square.
    exact = {"rtol": 1e-10, "atol": 1e-11}
    torch.testing.assert_close(sinkhorn_divergence(x, y, debias=False, **options), objective, **exact)
    generator = torch.Generator().manual_seed(3)
    values = torch.randn(11, 5, generator=generator, dtype=torch.float64).to(DEVICE).requires_grad_()
    cotangent = torch.randn(15, 5, generator=generator, dtype=torch.float64).to(DEVICE)
    product = sinkhorn_transport(x, y, values, **options)
    torch.testing.assert_close(product, P @ values, **exact)
    torch.testing.assert_close(torch.autograd.grad(product, values, cotangent)[0], P.T @ cotangent, **exact)
    torch.testing.assert_close(sinkhorn_transport(x, y, values[:, 0], **options), P @ values[:, 0], **exact)
    torch.testing.assert_close(barycentric_map(x, y, **options), P @ y / P.sum(1, keepdim=True), **exact)


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("reach", [None, 0.5])
@pytest.mark.parametrize("tolerance", [1e-2, 1e-6])
def test_marginals_hold_to_the_tolerance(p, reach, tolerance):
    x, y, a, b = clouds(30, 20)
    options = {"p": p, "blur": 0.15, "reach": reach, "tolerance": tolerance, "max_iter": 5000, "weights_x": a, "weights_y": b}
    ones = torch.ones(20, dtype=torch.float64, device=DEVICE, requires_grad=True)
    rows = sinkhorn_transport(x, y, ones, **options)
    (columns,) = torch.autograd.grad(rows, ones, torch.ones_like(rows))
    if reach is None:
        a, b = a / a.sum(), b / b.sum()
    else:
        f, g = sinkhorn_divergence(x, y, debias=False, potentials=True, **options)
        a, b = a * (-f / reach**p).exp(), b * (-g / reach**p).exp()
    error = (columns - b).abs().sum() / b.sum()
    assert error <= 2 * tolerance  # "with reach" g itself is one half-step further than the plan
    torch.testing.assert_close(rows, a, rtol=0 if reach is None else tolerance, atol=1e-12)


def test_without_tolerance_the_marginals_are_those_of_the_schedule():
    x, y, *_ = clouds(30, 20)
    ones = torch.ones(20, dtype=torch.float64, device=DEVICE, requires_grad=True)

    def error(**options):
        rows = sinkhorn_transport(x, y, ones, blur=0.05, **options)
        return (torch.autograd.grad(rows.sum(), ones)[0] - 1 / 20).abs().sum().item()

    assert error(tolerance=1e-8, max_iter=20_000) <= 1e-8 < error(tolerance=None) / 100


@pytest.mark.parametrize("impl, p", [("reference", 1), ("reference", 2), ("triton", 2)])
def test_diracs_with_reach(impl, p):
    """(2 reach^p + blur^p) (1 - exp(-cost / (2 reach^p + blur^p))): all mass moves, but for exp(...) of it."""
    x, y = torch.tensor([[0.0, 1.0]], device=DEVICE), torch.tensor([[3.0, 5.0]], device=DEVICE)
    reach, blur, c = 2.0, 1.0, 5.0**p / p
    rho = 2 * reach**p + blur**p
    for debias in (True, False)[impl == "triton" :]:  # the interpreter takes long for an update
        value = sinkhorn_divergence(x, y, p=p, reach=reach, blur=blur, debias=debias, tolerance=1e-6, impl=impl)
        # a few float32 roundings of exp(-1) and of c
        assert value.item() == pytest.approx(rho * -math.expm1(-c / rho), rel=2e-6)
    far = sinkhorn_divergence(x, y, p=p, reach=0.1, blur=0.1, diameter=0.1, debias=False, impl=impl).item()
    assert far == pytest.approx(2 * 0.1**p + 0.1**p, rel=1e-5)  # nothing is moved


@pytest.mark.parametrize("p", [1, 2])
def test_a_large_reach_is_none(p):
    x, y, *_ = clouds()
    expected = sinkhorn_divergence(x, y, p=p, blur=0.3)
    torch.testing.assert_close(sinkhorn_divergence(x, y, p=p, blur=0.3, reach=1e6), expected, rtol=10 * 1e-6**p, atol=1e-12)
    for dtype, reach in ((torch.float32, 1e8), (torch.float64, 1e60)):
        got = sinkhorn_divergence(x.to(dtype), y.to(dtype), p=p, blur=0.3, reach=reach)
        torch.testing.assert_close(got.double(), expected, rtol=1e-5 if dtype == torch.float32 else 1e-10, atol=0)


def test_gaussians_are_mapped_by_an_affine_map():
    """The entropic plan of N(0, s^2) and N(m, t^2) is Gaussian, with covariance sqrt(s^2 t^2 + epsilon^2 / 4) - epsilon / 2.

    (Janati et al. 2020, arXiv 2006.02572, theorem 1, for the cost |x - y|^2 / 2.) As blur goes to 0 the slope tends to t / s.
    """
    s, t, m, epsilon = 1.0, 1.5, 0.8, 0.25
    grid = torch.linspace(-9, 9, 301, dtype=torch.float64)[:, None]
    a, b = ((-((grid[:, 0] - mean) ** 2) / (2 * sd**2)).exp() for mean, sd in ((0.0, s), (m, t)))
    got = barycentric_map(grid, grid, blur=math.sqrt(epsilon), weights_x=a, weights_y=b, tolerance=1e-10)
    slope = (math.sqrt(s**2 * t**2 + epsilon**2 / 4) - epsilon / 2) / s**2
    inside = grid.abs() < 3  # beyond, the grid's end shows
    torch.testing.assert_close(got[inside], (m + slope * grid)[inside], rtol=1e-6, atol=1e-6)
    sharp = barycentric_map(grid, grid, blur=0.1, weights_x=a, weights_y=b, tolerance=1e-4)
    torch.testing.assert_close(sharp[inside], (m + t / s * grid)[inside], rtol=0.01, atol=0.02)


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("reach", [None, 0.5])
def test_translation_and_scale(p, reach):
    x, y, *_ = (t.to(torch.float32).mul(64).round() / 64 for t in clouds())  # exact next to 2^10
    for factor in (2.0**-60, 1.0, 2.0**40):
        reaches = None if reach is None else reach * factor
        options = {"p": p, "blur": 0.25 * factor, "reach": reaches, "tolerance": 1e-4}
        image = barycentric_map(x * factor, y * factor, **options) / factor
        if factor == 2.0**-60:
            expected = image
        assert torch.equal(image, expected)
        moved = barycentric_map((x + 1024) * factor, (y + 1024) * factor, **options) / factor - 1024
        torch.testing.assert_close(moved, image, rtol=0, atol=4 * 1024 * 2.0**-24)  # the translation's own rounding


def test_permutations_are_permuted():
    """Far apart pairs: the plan is that of the pairs, the map a permutation."""
    x = 10 * torch.arange(7, dtype=torch.float64, device=DEVICE)[:, None].expand(7, 2).contiguous()
    order = torch.randperm(7, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    y = x[order] + 0.25
    torch.testing.assert_close(barycentric_map(x, y, blur=0.5, tolerance=1e-9), x + 0.25, rtol=0, atol=1e-8)
    labels = sinkhorn_transport(x, y, order.double(), blur=0.5, tolerance=1e-9) * 7
    torch.testing.assert_close(labels, torch.arange(7.0, dtype=torch.float64, device=DEVICE), rtol=0, atol=1e-7)


def test_points_of_weight_zero():
    x, y, a, b = clouds()
    a[3], b[2] = 0, 0
    values = torch.randn(9, 2, dtype=torch.float64, device=DEVICE, requires_grad=True)
    options = {"blur": 0.5, "diameter": 5.0, "tolerance": 1e-10}
    product = sinkhorn_transport(x, y, values, weights_x=a, weights_y=b, **options)
    keep_x, keep_y = a > 0, b > 0
    without = sinkhorn_transport(x[keep_x], y[keep_y], values[keep_y], weights_x=a[keep_x], weights_y=b[keep_y], **options)
    torch.testing.assert_close(product[keep_x], without, rtol=1e-8, atol=1e-9)
    assert not product[3].any() and not torch.autograd.grad(product.sum(), values)[0][2].any()
    assert barycentric_map(x, y, weights_x=a, weights_y=b, **options).isfinite().all()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("reach", [None, 1.5])
def test_float32_against_float64(impl, p, reach):
    x, y, a, b = clouds(33, 20, 3, torch.float32)
    values = torch.randn(20, 2, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    options = {"p": p, "reach": reach, "max_iter": 2} | SHORT

    def results(convert, impl):
        leaves = [convert(t).detach().requires_grad_() for t in (x, y, a, b, values)]
        weights = {"weights_x": leaves[2], "weights_y": leaves[3]}
        divergence = sinkhorn_divergence(*leaves[:2], **weights, impl=impl, **options)
        product = sinkhorn_transport(*leaves[:2], leaves[4], **weights, tolerance=None, impl=impl, **options)
        image = barycentric_map(*leaves[:2], **weights, tolerance=None, impl=impl, **options)
        cotangent = torch.linspace(-1, 1, 66, device=DEVICE).view(33, 2).to(product.dtype)
        made = torch.autograd.grad((divergence, product), leaves, (torch.ones_like(divergence), cotangent))
        return [divergence, product, image, *made]

    got, exact = results(lambda t: t, impl), results(lambda t: t.double(), "reference")
    assert all(t.dtype == torch.float32 for t in got)
    # A score is cost / epsilon, of about 10 here, and errs by some roundings of it, which plan and gradients err by.
    for one, other in zip(got, exact, strict=True):
        assert (one.double() - other).norm() <= 40 * 2.0**-24 * (other.norm() + 1e-3)


def test_half_clouds_and_strides():
    x, y, *_ = clouds(20, 14, 4, torch.float16)
    values = torch.randn(14, 6, device=DEVICE).half()
    got = sinkhorn_transport(x[:, ::2], y[:, ::2], values[:, ::2], blur=0.5)
    assert got.dtype == torch.float32 and got.shape == (20, 3)
    wide = (x[:, ::2].float(), y[:, ::2].float(), values[:, ::2].float())
    assert torch.equal(got, sinkhorn_transport(*wide, blur=0.5))


def test_blocks_do_not_show(monkeypatch):
    x, y, *_ = clouds(70, 50, 3)
    values = torch.randn(50, 4, dtype=torch.float64, device=DEVICE)
    for p in (1, 2):
        whole = sinkhorn_transport(x, y, values, p=p, blur=0.5)
        monkeypatch.setattr(reference, "MAX_SCORES", {})
        monkeypatch.setattr(reference, "MAX_SCORES_ELSEWHERE", 1)
        monkeypatch.setattr(reference, "MAX_HELD", 1)
        blocks = sinkhorn_transport(x, y, values, p=p, blur=0.5)
        monkeypatch.undo()
        torch.testing.assert_close(blocks, whole, rtol=1e-9, atol=1e-11)


def test_what_is_not_reached_is_said():
    x, y, *_ = clouds()
    with pytest.warns(
        RuntimeWarning, match=r"after 1 iterations at blur=0.05 the marginals .* off by .* more than tolerance=1e-09"
    ):
        value = sinkhorn_divergence(x, y, blur=0.05, max_iter=1, tolerance=1e-9)
    assert value.isfinite()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sinkhorn_divergence(x, y, blur=0.05, max_iter=1)  # no tolerance, nothing to be said
        sinkhorn_divergence(x, y, blur=0.5, tolerance=1e-6)
        assert sinkhorn_divergence(x * math.nan, y, tolerance=1e-6).isnan()


def test_max_iter_counts_iterations(monkeypatch):
    x, y, *_ = clouds()
    calls = []
    original = solver.Sinkhorn.updated
    monkeypatch.setattr(solver.Sinkhorn, "updated", lambda *o, **k: calls.append(1) or original(*o, **k))

    def counted(**options):
        calls.clear()
        value = sinkhorn_divergence(x, y, blur=0.5, debias=False, **options)
        return len(calls), value

    none, plain = counted()
    assert counted(max_iter=0)[0] == none and torch.equal(counted(max_iter=0)[1], plain)
    assert counted(max_iter=3)[0] == none + 6
    assert counted(max_iter=500, tolerance=1e-3)[0] < none + 100


@pytest.mark.parametrize("impl", IMPLS)
def test_operators(impl):
    x, y, a, b = clouds(6, 5, 2, torch.float32)
    values = torch.randn(5, 3, device=DEVICE)
    options = (2, 1.0, 0.5, 1.0, 1.5)
    triton = impl == "triton"
    torch.library.opcheck(operators.sinkhorn_potentials.op, (x, y, a, b, *options, 1, None, True, False, False, triton))
    for some in (values, None):
        torch.library.opcheck(operators.sinkhorn_means.op, (x, y, a, b, some, *options, 1, None, triton))
    torch.library.opcheck(
        operators.sinkhorn_transposed.op, (x, y, a, b, a, b, torch.randn(6, 3, device=DEVICE), *options, triton)
    )


def test_compile_vmap_and_func():
    x, y, *_ = (torch.stack(t) for t in zip(*(clouds(6, 5, 2, torch.float32, seed) for seed in range(2)), strict=True))
    values = torch.randn(2, 5, 3, device=DEVICE)

    again = torch.autograd.grad(
        sinkhorn_transport(x[0], y[0], values.requires_grad_()[0], blur=1.0, tolerance=None).square().sum(),
        values,
        create_graph=True,
    )
    with pytest.raises(RuntimeError, match="no second derivative"):
        again[0].sum().backward()
    values = values.detach()

    def norm(x, y, values):
        return sinkhorn_transport(x, y, values, blur=1.0, tolerance=None).square().sum()

    gradient = torch.func.grad(norm, argnums=2)
    expected = torch.stack([gradient(*rows) for rows in zip(x, y, values, strict=True)])
    torch.testing.assert_close(torch.vmap(gradient)(x, y, values), expected)
    torch._dynamo.reset()
    compiled = torch.compile(norm, fullgraph=True, backend="aot_eager")
    leaf = values[0].clone().requires_grad_()
    torch.testing.assert_close(torch.autograd.grad(compiled(x[0], y[0], leaf), leaf)[0], expected[0])
    images = torch.vmap(lambda x, y: barycentric_map(x, y, blur=1.0, tolerance=None))(x, y)
    torch.testing.assert_close(images[1], barycentric_map(x[1], y[1], blur=1.0, tolerance=None))


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("E", [1, 17])
def test_the_mean_kernel_stays_inside_its_buffers(p, E):
    """NaN lies around what is read and must not be seen, -7 around what is written and must survive."""
    from dae_kernels.sinkhorn_divergence import fused

    x, y, _, b = clouds(33, 45, 3, torch.float32)
    values, g = torch.randn(45, E, device=DEVICE), torch.randn(45, device=DEVICE)
    guard = 4000

    def guarded(inner: Tensor, around: float) -> tuple[Tensor, Tensor]:
        whole = torch.full((inner.numel() + 2 * guard,), around, device=DEVICE)
        return whole, whole[guard:-guard].view(inner.shape).copy_(inner)

    whole, out = guarded(torch.zeros(33, E), -7.0)
    f = torch.empty(33, device=DEVICE)
    x, y, log_b, g, values = (guarded(t, math.nan)[1] for t in (x, y, (b / b.sum()).log(), g, values))
    fused.TritonUpdate(x, y, p).write(f, out, log_b, g, 0.5, False, False, values, None)
    assert (whole[:guard] == -7).all() and (whole[-guard:] == -7).all()
    update = reference.ReferenceUpdate(x.double(), y.double(), p)
    expected = update(log_b.double(), g.double(), 0.5, False, values_ME=values.double())
    torch.testing.assert_close(out.double(), expected[1], rtol=1e-4, atol=1e-5)  # scores of 10 or so, by some roundings


ERRORS = {
    "reach": ({"reach": 0.0}, ValueError, "reach must be positive and finite, got 0.0"),
    "reach text": ({"reach": "1"}, TypeError, "needs reach as a number, got str '1'"),
    "reach far": ({"reach": 1e20}, ValueError, "with reach, reach must be between .* for points that span 1.41 .* got 1e.20"),
    "blur far": ({"reach": 1.0, "blur": 1e20}, ValueError, "with reach, blur must be between .* got 1e.20"),
    "tolerance": ({"tolerance": -1e-3}, ValueError, "tolerance must be positive and finite, got -0.001"),
    "tolerance none": ({"tolerance": True}, TypeError, "needs tolerance as a number, got bool True"),
    "max_iter": ({"max_iter": -1}, ValueError, "max_iter must be a whole number that is not negative, got -1"),
    "max_iter float": ({"max_iter": 2.5}, TypeError, "needs max_iter as an int, got float 2.5"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_user_errors(case):
    options, error, message = ERRORS[case]
    x, y = torch.zeros(3, 2), torch.ones(4, 2)
    for function in (sinkhorn_divergence, barycentric_map, lambda x, y, **o: sinkhorn_transport(x, y, y, **o)):
        with pytest.raises(error, match=message):
            function(x, y, **options)


def test_bad_values():
    x, y = torch.zeros(3, 2), torch.ones(4, 2)
    for values, error, message in (
        ([1.0] * 4, TypeError, "needs values as a torch.Tensor, got list"),
        (torch.ones(3), ValueError, r"needs values \[4, E\] or \[4\] on cpu, a row a point of y, got \[3\] on cpu"),
        (torch.ones(4, 0), ValueError, r"got \[4, 0\] on cpu"),
        (torch.ones(4, 1, 1), ValueError, r"got \[4, 1, 1\] on cpu"),
        (torch.ones(4, device="meta"), ValueError, r"got \[4\] on meta"),
        (torch.ones(4).double(), TypeError, "values of the dtype of the clouds, got torch.float64 and torch.float32"),
    ):
        with pytest.raises(error, match=message):
            sinkhorn_transport(x, y, values)
