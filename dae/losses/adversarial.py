"""Hinge GAN losses (Lim & Ye 2017) and the adaptive weight of VQGAN (Esser et al. 2021, section 3.1)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dae.distributed import sum_over_processes


def discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """1/2 (mean max(0, 1 - D(real)) + mean max(0, 1 + D(fake)))."""
    return 0.5 * (F.relu(1 - real_logits).mean() + F.relu(1 + fake_logits).mean())


def generator_loss(fake_logits: Tensor) -> Tensor:
    """-mean D(fake)."""
    return -fake_logits.mean()


def adaptive_weight(reconstruction: Tensor, adversarial: Tensor, sample: Tensor) -> Tensor:
    """|d reconstruction / d sample| / |d adversarial / d sample|, at most 1e4, detached, over the global batch.

    VQGAN takes the gradients at the decoder's last layer; at the decoder's output they need no second pass through the
    decoder and work under `torch.compile`.
    """
    squares = [
        torch.autograd.grad(loss, sample, retain_graph=True)[0].float().square().sum() for loss in (reconstruction, adversarial)
    ]
    squared = sum_over_processes(torch.stack(squares))
    return (squared[0] / squared[1].clamp(min=1e-16)).sqrt().clamp(max=1e4).detach()
