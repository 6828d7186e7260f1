"""What the operations share: operands and options of another type are refused alike, and where clouds have their centre."""

from __future__ import annotations

import pytest
import torch
from dae_kernels.clouds import middle, sampled
from dae_kernels.codebook_statistics import codebook_statistics
from dae_kernels.energy_distance import energy_distance
from dae_kernels.frechet_distance import GaussianStatistics, frechet_distance, gaussian_w2
from dae_kernels.mmd import mmd
from dae_kernels.nearest_code import nearest_code
from dae_kernels.precision_recall_density_coverage import k_nearest_distances, precision_recall_density_coverage
from dae_kernels.sliced_wasserstein import max_sliced_wasserstein, sliced_wasserstein
from dae_kernels.vector_quantize import vector_quantize
from hypothesis import given, settings
from hypothesis import strategies as st

DISTANCES = {
    "energy": energy_distance,
    "mmd": lambda x, y, **options: mmd(x, y, bandwidths=(1.0,), **options),
    "sliced": sliced_wasserstein,
    "max": max_sliced_wasserstein,
}
X, Y, E = torch.randn(6, 3), torch.randn(7, 3), torch.eye(3)
ONES = torch.zeros(6, dtype=torch.int64)
PAIRS = DISTANCES | {
    "prdc": lambda x, y: precision_recall_density_coverage(x, y, k=2),
    "nearest": lambda x, y: k_nearest_distances(x, y, 2),
    "quantize": vector_quantize,
    "statistics": lambda x, y: codebook_statistics(x, y if y is not Y else ONES, 3),
    "means": lambda x, y: gaussian_w2(x if x is not X else X[0], E, y if y is not Y else Y[0], E),
    "covariances": lambda x, y: gaussian_w2(X[0], x if x is not X else E, Y[0], y if y is not Y else E),
    "frechet": frechet_distance,
}


@pytest.mark.parametrize("kind", PAIRS)
def test_operands_that_are_no_tensors(kind):
    PAIRS[kind](X, Y)
    for bad in (None, X.tolist(), X.numpy(), 1.0):
        for operands in ((bad, Y), (X, bad)):
            with pytest.raises(TypeError, match=f"needs .* as a torch.Tensor.* got {type(bad).__name__}"):
                PAIRS[kind](*operands)


@pytest.mark.parametrize("kind", DISTANCES)
def test_weights_that_are_no_tensors(kind):
    for bad in ([1.0] * 6, torch.ones(6).numpy(), 1.0):
        with pytest.raises(TypeError, match=f"needs weights_x as a torch.Tensor, got {type(bad).__name__}"):
            DISTANCES[kind](X, Y, weights_x=bad)


@pytest.mark.parametrize("kind", DISTANCES)
def test_float16_weights_whose_sum_is_none(kind):
    """300 weights of 300 sum to 90000, beyond float16; their proportions are those of ones."""
    x, projections = torch.randn(300, 3), {"projections": E} if kind in ("sliced", "max") else {}
    weights = torch.full((300,), 300.0, dtype=torch.float16)
    got = DISTANCES[kind](x, Y, weights_x=weights, **projections)
    torch.testing.assert_close(got, DISTANCES[kind](x, Y, weights_x=torch.ones(300), **projections))


OPTIONS = {
    "prdc k": (lambda: precision_recall_density_coverage(X, Y, k=2.5), "k as an int, got float"),
    "prdc k None": (lambda: precision_recall_density_coverage(X, Y, k=None), "k as an int, got NoneType"),
    "nearest k": (lambda: k_nearest_distances(X, Y, 2.5), "k as an int, got float"),
    "K word": (lambda: codebook_statistics(X, ONES, "4"), "K as an int, got str"),
    "K None": (lambda: codebook_statistics(X, ONES, None), "K as an int, got NoneType"),
    "K bool": (lambda: codebook_statistics(X, ONES, True), "K as an int, got bool"),
    "p None": (lambda: sliced_wasserstein(X, Y, p=None), "p as a number, got NoneType"),
    "p word": (lambda: max_sliced_wasserstein(X, Y, p="2"), "p as a number, got str"),
    "projections 2.5": (lambda: sliced_wasserstein(X, Y, num_projections=2.5), "num_projections as an int, got float"),
    "projections None": (lambda: sliced_wasserstein(X, Y, num_projections=None), "num_projections as an int, got NoneType"),
    "generator": (lambda: sliced_wasserstein(X, Y, generator=3), "generator as a torch.Generator or None, got int"),
    "projections list": (lambda: sliced_wasserstein(X, Y, projections=E.tolist()), "projections as a torch.Tensor, got list"),
    "commitment None": (lambda: vector_quantize(X, Y, commitment_weight=None), "commitment_weight as a number, got NoneType"),
    "update": (lambda: GaussianStatistics().update(X.tolist()), "x as a torch.Tensor, got list"),
    "merge": (lambda: GaussianStatistics().merge(X), "expected GaussianStatistics to merge, got Tensor"),
    "from_state": (lambda: GaussianStatistics.from_state([3.0, 0.0, 0.0]), "state as a torch.Tensor, got list"),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_options_of_another_type(case):
    call, message = OPTIONS[case]
    with pytest.raises(TypeError, match=message):
        call()


CONVENTIONS = {precision_recall_density_coverage: "share", nearest_code: "squared", vector_quantize: "squared"}


@pytest.mark.parametrize("function", CONVENTIONS)
def test_conventions_are_stated(function):
    assert function.convention.value == CONVENTIONS[function]
    assert "|x - " in function.convention.cost and function.convention.bias


@settings(max_examples=20, deadline=None)
@given(weights=st.lists(st.sampled_from([0.0, 0.0, 1e-30, 0.3, 1.0, 7.0]), min_size=1, max_size=700).filter(any))
def test_a_centre_comes_from_points_in_proportion_to_their_weights(weights):
    weights_N = torch.tensor(weights, dtype=torch.float64)
    weights_N /= weights_N.sum()
    points_S1 = sampled(torch.arange(len(weights), dtype=torch.float64)[:, None], weights_N)
    counts_N = torch.bincount(points_S1[:, 0].long(), minlength=len(weights))
    assert (counts_N[weights_N == 0] == 0).all()
    assert ((counts_N - len(points_S1) * weights_N).abs() < 1 + 1e-9).all()


@pytest.mark.parametrize("N", [1, 2, 3, 7, 100, 511, 512, 513, 1023, 1024, 1025, 5000, 99991])
def test_equal_weights_need_not_be_summed(N):
    cloud = torch.arange(N, dtype=torch.float64)[:, None]
    assert torch.equal(sampled(cloud, None), sampled(cloud, torch.full((N,), 1 / N, dtype=torch.float64)))


def test_the_middle_is_the_lower_median():
    for points in (torch.randn(7, 3), torch.randn(8, 3)):
        assert torch.equal(middle(points), points.median(dim=0).values)
