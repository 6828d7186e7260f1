"""Precision, recall, density, coverage and the search below them, against prdc, sorted brute force and clouds made by hand."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import numpy as np
import prdc
import pytest
import torch
from dae_kernels.precision_recall_density_coverage import distances, k_nearest_distances, precision_recall_density_coverage
from hypothesis import given, settings
from hypothesis import strategies as st


def cloud(N, D=3, seed=0):
    return torch.randn(N, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def line(*points):
    return torch.tensor(points, dtype=torch.float64)[:, None]


def measured(real, fake, k):
    return [value.item() for value in precision_recall_density_coverage(real, fake, k=k)]


@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize(
    "N, M, D, shift", [(63, 60, 4, 0.3), (30, 90, 1, 0.0), (60, 20, 20, 0.5), (8, 7, 2, 1.0)]
)  # prdc itself needs k + 2 points
def test_equals_prdc_exactly(k, N, M, D, shift):
    """k is its nearest_k. All four are counts, so nothing may differ."""
    for seed in range(3):
        real, fake = cloud(N, D, seed), cloud(M, D, seed + 100) * 1.2 + shift
        expected = prdc.compute_prdc(real.numpy(), fake.numpy(), nearest_k=k)
        got = precision_recall_density_coverage(real, fake, k=k)
        for name in ("precision", "recall", "coverage"):
            assert getattr(got, name).item() == expected[name], name
        assert got.density.item() == pytest.approx(expected["density"], rel=1e-14)  # it multiplies by 1 / k


@pytest.mark.parametrize("k", [1, 4])
def test_a_lattice_with_ties_equals_prdc(k):
    """Integer coordinates: prdc's products are exact too, and many points lie on spheres, which are outside."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        real, fake = (torch.randint(0, 4, (N, 2), generator=generator).double() for N in (40, 30))
        expected = prdc.compute_prdc(real.numpy(), fake.numpy(), nearest_k=k)
        got = precision_recall_density_coverage(real, fake, k=k)
        assert [got.precision.item(), got.recall.item(), got.coverage.item()] == [
            expected[name] for name in ("precision", "recall", "coverage")
        ]
        assert got.density.item() == pytest.approx(expected["density"], rel=1e-14)


def test_improved_precision_and_recall_by_the_papers_formula():
    real, fake, k = cloud(50), cloud(40, seed=1) + 1, 3
    real_real, real_fake, fake_fake = torch.cdist(real, real), torch.cdist(real, fake), torch.cdist(fake, fake)
    real_radius, fake_radius = (d.sort(dim=1).values[:, k] for d in (real_real, fake_fake))  # column 0 is the point itself
    got = precision_recall_density_coverage(real, fake, k=k)
    assert got.precision == (real_fake <= real_radius[:, None]).any(0).double().mean()
    assert got.recall == (real_fake <= fake_radius).any(1).double().mean()
    assert 0 < got.precision < 1 and 0 < got.recall < 1


def test_by_hand_on_a_line():
    real = line(0, 1, 3, 7)  # radii 1, 1, 2, 4: open balls (-1, 1), (0, 2), (1, 5), (3, 11)
    fake = line(-1, 0.5, 4, 20)  # radii 1.5, 1.5, 3.5, 16: (-2.5, .5), (-1, 2), (.5, 7.5), (4, 36)
    got = precision_recall_density_coverage(real, fake, k=1)
    assert got.precision == 2 / 4  # -1 is on a sphere, 20 far out
    assert got.recall == 1
    assert got.density == (2 + 2) / 4  # 0.5 in the first two balls, 4 in the last two
    assert got.coverage == 1
    assert precision_recall_density_coverage(real, line(0.5, 30, 40), k=1).coverage == 2 / 4


def test_modes_dropped_and_invented():
    one, other = cloud(40), cloud(60, seed=1) + 1e3
    assert measured(torch.cat([one, other]), one, 5)[:2] == [1.0, 0.4]
    assert measured(one, torch.cat([one, other]), 5)[:2] == [0.4, 1.0]
    assert measured(one, other, 5) == [0, 0, 0, 0]
    same = precision_recall_density_coverage(one, one.flip(0))
    assert same.precision == same.recall == same.coverage == 1


def test_coinciding_points_have_empty_balls():
    x = torch.zeros(5, 2)
    assert measured(x, x, 4) == [0, 0, 0, 0]
    # Two of each: with k = 1 the nearest neighbour is the twin, with k = 2 another point.
    twins = line(0, 0, 1, 1, 3, 3)
    assert measured(twins, twins, 1) == [0, 0, 0, 0]
    assert measured(twins, twins, 2)[:2] == [1, 1]


@pytest.mark.parametrize("exclude_self", [False, True])
@pytest.mark.parametrize("N, M, D", [(63, 60, 3), (1, 2, 1), (17, 17, 40)])
def test_k_nearest_distances_equal_sorted_ones(exclude_self, N, M, D):
    x, y = cloud(N, D), cloud(M, D, 1)
    if exclude_self:
        x = y
    distance = (x[:, None] - y).square().sum(-1).sqrt()
    if exclude_self:
        distance.fill_diagonal_(math.inf)
    available = M - exclude_self
    for k in {1, min(3, available), available}:
        got = k_nearest_distances(x, y, k, exclude_self=exclude_self)
        assert got.shape == (len(x), k)
        # Squares of D differences summed in another order.
        torch.testing.assert_close(got, distance.sort(dim=1).values[:, :k], rtol=1e-14, atol=0)
    assert k_nearest_distances.convention.value == "root"


def test_exclude_self_goes_by_index():
    x = line(0, 0, 5, 6)
    assert k_nearest_distances(x, x, 1).tolist() == [[0], [0], [0], [0]]
    assert k_nearest_distances(x, x, 2, exclude_self=True).tolist() == [[0, 5], [0, 5], [1, 5], [1, 6]]


def test_far_from_zero_nothing_cancels():
    x = line(*range(5)) + 1e8
    assert k_nearest_distances(x, x, 1, exclude_self=True).flatten().tolist() == [1] * 5


@pytest.mark.parametrize("limit", [1, 70, 300])
def test_blocks_do_not_show(monkeypatch, limit):
    real, fake = cloud(33), cloud(29, seed=1) * 1.3
    expected, nearest = measured(real, fake, 3), k_nearest_distances(real, real, 4, exclude_self=True)
    monkeypatch.setattr(distances, "MAX_NUMBERS", limit)
    assert measured(real, fake, 3) == expected
    assert torch.equal(k_nearest_distances(real, real, 4, exclude_self=True), nearest)


def test_memory_is_bounded():
    # 6000^2 distances are 275 MiB in float64; a block is 1.
    script = (
        "import torch; from dae_kernels.precision_recall_density_coverage import *\n"
        "from dae_kernels.precision_recall_density_coverage import distances\n"
        "distances.MAX_NUMBERS = 1 << 17\n"
        "peak = lambda: int(open('/proc/self/status').read().split('VmHWM:')[1].split()[0]) // 1024\n"
        "x = torch.randn(6000, 2)\n"
        "precision_recall_density_coverage(x[:500], x[500:1000]); before = peak()\n"
        "precision_recall_density_coverage(x, x + 1); print(peak() - before)"
    )
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}  # or glibc's hoard of freed blocks counts as well
    grown = subprocess.run([sys.executable, "-c", script], env=environment, check=True, capture_output=True, text=True).stdout
    assert int(grown) < 30  # MiB


def test_dtypes_and_strides():
    real, fake = cloud(40), cloud(30, seed=1)
    wide = torch.stack([real, -real], dim=-1)
    assert measured(wide[..., 0], fake.T.contiguous().T, 3) == measured(real, fake, 3)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        got = precision_recall_density_coverage(real.to(dtype), fake.to(dtype), k=3)
        exact = precision_recall_density_coverage(real.to(dtype).double(), fake.to(dtype).double(), k=3)
        assert all(g.dtype == torch.float32 and g == e.float() for g, e in zip(got, exact, strict=True))
        assert k_nearest_distances(real.to(dtype), fake.to(dtype), 2).dtype == torch.float32
    point = cloud(1).expand(8, 3)
    assert measured(point, fake, 3)[0] == 0
    leaf = real.clone().requires_grad_()
    assert not precision_recall_density_coverage(leaf, fake).density.requires_grad
    assert not k_nearest_distances(leaf, fake, 2).requires_grad


@settings(max_examples=15, deadline=None)
@given(N=st.integers(3, 30), M=st.integers(3, 30), D=st.integers(1, 5), k=st.integers(1, 2), seed=st.integers(0, 99))
def test_properties(N, M, D, k, seed):
    real, fake = cloud(N, D, seed), cloud(M, D, seed + 1)
    precision, recall, density, coverage = measured(real, fake, k)
    assert 0 <= precision <= 1 and 0 <= recall <= 1 and 0 <= coverage <= 1
    assert precision <= density * k  # each fake point in a ball is counted at least once
    assert measured(fake, real, k)[:2] == [recall, precision]
    assert measured(4 * real.flip(0), 4 * fake, k) == [precision, recall, density, coverage]  # powers of two are exact


def test_equal_distributions_have_density_one():
    """E density = 1 for equal distributions; coverage 1 - prod (N - 1 - i) / (N + M - 1 - i) over i < k (Naeem et al.)."""
    N, M, k = 400, 300, 5
    results = np.array([measured(cloud(N, 2, seed), cloud(M, 2, seed + 50), k) for seed in range(20)]).mean(axis=0)
    missed = math.prod((N - 1 - i) / (N + M - 1 - i) for i in range(k))  # the k nearest of all are real
    # 20 draws: density scatters by about 0.02, coverage by 0.005.
    assert results[2] == pytest.approx(1, abs=0.06)
    assert results[3] == pytest.approx(1 - missed, abs=0.02)


def test_the_search_compiles_into_one_graph():
    torch._dynamo.reset()
    compiled = torch.compile(k_nearest_distances, fullgraph=True, backend="aot_eager")
    for N in (20, 25):
        x = cloud(N)
        assert torch.equal(compiled(x, x, 3, exclude_self=True), k_nearest_distances(x, x, 3, exclude_self=True))


@pytest.mark.parametrize("shift", [0.0, 1e3, 1e8])
def test_a_cloud_against_itself_ties_everywhere(shift):
    """The k-th neighbour of every point is on its sphere, so outside: k points, itself among them, are in each ball."""
    x = cloud(150, 7) + shift
    for fake in (x, x.flip(0)):
        assert measured(x, fake, 4) == [1, 1, 1, 1]


def test_an_outlier_does_not_blur_the_others():
    real, fake = cloud(60), cloud(50, seed=1)
    far = torch.full((1, 3), 1e12, dtype=torch.float64)
    got = precision_recall_density_coverage(torch.cat([far, real]), fake, k=3)
    assert got.coverage * 61 == pytest.approx(precision_recall_density_coverage(real, fake, k=3).coverage.item() * 60 + 1)


X = cloud(6, 4)
ERRORS = {
    "few real": (lambda: measured(X[:5], X, 5), ValueError, "k from 1 to 4, .* got k=5 with 5 points in real"),
    "few fake": (lambda: measured(X, X[:1], 5), ValueError, "got k=5 with 1 points in fake"),
    "k": (lambda: measured(X, X, 0), ValueError, "got k=0"),
    "empty": (lambda: measured(X, X[:0], 5), ValueError, "at least one point"),
    "width": (lambda: measured(X, X[:, :2], 2), ValueError, r"got x \[6, 4\], y \[6, 2\]"),
    "integers": (lambda: measured(X, X.long(), 2), TypeError, "floating point"),
    "two dtypes": (lambda: measured(X, X.float(), 2), TypeError, "one dtype"),
    "nan": (lambda: measured(X, X * math.nan, 2), ValueError, "NaN or infinity in fake"),
    "infinity": (lambda: k_nearest_distances(X / 0, X, 2), ValueError, "NaN or infinity in x"),
    "too many": (lambda: k_nearest_distances(X, X, 7), ValueError, "k from 1 to 6"),
    "too many others": (lambda: k_nearest_distances(X, X, 6, exclude_self=True), ValueError, "k from 1 to 5"),
    "not the same": (lambda: k_nearest_distances(X, X[:5], 2, exclude_self=True), ValueError, "the same points"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_user_errors(case):
    call, error, message = ERRORS[case]
    with pytest.raises(error, match=message):
        call()
