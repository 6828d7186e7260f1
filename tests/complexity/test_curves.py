"""Complexity curves fall where families are nested, and tell how much a latent asks of its generators."""

import json
import math

import pytest
import torch

from dae.complexity.curves import ComplexityCurve, complexity_curve
from dae.complexity.estimate import Estimate
from dae.complexity.families import ConvDecoders, LinearMaps, LipschitzNetworks, MLPs
from dae.complexity.generator_distance import generator_distance


def cloud(N, D, seed):
    return torch.randn(N, D, generator=torch.Generator().manual_seed(seed))


def falls(curve: ComplexityCurve) -> bool:
    """But for the spread over the seeds, which is the error of finite samples."""
    pairs = zip(curve.estimates, curve.estimates[1:], strict=False)
    return all(after.value <= before.value + before.std for before, after in pairs)


@pytest.mark.parametrize(
    ("family", "capacities", "distance"),
    [
        (LinearMaps(), [0.25, 0.5, 1.0, 2.0, math.inf], "frechet"),
        (LinearMaps(), [0.25, 0.5, 1.0, 2.0, math.inf], "reconstruction"),
        (LinearMaps(), [0.25, 1.0, 4.0], "energy"),
        (MLPs(depth=1), [1, 4, 16], "reconstruction"),
        (LipschitzNetworks(width=8, depth=1), [0.5, 1.0, 2.0], "sliced_wasserstein"),
    ],
    ids=str,
)
def test_nested_families_fall(family, capacities, distance):
    z = cloud(400, 2, 0)
    x = torch.cat([2 * z + 0.1 * cloud(400, 2, 1), z.abs()], dim=1)
    curve = complexity_curve(z, x, family, capacities, distance, steps=60, batch_size=64, learning_rate=0.04)
    assert curve.chosen and falls(curve)
    assert curve.estimates[-1].value < 0.8 * curve.estimates[0].value, "a curve that is flat would fall too"
    assert curve.capacities == tuple(capacities)
    assert [estimate.capacity for estimate in curve.estimates] == list(capacities)
    assert {estimate.bound for estimate in curve.estimates} == {"exact" if distance == "frechet" else "upper"}


def test_the_raw_estimates_are_those_of_generator_distance():
    z, x = cloud(100, 2, 0), cloud(100, 3, 1)
    options = {"steps": 5, "seeds": (3, 4)}
    curve = complexity_curve(z, x, MLPs(), [2, 8], "sliced_wasserstein", **options)
    for raw in curve.raw:
        assert raw == generator_distance(z, x, MLPs(int(raw.capacity)), "sliced_wasserstein", **options)
    for index, (best, raw) in enumerate(zip(curve.estimates, curve.raw, strict=True)):
        assert all(value in {r.values[s] for r in curve.raw[: index + 1]} for s, value in enumerate(best.values))
        assert best.family == raw.family


def test_a_family_that_is_not_nested_is_reported_as_fitted():
    z, x = cloud(20, 8, 0).reshape(20, 2, 2, 2), cloud(20, 16, 1).reshape(20, 1, 4, 4)
    curve = complexity_curve(z, x, ConvDecoders(base_channels=8), [0.5, 1.0], "reconstruction", steps=2, seeds=(0,))
    assert not curve.chosen and curve.estimates == curve.raw


@pytest.mark.slow
def test_two_modes_need_a_steep_generator_from_a_gaussian_and_none_from_two_modes():
    """A Gaussian has to be torn apart: the gap over the width of its middle; a latent with two modes only has to be moved."""
    N = 1200
    sign = torch.tensor([-1.0, 1.0]).repeat(N // 2)[:, None]
    sign_of_latent = sign[torch.randperm(N, generator=torch.Generator().manual_seed(9))]
    family, capacities, options = (
        LipschitzNetworks(width=8),
        [1.0, 4.0, 16.0],
        {"steps": 100, "batch_size": 128, "learning_rate": 0.05},
    )
    required = {}
    for gap in (2.0, 8.0):
        x = sign * gap / 2 + 0.05 * cloud(N, 1, 0)
        latents = {"gaussian": cloud(N, 1, 1), "modes": sign_of_latent * gap / 2 + 0.05 * cloud(N, 1, 2)}
        for name, z in latents.items():
            curve = complexity_curve(z, x, family, capacities, "energy", **options)
            assert falls(curve)
            required[name, gap] = curve.required_capacity(0.05 * gap)  # the energy distance grows with the unit of length
    assert required == {("gaussian", 2.0): 4.0, ("gaussian", 8.0): 16.0, ("modes", 2.0): 1.0, ("modes", 8.0): 1.0}


REST = {"bound": "upper", "distance": "mmd", "convention": "", "family": "f", "capacity": 1.0, "counts": (2, 2)}


def curve_of(*values: float) -> ComplexityCurve:
    estimates = tuple(Estimate.over([value], (0,), **REST) for value in values)
    return ComplexityCurve(tuple(float(2**n) for n in range(len(values))), estimates, estimates, "width", True)


def test_required_capacity():
    curve = curve_of(3.0, 2.0, 2.0, 0.5)
    assert [curve.required_capacity(eps) for eps in (4, 3.0, 2.0, 1.9, 0.5, 0.4)] == [1.0, 1.0, 2.0, 8.0, 8.0, None]
    estimates = tuple(
        Estimate.over(values, (0, 1), **REST)
        for values in ((3.0, 3.2), (2.0, 0.9), (0.8, 0.7))  # means 3.1, 1.45, 0.75
    )
    two = ComplexityCurve((1.0, 2.0, 4.0), estimates, estimates, "width", True)
    assert two.required_capacity(1.0) == 4.0 and two.required_capacity_of_seeds(1.0) == (4.0, 2.0)
    assert two.required_capacity_of_seeds(0.75) == (None, 4.0)
    for eps in (math.nan, math.inf):
        with pytest.raises(ValueError, match="finite eps"):
            curve.required_capacity(eps)
    with pytest.raises(TypeError, match="eps as a number"):
        curve.required_capacity("0.1")
    assert json.loads(json.dumps(curve.to_dict(), allow_nan=False))["knob"] == "width"


@pytest.mark.parametrize(
    ("capacities", "error", "message"),
    [
        ([2, 1], ValueError, "capacities that increase"),
        ([1, 1], ValueError, "capacities that increase"),
        ([1.0, math.nan], ValueError, "capacities that increase"),
        ([], ValueError, "at least one capacity"),
        (3, TypeError, "sequence of numbers"),
        (["1"], TypeError, "sequence of numbers"),
        ([1.5], ValueError, "whole width"),
    ],
)
def test_bad_capacities(capacities, error, message):
    with pytest.raises(error, match=message):
        complexity_curve(cloud(10, 2, 0), cloud(10, 2, 1), MLPs(), capacities, "mmd")


def test_bad_clouds():
    with pytest.raises(ValueError, match="equal ones"):
        complexity_curve(torch.zeros(10, 2), cloud(10, 2, 1), MLPs(), [1], "mmd")
