"""Intervals of paired differences (Student's, bootstrap's), differences at equal rate, rank correlations; without asymptotics."""

from __future__ import annotations

import math
from typing import Callable, Hashable, Mapping, NamedTuple, Sequence

import numpy as np


class Interval(NamedTuple):
    """A mean over `n` values and the ends of its interval; the ends are None for a single value."""

    mean: float
    low: float | None
    high: float | None
    n: int

    @property
    def verdict(self) -> int:
        """-1 if the interval is below 0, 1 if above, 0 if it contains 0 or does not exist."""
        return 0 if self.low is None or self.high is None or self.low <= 0 <= self.high else 1 if self.low > 0 else -1


class RankCorrelation(NamedTuple):
    """Spearman's rho of `n` pairs with its bootstrap interval; NaN if a side is constant or there is no interval."""

    rho: float
    low: float
    high: float
    n: int


class EqualRate(NamedTuple):
    """Differences to a baseline's frontier, per seed; None if the rate is outside the baseline's range."""

    seeds: tuple[Hashable, ...]
    differences: tuple[float | None, ...]
    baseline: tuple[float | None, ...]  # the frontier at our rate
    interval: Interval | None  # over the seeds within range; None if there are none

    @property
    def inside(self) -> int:
        return sum(d is not None for d in self.differences)


def mean_interval(values: Sequence[float], level: float = 0.95) -> Interval:
    """Student's interval of a mean: m +- t_{n-1}((1 + level) / 2) s / sqrt(n), exact for independent normal values.

    Args:
        values: n >= 1 finite numbers, one per seed. For one value the ends are None.
        level: coverage, between 0 and 1.

    Raises:
        ValueError: no value, a value that is not finite, or a level outside (0, 1).
    """
    from scipy.stats import t

    v = _finite(values, "values")
    _check_level(level)
    if len(v) == 1:
        return Interval(float(v[0]), None, None, 1)
    half = t.ppf((1 + level) / 2, len(v) - 1) * v.std(ddof=1) / math.sqrt(len(v))
    return Interval(float(v.mean()), float(v.mean() - half), float(v.mean() + half), len(v))


def paired_interval(ours: Sequence[float], theirs: Sequence[float], level: float = 0.95) -> Interval:
    """`mean_interval` of the differences ours - theirs of pairs that share a seed, whose common part cancels.

    Raises:
        ValueError: different lengths, fewer than 2 pairs, or a value that is not finite.
    """
    x, y = _finite(ours, "ours"), _finite(theirs, "theirs")
    if len(x) != len(y):
        raise ValueError(f"expected pairs, got {len(x)} values of ours and {len(y)} of theirs: keep the seeds that both have")
    if len(x) < 2:
        raise ValueError("an interval of paired differences needs at least 2 pairs, got 1: compare more seeds")
    return mean_interval(x - y, level)


def paired_p_value(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Two-sided p of the paired t-test, the test whose acceptance region is `paired_interval`. ValueError: as there."""
    from scipy.stats import t

    paired_interval(ours, theirs)  # checks the operands
    d = np.asarray(ours, float) - np.asarray(theirs, float)
    deviation = d.std(ddof=1)
    if deviation == 0:  # all differences equal: p is 0 or 1
        return 1.0 if d[0] == 0 else 0.0
    return float(2 * t.sf(abs(d.mean()) / deviation * math.sqrt(len(d)), len(d) - 1))


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted for their number (Holm, 1979): among those below a, one is false with probability a at most.

    adjusted_(i) = max over j <= i of min(1, (m - j + 1) p_(j)), for the i-th smallest of m.

    Raises:
        ValueError: a value outside [0, 1].
    """
    p = _finite(p_values, "p_values") if len(p_values) else np.zeros(0)
    if ((p < 0) | (p > 1)).any():
        raise ValueError(f"p_values: expected numbers from 0 to 1, got {p.tolist()}")
    order = np.argsort(p, kind="stable")
    steps = np.minimum(1, (len(p) - np.arange(len(p))) * p[order])
    adjusted = np.empty(len(p))
    adjusted[order] = np.maximum.accumulate(steps)
    return adjusted.tolist()


def paired_bootstrap(
    statistic: Callable[[np.ndarray], tuple[float, float]], n: int, *, level: float = 0.95, repeats: int = 1000, seed: int = 0
) -> tuple[Interval, Interval, Interval]:
    """Bootstrap intervals of a statistic of two treatments of the same n units, and of its difference second - first.

        [t + q_lo - m, t + q_hi - m],  t the statistic of all units, q quantiles and m the mean of it over samples of n units with
        replacement

    Both treatments are computed on the same samples, so that what makes a unit hard for both cancels in the difference. The
    intervals are of what the statistic is expected to be for n other units: how it depends on n, as the Frechet distance does, is
    neither corrected nor, as by percentiles, counted twice.

    Args:
        statistic: numbers of the chosen units, with repetitions, to its values for the first and the second treatment.
        n: units, at least 2.
        level: coverage.
        repeats: samples.
        seed: of the samples; the global random state is not used.

    Raises:
        ValueError: fewer than 2 units, or a level or repeats out of range.

    Source: Davison and Hinkley, "Bootstrap Methods and their Application" (1997), section 5.2.
    """
    _check_level(level)
    if n < 2 or repeats < 1:
        raise ValueError(f"expected at least 2 units and 1 repeat, got {n} and {repeats}")
    random, whole = np.random.default_rng(seed), statistic(np.arange(n))
    drawn = np.array([statistic(random.integers(n, size=n)) for _ in range(repeats)])  # [repeats, 2]
    estimates = (whole[0], whole[1], whole[1] - whole[0])
    found = []
    for t, values in zip(estimates, (drawn[:, 0], drawn[:, 1], drawn[:, 1] - drawn[:, 0]), strict=True):
        low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
        found.append(Interval(float(t), float(t + low - values.mean()), float(t + high - values.mean()), n))
    return found[0], found[1], found[2]


def difference_at_equal_rate(
    frontier: Mapping[Hashable, Sequence[tuple[float, float]]], ours: Mapping[Hashable, tuple[float, float]], level: float = 0.95
) -> EqualRate:
    """Distance of ours minus that of a baseline at our rate, read off the baseline's frontier of the same seed.

    A seed's frontier is interpolated linearly in the rate between neighbouring points, never extrapolated: a seed with our
    rate out of range counts as outside. Points of equal rate are averaged first.

    Args:
        frontier: per seed the baseline's points (rate in bits, distance).
        ours: per seed one point (rate in bits, distance).
        level: coverage of the interval of the differences.

    Raises:
        ValueError: no seed in common, or a number that is not finite.
    """
    seeds = tuple(seed for seed in ours if frontier.get(seed))
    if not seeds:
        raise ValueError(f"no seed in common: the baseline has {list(frontier)}, ours {list(ours)}")
    expected = [_interpolated(frontier[seed], _finite(ours[seed], f"ours at seed {seed}")[0]) for seed in seeds]
    differences = [None if e is None else float(ours[s][1]) - e for s, e in zip(seeds, expected, strict=True)]
    inside = [d for d in differences if d is not None]
    return EqualRate(seeds, tuple(differences), tuple(expected), mean_interval(inside, level) if inside else None)


def _interpolated(points: Sequence[tuple[float, float]], rate: float) -> float | None:
    table = np.stack([_finite(point, "the baseline's frontier") for point in points])
    rates, where = np.unique(table[:, 0], return_inverse=True)
    distances = np.bincount(where, table[:, 1]) / np.bincount(where)
    return float(np.interp(rate, rates, distances)) if rates[0] <= rate <= rates[-1] else None


def rank_correlation(
    x: Sequence[float],
    y: Sequence[float],
    *,
    groups: Sequence[Hashable] | None = None,
    level: float = 0.95,
    repeats: int = 2000,
    seed: int = 0,
) -> RankCorrelation:
    """Spearman's rank correlation (ties take the average rank) with a percentile bootstrap interval.

    Values of one group, such as one seed's, are not independent, so whole groups are drawn with replacement. With few groups
    the percentile interval is too narrow; it still shows how much the seeds disagree.

    Args:
        x, y: n >= 2 finite numbers each.
        groups: n labels; None makes each pair its own group.
        level: coverage of the interval.
        repeats: bootstrap samples.
        seed: for the bootstrap; the global random state is not used.

    Returns:
        RankCorrelation; rho is NaN if x or y is constant. The ends are NaN if rho is, or if there is only one group.

    Raises:
        ValueError: different lengths, fewer than 2 pairs, values that are not finite, a level or repeats out of range.
    """
    a, b = _finite(x, "x"), _finite(y, "y")
    _check_level(level)
    if len(a) != len(b) or len(a) < 2:
        raise ValueError(f"expected at least 2 pairs, got {len(a)} and {len(b)} values")
    if groups is not None and len(groups) != len(a):
        raise ValueError(f"groups: expected {len(a)} labels, one a pair, got {len(groups)}")
    if repeats < 1:
        raise ValueError(f"repeats: expected at least 1, got {repeats}")
    rho, nan = _spearman(a[None], b[None]).item(), math.nan
    labels = list(range(len(a))) if groups is None else list(groups)
    members = [np.array([i for i, label in enumerate(labels) if label == g]) for g in dict.fromkeys(labels)]
    if len(members) < 2 or math.isnan(rho):
        return RankCorrelation(rho, nan, nan, len(a))
    random = np.random.default_rng(seed)
    draws = random.integers(len(members), size=(repeats, len(members)))
    by_length: dict[int, list[np.ndarray]] = {}  # samples by length, computed together: groups may differ in size
    for draw in draws:
        sample = np.concatenate([members[g] for g in draw])
        by_length.setdefault(len(sample), []).append(sample)
    rhos = np.concatenate([_spearman(a[np.stack(rows)], b[np.stack(rows)]) for rows in by_length.values()])
    rhos = rhos[~np.isnan(rhos)]  # samples in which one side is constant
    low, high = np.quantile(rhos, [(1 - level) / 2, (1 + level) / 2]) if len(rhos) else (nan, nan)
    return RankCorrelation(rho, float(low), float(high), len(a))


def fisher_z(rho: float, n: int) -> float:
    """atanh(rho) of a rank correlation over n pairs: unbounded, with a spread that hardly depends on rho.

    -1 and 1, where z is infinite, count as half-way to the next possible value, 1 - 12 / (n^3 - n) (one swap of neighbours).

    Raises:
        ValueError: rho outside [-1, 1], or fewer than 3 pairs.

    Source: Fisher 1915, "Frequency distribution of the values of the correlation coefficient".
    """
    if not -1 <= rho <= 1 or n < 3:
        raise ValueError(f"expected a correlation from -1 to 1 over at least 3 pairs, got {rho} over {n}")
    most = 1 - 6 / (n**3 - n)
    return math.atanh(min(max(rho, -most), most))


def mean_correlation(rhos: Sequence[float], counts: Sequence[int], level: float = 0.95) -> Interval:
    """Mean of rank correlations with Student's interval, both computed in `fisher_z`, so inside (-1, 1).

    Args:
        rhos, counts: correlation and number of pairs per comparison.
        level: coverage.

    Raises:
        ValueError: different lengths, or as `fisher_z` and `mean_interval`.
    """
    mean, low, high, n = mean_interval([fisher_z(rho, count) for rho, count in zip(rhos, counts, strict=True)], level)
    return Interval(math.tanh(mean), None if low is None else math.tanh(low), None if high is None else math.tanh(high), n)


def _spearman(x_BN: np.ndarray, y_BN: np.ndarray) -> np.ndarray:
    """rho per row [B]; NaN if a row of either is constant."""
    from scipy.stats import rankdata

    a, b = (ranks - ranks.mean(axis=1, keepdims=True) for ranks in (rankdata(v, axis=1) for v in (x_BN, y_BN)))
    scale = np.sqrt((a * a).sum(1) * (b * b).sum(1))
    return np.divide((a * b).sum(1), scale, out=np.full(len(scale), np.nan), where=scale > 0).clip(-1, 1)


def _finite(values: Sequence[float], name: str) -> np.ndarray:
    array = np.asarray(values, dtype=float)
    if array.ndim != 1 or not len(array):
        raise ValueError(f"{name}: expected a sequence of at least one number, got shape {array.shape}")
    if not np.isfinite(array).all():
        raise ValueError(f"{name}: expected finite numbers, got {array.tolist()}: leave out what diverged, and say so")
    return array


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise ValueError(f"level: expected a number between 0 and 1, got {level}")
