"""Pixel losses."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from dae.config import LossConfig
from dae.precision import own_arithmetic


@own_arithmetic(gradients=None)
def reconstruction_loss(sample: Tensor, images: Tensor, config: LossConfig) -> Tensor:
    """Sum of the weighted means of |d|, d^2 and sqrt(d^2 + 1e-6), d = sample - images; a scalar in fp32, 0 without images.

    The last is Charbonnier's (Charbonnier et al. 1994), which is |d| with a smooth foot of 1e-3.
    """
    sample, count = sample.float(), max(1, sample.numel())
    absolute, squared = (loss(sample, images, reduction="sum") / count for loss in (F.l1_loss, F.mse_loss))
    loss = config.l1 * absolute + config.l2 * squared
    if config.charbonnier:
        loss = loss + config.charbonnier * (((sample - images).square() + 1e-6).sqrt().sum() / count)
    return loss
