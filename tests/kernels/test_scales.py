"""Distances of clouds in other units: the same number times the unit, where squares of distances would overflow or be 0."""

from __future__ import annotations

import pytest
import torch
from dae_kernels import (
    barycentric_map,
    energy_distance,
    frechet_distance,
    max_sliced_wasserstein,
    mmd,
    sinkhorn_divergence,
    sliced_wasserstein,
)
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in the interpreter
DIRECTIONS = torch.randn(3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

# power of the unit that the value has, and the distance of clouds in units of s
DISTANCES = {
    "sinkhorn p=1": (1, lambda x, y, s: sinkhorn_divergence(x, y, p=1, blur=0.5 * s)),
    "sinkhorn p=2": (2, lambda x, y, s: sinkhorn_divergence(x, y, p=2, blur=0.5 * s)),
    "sinkhorn triton": (1, lambda x, y, s: sinkhorn_divergence(x, y, p=1, blur=3 * s, diameter=3 * s, impl="triton")),
    "sinkhorn reach": (1, lambda x, y, s: sinkhorn_divergence(x, y, p=1, blur=0.5 * s, reach=2 * s, tolerance=1e-3)),
    "sinkhorn large blur": (2, lambda x, y, s: sinkhorn_divergence(x, y, p=2, blur=1e12 * s)),
    "energy": (1, lambda x, y, s: energy_distance(x, y)),
    "energy triton": (1, lambda x, y, s: energy_distance(x, y, impl="triton")),
    "mmd": (0, lambda x, y, s: mmd(x, y, bandwidths=(0.5 * s, 2 * s))),
    "sliced p=1": (1, lambda x, y, s: sliced_wasserstein(x, y, p=1, projections=DIRECTIONS.to(x))),
    "sliced p=2": (1, lambda x, y, s: sliced_wasserstein(x, y, p=2, projections=DIRECTIONS.to(x))),
    "sliced p=3": (1, lambda x, y, s: sliced_wasserstein(x, y[:5], p=3, projections=DIRECTIONS.to(x))),
    "max sliced": (1, lambda x, y, s: max_sliced_wasserstein(x, y, p=2, projections=DIRECTIONS.to(x))),
    "frechet": (2, lambda x, y, s: frechet_distance(x, y)),
}
# A power of 2 near the decimal one rounds no point, so that only the operation's own arithmetic differs.
SCALES = {torch.float32: (2.0**-100, 2.0**-66, 2.0**66, 2.0**100), torch.float64: (2.0**-490, 2.0**490)}
CASES = [(name, dtype) for name in DISTANCES for dtype in SCALES if dtype == torch.float32 or "triton" not in name]


def clouds(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x, y = (torch.randn(n, 3, generator=generator, dtype=torch.float64) for n in (9, 7))
    return x.to(DEVICE, dtype), (y + 0.5).to(DEVICE, dtype)


@pytest.mark.parametrize("name, dtype", CASES)
def test_a_unit_is_a_factor(name, dtype):
    power, distance = DISTANCES[name]
    x, y = clouds(dtype)

    def results(scale: float) -> tuple[Tensor, Tensor]:
        leaf = (x * scale).requires_grad_()
        value = distance(leaf, y * scale, scale)
        return value.detach(), torch.autograd.grad(value, leaf)[0]

    value, gradient = results(1.0)
    for scale in SCALES[dtype]:
        scaled, scaled_gradient = results(scale)
        # A squared distance may be beyond the dtype, and then is infinite or 0; the gradient of it is not.
        limits = torch.finfo(dtype)
        expected = (value.double() * scale**power).to(dtype)
        torch.testing.assert_close(scaled, expected, rtol=4 * limits.eps, atol=2 * limits.tiny * limits.eps)
        if power > 0:  # that of mmd has the unit 1 / s
            scaled_gradient = scaled_gradient.double() / scale ** (power - 1)
            close = {"rtol": 1e-5, "atol": 1e-7} if dtype == torch.float32 else {"rtol": 1e-11, "atol": 1e-13}
            torch.testing.assert_close(scaled_gradient, gradient.double(), **close)


@pytest.mark.parametrize("name", [name for name in DISTANCES if "triton" not in name])
@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e20, 1e30])
def test_decimal_units(name, scale):
    """Rounding of the points is all that differs: a few digits of float32."""
    power, distance = DISTANCES[name]
    x, y = clouds(torch.float64)
    value = distance((x * scale).float(), (y * scale).float(), scale)
    expected = (distance(x, y, 1.0) * scale**power).float()
    torch.testing.assert_close(value, expected, rtol=1e-4, atol=2 * 2.0**-149)


def test_projections_of_any_length():
    x, y = clouds(torch.float32)
    expected = sliced_wasserstein(x, y, projections=DIRECTIONS.to(x))
    for scale in (2.0**-100, 2.0**100):
        torch.testing.assert_close(
            sliced_wasserstein(x, y, projections=DIRECTIONS.to(x) * scale), expected * scale, rtol=1e-6, atol=0
        )


def test_a_map_has_the_unit_of_the_points():
    x, y = clouds(torch.float32)
    image = barycentric_map(x, y, blur=0.5)
    for scale in SCALES[torch.float32]:
        assert torch.equal(barycentric_map(x * scale, y * scale, blur=0.5 * scale) / scale, image)


def test_points_at_the_ends_of_float32():
    x, y = torch.tensor([[3e38, -3e38]], device=DEVICE), torch.tensor([[-3e38, -3e38]], device=DEVICE)
    assert sinkhorn_divergence(x, x, p=1, blur=1e37) == 0
    assert sinkhorn_divergence(x / 2, y / 2, p=1, blur=1e37).item() == pytest.approx(3e38, rel=1e-6)
