"""Gaussian bottleneck (Kingma & Welling 2014, "Auto-Encoding Variational Bayes")."""

from __future__ import annotations

from typing import Self

import torch
from dae_kernels.tracing import values_readable
from torch import Tensor

from dae.config import AutoencoderConfig, KLConfig
from dae.distributed import draw_rows
from dae.precision import wide
from dae.quantizers.bottleneck import Bottleneck, Encoding, check_feature_map

LEAST_LOG_VARIANCE = -30.0


class GaussianBottleneck(Bottleneck):
    """q(z|x) = N(mean, diag(exp(log_variance))), with loss kl_weight * KL(q || N(0, I)).

    KL = 1/2 sum(mean^2 + variance - 1 - log variance), in nats, summed over a latent and averaged over the batch.
    """

    discrete, features_per_latent = False, 2
    kept, rate_knob = ("features", "log_variance"), "autoencoder.kl.kl_weight"
    rate_plural, rate_setting = "KL weights", "a KL weight of {:g}"

    def __init__(self, config: KLConfig):
        super().__init__()
        self.config = config

    @classmethod
    def build(cls, config: AutoencoderConfig) -> Self:
        return cls(config.kl)

    def forward(self, features: Tensor, sample_posterior: bool = False) -> Encoding:
        """Features [B, 2D, h, w] to latents [B, D, h, w] of the same dtype: a posterior sample, or the posterior's mean."""
        check_feature_map("GaussianBottleneck", features)
        dtype = features.dtype
        mean, log_variance = features.to(wide(dtype)).chunk(2, dim=1)
        log_variance = log_variance.clamp(LEAST_LOG_VARIANCE, 20)
        kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum((1, 2, 3)).sum() / max(1, len(mean))
        latents = mean
        if sample_posterior:
            noise = draw_rows(torch.randn, mean.shape, device=mean.device, dtype=mean.dtype)
            latents = mean + (0.5 * log_variance).exp() * noise
        return Encoding(latents.to(dtype), self.config.kl_weight * kl, mean.to(dtype), log_variance=log_variance.to(dtype))

    def pack(self, encoding: Encoding) -> Tensor:
        if encoding.log_variance is None:
            raise ValueError("GaussianBottleneck packs encodings with a log_variance, got one without")
        return torch.cat([encoding.features, encoding.log_variance], dim=1).float()

    @staticmethod
    def rate(config: AutoencoderConfig) -> float:
        return float(config.kl.kl_weight)

    @staticmethod
    def check_rates(rates: list[float]) -> None:
        if any(not 0 <= r < 1 for r in rates):
            raise ValueError(f"compare.rates: expected KL weights from 0 to 1 for the kl bottleneck, got {rates}")


def sample_posteriors(moments_BEhw: Tensor) -> Tensor:
    """Latents [B, D, h, w] drawn from the posteriors N(mean, exp(log-variance)); torch's global generator decides.

    Args:
        moments_BEhw: [B, 2D, h, w], D means and D log-variances.
    """
    mean, log_variance = moments_BEhw.chunk(2, dim=1)
    return mean + (0.5 * log_variance).exp() * draw_rows(torch.randn, mean.shape, device=mean.device)


def latent_statistics(moments_NCEhw: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation [D] of each channel of the latents that `sample_posteriors` draws.

    Exact, without drawing: Var z = Var E[z | x] + E Var[z | x], in float64.

    Args:
        moments_NCEhw: [N, encodings per image, 2D, h, w], as a cache holds them.

    Raises:
        ValueError: a channel is constant, or not finite: no scale can be estimated.
    """
    mean, log_variance = moments_NCEhw.chunk(2, dim=2)
    over = (0, 1, 3, 4)
    centre_D = mean.mean(over, dtype=torch.float64)
    variance_D = (mean.double() - centre_D.view(-1, 1, 1)).square().mean(over) + log_variance.double().exp().mean(over)
    std_D = variance_D.sqrt()
    known = values_readable(std_D)  # not of fake tensors
    if known and not (centre_D.isfinite().all() and std_D.isfinite().all() and (std_D > 0).all()):
        raise ValueError(
            f"the latents' standard deviations by channel are {std_D.tolist()}: expected finite, positive ones. Has the "
            "autoencoder diverged, or its latent collapsed (autoencoder.kl.kl_weight)?"
        )
    return centre_D.float(), std_D.float()
