"""Feature statistics and the Fréchet distance, against closed forms and scipy."""

import math

import numpy as np
import pytest
import torch

from dae.metrics import FeatureStatistics, equal_count_frechet, frechet_distance


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def points_with(mean, covariance, rows=50, seed=0):
    """Points whose sample mean and unbiased sample covariance are the given ones, to rounding."""
    z = normal(rows, len(mean), seed=seed)
    z = z - z.mean(0)
    white = torch.linalg.solve_triangular(torch.linalg.cholesky(z.T @ z / (rows - 1)), z.T, upper=False)
    return (torch.linalg.cholesky(covariance) @ white).T + mean


def random_covariance(D, seed):
    x = normal(2 * D, D, seed=seed)
    return x.T @ x / D


def test_statistics_are_numpys():
    x = normal(41, 5) @ normal(5, 5, seed=1) + 3
    statistics = FeatureStatistics().update(x)
    assert statistics.count == 41
    # Sums of 41 terms of order 10 in float64.
    np.testing.assert_allclose(statistics.mean.numpy(), x.numpy().mean(0), rtol=1e-13)
    np.testing.assert_allclose(statistics.covariance.numpy(), np.cov(x.numpy().T), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("splits", [[41], [1] * 41, [0, 1, 0, 40], [20, 21], [40, 1]])
def test_stream_equals_one_shot_far_from_zero(splits):
    x = normal(41, 3) + 1e6
    stream = FeatureStatistics()
    for part in x.split(splits):
        stream.update(part)
    # A mean of 1e6 has a rounding of 1e-10, and so have deviations of order 1; E[x^2] - E[x]^2 would be off by 1e-4.
    torch.testing.assert_close(stream.covariance, torch.cov((x - 1e6).T), rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(stream.mean, x.mean(0), rtol=1e-15, atol=0)
    assert stream.count == 41


def test_merge_equals_one_shot_and_leaves_the_other_alone():
    x = normal(30, 4)
    left, right = FeatureStatistics().update(x[:7]), FeatureStatistics().update(x[7:])
    before = right.covariance.clone()
    empty = FeatureStatistics().merge(right)
    empty.update(x[:7])
    left.merge(right).merge(FeatureStatistics())
    for merged in (left, empty):
        torch.testing.assert_close(merged.covariance, torch.cov(x.T), rtol=1e-12, atol=1e-14)  # sums of 30 terms
        assert merged.count == 30
    assert torch.equal(right.covariance, before)
    assert right.count == 23


def test_statistics_accumulate_low_precision_in_float64():
    x = normal(1000, 3).to(torch.bfloat16)
    torch.testing.assert_close(FeatureStatistics().update(x).covariance, torch.cov(x.double().T), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("splits", [[10, 20], [30], [0, 30, 0], [1, 9, 17, 3]])
def test_all_reduce_is_the_statistics_of_all_rows(processes, splits):
    x = normal(30, 4) + 100
    parts = x.split(splits)
    results = processes(len(parts), lambda rank: FeatureStatistics().update(parts[rank]).all_reduce())
    for statistics in results:
        assert statistics.count == 30
        torch.testing.assert_close(statistics.mean, x.mean(0), rtol=1e-14, atol=0)
        # Offsets of 100 round to 1e-14.
        torch.testing.assert_close(statistics.covariance, torch.cov(x.T), rtol=1e-11, atol=1e-12)


def test_all_reduce_without_any_rows(processes):
    assert [s.count for s in processes(2, lambda rank: FeatureStatistics().all_reduce())] == [0, 0]


def test_all_reduce_of_different_dimensions_fails_everywhere(processes):
    def reduce(rank):
        with pytest.raises(ValueError, match=f"one feature dimension in all processes, got {3 + rank} here"):
            FeatureStatistics().update(normal(5, 3 + rank)).all_reduce()
        return True

    assert all(processes(3, reduce))


def test_statistics_errors():
    statistics = FeatureStatistics()
    with pytest.raises(ValueError, match="at least 1 row"):
        _ = statistics.mean
    with pytest.raises(ValueError, match="at least 2 rows for a covariance, got 0"):
        _ = statistics.covariance
    statistics.update(normal(4, 3))
    for x, message in [
        (normal(4, 2), "expected 3 features per row, got 2"),
        (normal(4), r"features \[N, D\], got shape \(4,\)"),
        (normal(4, 3) * math.nan, "NaN or infinity"),
        (normal(4, 3) / 0, "NaN or infinity"),
    ]:
        with pytest.raises(ValueError, match=message):
            statistics.update(x)
    with pytest.raises(TypeError, match=r"got torch\.int64"):
        statistics.update(torch.ones(4, 3, dtype=torch.int64))
    assert statistics.count == 4, "a refused batch must not count"


def test_commuting_gaussians():
    a, b = torch.tensor([1.0, 4.0, 0.25, 9.0]).double(), torch.tensor([4.0, 1.0, 1.0, 0.01]).double()
    rotation = torch.linalg.qr(normal(4, 4)).Q
    mean_a, mean_b = normal(4, seed=2), normal(4, seed=3)
    x = points_with(mean_a, rotation @ a.diag() @ rotation.T)
    y = points_with(mean_b, rotation @ b.diag() @ rotation.T, rows=77, seed=5)
    expected = (mean_a - mean_b).square().sum() + (a.sqrt() - b.sqrt()).square().sum()
    # Rounding 1e-16 of traces of order 10, times the condition (30) of the roots.
    assert frechet_distance(x, y) == pytest.approx(expected.item(), rel=1e-12)


@pytest.mark.parametrize("D", [1, 2, 7, 30])
def test_non_commuting_gaussians_against_scipy(D):
    from scipy.linalg import sqrtm

    a, b = random_covariance(D, seed=D), 3 * random_covariance(D, seed=D + 1)
    mean_a, mean_b = normal(D, seed=2), normal(D, seed=3)
    x, y = points_with(mean_a, a, rows=100), points_with(mean_b, b, rows=90, seed=9)
    root = np.trace(np.real(sqrtm(a.numpy() @ b.numpy())))
    expected = (mean_a - mean_b).square().sum().item() + (a.trace() + b.trace()).item() - 2 * root
    if D > 1:
        assert (a @ b - b @ a).abs().max() > 0.1
    # scipy's Schur method and ours round differently, by about 1e-15 of the traces (10 to 200) times a condition of 100.
    assert frechet_distance(x, y) == pytest.approx(expected, rel=1e-10)
    assert frechet_distance(x, y) == pytest.approx(frechet_distance(y, x), rel=1e-12)


def test_translation_gives_the_squared_length():
    x, d = normal(60, 5) @ normal(5, 5, seed=1), torch.tensor([3.0, 0, 0, 4.0, 0]).double()
    assert frechet_distance(x, x + d) == pytest.approx(25.0, rel=1e-12)


def test_scaling_gives_the_squared_difference_of_the_deviations():
    x = normal(60, 3)
    x = x - x.mean(0)
    assert frechet_distance(x, 3 * x) == pytest.approx(4 * torch.cov(x.T).trace().item(), rel=1e-12)


@pytest.mark.parametrize(("rows", "D"), [(100, 8), (20, 64), (2, 5)])
def test_a_set_is_at_distance_zero_from_itself_even_if_its_covariance_is_singular(rows, D):
    x = normal(rows, D) @ normal(D, D, seed=1)
    trace = torch.cov(x.T).trace().item()
    # The square root of eigenvalues that should be 0 would leave 1e-7 of the trace; singular values leave rounding.
    assert 0 <= frechet_distance(x, x) < 1e-12 * trace
    assert 0 <= frechet_distance(x, x.flip(0)) < 1e-12 * trace


def test_statistics_and_features_agree():
    x, y = normal(40, 3), normal(30, 3, seed=1) * 2
    streams = FeatureStatistics().update(x[:11]).update(x[11:]), FeatureStatistics().update(y)
    assert frechet_distance(*streams) == pytest.approx(frechet_distance(x, y), rel=1e-12)
    assert frechet_distance(x.float(), streams[1]) == pytest.approx(frechet_distance(x, y), rel=1e-6)  # float32 features


def test_distance_errors():
    x = normal(5, 3)
    with pytest.raises(ValueError, match="at least 2 rows for a covariance, got 1"):
        frechet_distance(x, x[:1])
    with pytest.raises(ValueError, match="got 0"):
        frechet_distance(x[:0], x)
    with pytest.raises(ValueError, match="one dimension, got 3 and 2"):
        frechet_distance(x, x[:, :2])
    with pytest.raises(ValueError, match="NaN or infinity"):
        frechet_distance(x, x * math.nan)


def test_equal_counts_draw_disjoint_subsets():
    reference, other = normal(40, 2), normal(100, 2, seed=1)
    mean, std, number = equal_count_frechet(reference, other, seed=0)
    assert number == 20 and mean > 0 and std > 0
    assert equal_count_frechet(reference, other, seed=0) == (mean, std, number)
    assert equal_count_frechet(reference, other, seed=1).mean != mean
    assert equal_count_frechet(reference, other, count=10, repeats=3, seed=0).number_of_subsets == 30
    assert equal_count_frechet(other, reference, repeats=1, seed=0).number_of_subsets == 1
    assert equal_count_frechet(other, reference, repeats=1, seed=0).std == 0.0


def test_repeats_make_the_mean_depend_less_on_the_draw():
    reference, other = normal(40, 4), normal(100, 4, seed=1)
    spread = [
        torch.tensor([equal_count_frechet(reference, other, repeats=r, seed=s).mean for s in range(8)]).std() for r in (1, 16)
    ]
    assert spread[1] < 0.6 * spread[0]
    with pytest.raises(ValueError, match="repeats: expected at least 1, got 0"):
        equal_count_frechet(reference, other, repeats=0, seed=0)


def test_equal_counts_use_each_row_at_most_once():
    # Each row is far out in its own direction, so a subset's distance is about the sum of its own squared lengths / n:
    # two disjoint halves add up to the whole only if no row is in both.
    reference = torch.zeros(4, 8).double()
    other = torch.diag(torch.arange(1, 9).double())
    mean, std, number = equal_count_frechet(reference, other, repeats=1, seed=3)
    assert number == 2
    # tr S + |m|^2 of 4 rows e_i a_i: sum a_i^2 (3/4 / 3 + 1/16) / 1, as rows are orthogonal.
    assert mean * 2 == pytest.approx((torch.arange(1, 9).double() ** 2).sum().item() * (1 / 4 + 1 / 16), rel=1e-12)
    assert std > 0


def test_equal_counts_take_a_subset_of_the_reference_too():
    # Orthonormal rows against zeros: tr S + |m|^2 = (n - 1) / n * n / (n - 1) + 1 / n = 1 + 1 / n of the subset's n rows.
    distance = equal_count_frechet(torch.eye(8).double(), torch.zeros(4, 8).double(), seed=0).mean
    assert distance == pytest.approx(1 + 1 / 4, rel=1e-12)


def test_equal_counts_leave_the_global_random_state_alone():
    before = torch.random.get_rng_state()
    equal_count_frechet(normal(10, 2), normal(10, 2, seed=1), seed=0)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("count", [1, 6, 0, -1])
def test_equal_counts_out_of_range(count):
    with pytest.raises(ValueError, match=f"count: expected 2 to 5 rows .*, got {count}"):
        equal_count_frechet(normal(5, 2), normal(9, 2), count=count, seed=0)


def test_equal_counts_errors_name_the_argument():
    with pytest.raises(ValueError, match="other_features: expected at least 2 rows, got 1"):
        equal_count_frechet(normal(5, 2), normal(1, 2), seed=0)
    with pytest.raises(ValueError, match="other_features: expected 2 features per row, got 3"):
        equal_count_frechet(normal(5, 2), normal(5, 3), seed=0)
