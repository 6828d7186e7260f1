"""Kernel distance: the squared MMD of features with a polynomial kernel, over random subsets (KID with Inception's features)."""

from __future__ import annotations

import statistics
from typing import NamedTuple

import torch
from dae_kernels import mmd
from torch import Tensor

from dae.metrics.validation import check_features
from dae.precision import own_arithmetic

MAX_SUBSET = 1000  # rows per subset in the paper's experiments


class KernelDistance(NamedTuple):
    mean: float
    std: float
    number_of_subsets: int
    subset_size: int


@own_arithmetic(gradients=False)
def kernel_distance(
    reference_features: Tensor,
    other_features: Tensor,
    *,
    subsets: int = 100,
    subset_size: int | None = None,
    degree: int = 3,
    gamma: float | None = None,
    coef0: float = 1.0,
    seed: int,
) -> KernelDistance:
    """Mean and standard deviation of kernel distances between random subsets of two sets of features.

        MMD^2(X, Y) = mean_{i != j} k(x_i, x_j) + mean_{i != j} k(y_i, y_j) - 2 mean_{ij} k(x_i, y_j)
        k(x, y)     = (gamma x.y + coef0)^degree

    With an Inception network's features this is KID. Unlike the Frechet distance the estimate is unbiased at any number of
    rows: it may be negative, and values at unequal counts compare. On all rows it is
    `dae_kernels.mmd(x, y, kernel="polynomial")`; subsets show its spread. In float64.

    Args:
        reference_features, other_features: [N, D] and [M, D].
        subsets: pairs of subsets drawn, at least 1; rows are drawn without replacement within a subset.
        subset_size: rows of each subset, 2 to min(N, M); None is half of that, at most 1000, so that subsets differ.
        degree, gamma, coef0: kernel parameters; gamma None is 1 / D. The defaults are the paper's.
        seed: for the subsets; the global random state is not used.

    Returns:
        mean and sample standard deviation of the distances (0 for a single one; torchmetrics divides by their number), their
        number and size. The deviation is of one subset, not of the mean: subsets share rows.

    Raises:
        TypeError, ValueError: features that are not floating point [N, D], not finite, of different D, or with fewer than 2
            rows (4 if subset_size is None); no subsets, or subset_size out of range.

    Source: Binkowski et al. 2018, "Demystifying MMD GANs", arXiv 1801.01401, section 4.
    """
    check_features(rows=2, reference_features=reference_features, other_features=other_features)
    available = min(len(reference_features), len(other_features))
    size = min(MAX_SUBSET, available // 2) if subset_size is None else subset_size
    if not 2 <= size <= available:
        got = f"{available // 2}, half of the smaller set" if subset_size is None else size
        raise ValueError(f"subset_size: expected 2 to {available} rows (the smaller set), got {got}")
    if subsets < 1:
        raise ValueError(f"subsets: expected at least 1, got {subsets}")
    generator = torch.Generator().manual_seed(seed)
    other_features = other_features.to(reference_features.device)

    def drawn(features: Tensor) -> Tensor:
        return features[torch.randperm(len(features), generator=generator)[:size].to(features.device)].detach().double()

    kernel = {"kernel": "polynomial", "degree": degree, "gamma": gamma, "coef0": coef0}
    distances = [mmd(drawn(reference_features), drawn(other_features), **kernel).item() for _ in range(subsets)]
    return KernelDistance(statistics.fmean(distances), statistics.stdev(distances) if subsets > 1 else 0.0, subsets, size)
