"""Precision and recall of generated features."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dae.metrics.validation import check_features
from dae.precision import own_arithmetic


class PrecisionRecall(NamedTuple):
    precision: float
    recall: float


@own_arithmetic(gradients=False)
def precision_recall(real_ND: Tensor, fake_MD: Tensor, k: int = 3, *, block: int = 1024) -> PrecisionRecall:
    """Improved precision and recall: how much of each set lies on the other's estimated manifold.

        manifold(X) = union over x in X of the closed balls around x that reach its k-th nearest neighbour in X (itself excluded)
        precision = share of the fake points on manifold(real),   recall = share of the real points on manifold(fake)

    Distances are Euclidean, in float64, differences before squares, so that coinciding points have distance 0 exactly and
    the result does not depend on the block size.

    Args:
        real_ND, fake_MD: features [N, D] and [M, D]. Compare results only at equal N, M and k.
        k: neighbour that sets the radius; the paper's is 3.
        block: rows whose distances are held at once: memory is O(block max(N, M)).

    Returns:
        precision and recall in [0, 1], higher is better; unpacks as a tuple.

    Raises:
        TypeError: features that are not floating point.
        ValueError: k or block below 1, fewer than k + 1 points, NaN or infinity, or different D.

    Source: Kynkäänniemi et al., "Improved Precision and Recall Metric for Assessing Generative Models", NeurIPS 2019
    (arXiv 1904.06991), section 2.
    """
    if k < 1 or block < 1:
        raise ValueError(f"expected k and block of at least 1, got k={k} and block={block}")
    check_features(rows=k + 1, real_ND=real_ND, fake_MD=fake_MD)
    real_ND, fake_MD = real_ND.double(), fake_MD.to(real_ND.device).double()
    return PrecisionRecall(
        precision=_share_covered(fake_MD, real_ND, k, block),
        recall=_share_covered(real_ND, fake_MD, k, block),
    )


def _share_covered(points: Tensor, centres: Tensor, k: int, block: int) -> float:
    # A point's own distance, 0, is the smallest of its row, so the k-th neighbour is the (k + 1)-th smallest.
    radii = torch.cat([_distances(rows, centres).kthvalue(k + 1).values for rows in centres.split(block)])
    return torch.cat([(_distances(rows, centres) <= radii).any(1) for rows in points.split(block)]).double().mean().item()


def _distances(a: Tensor, b: Tensor) -> Tensor:
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")
