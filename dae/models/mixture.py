"""Gaussian mixture over a continuous latent: the smallest prior with several modes, fitted without gradients."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dae.config import PriorConfig
from dae.models.continuous import ContinuousPrior
from dae.precision import WideBuffers


class GaussianMixturePrior(WideBuffers, ContinuousPrior):
    """p(z) = sum_k w_k N(z; mu_k, L_k L_k') over the flattened latent z of P = D h h values; it ignores the class.

    K = `config.num_components`, with full covariances. Before `fit` it is a standard normal. There is nothing to train by
    gradients: weights, means and covariance factors are buffers, which are float32 or float64 whatever it is cast to.

    Args:
        config: num_components.
        latent_channels, latent_size, num_classes, tokenizer: as of `ContinuousPrior`.
    """

    weights: Tensor  # [K]
    means: Tensor  # [K, P]
    cholesky: Tensor  # [K, P, P]

    def __init__(self, config: PriorConfig, *, latent_channels: int, latent_size: int, num_classes: int, tokenizer: str = ""):
        shape = {"latent_channels": latent_channels, "latent_size": latent_size}
        super().__init__(config, **shape, num_classes=num_classes, tokenizer=tokenizer)
        K, P = config.num_components, latent_channels * latent_size**2
        self.register_buffer("weights", torch.full((K,), 1 / K))
        self.register_buffer("means", torch.zeros(K, P))
        self.register_buffer("cholesky", torch.eye(P).repeat(K, 1, 1))

    def fit(self, latents_NDhw: Tensor, seed: int, *, regularisation: float = 1e-2) -> GaussianMixturePrior:
        """Fit by expectation-maximisation from k-means (scikit-learn), with channels scaled to variance 1; returns itself.

        Args:
            latents_NDhw: [N, D, h, h] with N >= K.
            seed: of k-means; the global random state is neither read nor changed.
            regularisation: share of its channel's variance that is added to the variance of each value, > 0. It keeps a
                component of few points from collapsing onto them, and gives values that never vary a density.

        Raises:
            TypeError: latents that are not floating.
            ValueError: another shape, fewer latents than components, NaN or infinity, a channel that does not vary, or a
                regularisation that is not positive.
        """
        from sklearn.mixture import GaussianMixture

        self.check_latents(latents_NDhw)
        K = self.config.num_components
        if len(latents_NDhw) < max(K, 2):
            raise ValueError(
                f"expected at least {max(K, 2)} latents for prior.num_components={K}, got {len(latents_NDhw)}; "
                "give more, or ask for fewer components"
            )
        if not regularisation > 0:
            raise ValueError(f"regularisation: expected a positive number, got {regularisation}")
        latents = latents_NDhw.detach().double().cpu()
        if not torch.isfinite(latents).all():
            raise ValueError("expected finite latents, got NaN or infinity; has the autoencoder diverged?")
        std_D, mean_D = torch.std_mean(latents, dim=(0, 2, 3))
        if not (std_D > 0).all():
            constant = (std_D <= 0).nonzero().flatten().tolist()
            raise ValueError(f"channels {constant} do not vary, which no density describes; use fewer latent_channels")
        scale_P, shift_P = (x.repeat_interleave(self.latent_size**2) for x in (std_D, mean_D))
        points = ((latents.flatten(1) - shift_P) / scale_P).numpy()
        fitted = GaussianMixture(K, covariance_type="full", reg_covar=regularisation, max_iter=200, random_state=seed).fit(points)
        factors = torch.linalg.cholesky(torch.from_numpy(fitted.covariances_))
        self.weights.copy_(torch.from_numpy(fitted.weights_))
        self.means.copy_(torch.from_numpy(fitted.means_) * scale_P + shift_P)
        self.cholesky.copy_(scale_P[:, None] * factors)
        return self

    def log_prob(self, latents_BDhw: Tensor) -> Tensor:
        """log p(z) [B] in nats, a density in the autoencoder's own scale, in the dtype of the buffers.

        Raises:
            TypeError, ValueError: the latents are no floating point [B, D, h, h].
        """
        self.check_latents(latents_BDhw)
        centred_KPB = latents_BDhw.flatten(1).to(self.means.dtype).T - self.means[:, :, None]
        white_KPB = torch.linalg.solve_triangular(self.cholesky, centred_KPB, upper=False)
        P = self.means.shape[1]
        volume_K = self.cholesky.diagonal(dim1=1, dim2=2).log().sum(1) + 0.5 * P * math.log(2 * math.pi)
        joint_KB = (self.weights.log() - volume_K)[:, None] - 0.5 * white_KPB.square().sum(1)
        return joint_KB.logsumexp(0)

    def sample(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        """[count, D, h, h] drawn from the mixture, of any class; `generator` is on the model's device.

        Raises:
            ValueError: a negative count.
        """
        if count < 0:
            raise ValueError(f"count must not be negative, got {count}")
        K, P = self.means.shape
        noise = torch.randn(count, P, generator=generator, device=self.means.device, dtype=self.means.dtype)
        component = torch.rand(count, generator=generator, device=self.means.device, dtype=torch.float64)
        component = torch.searchsorted(self.weights.double().cumsum(0)[:-1].contiguous(), component, right=True)
        latents = torch.empty_like(noise)
        for k in range(K):
            rows = component == k
            latents[rows] = self.means[k] + noise[rows] @ self.cholesky[k].T
        return latents.view(count, self.latent_channels, self.latent_size, self.latent_size)
