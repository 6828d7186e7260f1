"""Fréchet distance against closed forms, scipy, POT and torchmetrics, and the streaming statistics against one shot."""

from __future__ import annotations

import math

import ot
import pytest
import torch
from dae_kernels.frechet_distance import GaussianStatistics, frechet_distance, gaussian_w2
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import sqrtm
from torchmetrics.image.fid import _compute_fid


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def random_covariance(D, seed):
    x = normal(2 * D, D, seed=seed)
    return x.T @ x / D


def close(got, expected, rtol=1e-10, atol=1e-12):
    torch.testing.assert_close(got, torch.as_tensor(expected, dtype=got.dtype), rtol=rtol, atol=atol)


@pytest.mark.parametrize("D", [1, 2, 7, 30])
def test_peers(D):
    """Factors: torchmetrics and scipy's formula 1; POT returns the root, so its square."""
    mean_a, mean_b, a, b = normal(D, seed=2), normal(D, seed=3), random_covariance(D, D), 3 * random_covariance(D, D + 1)
    distance = gaussian_w2(mean_a, a, mean_b, b)
    # Other algorithms, each with about 1e-15 of the traces (10 to 200) times a condition of 100.
    close(distance, _compute_fid(mean_a, a, mean_b, b))
    close(distance, ot.gaussian.bures_wasserstein_distance(mean_a, mean_b, a, b).square().squeeze())
    root = sqrtm(a.numpy() @ b.numpy()).real.trace()
    close(distance, (mean_a - mean_b).square().sum() + a.trace() + b.trace() - 2 * root)
    assert gaussian_w2.convention.value == frechet_distance.convention.value == "squared"


def test_commuting_covariances():
    a, b = torch.tensor([1.0, 4.0, 0.25, 0.0]).double(), torch.tensor([4.0, 1.0, 0.0, 0.01]).double()
    rotation = torch.linalg.qr(normal(4, 4)).Q
    mean_a, mean_b = normal(4, seed=2), normal(4, seed=3)
    expected = (mean_a - mean_b).square().sum() + (a.sqrt() - b.sqrt()).square().sum()
    distance = gaussian_w2(mean_a, rotation @ a.diag() @ rotation.T, mean_b, rotation @ b.diag() @ rotation.T)
    # The zero eigenvalues are 1e-16 after the rotation, their roots 1e-8, against eigenvalues of order 1.
    close(distance, expected, rtol=1e-7)
    close(gaussian_w2(mean_a, a.diag(), mean_b, b.diag()), expected)


def test_points_lines_and_zero():
    zero, line = torch.zeros(3, 3).double(), torch.outer(*[torch.tensor([1.0, 2.0, 2.0]).double()] * 2)
    mean = torch.tensor([3.0, 4.0, 0.0]).double()
    close(gaussian_w2(mean, zero, 0 * mean, zero), 25.0)
    close(gaussian_w2(mean, line, mean, zero), 9.0)
    # Rank one along orthogonal directions: nothing overlaps.
    other = torch.diag(torch.tensor([0.0, 4.0, 0.0])).double()
    e1 = torch.diag(torch.tensor([9.0, 0.0, 0.0])).double()
    close(gaussian_w2(mean, e1, mean, other), 13.0)
    for covariance in (line, e1, random_covariance(3, 1)):
        close(gaussian_w2(mean, covariance, mean, covariance), 0.0, atol=1e-13)


@pytest.mark.parametrize("rows, D", [(100, 8), (20, 64), (2, 5), (2, 1)])
def test_a_cloud_is_at_distance_zero_from_itself(rows, D):
    x = normal(rows, D) @ normal(D, D, seed=1)
    # The root of eigenvalues that should be 0 would leave 1e-7 of the trace; singular values leave rounding.
    assert 0 <= frechet_distance(x, x.flip(0)) < 1e-12 * x.var(0).sum()


def test_samples_streams_and_dtypes_agree():
    x, y = normal(40, 3) + 100, normal(30, 3, seed=1) * 2
    expected = gaussian_w2(x.mean(0), x.T.cov(), y.mean(0), y.T.cov())
    stream = GaussianStatistics().update(x[:11]).update(x[11:])
    wide = torch.stack([x, -x], dim=2).transpose(0, 1)[..., 0].T  # not contiguous
    for a, b in ((x, y), (stream, y), (x, GaussianStatistics().update(y)), (wide, y)):
        distance = frechet_distance(a, b)
        assert distance.dtype == torch.float64 and distance.shape == ()
        close(distance, expected)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        distance = frechet_distance(x.to(dtype), y.to(dtype))
        assert distance.dtype == torch.float32
        assert torch.equal(distance, frechet_distance(x.to(dtype).double(), y.to(dtype).double()).float())
    assert frechet_distance(x.float(), stream).dtype == torch.float32
    row = normal(1, 3).expand(5, 3)  # one point five times: no covariance
    close(frechet_distance(row, y), (row[0] - y.mean(0)).square().sum() + y.T.cov().trace())


@pytest.mark.parametrize("D", [1, 2, 4])
def test_gradcheck(D):
    moments = [normal(D, seed=2), random_covariance(D, 1), normal(D, seed=3), 2 * random_covariance(D, 2)]
    assert torch.autograd.gradcheck(gaussian_w2, [m.clone().requires_grad_() for m in moments])
    x, y = normal(2 * D + 2, D).requires_grad_(), (2 * normal(3 * D + 2, D, seed=1)).requires_grad_()
    assert torch.autograd.gradcheck(frechet_distance, [x, y])


def test_gradient_at_equal_eigenvalues():
    """dW2^2 / dS_a = I - T with the optimal map T, here sqrt(4 / 1): where torch's own derivative of eigh is not finite."""
    identity = torch.eye(3).double()
    a, b, mean = identity.clone().requires_grad_(), (4 * identity).requires_grad_(), torch.zeros(3).double()
    grad_a, grad_b = torch.autograd.grad(gaussian_w2(mean, a, mean, b), (a, b), torch.tensor(0.3, dtype=torch.float64))
    close(grad_a, 0.3 * (1 - 2) * identity)
    close(grad_b, 0.3 * (1 - 1 / 2) * identity)


def test_gradient_of_float32_moments_is_that_of_float64():
    moments = [normal(5, seed=2), random_covariance(5, 1), normal(5, seed=3), 2 * random_covariance(5, 2)]
    single = [m.float().requires_grad_() for m in moments]
    exact = [m.detach().double().requires_grad_() for m in single]
    got = torch.autograd.grad(gaussian_w2(*single), single, torch.tensor(-1.7))
    expected = torch.autograd.grad(gaussian_w2(*exact), exact, torch.tensor(-1.7).double())
    for g, e in zip(got, expected, strict=True):
        close(g.double(), e, rtol=1e-6, atol=1e-6)  # computed in float64, rounded once


@pytest.mark.parametrize(("k", "D"), [(1, 4), (2, 5), (5, 5)])
def test_gradient_by_a_factor_of_a_singular_covariance(k, D):
    """Of points of k < D dimensions mapped linearly: with S_a = A A^T the trace of the root is |S_b^1/2 A|_*, which is smooth."""
    factor, b, zero = normal(D, k, seed=1).requires_grad_(), random_covariance(D, 2), torch.zeros(D, dtype=torch.float64)
    (gradient,) = torch.autograd.grad(gaussian_w2(zero, factor @ factor.T, zero, b), factor)
    values, vectors = torch.linalg.eigh(b)
    nuclear = torch.linalg.svdvals((vectors * values.sqrt()) @ vectors.T @ factor).sum()
    (expected,) = torch.autograd.grad(factor.square().sum() - 2 * nuclear, factor)
    # Eigenvalues that are 0 to rounding have roots of 1e-8 instead of 0.
    torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-6 if k < D else 1e-10)


def test_singular_covariances_have_a_finite_gradient():
    x, y = normal(4, 9).requires_grad_(), normal(5, 9, seed=1).requires_grad_()
    for gradient in torch.autograd.grad(frechet_distance(x, y), (x, y)):
        assert gradient.isfinite().all() and gradient.abs().max() < 10


@settings(max_examples=20, deadline=None)
@given(D=st.integers(1, 6), seed=st.integers(0, 99), scale=st.floats(0.1, 10))
def test_properties(D, seed, scale):
    mean_a, mean_b, a, b = (
        normal(D, seed=seed),
        normal(D, seed=seed + 1),
        random_covariance(D, seed),
        random_covariance(D, seed + 9),
    )
    distance = gaussian_w2(mean_a, a, mean_b, b)
    close(gaussian_w2(mean_b, b, mean_a, a), distance)
    close(gaussian_w2(scale * mean_a, scale**2 * a, scale * mean_b, scale**2 * b), scale**2 * distance)
    rotation = torch.linalg.qr(normal(D, D, seed=seed + 2)).Q
    rotated = gaussian_w2(rotation @ mean_a, rotation @ a @ rotation.T, rotation @ mean_b, rotation @ b @ rotation.T)
    close(rotated, distance)
    mean_c, c = normal(D, seed=seed + 3), random_covariance(D, seed + 5)
    detour = gaussian_w2(mean_a, a, mean_c, c).sqrt() + gaussian_w2(mean_c, c, mean_b, b).sqrt()
    assert distance.sqrt() <= detour + 1e-10


def test_bias_falls_by_theory():
    """Between samples of one Gaussian the estimate is all bias, of order 1 / N."""
    generator, means = torch.Generator().manual_seed(0), []
    for N in (100, 1600):
        draws = [torch.randn(2, N, 3, generator=generator, dtype=torch.float64) for _ in range(200)]
        means.append(torch.stack([frechet_distance(x, y) for x, y in draws]).mean().log().item())
    # A distance scatters by half of its mean: 200 know the mean to 4 %, the slope to 0.02.
    assert (means[1] - means[0]) / math.log(16) == pytest.approx(-1, abs=0.1)


@pytest.mark.parametrize("splits", [[41], [1] * 41, [0, 1, 0, 40], [20, 21]])
def test_streams_far_from_zero(splits):
    x = normal(41, 3) + 1e6
    stream, merged = GaussianStatistics(), GaussianStatistics()
    for part in x.split(splits):
        stream.update(part)
        merged.merge(GaussianStatistics().update(part))
    for statistics in (stream, merged):
        assert statistics.count == 41
        # A mean of 1e6 has a rounding of 1e-10, and so have deviations of order 1; E[x^2] - E[x]^2 would be off by 1e-4.
        torch.testing.assert_close(statistics.covariance, torch.cov((x - 1e6).T), rtol=1e-8, atol=1e-9)
        torch.testing.assert_close(statistics.mean, x.mean(0), rtol=1e-15, atol=0)


@pytest.mark.parametrize("D", [1, 2, 3, 10])
def test_states_gathered_from_processes(D):
    x = normal(30, D) + 100
    states = [GaussianStatistics().update(part).state() for part in x.split([1, 9, 20])]
    assert all(state.shape == (1 + D + D * D,) and state.dtype == torch.float64 for state in states)
    merged = GaussianStatistics()
    for state in torch.stack(states):
        merged.merge(GaussianStatistics.from_state(state))
    assert merged.count == 30
    torch.testing.assert_close(merged.mean, x.mean(0), rtol=1e-14, atol=0)
    torch.testing.assert_close(merged.covariance, torch.cov(x.T).reshape(D, D), rtol=1e-11, atol=1e-12)  # offsets of 100
    assert torch.equal(GaussianStatistics.from_state(merged.state()).state(), merged.state())
    restored = GaussianStatistics.from_state(states[0])
    before = states[0].clone()
    restored.update(x)
    assert torch.equal(states[0], before)


def test_all_reduce_uses_the_given_sum():
    """Two processes in one: `summed` answers with what both would have sent, in the order of the calls."""
    x = normal(12, 2) + 10
    statistics = GaussianStatistics().update(x)
    # A second process with the same points: every sum is twice what this one sends.
    statistics.all_reduce(lambda tensor: tensor * 2)
    assert statistics.count == 24
    both = torch.cat([x, x])
    close(statistics.mean, both.mean(0))
    close(statistics.covariance, both.T.cov())
    assert GaussianStatistics().all_reduce(lambda tensor: tensor * 2).count == 0


def test_statistics_may_be_on_another_device():
    """Meta tensors stand for a GPU."""
    x, y = torch.zeros(5, 3, device="meta"), normal(5, 3)
    assert frechet_distance(x, GaussianStatistics().update(y)).device.type == "meta"
    with pytest.raises(ValueError, match="mean_b on cpu"):
        frechet_distance(x, y)


def test_statistics_keep_no_graph():
    statistics = GaussianStatistics().update(normal(5, 2).requires_grad_())
    assert not statistics.covariance.requires_grad


def test_compiles_into_one_graph():
    torch._dynamo.reset()
    compiled = torch.compile(frechet_distance, fullgraph=True, backend="aot_eager")
    for N in (8, 11):
        x, y = normal(N, 3).requires_grad_(), 2 * normal(9, 3, seed=1)
        got, expected = compiled(x, y), frechet_distance(x, y)
        close(got, expected)
        close(torch.autograd.grad(got, x)[0], torch.autograd.grad(expected, x)[0])


def test_vmap_and_func_grad():
    x, y = normal(4, 8, 3), 2 * normal(9, 3, seed=1)
    values = torch.vmap(lambda x: frechet_distance(x, y))(x)
    gradients = torch.vmap(torch.func.grad(lambda x: frechet_distance(x, y)))(x)
    for i in range(4):
        leaf = x[i].clone().requires_grad_()
        value = frechet_distance(leaf, y)
        close(values[i], value.detach())
        close(gradients[i], torch.autograd.grad(value, leaf)[0])


def test_a_second_derivative_is_refused():
    x = normal(8, 3).requires_grad_()
    (gradient,) = torch.autograd.grad(frechet_distance(x, normal(9, 3, seed=1)), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivatives"):
        gradient.sum().backward()


MEAN, COVARIANCE = torch.zeros(3), torch.eye(3)
MOMENT_ERRORS = {
    "mean": ((MEAN[:2], COVARIANCE, MEAN, COVARIANCE), ValueError, r"got mean_a \[2\], cov_a \[3, 3\]"),
    "covariance": ((MEAN, COVARIANCE, MEAN, COVARIANCE[:2]), ValueError, r"cov_b \[2, 3\]"),
    "scalar": ((MEAN[0], COVARIANCE, MEAN, COVARIANCE), ValueError, r"mean_a \[\]"),
    "empty": ((MEAN[:0], COVARIANCE[:0, :0]) * 2, ValueError, "one D >= 1"),
    "batch": ((COVARIANCE, COVARIANCE, COVARIANCE, COVARIANCE), ValueError, r"mean_a \[3, 3\]"),
    "integers": ((MEAN, COVARIANCE.long(), MEAN, COVARIANCE), TypeError, "cov_a of torch.int64"),
    "device": ((MEAN, COVARIANCE, MEAN.to("meta"), COVARIANCE), ValueError, "mean_b on meta"),
}


@pytest.mark.parametrize("case", MOMENT_ERRORS)
def test_errors_of_moments(case):
    arguments, error, message = MOMENT_ERRORS[case]
    with pytest.raises(error, match=message):
        gaussian_w2(*arguments)


def test_errors_of_clouds_and_statistics():
    x = normal(5, 3)
    statistics = GaussianStatistics()
    for call, error, message in [
        (lambda: frechet_distance(x, x[:1]), ValueError, "at least 2 points for a covariance, got 1 in y"),
        (lambda: frechet_distance(x, x[:, :2]), ValueError, "one dimension, got 3 and 2"),
        (lambda: frechet_distance(x[0], x), ValueError, r"got x \[3\]"),
        (lambda: frechet_distance(x, x.long()), TypeError, "got y of torch.int64"),
        (lambda: frechet_distance(x, statistics), ValueError, "at least 1 row for a mean, got 0"),
        (lambda: frechet_distance(x, x * math.nan), ValueError, "finite points, got NaN or infinity in y"),
        (lambda: gaussian_w2(x[0], x.T @ x * math.inf, x[0], x.T @ x), ValueError, "finite moments, got .* in cov_a"),
        (lambda: statistics.update(x[0]), ValueError, r"points \[N, D\], D >= 1, got \[3\]"),
        (lambda: statistics.update(x.long()), TypeError, "got torch.int64"),
        (lambda: statistics.state(), ValueError, "got 0"),
        (lambda: GaussianStatistics().update(x[:1]).covariance, ValueError, "at least 2 rows for a covariance, got 1"),
        (lambda: GaussianStatistics().update(x).update(x[:, :2]), ValueError, "expected 3 features per row, got 2"),
        (lambda: GaussianStatistics.from_state(torch.zeros(5).double()), ValueError, r"got torch.float64 \[5\]"),
        (lambda: GaussianStatistics.from_state(torch.zeros(0).double()), ValueError, r"got torch.float64 \[0\]"),
        *(
            (lambda n=n: GaussianStatistics.from_state(torch.tensor([n, 0, 1]).double()), ValueError, f"whole count .*, got {n}")
            for n in (-3.0, 0.0, 2.5, math.inf, math.nan)
        ),
        (lambda: GaussianStatistics.from_state(torch.zeros(7)), ValueError, r"got torch.float32 \[7\]"),
    ]:
        with pytest.raises(error, match=message):
            call()
    assert statistics.count == 0
