"""Detect samples that copy training images."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dae.metrics.validation import as_float, check_same_pixels
from dae.precision import own_arithmetic

BLOCK_VALUES = 1 << 25  # pixels per block in float64: 256 MB


@dataclass(frozen=True)
class Memorisation:
    """Result of `memorisation`; N samples, M held-out images.

    Attributes:
        share_samples: share of the samples closer than the threshold to a training image.
        share_heldout: the same for held-out images: about 0.01, as expected of a model that does not memorise.
        threshold: distance below which an image counts as a copy.
        nearest_index: int64 [N], the training image nearest to each sample.
        nearest_distance: float64 [N], its distance.
        heldout_distance: float64 [M], distance of each held-out image to the nearest training image.
    """

    share_samples: float
    share_heldout: float
    threshold: float
    nearest_index: Tensor
    nearest_distance: Tensor
    heldout_distance: Tensor


@own_arithmetic(gradients=False)
def memorisation(
    samples: Tensor, train: Tensor, heldout: Tensor, *, block: int = 1024, heldout_distance: Tensor | None = None
) -> Memorisation:
    """Share of samples that are nearer to a training image than all but 1 % of the held-out images are.

        distance(x) = min over training images t of sqrt(mean over pixels and channels of (x - t)^2)

    the root mean square difference per pixel, in units of [-1, 1]: black and white images are 2 apart. The threshold is the 1 %
    quantile of the held-out images' distances by nearest rank, the (r + 1)-th smallest, where r is 0.01 M rounded (halves up).
    An image counts if it is *strictly* below: without ties r of the M held-out images do, none if M is below 50. A threshold of
    0 (many held-out images are copies of training images) becomes the smallest positive number, so that exact copies count.

    Args:
        samples, train, heldout: images [N, C, H, W], [T, C, H, W], [M, C, H, W], float in [-1, 1] or held as uint8.
        block: images compared at once, fewer if they are large: memory is O(block (block + C H W)).
        heldout_distance: from an earlier result with the same `train` and `heldout`, to avoid recomputing it.

    Raises:
        TypeError: images that are neither floating point nor uint8.
        ValueError: an empty batch, images of different sizes, NaN, or block below 1.

    Source: ours. Nearest neighbours in the training set are the usual evidence; the held-out set calibrates them.
    """
    check_same_pixels(train=train, samples=samples, heldout=heldout)
    if block < 1:
        raise ValueError(f"block: expected at least 1 image, got {block}")
    for name, images in {"samples": samples, "train": train, "heldout": heldout}.items():
        if len(images) == 0:
            raise ValueError(f"{name}: expected images, got none")
        if images.is_floating_point() and not torch.isfinite(images).all():
            raise ValueError(f"{name}: expected finite pixels, got NaN or infinity; look for a diverged model")
    block = min(block, max(16, BLOCK_VALUES // train[0].numel()))
    nearest_index, nearest_distance = _nearest(samples, train, block)
    if heldout_distance is None:
        heldout_distance = nearest_distance if samples is heldout else _nearest(heldout, train, block)[1]
    threshold = heldout_distance.sort().values[(len(heldout) + 50) // 100].item()
    threshold = max(threshold, torch.finfo(torch.float64).tiny)
    samples_below, heldout_below = ((d < threshold).double().mean().item() for d in (nearest_distance, heldout_distance))
    return Memorisation(samples_below, heldout_below, threshold, nearest_index, nearest_distance, heldout_distance)


def _nearest(images: Tensor, train: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Index of the training image nearest to each image, and its root mean square distance per pixel."""
    indices, distances = [], []
    for rows in images.flatten(1).split(block):
        x_BP = as_float(rows).double()
        best_B, index_B = x_BP.new_full((len(rows),), torch.inf), torch.zeros(len(rows), dtype=torch.int64, device=rows.device)
        for start, candidates in zip(range(0, len(train), block), train.flatten(1).split(block), strict=True):
            t_KP = as_float(candidates.to(rows.device)).double()
            # |x - t|^2 - |x|^2 has the same nearest t and needs one matrix product.
            value_B, within_B = (t_KP.square().sum(1) - 2 * x_BP @ t_KP.T).min(1)
            index_B = torch.where(value_B < best_B, start + within_B, index_B)
            best_B = torch.minimum(best_B, value_B)
        # Recompute the distance from the difference, so that it is exactly 0 for a copy.
        nearest_BP = as_float(train[index_B.to(train.device)].flatten(1).to(rows.device)).double()
        indices.append(index_B)
        distances.append((x_BP - nearest_BP).square().mean(1).sqrt())
    return torch.cat(indices), torch.cat(distances)
