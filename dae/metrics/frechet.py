"""Fréchet distance between Gaussians fitted to features."""

from __future__ import annotations

import statistics
from typing import NamedTuple, Self

import torch
from dae_kernels.frechet_distance import GaussianStatistics
from dae_kernels.frechet_distance import frechet_distance as tensor_frechet_distance
from torch import Tensor

from dae.distributed import sum_over_processes
from dae.metrics.validation import check_features
from dae.precision import own_arithmetic


class FeatureStatistics(GaussianStatistics):
    """`GaussianStatistics` of finite features; `all_reduce` sums over the processes of the run."""

    @own_arithmetic(gradients=False)
    def update(self, x_ND: Tensor) -> Self:
        """Add rows [N, D] (N may be 0); returns itself. ValueError: not [N, D], a different D, NaN or infinity."""
        check_features(x_ND=x_ND)
        return super().update(x_ND)

    @own_arithmetic(gradients=False)
    def all_reduce(self) -> Self:
        """Combine the statistics of all processes, as `GaussianStatistics.all_reduce`; returns itself."""
        return super().all_reduce(lambda x: sum_over_processes(x.clone()))


@own_arithmetic(gradients=False)
def frechet_distance(a: FeatureStatistics | Tensor, b: FeatureStatistics | Tensor) -> float:
    """`dae_kernels.frechet_distance` (squared, float64) of finite features [N, D] and [M, D] or their `FeatureStatistics`.

    Raises:
        TypeError: features that are not floating point.
        ValueError: fewer than 2 rows, NaN or infinity, or different D.
    """
    a, b = (x if isinstance(x, FeatureStatistics) else FeatureStatistics().update(x) for x in (a, b))
    return tensor_frechet_distance(a, b).item()


class EqualCountFrechet(NamedTuple):
    mean: float
    std: float
    number_of_subsets: int


@own_arithmetic(gradients=False)
def equal_count_frechet(
    reference_features: Tensor, other_features: Tensor, *, count: int | None = None, repeats: int = 10, seed: int
) -> EqualCountFrechet:
    """Fréchet distances of disjoint random subsets of `other_features` to random subsets of the reference, n rows each.

    The estimate's bias depends on n, so distances compare only at equal `count`. The floor is the distance of real held-out
    images to the reference.

    Args:
        reference_features: [N, D].
        other_features: [M, D]; floor(M / n) subsets are drawn in each repeat.
        count: rows n per subset, at most min(N, M) (default).
        repeats: shuffles of both sets, at least 1: the choice of rows moves a distance more than most changes of a model.
        seed: for the subsets; the global random state is not used.

    Returns:
        mean, sample standard deviation (0 for a single one) and number of the distances. The deviation is of one subset, not of
        the mean: repeats share rows, and if n is the whole reference, its share of the variance is missing.

    Raises:
        TypeError, ValueError: as `frechet_distance`; count below 2 or above min(N, M); no repeats.
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
        first, second = (
            x[torch.randperm(len(x), generator=generator).to(x.device)] for x in (reference_features, other_features)
        )
        reference = FeatureStatistics().update(first[:count])
        distances += [frechet_distance(reference, rows) for rows in second.split(count) if len(rows) == count]
    mean, std = statistics.fmean(distances), statistics.stdev(distances) if len(distances) > 1 else 0.0
    return EqualCountFrechet(mean, std, len(distances))
