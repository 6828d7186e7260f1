"""Gaussian bottleneck (Kingma & Welling 2014, "Auto-Encoding Variational Bayes")."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dae.config import KLConfig
from dae.distributed import draw_rows
from dae.precision import wide
from dae.quantizers.encoding import Encoding, check_features


class GaussianBottleneck(nn.Module):
    """q(z|x) = N(mean, diag(exp(log_variance))), with loss kl_weight * KL(q || N(0, I)).

    KL = 1/2 sum(mean^2 + variance - 1 - log variance), in nats, summed over a latent and averaged over the batch.
    """

    features_per_latent = 2
    frozen = False

    def __init__(self, config: KLConfig):
        super().__init__()
        self.config = config

    def forward(self, features: Tensor, sample_posterior: bool) -> Encoding:
        """Features [B, 2D, h, w] to latents [B, D, h, w] of the same dtype: a posterior sample, or the posterior's mean."""
        check_features("GaussianBottleneck", features)
        dtype = features.dtype
        mean, log_variance = features.to(wide(dtype)).chunk(2, dim=1)
        log_variance = log_variance.clamp(-30, 20)
        kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum((1, 2, 3)).sum() / max(1, len(mean))
        latents = mean
        if sample_posterior:
            noise = draw_rows(torch.randn, mean.shape, device=mean.device, dtype=mean.dtype)
            latents = mean + (0.5 * log_variance).exp() * noise
        return Encoding(latents.to(dtype), self.config.kl_weight * kl, mean.to(dtype), log_variance=log_variance.to(dtype))
