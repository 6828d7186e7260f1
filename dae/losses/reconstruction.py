"""Pixel losses."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from dae.config import LossConfig
from dae.precision import own_arithmetic


@own_arithmetic(gradients=None)
def reconstruction_loss(sample: Tensor, images: Tensor, config: LossConfig) -> Tensor:
    """l1 * mean |sample - images| + l2 * mean (sample - images)^2, a scalar in fp32; 0 without images."""
    sample, count = sample.float(), max(1, sample.numel())
    absolute, squared = (loss(sample, images, reduction="sum") / count for loss in (F.l1_loss, F.mse_loss))
    return config.l1 * absolute + config.l2 * squared
