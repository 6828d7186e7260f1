"""Gromov-Wasserstein against what isometries and scales must give."""

import sys

import pytest
import torch

from dae.complexity.gromov_wasserstein import gromov_wasserstein


def cloud(N, D, seed=0):
    return torch.randn(N, D, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(autouse=True)
def pot():
    pytest.importorskip("ot")


@pytest.mark.parametrize("shuffled", [False, True])
def test_isometric_clouds(shuffled):
    """A rotation into more dimensions and a shift, whatever the order of the rows."""
    z = cloud(60, 3)
    axes = torch.linalg.qr(cloud(5, 5, 1))[0][:, :3]
    x = z @ axes.T + 7
    if shuffled:
        x = x[torch.randperm(60, generator=torch.Generator().manual_seed(2))]
    found = gromov_wasserstein(z, x)
    assert 0 <= found.value < 1e-9  # float32 clouds: squares of 1e-6
    assert found.bound == "upper" and found.counts == (60, 60) and found.family is None


def test_two_points():
    """Any plan of two points costs at least (a - b)^2 / 2, and the identity costs that."""
    found = gromov_wasserstein(torch.tensor([[0.0], [1.0]]), torch.tensor([[0.0, 0.0], [0.0, 4.0]]))
    assert found.value == pytest.approx((4 - 1) ** 2 / 2)


def test_a_scaled_cloud():
    """Along the diagonal plan the cost is (s - 1)^2 E d^2, and none costs less than sqrt(E d'^2) - sqrt(E d^2), squared."""
    z = cloud(50, 2)
    squares = torch.cdist(z.double(), z.double()).square().mean().item()
    assert gromov_wasserstein(z, 3 * z).value == pytest.approx(4 * squares, rel=1e-5)
    assert gromov_wasserstein(z, 3 * z, normalize=True).value < 1e-9


def test_seeds_draw_the_points():
    z, x = cloud(100, 2), cloud(100, 3, 1)
    found = gromov_wasserstein(z, x, num_points=20, seeds=(0, 1))
    assert found == gromov_wasserstein(z, x, num_points=20, seeds=(0, 1))
    assert found.values[0] != found.values[1] and found.counts == (20, 20)
    assert found.value > 0


def test_images():
    z, x = cloud(10, 4), cloud(10, 12, 1)
    assert gromov_wasserstein(z, x.reshape(10, 3, 2, 2), seeds=(0,)) == gromov_wasserstein(z, x, seeds=(0,))


def test_bad_input(monkeypatch):
    z = cloud(10, 2)
    for call, message in (
        (lambda: gromov_wasserstein(z, z[:5]), "10 latents and 5 data"),
        (lambda: gromov_wasserstein(z, z * torch.nan), "NaN"),
        (lambda: gromov_wasserstein(torch.ones(10, 2), z), "equal ones"),
        (lambda: gromov_wasserstein(z, z, num_points=1), "num_points >= 2"),
        (lambda: gromov_wasserstein(z, z, max_iterations=0), "max_iterations >= 1"),
        (lambda: gromov_wasserstein(z, z, seeds=()), "at least one seed"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    monkeypatch.setitem(sys.modules, "ot", None)
    with pytest.raises(ImportError, match="pip install POT"):
        gromov_wasserstein(z, z)
