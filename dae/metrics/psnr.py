"""Peak signal-to-noise ratio."""

from __future__ import annotations

import torch
from torch import Tensor

from dae.metrics.validation import check_image_pairs
from dae.precision import own_arithmetic


@own_arithmetic(gradients=None)
def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each pair of images, in decibels.

        PSNR = 10 log10(R^2 / MSE),  R = 2 (the range of [-1, 1]),  MSE over all pixels and channels of one image

    A data set's PSNR is the mean of these values, not the PSNR of the mean error. Values outside [-1, 1] are not clipped:
    clip reconstructions first if they will be saved as 8-bit images.

    Args:
        a, b: images [N, C, H, W], float, in [-1, 1].

    Returns:
        float64 [N], higher is closer; `inf` for identical images, NaN for NaN pixels.

    Raises:
        TypeError: a batch is not floating point.
        ValueError: the shapes differ or are not [N, C, H, W].
    """
    check_image_pairs(a, b)
    error_N = (a.double() - b.double()).square().flatten(1).mean(1)
    return 10 * torch.log10(4 / error_N)
