"""Statistics of comparisons against scipy and closed forms."""

import math

import numpy as np
import pytest
from scipy import stats

from dae.statistics import (
    difference_at_equal_rate,
    fisher_z,
    holm,
    mean_correlation,
    mean_interval,
    paired_bootstrap,
    paired_interval,
    paired_p_value,
    rank_correlation,
)

RANDOM = np.random.default_rng(0)


@pytest.mark.parametrize("n", [2, 5, 30])
@pytest.mark.parametrize("level", [0.5, 0.95])
def test_intervals_are_scipys(n, level):
    x, y = RANDOM.normal(size=(2, n))
    ours, theirs = paired_interval(x, y, level), stats.ttest_rel(x, y).confidence_interval(level)
    np.testing.assert_allclose((ours.low, ours.high), (theirs.low, theirs.high), rtol=1e-12)
    np.testing.assert_allclose(paired_p_value(x, y), stats.ttest_rel(x, y).pvalue, rtol=1e-10)
    np.testing.assert_allclose(mean_interval(x, level)[1:3], stats.ttest_1samp(x, 0).confidence_interval(level), rtol=1e-12)
    assert ours.n == n


def test_interval_by_hand():
    # Differences 1, 3: mean 2, s = sqrt(2), s / sqrt(2) = 1; t_1 is Cauchy, whose 75 % quantile is 1.
    assert paired_interval([2, 5], [1, 2], level=0.5) == pytest.approx((2, 1, 3, 2))


def test_what_pairs_share_cancels():
    shared = 100 * RANDOM.normal(size=5)
    ours = np.array([0.9, 1.1, 1.0, 1.2, 0.8])
    np.testing.assert_allclose(paired_interval(shared + ours, shared), mean_interval(ours), rtol=1e-12)


def test_coverage():
    """Of 4,000 intervals of 4 normal values 95 % hold the mean; the share's deviation is 0.34 %, four of which are allowed."""
    held = [i.low <= 1 <= i.high for i in map(mean_interval, np.random.default_rng(1).normal(1, 3, (4000, 4)))]
    assert abs(np.mean(held) - 0.95) < 4 * math.sqrt(0.95 * 0.05 / 4000)


def test_one_value_has_no_interval_and_equal_differences_are_certain():
    assert mean_interval([3.0]) == (3.0, None, None, 1) and mean_interval([3.0]).verdict == 0
    assert paired_interval([2, 3], [1, 2]) == (1, 1, 1, 2)
    assert (paired_p_value([2, 3], [1, 2]), paired_p_value([1, 2], [1, 2])) == (0.0, 1.0)


def test_verdicts():
    assert [paired_interval(x, [0, 0, 0]).verdict for x in ([1, 1.1, 0.9], [-1, -1.1, -0.9], [1, -1, 0.1])] == [1, -1, 0]
    assert paired_interval([1, 2], [1, 2]).verdict == 0


@pytest.mark.parametrize(
    ("ours", "theirs", "words"),
    [
        ([1], [2], "at least 2 pairs"), ([1, 2], [1, 2, 3], "2 values of ours and 3"), ([1, math.nan], [1, 2], "finite"),
        ([1, 2], [1, math.inf], "finite"), ([], [], "at least one"),
    ],
)  # fmt: skip
def test_bad_pairs(ours, theirs, words):
    for function in (paired_interval, paired_p_value):
        with pytest.raises(ValueError, match=words):
            function(ours, theirs)


@pytest.mark.parametrize("level", [0, 1, 95])
def test_bad_levels(level):
    with pytest.raises(ValueError, match="between 0 and 1"):
        mean_interval([1, 2], level)


def test_holm_by_hand():
    # 4 x 0.01; 3 x 0.02; then 2 x 0.025 = 0.05 stays at the 0.06 before it; 1 x 0.5.
    assert holm([0.02, 0.5, 0.01, 0.025]) == pytest.approx([0.06, 0.5, 0.04, 0.06])
    assert holm([0.9, 0.8]) == [1, 1] and holm([]) == [] and holm([0.03]) == [0.03]
    with pytest.raises(ValueError, match="0 to 1"):
        holm([1.5])


def test_equal_rate_interpolates_and_never_extrapolates():
    frontier = {0: [(20, 10), (10, 30)], 1: [(10, 40), (20, 20), (30, 10)], 2: [(10, 1), (20, 2)]}
    ours = {0: (15, 18), 1: (20, 23), 2: (20.001, 5)}
    found = difference_at_equal_rate(frontier, ours)
    assert found.seeds == (0, 1, 2) and found.inside == 2
    assert found.differences == (-2, 3, None) and found.baseline == (20, 20, None)
    assert found.interval == paired_interval([18, 23], [20, 20])


def test_a_frontier_is_its_own_equal():
    """At the baseline's own rates, ends included, the differences are those of the points."""
    points = [(32.0, 5.0), (48.0, 4.0), (64.0, 3.5)]
    for rate, distance in points:
        assert difference_at_equal_rate({7: points}, {7: (rate, distance + 1)}).differences == (1,)


def test_equal_rate_without_a_seed_inside_or_in_common():
    outside = difference_at_equal_rate({0: [(10, 1), (20, 2)]}, {0: (9, 1)})
    assert outside.interval is None and outside.inside == 0
    assert difference_at_equal_rate({0: [(10, 1), (10, 3)]}, {0: (10, 5)}).differences == (3,)  # of one rate: averaged
    assert difference_at_equal_rate({0: [(1, 1), (3, 3)], 1: []}, {0: (2, 2), 1: (2, 2)}).seeds == (0,)
    with pytest.raises(ValueError, match="in common"):
        difference_at_equal_rate({0: [(1, 1)]}, {1: (1, 1)})
    with pytest.raises(ValueError, match="finite"):
        difference_at_equal_rate({0: [(1, math.nan), (2, 1)]}, {0: (1, 1)})


@pytest.mark.parametrize("ties", [False, True])
def test_rank_correlation_is_scipys(ties):
    x, y = RANDOM.normal(size=(2, 40))
    if ties:
        x, y = x.round(), y.round()
    assert rank_correlation(x, y, repeats=1).rho == pytest.approx(stats.spearmanr(x, y).statistic, rel=1e-12)


def test_rank_correlation_of_monotone_maps():
    x = RANDOM.normal(size=20)
    assert rank_correlation(x, np.exp(x)) == (1, 1, 1, 20) and rank_correlation(x, -(x**3)).rho == -1
    assert math.isnan(rank_correlation(x, np.ones(20)).rho)
    alone = rank_correlation(x, np.exp(x), groups=[0] * 20)
    assert alone.rho == 1 and math.isnan(alone.low) and math.isnan(alone.high)


def test_bootstrap_draws_whole_groups():
    """Ten copies of each group add no information, so they must not narrow the interval, as independent pairs would."""
    x, y = RANDOM.normal(size=(2, 8))
    groups = list(range(8))
    once = rank_correlation(x, y, groups=groups)
    copied = rank_correlation(np.tile(x, 10), np.tile(y, 10), groups=groups * 10)
    independent = rank_correlation(np.tile(x, 10), np.tile(y, 10))
    assert copied[:3] == pytest.approx(once[:3], abs=1e-12)
    assert independent.high - independent.low < 0.7 * (once.high - once.low)


def test_rank_correlation_repeats_and_leaves_the_random_state():
    x, y = RANDOM.normal(size=(2, 10))
    state = np.random.get_state()[1].copy()
    assert rank_correlation(x, y, seed=1) == rank_correlation(x, y, seed=1) != rank_correlation(x, y, seed=2)
    assert (np.random.get_state()[1] == state).all()


@pytest.mark.parametrize(
    ("x", "y", "options", "words"),
    [
        ([1], [1], {}, "at least 2 pairs"), ([1, 2], [1, 2, 3], {}, "2 and 3"), ([1, math.nan], [1, 2], {}, "finite"),
        ([1, 2], [1, 2], {"groups": [0]}, "2 labels"), ([1, 2], [1, 2], {"repeats": 0}, "repeats"),
        ([1, 2], [1, 2], {"level": 2}, "level"),
    ],
)  # fmt: skip
def test_bad_rank_correlations(x, y, options, words):
    with pytest.raises(ValueError, match=words):
        rank_correlation(x, y, **options)


def test_means_of_correlations_stay_inside():
    """z = atanh; a perfect order of 4 counts as half-way between 1 and 0.8, that of one exchanged pair of neighbours."""
    assert fisher_z(0.5, 10) == pytest.approx(math.atanh(0.5)) and fisher_z(-1, 4) == -math.atanh(0.9)
    assert stats.spearmanr([1, 2, 3, 4], [1, 2, 4, 3]).statistic == pytest.approx(0.8)
    alone = mean_correlation([0.3], [9])
    assert alone == pytest.approx((0.3, None, None, 1))
    found, z = mean_correlation([1, 0.2, 0.9], [20, 20, 20]), [fisher_z(r, 20) for r in (1, 0.2, 0.9)]
    assert found == pytest.approx((*np.tanh(mean_interval(z)[:3]), 3)) and -1 < found.low < found.mean < found.high < 1


@pytest.mark.parametrize(("rho", "n"), [(1.1, 5), (math.nan, 5), (0.5, 2)])
def test_bad_correlations(rho, n):
    with pytest.raises(ValueError, match="from -1 to 1 over at least 3"):
        fisher_z(rho, n)


def test_paired_bootstrap_of_means():
    """Beside Student's interval of the same pairs: for 200 of them both are that of a normal distribution, up to a tenth."""
    random = np.random.default_rng(0)
    hard = 10 * random.normal(size=200)
    a, b = hard + random.normal(size=200), hard + 0.5 + random.normal(size=200)
    first, second, difference = paired_bootstrap(lambda rows: (a[rows].mean(), b[rows].mean()), 200, repeats=2000)
    expected = paired_interval(b, a)
    assert difference.mean == pytest.approx(expected.mean) and (first.mean, second.mean) == (a.mean(), b.mean())
    width = expected.high - expected.low
    assert [difference.low, difference.high] == pytest.approx([expected.low, expected.high], abs=width / 10)
    assert first.high - first.low > 5 * (difference.high - difference.low)  # what is hard for both cancels
    assert difference == paired_bootstrap(lambda rows: (a[rows].mean(), b[rows].mean()), 200, repeats=2000)[2]


def test_paired_bootstrap_of_a_biased_statistic():
    """Variances of 20 units are low by 1 / 20, those of their resamples by as much again: the interval is about the first.

    Percentiles would be too low by 1 / 20 of the variance: a resample's mean is (n - 1) / n times the sample's.
    """
    x = np.random.default_rng(1).normal(size=20)
    interval, *_ = paired_bootstrap(lambda rows: (x[rows].var(), 0.0), 20, repeats=4000)
    draws = np.array([x[np.random.default_rng(seed).integers(20, size=20)].var() for seed in range(4000)])
    low, high = np.quantile(draws, [0.025, 0.975]) + x.var() / 20
    assert interval.mean == pytest.approx(x.var())
    error = 4 * draws.std() / 4000**0.5 * 4  # four standard errors of a quantile in the tail, about four times the mean's
    assert [interval.low, interval.high] == pytest.approx([low, high], abs=error)


@pytest.mark.parametrize("options", [{"n": 1}, {"n": 5, "repeats": 0}, {"n": 5, "level": 1.0}])
def test_paired_bootstrap_refuses(options):
    with pytest.raises(ValueError, match="expected"):
        paired_bootstrap(lambda rows: (0.0, 0.0), **options)
