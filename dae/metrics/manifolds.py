"""Precision and recall of generated features."""

from __future__ import annotations

from typing import NamedTuple

from dae_kernels import precision_recall_density_coverage
from torch import Tensor

from dae.metrics.validation import check_features
from dae.precision import own_arithmetic


class PrecisionRecall(NamedTuple):
    precision: float
    recall: float


@own_arithmetic(gradients=False)
def precision_recall(real_ND: Tensor, fake_MD: Tensor, k: int = 3) -> PrecisionRecall:
    """Improved precision and recall: the share of each set that lies on the other's estimated manifold.

        manifold(X) = union over x in X of the open balls around x that reach its k-th nearest neighbour in X (itself excluded)
        precision = share of the fake points on manifold(real),   recall = share of the real points on manifold(fake)

    As `dae_kernels.precision_recall_density_coverage` in float64, for finite features: Euclidean, and a point on a sphere is
    outside, as in the package `prdc`.

    Args:
        real_ND, fake_MD: features [N, D] and [M, D]. Compare results only at equal N, M and k.
        k: neighbour that sets the radius; the paper's is 3.

    Returns:
        precision and recall in [0, 1], higher is better; unpacks as a tuple.

    Raises:
        TypeError: features that are not floating point.
        ValueError: k below 1, fewer than k + 1 points, NaN or infinity, or different D.

    Source: Kynkäänniemi et al., "Improved Precision and Recall Metric for Assessing Generative Models", NeurIPS 2019
    (arXiv 1904.06991), section 2.
    """
    if k < 1:
        raise ValueError(f"expected k of at least 1, got {k}")
    check_features(rows=k + 1, real_ND=real_ND, fake_MD=fake_MD)
    found = precision_recall_density_coverage(real_ND.double(), fake_MD.to(real_ND.device).double(), k=k)
    return PrecisionRecall(found.precision.item(), found.recall.item())
