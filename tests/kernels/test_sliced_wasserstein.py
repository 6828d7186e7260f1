"""Sliced Wasserstein distances against closed forms, POT, scipy and their own definition in float64.

Tolerances in float64: 1e-10 where a sum of some hundred terms of order 1 is compared, relative to the result.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys

import ot
import pytest
import scipy.stats
import torch
from dae_kernels.sliced_wasserstein import api, autograd, max_sliced_wasserstein, sliced_wasserstein
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import rounding_bound

DISTANCES = {"mean": sliced_wasserstein, "max": max_sliced_wasserstein}
POT = {"mean": ot.sliced_wasserstein_distance, "max": ot.max_sliced_wasserstein_distance}
both = pytest.mark.parametrize("kind", DISTANCES)


def cloud(N, D, seed=0, dtype=torch.float64):
    return torch.randn(N, D, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def directions(D, L=7, seed=5):
    return torch.nn.functional.normalize(cloud(D, L, seed), dim=0)


def weights(N, seed=9):
    """Of any sum; some are 0."""
    w = torch.rand(N, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.where(w < 0.2, 0.0, w) + (torch.arange(N) == 0)


def close(got, expected, rtol=1e-10):
    torch.testing.assert_close(got, torch.as_tensor(expected, dtype=got.dtype), rtol=rtol, atol=1e-12)


@both
@pytest.mark.parametrize("weighted", ["none", "x", "both"])
@pytest.mark.parametrize("p", [1, 1.5, 2, 3])
@pytest.mark.parametrize("N, M, D", [(63, 60, 3), (20, 20, 2), (1, 5, 4), (30, 1, 1)])
def test_equals_pot(kind, weighted, p, N, M, D):
    """Factor 1: POT returns the root as well. It does not normalise weights."""
    x, y, projections = cloud(N, D), cloud(M, D, 1) * 2 + 1, directions(D)
    wx, wy = weights(N) if weighted != "none" else None, weights(M, 10) if weighted == "both" else None
    got = DISTANCES[kind](x, y, p=p, projections=projections, weights_x=wx, weights_y=wy)
    a, b = (None if w is None else w / w.sum() for w in (wx, wy))
    close(got, POT[kind](x, y, a, b, projections=projections, p=p))


@pytest.mark.parametrize("N, M", [(40, 40), (13, 29), (1, 8)])
def test_equals_scipy_on_the_line(N, M):
    x, y, wx, wy = cloud(N, 1), cloud(M, 1, 1) + 1, weights(N), weights(M, 10)
    close(sliced_wasserstein(x, y, p=1), scipy.stats.wasserstein_distance(x[:, 0], y[:, 0]))
    expected = scipy.stats.wasserstein_distance(x[:, 0], y[:, 0], wx, wy)
    close(sliced_wasserstein(x, y, p=1, weights_x=wx, weights_y=wy), expected)


@both
@pytest.mark.parametrize("p", [1, 2, 4])
def test_points_and_translations(kind, p):
    projections = directions(3, 50)
    d = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    cosines = (d @ projections).abs()
    expected = cosines.max() if kind == "max" else cosines.pow(p).mean().pow(1 / p)
    for N in (1, 17):
        x = cloud(N, 3)
        close(DISTANCES[kind](x, (x + d).flip(0), p=p, projections=projections), expected)


def test_drawn_directions_are_uniform():
    # E <t, e>^2 = 1 / D; 20000 draws scatter by sqrt(2 / D (1 - 1/D) / (D + 2) / 20000) < 0.003: 5 deviations.
    for D in (1, 2, 5):
        x = torch.zeros(1, D, dtype=torch.float64)
        y = torch.eye(D, dtype=torch.float64)[:1]
        generator = torch.Generator().manual_seed(0)
        assert sliced_wasserstein(x, y, num_projections=20000, generator=generator).square() == pytest.approx(1 / D, abs=0.015)


@both
def test_generator_and_dtypes_give_the_same_directions(kind):
    x, y = cloud(20, 4), cloud(30, 4, 1)
    first = DISTANCES[kind](x, y, generator=torch.Generator().manual_seed(3))
    assert torch.equal(first, DISTANCES[kind](x, y, generator=torch.Generator().manual_seed(3)))
    assert first != DISTANCES[kind](x, y, generator=torch.Generator().manual_seed(4))
    torch.manual_seed(3)
    assert torch.equal(first, DISTANCES[kind](x, y))
    single = DISTANCES[kind](x.float(), y.float(), generator=torch.Generator().manual_seed(3))
    assert single.dtype == torch.float32 and first.dtype == torch.float64
    close(single.double(), first, rtol=1e-6)  # clouds rounded to float32
    for dtype in (torch.float16, torch.bfloat16):
        half = DISTANCES[kind](x.to(dtype), y.to(dtype), generator=torch.Generator().manual_seed(3))
        same = DISTANCES[kind](x.to(dtype).float(), y.to(dtype).float(), generator=torch.Generator().manual_seed(3))
        assert half.dtype == torch.float32 and torch.equal(half, same)


@both
def test_autocast_does_not_touch_the_operands(kind):
    x, y, projections = cloud(20, 4).float(), cloud(20, 4, 1).float(), directions(4).float()
    expected = DISTANCES[kind](x, y, projections=projections)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(DISTANCES[kind](x, y, projections=projections), expected)


@both
def test_repeated_points_are_weights(kind):
    x, y, projections = cloud(6, 3), cloud(9, 3, 1), directions(3)
    times = torch.tensor([1, 3, 0, 2, 2, 5])
    repeated = DISTANCES[kind](x.repeat_interleave(times, 0), y, projections=projections)
    close(DISTANCES[kind](x, y, projections=projections, weights_x=times.double() / 7), repeated)


@pytest.mark.parametrize("outlier", [-1e30, 1e30])
def test_points_without_weight_do_not_count(outlier):
    x, y, projections = cloud(8, 2), cloud(5, 2, 1), directions(2)
    far = torch.cat([torch.full((1, 2), outlier, dtype=torch.float64), x])
    wx = torch.cat([torch.zeros(1, dtype=torch.float64), weights(8)])
    got = sliced_wasserstein(far, y, projections=projections, weights_x=wx)
    close(got, sliced_wasserstein(x, y, projections=projections, weights_x=wx[1:]))


@both
@pytest.mark.parametrize("p", [1, 2, 3])
@pytest.mark.parametrize("N, M, weighted", [(6, 6, False), (5, 7, False), (5, 7, True), (1, 3, True)])
def test_gradcheck(kind, p, N, M, weighted):
    x, y, projections = cloud(N, 2).requires_grad_(), (cloud(M, 2, 1) + 1).requires_grad_(), directions(2, 3)
    arguments = [x, y]
    if weighted:  # all positive: at 0 the derivative has one side only
        arguments += [(torch.rand(n, dtype=torch.float64) + 0.5).requires_grad_() for n in (N, M)]

    def function(x, y, wx=None, wy=None):
        return DISTANCES[kind](x, y, p=p, projections=projections, weights_x=wx, weights_y=wy)

    torch.manual_seed(0)
    assert torch.autograd.gradcheck(function, arguments)


@both
def test_gradients_of_float32_and_strided_clouds(kind):
    torch.manual_seed(1)
    projections = directions(4)
    wide = torch.randn(4, 31, 2)
    cases = [
        (torch.randn(31, 4), torch.randn(31, 4)),
        (wide[..., 0].T, wide[..., 1].T[::2]),
        (wide[:, :9, 0].T, wide[:, :1, 1].T.expand(5, 4)),
    ]
    for x, y in cases:
        cotangent = torch.randn(())
        exact = [t.double().contiguous().requires_grad_() for t in (x, y)]
        single = [t.detach().requires_grad_() for t in (x, y)]
        expected = DISTANCES[kind](*exact, projections=projections)
        got = DISTANCES[kind](*single, projections=projections.float())
        # Sums of 31 products of order 1 in float32, and their root.
        close(got.double(), expected, rtol=1e-5)
        for g, e in zip(
            torch.autograd.grad(got, single, cotangent), torch.autograd.grad(expected, exact, cotangent.double()), strict=True
        ):
            torch.testing.assert_close(g.double(), e, rtol=1e-4, atol=1e-6)


@both
@pytest.mark.parametrize("p", [1, 2, 3])
def test_zero_between_equal_clouds_with_gradient_zero(kind, p):
    """Exactly where the points come in one order: both clouds then go through the same operations on the same numbers."""
    x = cloud(9, 3).requires_grad_()
    distance = DISTANCES[kind](x, x.detach().clone(), p=p, num_projections=10)
    assert distance == 0
    (gradient,) = torch.autograd.grad(distance, x)
    assert not gradient.any()


@both
@pytest.mark.parametrize("p", [1, 2, 3])
def test_equal_clouds_in_another_order_are_a_rounding_apart(kind, p):
    """A product of matrices may round one point in two ways, by its row, so that the distance is not 0 on every processor."""
    x = cloud(9, 3).requires_grad_()
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    # A projection has D products, of unit directions and points that are moved by a median of theirs: as large as 2 max |x| at
    # most. The greatest difference of two bounds their p-mean, which is off by some roundings of itself.
    allowed = rounding_bound(2 * 3 + 8, 2 * x.detach().norm(dim=1).max(), torch.float64)
    for y in (x.detach()[order], torch.cat([x.detach(), x.detach()])):
        distance = DISTANCES[kind](x, y, p=p, num_projections=10)
        assert 0 <= distance <= allowed
        (gradient,) = torch.autograd.grad(distance, x)
        # W_p moves by (mean |dx_i|^p)^(1/p) at most: no row of a gradient is longer than N^(-1/p).
        assert (gradient.norm(dim=1) <= 9 ** (-1 / p) * (1 + 1e-9)).all()


@pytest.mark.parametrize("weighted", [False, True])
def test_blocks_do_not_show(monkeypatch, weighted):
    projections, L = directions(3, 11), 11
    results = []
    for limit in (1, 50, 1 << 22):  # one, a few, and all projections in a block
        monkeypatch.setattr(autograd, "MAX_PROJECTED", limit)
        leaves = [cloud(8, 3).requires_grad_(), cloud(12, 3, 1).requires_grad_(), weights(8).requires_grad_()]
        value = sliced_wasserstein(
            *leaves[:2], projections=projections, num_projections=L, weights_x=leaves[2] if weighted else None
        )
        greatest = max_sliced_wasserstein(*leaves[:2], projections=projections, weights_x=leaves[2] if weighted else None)
        results.append([value, greatest, *torch.autograd.grad(value + greatest, leaves[: 2 + weighted])])
    for other in results[:2]:
        torch.testing.assert_close(other, results[2], rtol=1e-12, atol=1e-14)


def test_memory_is_bounded_in_both_passes():
    # 2000 directions of 2^13 points in float32 are 62 MiB an array, and autograd would keep several of them.
    script = (
        "import torch; from dae_kernels.sliced_wasserstein import autograd, sliced_wasserstein\n"
        "autograd.MAX_PROJECTED = 1 << 17\n"
        "peak = lambda: int(open('/proc/self/status').read().split('VmHWM:')[1].split()[0]) // 1024\n"
        "x, y = torch.randn(1 << 12, 2, requires_grad=True), torch.randn(1 << 12, 2)\n"
        "run = lambda L: sliced_wasserstein(x, y, num_projections=L).backward()\n"
        "run(40); before = peak(); run(2000); print(peak() - before)"
    )
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}  # or glibc's hoard of freed blocks counts as well
    grown = subprocess.run([sys.executable, "-c", script], env=environment, check=True, capture_output=True, text=True).stdout
    assert int(grown) < 30  # MiB; an array of a block is half of one


def test_max_is_the_greatest_of_single_projections():
    x, y, projections = cloud(12, 3), cloud(10, 3, 1), directions(3, 20)
    single = torch.stack([sliced_wasserstein(x, y, projections=projections[:, [i]]) for i in range(20)])
    close(max_sliced_wasserstein(x, y, projections=projections), single.max())
    close(sliced_wasserstein(x, y, projections=projections), single.square().mean().sqrt())


@settings(max_examples=25, deadline=None)
@given(
    N=st.integers(1, 30),
    M=st.integers(1, 30),
    D=st.integers(1, 4),
    p=st.sampled_from([1, 1.3, 2]),
    weighted=st.booleans(),
    seed=st.integers(0, 99),
)
def test_properties(N, M, D, p, weighted, seed):
    x, y, z, projections = cloud(N, D, seed), cloud(M, D, seed + 1), cloud(5, D, seed + 2), directions(D, 6)
    wx, wy = (weights(N), weights(M, 10)) if weighted else (None, None)
    for function in DISTANCES.values():

        def distance(a, b, wa=None, wb=None, function=function):
            return function(a, b, p=p, projections=projections, weights_x=wa, weights_y=wb)

        xy = distance(x, y, wx, wy)
        close(distance(y, x, wy, wx), xy)
        close(distance(3 * x + 1, 3 * y + 1, wx, wy), 3 * xy)
        close(distance(x.flip(0), y, None if wx is None else wx.flip(0), wy), xy)
        assert xy <= distance(x, z, wx) + distance(z, y, None, wy) + 1e-12
        assert distance(x, x, wx, wx) <= 1e-7  # the root of rounding, where levels are cumulated


def test_converges_between_gaussians_and_falls_by_theory_between_equal_ones():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20000, 2, generator=generator, dtype=torch.float64)
    y = torch.randn(20000, 2, generator=generator, dtype=torch.float64) * 3
    # W_2 of N(0, 1) and N(0, 9) on any line is 2; 20000 points scatter by about 0.02.
    assert sliced_wasserstein(x, y, generator=generator) == pytest.approx(2, abs=0.06)
    # Between samples of one distribution W_1 falls as N^-1/2.
    counts = [64, 256, 1024, 4096]
    means = []
    for N in counts:
        draws = [torch.randn(2, N, 2, generator=generator, dtype=torch.float64) for _ in range(4096 // N * 8)]
        means.append(torch.stack([sliced_wasserstein(a, b, p=1, num_projections=8) for a, b in draws]).mean().log().item())
    slope = (means[-1] - means[0]) / math.log(counts[-1] / counts[0])
    assert slope == pytest.approx(-0.5, abs=0.1)


def test_error_of_the_directions_falls_by_theory():
    x, y, generator = cloud(12, 6), cloud(12, 6, 1), torch.Generator().manual_seed(0)
    deviations = []
    for L in (8, 512):
        # W_2^2 is averaged over the directions: its deviation falls as L^-1/2. 200 draws know one to 5 %, so the slope to 0.02.
        draws = [sliced_wasserstein(x, y, num_projections=L, generator=generator).square() for _ in range(200)]
        deviations.append(torch.stack(draws).std().log().item())
    assert (deviations[1] - deviations[0]) / math.log(64) == pytest.approx(-0.5, abs=0.1)


def test_clouds_of_another_device_stay_there():
    """Meta tensors stand for a GPU (autocast does not know them): drawn directions follow the clouds, nothing is on the CPU."""
    x, w = torch.empty(7, 3, device="meta", requires_grad=True), torch.empty(7, device="meta")
    for M in (7, 9):
        for cost in (autograd.mean_cost, autograd.greatest_cost):
            for weights_x in (None, w):
                y = torch.empty(M, 3, device="meta")
                value = api.projected_distance(cost, "test", x, y, 2, 5, weights_x, None, None, None)
                assert value.device.type == torch.autograd.grad(value, x)[0].device.type == "meta"


@both
def test_compiles_into_one_graph(kind):
    torch._dynamo.reset()
    compiled = torch.compile(DISTANCES[kind], fullgraph=True, backend="aot_eager")
    projections = directions(3)
    for M, w in ((6, None), (9, None), (9, weights(6))):
        x, y = cloud(6, 3).requires_grad_(), cloud(M, 3, 1)
        got = compiled(x, y, projections=projections, weights_x=w)
        expected = DISTANCES[kind](x, y, projections=projections, weights_x=w)
        close(got, expected)
        close(torch.autograd.grad(got, x)[0], torch.autograd.grad(expected, x)[0])
    assert compiled(cloud(6, 3), cloud(6, 3, 1)) > 0  # draws its directions


def test_compiles_with_several_blocks(monkeypatch):
    monkeypatch.setattr(autograd, "MAX_PROJECTED", 50)
    torch._dynamo.reset()
    x, y, projections = cloud(6, 3).requires_grad_(), cloud(9, 3, 1), directions(3)
    expected = sliced_wasserstein(x, y, projections=projections)
    got = torch.compile(sliced_wasserstein, fullgraph=True, backend="aot_eager")(x, y, projections=projections)
    close(got, expected)
    close(torch.autograd.grad(got, x)[0], torch.autograd.grad(expected, x)[0])


@both
def test_vmap_and_func_grad(kind):
    x, y, projections = cloud(4 * 6, 3).view(4, 6, 3), cloud(9, 3, 1), directions(3)

    def distance(x):
        return DISTANCES[kind](x, y, projections=projections)

    values, gradients = torch.vmap(distance)(x), torch.vmap(torch.func.grad(distance))(x)
    for i in range(4):
        leaf = x[i].clone().requires_grad_()
        value = distance(leaf)
        close(values[i], value.detach())
        close(gradients[i], torch.autograd.grad(value, leaf)[0])


def test_convention_is_stated():
    for function in DISTANCES.values():
        assert function.convention.value == "root"


def test_nan_is_not_hidden():
    x = cloud(5, 2)
    x[1, 0] = math.nan
    assert sliced_wasserstein(x, cloud(5, 2, 1)).isnan()
    assert max_sliced_wasserstein(x, cloud(5, 2, 1)).isnan()


ERRORS = {
    "width": (cloud(3, 4), cloud(5, 6), {}, ValueError, r"got x \[3, 4\], y \[5, 6\]"),
    "empty": (cloud(0, 4), cloud(5, 4), {}, ValueError, "at least one point"),
    "dtype": (cloud(3, 4), cloud(5, 4).float(), {}, TypeError, "one dtype"),
    "integers": (cloud(3, 4).long(), cloud(5, 4), {}, TypeError, "floating point clouds, got x"),
    "p": (cloud(3, 4), cloud(5, 4), {"p": 0.5}, ValueError, "p of at least 1, got 0.5"),
    "infinite p": (cloud(3, 4), cloud(5, 4), {"p": math.inf}, ValueError, "finite p"),
    "none drawn": (cloud(3, 4), cloud(5, 4), {"num_projections": 0}, ValueError, "num_projections=0"),
    "weights": (cloud(3, 4), cloud(5, 4), {"weights_x": torch.ones(5)}, ValueError, r"weights_x \[3\]"),
    "negative": (cloud(3, 4), cloud(5, 4), {"weights_y": -torch.ones(5)}, ValueError, "weights_y with minimum -1"),
    "projections": (cloud(3, 4), cloud(5, 4), {"projections": cloud(3, 7)}, ValueError, r"projections \[4, L\], .* got \[3, 7\]"),
    "no projections": (cloud(3, 4), cloud(5, 4), {"projections": cloud(4, 0)}, ValueError, r"got \[4, 0\]"),
    "projection dtype": (
        cloud(3, 4),
        cloud(5, 4),
        {"projections": cloud(4, 2).long()},
        TypeError,
        "projections, got torch.int64",
    ),
    "device": (cloud(3, 4), cloud(5, 4), {"projections": cloud(4, 2).to("meta")}, ValueError, "projections on cpu"),
}


@both
@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_float32_far_from_the_origin(kind, weight):
    """Projections of centred points of radius 10, so off by a few eps 10, also beside an outlier without weight."""
    x, y, w = cloud(63, 8, dtype=torch.float32) + 1e6, cloud(60, 8, 1, torch.float32) * 2 + 1e6, torch.ones(63)
    x[0], w[0] = x[0] + (1 - weight) * 1e9, weight
    options = {"weights_x": w, "projections": directions(8)}
    leaf, exact_leaf = x.clone().requires_grad_(), x.double().requires_grad_()
    got, exact = DISTANCES[kind](leaf, y, **options), DISTANCES[kind](exact_leaf, y.double(), **options)
    got.backward(), exact.backward()
    assert abs(got.item() - exact.item()) <= 8 * torch.finfo(torch.float32).eps * 10
    torch.testing.assert_close(leaf.grad, exact_leaf.grad.float(), rtol=1e-4, atol=1e-6)


@both
@pytest.mark.parametrize("case", ERRORS)
def test_user_errors(kind, case):
    x, y, options, error, message = ERRORS[case]
    with pytest.raises(error, match=message):
        DISTANCES[kind](x, y, **options)
