"""`energy_distance` against its formula in float64, closed forms, scipy and geomloss, both implementations.

Tolerance of the reference: it computes in float64, so a float32 result is off by its one rounding (2 eps for a margin of two),
and a gradient likewise. Tolerance of the kernel, see `kernel_slack`.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from dae_kernels.energy_distance import energy_distance
from dae_kernels.pairwise import reference
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IMPLS = ["reference", "triton"]
EPS = torch.finfo(torch.float32).eps
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in the interpreter


def formula(x: Tensor, y: Tensor, weights_x: Tensor | None = None, weights_y: Tensor | None = None) -> Tensor:
    """The definition with all differences in memory, float64; a zero distance has gradient 0."""
    x, y = x.double(), y.double()
    a, b = (
        torch.full_like(c[:, 0], 1 / len(c)) if w is None else w.double() / w.double().sum()
        for c, w in ((x, weights_x), (y, weights_y))
    )
    mean = lambda p, q, u, v: (u[:, None] * v * torch.linalg.vector_norm(p[:, None] - q, dim=-1)).sum()  # noqa: E731
    return 2 * mean(x, y, a, b) - mean(x, x, a, a) - mean(y, y, b, b)


def kernel_slack(x: Tensor, y: Tensor) -> float:
    """What the kernel may err by: |x|^2 + |y|^2 - 2 x.y of centred points is off by a few eps R^2, R the largest radius.

    That moves a distance r by eps R^2 / r. Averaged over pairs that is of the order of eps R; 4 terms of up to 2 R each.
    """
    radius = (torch.cat([x, y]).double() - torch.cat([x, y]).double().mean(0)).norm(dim=1).max().item()
    return 16 * EPS * radius


def clouds(N: int, M: int, D: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    x, y = torch.randn(N, D, generator=g), 1.3 * torch.randn(M, D, generator=g) + 0.5
    return x.to(DEVICE, dtype), y.to(DEVICE, dtype)


def check(x: Tensor, y: Tensor, impl: str, weights_x: Tensor | None = None, weights_y: Tensor | None = None) -> None:
    """Value and gradients to all floating operands, under a random cotangent."""
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in (x, y, weights_x, weights_y)]
    exact = [None if t is None else t.detach().double().clone().requires_grad_() for t in (x, y, weights_x, weights_y)]
    value = energy_distance(leaves[0], leaves[1], weights_x=leaves[2], weights_y=leaves[3], impl=impl)
    truth = formula(*exact)
    assert value.shape == () and value.dtype == (torch.float64 if x.dtype == torch.float64 else torch.float32)
    slack = kernel_slack(x, y) if impl == "triton" else 1e-14
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
        if impl == "triton":  # unit vectors (x - y) / r, each off by eps R^2 / r^2, r of the order of R / 10 at the nearest
            allowed = 200 * EPS * abs(cotangent) / min(len(x), len(y)) + abs(cotangent) * slack
            assert error <= 2 * torch.finfo(leaf.dtype).eps * largest + allowed
        else:
            assert error <= 2 * torch.finfo(leaf.dtype).eps * largest + 1e-13


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("N, M, D", [(63, 60, 8), (1, 1, 1), (1, 60, 3), (63, 1, 17), (65, 40, 68), (5, 6, 1)])
def test_matches_the_formula(impl, N, M, D):
    x, y = clouds(N, M, D)
    check(x, y, impl)
    g = torch.Generator().manual_seed(1)
    a, b = torch.rand(N, generator=g).to(DEVICE), 3 * torch.rand(M, generator=g).to(DEVICE)
    check(x, y, impl, a, b)
    check(x, y, impl, weights_y=b)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes(impl, dtype):
    x, y = clouds(20, 30, 5, dtype=dtype)
    if impl == "triton" and dtype == torch.float64:
        with pytest.raises(ValueError, match="impl='triton' cannot run here: the kernel takes float16, bfloat16 and float32"):
            energy_distance(x, y, impl=impl)
        return
    check(x, y, impl)


@pytest.mark.parametrize("impl", IMPLS)
def test_closed_forms(impl):
    one = lambda *p: torch.tensor([p], device=DEVICE)  # noqa: E731
    assert energy_distance(one(0.0, 0.0), one(3.0, 4.0), impl=impl).item() == pytest.approx(10.0, rel=4 * EPS)
    # E|x - x'| of {0, 1} is 1/2, and both points are 1 from {0, 2} on average.
    x, y = torch.tensor([[0.0], [1.0]], device=DEVICE), torch.tensor([[0.0], [2.0]], device=DEVICE)
    assert energy_distance(x, y, impl=impl).item() == pytest.approx(2 * 1.0 - 0.5 - 1.0, rel=1e-6)


def test_normal_laws():
    """N(0, 1) and N(m, 1) with m = 1: 2 E|N(1, 2)| - 2 E|N(0, 2)|; the standard error of 20 x 1000 points is 0.003."""
    torch.manual_seed(2)
    mean = sum(energy_distance(torch.randn(1000, 1), torch.randn(1000, 1) + 1) for _ in range(20)).item() / 20
    folded = 2 / torch.pi**0.5 * torch.exp(torch.tensor(-0.25)) + torch.erf(torch.tensor(0.5))
    bias = 2 / 1000 * 2 / torch.pi**0.5  # each cloud: E|x - x'| / N
    assert mean == pytest.approx(2 * folded.item() - 4 / torch.pi**0.5 + bias, abs=0.015)


def test_peers():
    geomloss = pytest.importorskip("geomloss")
    stats = pytest.importorskip("scipy.stats")
    x, y = clouds(40, 30, 1, dtype=torch.float64)
    a, b = torch.rand(40).double(), torch.rand(30).double()
    root = stats.energy_distance(x[:, 0], y[:, 0], a, b)
    assert energy_distance(x, y, weights_x=a, weights_y=b).item() == pytest.approx(root**2, rel=1e-12)
    x, y = clouds(40, 30, 4, dtype=torch.float64)
    half = geomloss.SamplesLoss("energy", backend="tensorized")(a / a.sum(), x, b / b.sum(), y)
    # geomloss adds 1e-8 under its root
    assert energy_distance(x, y, weights_x=a, weights_y=b).item() == pytest.approx(2 * half.item(), abs=1e-4)


@pytest.mark.parametrize("impl", IMPLS)
def test_far_from_the_origin(impl):
    x, y = clouds(50, 40, 6)
    x, y = x + 1000, y + 1000  # what is left of the fraction after this rounding is the same for all
    check(x, y, impl)


@pytest.mark.parametrize("impl", IMPLS)
def test_coincident_points_pull_nowhere(impl):
    x, _ = clouds(9, 1, 4)
    x = torch.cat([x, x[:3]])  # within a cloud and across
    y = x.clone()
    x.requires_grad_(), y.requires_grad_()
    value = energy_distance(x, y, impl=impl)
    value.backward()
    assert abs(value.item()) <= (kernel_slack(x.detach(), y.detach()) if impl == "triton" else EPS)
    for cloud in (x, y):
        assert cloud.grad.abs().max() <= 200 * EPS  # twice what pulls apart is what pulls together: NaN-free cancellation


@pytest.mark.parametrize("impl", IMPLS)
def test_only_the_side_that_asks_gets_a_gradient(impl):
    x, y = clouds(20, 30, 3)
    both_x, both_y = x.clone().requires_grad_(), y.clone().requires_grad_()
    energy_distance(both_x, both_y, impl=impl).backward()
    for leaf, arguments in ((x, lambda t: (t, y)), (y, lambda t: (x, t))):
        one = leaf.clone().requires_grad_()
        energy_distance(*arguments(one), impl=impl).backward()
        torch.testing.assert_close(one.grad, both_x.grad if leaf is x else both_y.grad, rtol=0, atol=0)
    weights = torch.rand(20, device=DEVICE).requires_grad_()
    energy_distance(x, y, weights_x=weights, impl=impl).backward()
    assert weights.grad.isfinite().all()
    assert abs((weights.grad * weights.detach()).sum().item()) < 1e-5  # a factor on all weights changes nothing


@pytest.mark.parametrize("impl", IMPLS)
def test_strides_do_not_matter(impl):
    x, y = clouds(20, 33, 12)
    wide = torch.stack([x, x + 1], dim=2)
    same = energy_distance(x, y, impl=impl)
    assert energy_distance(wide[..., 0], y.T.contiguous().T, impl=impl) == same
    check(x[:1].expand(7, 12), y[::2], impl)
    check(x[:, ::3], y[:, ::3], impl, torch.ones(1, device=DEVICE).expand(20))


def test_gradcheck():
    x, y = clouds(5, 4, 3, dtype=torch.float64)
    a, b = torch.rand(5).double() + 0.1, torch.rand(4).double() + 0.1
    leaves = [t.requires_grad_() for t in (x, y, a, b)]
    assert torch.autograd.gradcheck(lambda x, y, a, b: energy_distance(x, y, weights_x=a, weights_y=b), leaves)
    (gradient,) = torch.autograd.grad(energy_distance(x, y), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivatives"):
        gradient.sum().backward()


def test_chunks_of_the_reference_do_not_show(monkeypatch):
    x, y = clouds(31, 40, 6)
    whole, pieces = x.clone().requires_grad_(), x.clone().requires_grad_()
    expected = energy_distance(whole, y)
    expected.backward()
    monkeypatch.setattr(reference, "MAX_PAIRS", 90)
    value = energy_distance(pieces, y)
    value.backward()
    torch.testing.assert_close(value, expected, rtol=EPS, atol=0)
    torch.testing.assert_close(pieces.grad, whole.grad, rtol=2 * EPS, atol=1e-9)


def test_memory_of_the_reference_is_bounded():
    # 2^25 distances would take 256 MiB in float64; the first call pays for what torch itself sets up.
    script = (
        "import torch; from dae_kernels.energy_distance import energy_distance\n"
        "peak = lambda: int(open('/proc/self/status').read().split('VmHWM:')[1].split()[0]) // 1024\n"
        "x, y = torch.randn(1 << 12, 2, requires_grad=True), torch.randn(1 << 13, 2)\n"
        "energy_distance(x[:16], y[:16]).backward(); before = peak(); energy_distance(x, y).backward(); print(peak() - before)"
    )
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}  # or glibc's hoard of freed blocks counts as well
    grown = subprocess.run([sys.executable, "-c", script], env=environment, check=True, capture_output=True, text=True).stdout
    assert int(grown) < 120  # MiB


@settings(max_examples=6, deadline=None)
@given(N=st.integers(1, 40), M=st.integers(1, 50), D=st.integers(1, 20))
def test_properties_on_any_shape(N, M, D):
    x, y = clouds(N, M, D, seed=N + 100 * M + 10_000 * D)
    for impl in IMPLS:
        slack = kernel_slack(x, y)
        value = energy_distance(x, y, impl=impl)
        assert value >= -slack
        assert abs(value - energy_distance(y, x, impl=impl)) <= slack  # symmetric
        assert abs(energy_distance(x, x, impl=impl)) <= slack  # zero on itself
        order = torch.randperm(N)
        assert abs(value - energy_distance(x[order], y, impl=impl)) <= slack
        assert abs(2 * value - energy_distance(2 * x, 2 * y, impl=impl)) <= 2 * slack  # homogeneous
        twice = energy_distance(torch.cat([x, x]), y, weights_x=torch.ones(2 * N, device=DEVICE), impl=impl)
        assert abs(value - twice) <= slack  # a doubled cloud is the same law


def test_falls_as_one_over_n():
    """Two samples of one law: the mean of the V-statistic is exactly c / n; 400 small draws hold the slope to 0.1."""
    torch.manual_seed(4)
    sizes = (8, 32, 128)
    means = []
    for n in sizes:
        draws = [energy_distance(torch.randn(n, 2, dtype=torch.float64), torch.randn(n, 2).double()) for _ in range(400)]
        means.append(torch.stack(draws).mean())
    log_n, log_mean = torch.tensor(sizes).double().log(), torch.stack(means).log()
    slope = ((log_n - log_n.mean()) * log_mean).sum() / (log_n - log_n.mean()).square().sum()
    assert abs(slope + 1) < 0.1


@pytest.mark.parametrize("impl", IMPLS)
def test_compiles_into_one_graph(impl):
    torch._dynamo.reset()
    x, y = clouds(9, 7, 3)
    a = torch.rand(9, device=DEVICE)

    def step(x, y, a):
        return energy_distance(x.tanh(), y, weights_x=a, impl=impl)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for n in (9, 8):  # the second length is compiled for any
        ours, theirs = (x[:n].clone().requires_grad_() for _ in range(2))
        value, expected = compiled(ours, y, a[:n]), step(theirs, y, a[:n])
        value.backward(), expected.backward()
        torch.testing.assert_close(value, expected)
        torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.mark.parametrize("impl", IMPLS)
def test_not_finite_points_show(impl):
    x, y = clouds(9, 7, 3)
    x[2, 1] = float("nan")
    assert energy_distance(x, y, impl=impl).isnan()
    x[2, 1] = float("inf")
    assert not energy_distance(x, y, impl=impl).isfinite()


def test_convention_is_stated():
    assert energy_distance.convention.value == "squared" and "factor 1" in energy_distance.convention.cost


ERRORS = {
    "width": ((3, 4), (5, 6), {}, ValueError, r"got x \[3, 4\], y \[5, 6\]"),
    "empty": ((0, 4), (5, 4), {}, ValueError, "at least one point"),
    "impl": ((3, 4), (5, 4), {"impl": "cuda"}, ValueError, "impl must be one of"),
    "weights": ((3, 4), (5, 4), {"weights_x": torch.ones(5)}, ValueError, r"weights_x \[3\], one weight a point, got \[5\]"),
    "negative": ((3, 4), (5, 4), {"weights_y": -torch.ones(5)}, ValueError, "not negative"),
    "no mass": ((3, 4), (5, 4), {"weights_y": torch.zeros(5)}, ValueError, "sum to a positive number"),
    "integers": ((3, 4), (5, 4), {"weights_y": torch.ones(5).int()}, TypeError, "floating point weights"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_user_errors(case):
    x_shape, y_shape, options, error, message = ERRORS[case]
    with pytest.raises(error, match=message):
        energy_distance(torch.zeros(x_shape), torch.zeros(y_shape), **options)


def test_triton_is_refused_without_a_device_or_interpreter():
    script = (
        "import torch; from dae_kernels.energy_distance import energy_distance\n"
        "try: energy_distance(torch.zeros(3, 2), torch.zeros(3, 2), impl='triton')\n"
        "except ValueError as error: print(error)\n"
    )
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert "not on a CUDA device" in done.stdout, done.stderr
