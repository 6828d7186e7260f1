"""Pixel losses."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from dae.config import LossConfig


def reconstruction_loss(sample: Tensor, images: Tensor, config: LossConfig) -> Tensor:
    """l1 * mean |sample - images| + l2 * mean (sample - images)^2, a scalar in fp32."""
    sample = sample.float()
    return config.l1 * F.l1_loss(sample, images) + config.l2 * F.mse_loss(sample, images)
