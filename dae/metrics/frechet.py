"""Fréchet distance between Gaussians fitted to features."""

from __future__ import annotations

import statistics
from typing import NamedTuple

import torch
from torch import Tensor

from dae.metrics.reduction import summed
from dae.metrics.validation import check_features


class FeatureStatistics:
    """Mean and covariance of a stream of feature vectors, in float64, without keeping the features.

    Batches are merged by

        d = m_B - m_A,   n = n_A + n_B,   m = m_A + d n_B / n,   M2 = M2_A + M2_B + d d^T n_A n_B / n

    where M2 is the sum of outer products of deviations from the mean, so the covariance is exact to rounding however far
    the mean is from zero and however the rows are split into batches or processes.

    Source: Chan, Golub and LeVeque, "Updating Formulae and a Pairwise Algorithm for Computing Sample Variances", 1979.
    """

    def __init__(self) -> None:
        self.count = 0
        self._mean: Tensor | None = None
        self._scatter: Tensor | None = None

    def update(self, x_ND: Tensor) -> FeatureStatistics:
        """Add rows [N, D] (N may be 0); returns itself. ValueError: not [N, D], another D than before, NaN or infinity."""
        check_features(x_ND=x_ND)
        batch = FeatureStatistics()
        if len(x_ND):
            x_ND = x_ND.detach().double()
            batch.count = len(x_ND)
            batch._mean = x_ND.mean(0)
            deviation_ND = x_ND - batch._mean
            batch._scatter = deviation_ND.T @ deviation_ND
        return self.merge(batch)

    def merge(self, other: FeatureStatistics) -> FeatureStatistics:
        """Add the rows that `other` has seen; returns itself. ValueError: another dimension D."""
        if other.count == 0:
            return self
        if self.count == 0:
            self.count, self._mean, self._scatter = other.count, other._mean.clone(), other._scatter.clone()
            return self
        if len(self._mean) != len(other._mean):
            raise ValueError(
                f"expected {len(self._mean)} features a row, got {len(other._mean)}; use one feature extractor for all rows"
            )
        count = self.count + other.count
        difference = other._mean.to(self._mean.device) - self._mean
        self._mean = self._mean + difference * (other.count / count)
        self._scatter = (
            self._scatter
            + other._scatter.to(self._mean.device)
            + torch.outer(difference, difference) * (self.count * other.count / count)
        )
        self.count = count
        return self

    def all_reduce(self) -> FeatureStatistics:
        """Make this the statistics of the rows of all processes; returns itself.

        Every process must call it, once: a second call would count each row once for each process. A process without rows
        takes part. ValueError, in every process: the processes have features of different dimensions.
        """
        dimension = 0 if self._mean is None else len(self._mean)
        # Where all D are equal, and only there, Cauchy-Schwarz holds with equality: (sum D)^2 = (number) (sum D^2).
        members, total, squares = summed(torch.tensor([int(dimension > 0), dimension, dimension**2])).tolist()
        if members * squares != total**2:
            raise ValueError(f"expected one feature dimension in all processes, got {dimension} here; use one feature extractor")
        if members == 0:
            return self
        mean = torch.zeros(total // members, dtype=torch.float64) if self._mean is None else self._mean
        scatter = torch.outer(mean, mean) * 0 if self._scatter is None else self._scatter
        count = int(summed(torch.tensor(self.count)))
        common_mean = summed(mean * (self.count / count))
        offset = mean - common_mean
        self._scatter = summed(scatter + torch.outer(offset, offset) * self.count)
        self._mean, self.count = common_mean, count
        return self

    @property
    def mean(self) -> Tensor:
        """float64 [D]. ValueError: no rows yet."""
        if self.count < 1:
            raise ValueError("expected at least 1 row for a mean, got 0; call update first")
        return self._mean

    @property
    def covariance(self) -> Tensor:
        """float64 [D, D], the unbiased estimate M2 / (n - 1). ValueError: fewer than 2 rows."""
        if self.count < 2:
            raise ValueError(f"expected at least 2 rows for a covariance, got {self.count}; add images")
        return self._scatter / (self.count - 1)


def frechet_distance(a: FeatureStatistics | Tensor, b: FeatureStatistics | Tensor) -> float:
    """Squared 2-Wasserstein distance between the Gaussians with the means and covariances of two sets of features.

        d = |m1 - m2|^2 + tr(S1 + S2 - 2 (S1^1/2 S2 S1^1/2)^1/2)

    This is the formula of FID; it is FID only with the features of FID's Inception network. The estimate from few rows
    is biased upwards by an amount that depends on the number of rows: compare only distances at equal counts
    (`equal_count_frechet`).

    The trace of the root is the sum of the singular values of S1^1/2 S2^1/2, which loses no digits where covariances are
    singular (fewer rows than features); eigenvalues of the product would lose half of them in the square root.

    Args:
        a, b: features [N, D] and [M, D], or the `FeatureStatistics` of such.

    Returns:
        The distance, at least 0, in squared units of the features.

    Raises:
        TypeError: features that are not floating point.
        ValueError: fewer than 2 rows, NaN or infinity, or different D.

    Source: Dowson and Landau, "The Fréchet Distance between Multivariate Normal Distributions", 1982; as a metric of
    generative models: Heusel et al., "GANs Trained by a Two Time-Scale Update Rule", NeurIPS 2017 (arXiv 1706.08500).
    """
    a, b = (x if isinstance(x, FeatureStatistics) else FeatureStatistics().update(x) for x in (a, b))
    mean_a, mean_b, covariance_a, covariance_b = a.mean, b.mean, a.covariance, b.covariance
    if len(mean_a) != len(mean_b):
        raise ValueError(f"expected features of one dimension, got {len(mean_a)} and {len(mean_b)}; use one feature extractor")
    mean_b, covariance_b = mean_b.to(mean_a.device), covariance_b.to(mean_a.device)
    root = torch.linalg.svdvals(_square_root(covariance_a) @ _square_root(covariance_b)).sum()
    distance = (mean_a - mean_b).square().sum() + covariance_a.trace() + covariance_b.trace() - 2 * root
    return max(0.0, distance.item())


def _square_root(covariance_DD: Tensor) -> Tensor:
    """The positive semi-definite square root; eigenvalues that rounding made negative are 0."""
    values, vectors = torch.linalg.eigh(covariance_DD)
    return (vectors * values.clamp_min(0).sqrt()) @ vectors.T


class EqualCountFrechet(NamedTuple):
    mean: float
    std: float
    number_of_subsets: int


def equal_count_frechet(
    reference_features: Tensor, other_features: Tensor, *, count: int | None = None, repeats: int = 10, seed: int
) -> EqualCountFrechet:
    """Fréchet distances of disjoint random subsets of `other_features` to a random subset of the reference, all of n rows.

    Both sets are shuffled `repeats` times: which rows fall together moves a single distance more than most changes of a model.

    The bias of the estimate depends on n, so distances compare only at one n: give `count` the same value wherever
    the results will be compared. The floor of such a table is the distance of real held-out images to the reference.

    Args:
        reference_features: [N, D].
        other_features: [M, D]; floor(M / n) subsets are drawn in each repeat.
        count: rows n of every subset, at most min(N, M), which is the default.
        repeats: shuffles of both sets, at least 1.
        seed: of the subsets; the global random state is neither read nor changed.

    Returns:
        mean, std and number of the distances. The std is the sample standard deviation over the distances (0 of a single
        one). It says how far a single subset strays, not how sure the mean is: subsets of different repeats share rows, and
        where n is all of the reference, its part is missing.

    Raises:
        TypeError, ValueError: as `frechet_distance`; count below 2 or above min(N, M); or no repeats.
    """
    check_features(rows=2, reference_features=reference_features, other_features=other_features)
    available = min(len(reference_features), len(other_features))
    count = available if count is None else count
    if not 2 <= count <= available:
        raise ValueError(f"count: expected 2 to {available} rows (the smaller set), got {count}")
    if repeats < 1:
        raise ValueError(f"repeats: expected at least 1, got {repeats}")
    generator = torch.Generator().manual_seed(seed)
    distances = []
    for _ in range(repeats):
        reference_order, other_order = (
            torch.randperm(len(x), generator=generator).to(x.device) for x in (reference_features, other_features)
        )
        reference = FeatureStatistics().update(reference_features[reference_order[:count]])
        subsets = [rows for rows in other_order.split(count) if len(rows) == count]
        distances += [frechet_distance(reference, other_features[rows]) for rows in subsets]
    mean, std = statistics.fmean(distances), statistics.stdev(distances) if len(distances) > 1 else 0.0
    return EqualCountFrechet(mean, std, len(distances))
