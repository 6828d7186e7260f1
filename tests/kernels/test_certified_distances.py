"""Neighbours and balls are those of exact distances, whatever the clouds: `math.dist` of each pair is what they are held against.

It scales its differences, so it neither cancels nor leaves the range of float64, and rounds a few times.
"""

from __future__ import annotations

import math

import pytest
import torch
from dae_kernels.precision_recall_density_coverage import k_nearest_distances, precision_recall_density_coverage, reference
from hypothesis import given, settings
from hypothesis import strategies as st

K, N = 3, 50
EPS = 2.0**-52


def randn(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def modes(count, D, noise, seed):
    """Points about `count` centres."""
    chosen = torch.randint(count, (N,), generator=torch.Generator().manual_seed(seed))
    return randn(count, D, seed=9)[chosen] + noise * randn(N, D, seed=seed)


def spread(seed, *factors):
    """Clusters as wide as each factor, a hundred times as far out."""
    factor_N1 = torch.tensor(factors, dtype=torch.float64).repeat(N)[:N, None]
    return randn(N, 4, seed=seed) * factor_N1 + 100 * factor_N1


def integers(seed, least, most, D):
    return torch.randint(least, most, (N, D), generator=torch.Generator().manual_seed(seed)).double()


def beside(constant, cloud):
    return torch.cat([torch.full((N, 1), constant, dtype=torch.float64), cloud], dim=1)


CLOUDS = {
    "ordinary": lambda seed: randn(N, 6, seed=seed),
    "collapsed in float32": lambda seed: modes(3, 256, 3e-8, seed).float().double(),
    "collapsed": lambda seed: modes(4, 16, 1e-8, seed),
    "collapsed further": lambda seed: modes(3, 16, 1e-12, seed),
    "two far clusters": lambda seed: 1e-6 * randn(N, 5, seed=seed) + 1e6 * (torch.arange(N) % 2)[:, None],
    "clusters of many sizes": lambda seed: spread(seed, 1e-9, 1e-3, 1.0, 1e4, 1e12),
    "clusters of all sizes": lambda seed: spread(seed, 1e-290, 1e-150, 1e-20, 1e-10, 1.0, 1e100, 1e290),
    "huge": lambda seed: randn(N, 4, seed=seed) * 1e160,
    "tiny": lambda seed: randn(N, 4, seed=seed) * 1e-200,
    "subnormal": lambda seed: integers(seed, -20, 20, 3) * 5e-324,
    "both ends": lambda seed: randn(N, 3, seed=seed).sign() * 8e307 + randn(N, 3, seed=seed) * 1e306,
    "tiny beside huge": lambda seed: beside(1e300, randn(N, 2, seed=seed) * 1e-20),
    "far from the origin": lambda seed: randn(N, 4, seed=seed) + 1e8,
    "lattice": lambda seed: integers(seed, 0, 4, 2),
    "binary": lambda seed: integers(seed, 0, 2, 12),
    "duplicates": lambda seed: randn(5, 3, seed=1)[integers(seed, 0, 5, 1).long()[:, 0]],
}


def exact(x, y):
    return torch.tensor([[math.dist(a, b) for b in y.tolist()] for a in x.tolist()], dtype=torch.float64)


def exact_shares(real, fake, k):
    """By the definition, with the stated rule of which distances are equal."""
    within, across = [exact(cloud, cloud).fill_diagonal_(math.inf) for cloud in (real, fake)], exact(real, fake)
    equal = 1 - (real.shape[1] + 1) * EPS
    radius_N, radius_M = (distance.sort(dim=1).values[:, k - 1] * equal for distance in within)
    in_real, in_fake = across < radius_N[:, None], across < radius_M
    shares = [in_real.any(0), in_fake.any(1), in_real.sum(0).double() / k, in_real.any(1)]
    return [share.double().mean().item() for share in shares]


@pytest.mark.parametrize("spare", [reference.SPARE, 1])
@pytest.mark.parametrize("kind", CLOUDS)
def test_nearest_distances(kind, spare, monkeypatch):
    """SPARE = 1 leaves the choice of neighbours to the error bound almost everywhere."""
    monkeypatch.setattr(reference, "SPARE", spare)
    x, y = CLOUDS[kind](0), CLOUDS[kind](1)
    for k in (1, K, 20):
        expected = exact(x, x).fill_diagonal_(math.inf).sort(dim=1).values[:, :k]
        # Of D differences, squares and additions and a root; math.dist rounds less.
        torch.testing.assert_close(k_nearest_distances(x, x, k, exclude_self=True), expected, rtol=(x.shape[1] + 4) * EPS, atol=0)
        expected = exact(x, y).sort(dim=1).values[:, :k]
        torch.testing.assert_close(k_nearest_distances(x, y, k), expected, rtol=(x.shape[1] + 4) * EPS, atol=0)


@pytest.mark.parametrize("kind", CLOUDS)
def test_shares(kind):
    real, fake = CLOUDS[kind](0), CLOUDS[kind](1)
    if kind == "subnormal":  # math.dist has no digits to tell such distances apart, their multiples do
        assert torch.equal(*(torch.stack(precision_recall_density_coverage(real * s, fake * s, k=K)) for s in (1, 2.0**1000)))
        real, fake = real * 2.0**1000, fake * 2.0**1000
    got = [share.item() for share in precision_recall_density_coverage(real, fake, k=K)]
    assert got == pytest.approx(exact_shares(real, fake, K), rel=1e-14)  # counts, divided in another order


# Numbers that make equal points, near-duplicates and far clusters likely, besides those that hypothesis thinks of.
COORDINATES = st.one_of(
    st.sampled_from([0.0, 1.0, 1.0 + EPS, 1.0 - EPS, -1.0, 1e-8, 1e8, 1e8 + 1e-7, 1e160, 1e-200, 5e-324, -4e307]),
    st.floats(-4e307, 4e307),
    st.integers(-3, 3).map(float),
)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), D=st.integers(1, 3))
def test_any_cloud(data, D):
    rows = st.lists(st.lists(COORDINATES, min_size=D, max_size=D), min_size=4, max_size=14)
    x, y = (torch.tensor(data.draw(rows), dtype=torch.float64) for _ in range(2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "SPARE", 1)
        for k in (1, 3):
            got = k_nearest_distances(x, y, k), k_nearest_distances(x, x, k, exclude_self=True)
            expected = exact(x, y), exact(x, x).fill_diagonal_(math.inf)
            for distance, truth in zip(got, expected, strict=True):
                # A subnormal distance has a last place, no last digit.
                torch.testing.assert_close(distance, truth.sort(dim=1).values[:, :k], rtol=(D + 4) * EPS, atol=1e-323)
