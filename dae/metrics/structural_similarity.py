"""Structural similarity."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from dae.metrics.validation import check_image_pairs
from dae.precision import own_arithmetic


@own_arithmetic(gradients=None)
def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Structural similarity of each pair of images, by torchmetrics in float64.

        SSIM = mean over windows of (2 m_a m_b + c1)(2 s_ab + c2) / ((m_a^2 + m_b^2 + c1)(s_a^2 + s_b^2 + c2))

    with Gaussian-weighted means m and (co)variances s, c1 = (0.01 R)^2, c2 = (0.03 R)^2, R = 2, averaged over channels and
    over every position, borders reflected (torchmetrics' convention; others average over whole windows only). With negative
    means an image would resemble its negative, as both brackets change sign together, so pixels are shifted to [0, 2]
    first: the values equal the usual SSIM of images in [0, 1] with R = 1.

    The window is the paper's, 11 x 11 with sigma 1.5; for smaller images the largest odd one that fits, with sigma = 0.3
    radius: 7 x 7 with sigma 0.9 for 8 x 8 images. Below 11 pixels, values compare only at equal resolution.

    Args:
        a, b: images [N, C, H, W], float, in [-1, 1], H and W at least 3.

    Returns:
        float64 [N] in [-1, 1], 1 for identical images.

    Raises:
        TypeError: a batch is not floating point.
        ValueError: the shapes differ, are not [N, C, H, W], or a side is below 3 pixels.

    Source: Wang, Bovik, Sheikh and Simoncelli, "Image Quality Assessment: From Error Visibility to Structural Similarity",
    IEEE Transactions on Image Processing 2004, section III-C.
    """
    check_image_pairs(a, b)
    side = min(a.shape[2:])
    if side < 3:
        raise ValueError(f"expected images of at least 3 x 3 pixels, got {a.shape[2]} x {a.shape[3]}; no window fits")
    if len(a) == 0:
        return a.new_zeros(0, dtype=torch.float64)
    from torchmetrics.functional.image import structural_similarity_index_measure

    radius = min(5, (side - 1) // 2)
    # torchmetrics derives the window from sigma: radius = int(3.5 sigma + 0.5), which 0.3 x radius inverts for 1..5.
    x, y = a.double() + 1, b.double() + 1
    values = structural_similarity_index_measure(x, y, sigma=0.3 * radius, reduction="none", data_range=2.0)
    return cast(Tensor, values).reshape(len(a))
