"""The latent cache: what a KL autoencoder makes of a data set, as the mean and log-variance of each posterior.

The posteriors are kept rather than samples of them: a prior learns all of each (`dae.losses.flow_matching_loss`), not one draw.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dae.data.cache import EncodedDataset, EncodingCache
from dae.distributed import draw_rows


class PosteriorDataset(EncodedDataset):
    """Rows {"moments": float32 [copies, 2D, h, w], "label": int, "row": int}; of the 2D channels D are means, D log-variances.

    The posterior of the image itself comes first, then those of augmented copies of it.
    """

    name, stored, given = "moments", torch.float32, torch.float32

    @property
    def moments_NCEhw(self) -> Tensor:
        return self.values_NC


@dataclass
class LatentCache(EncodingCache):
    latent_channels: int

    dataset, folder, title = PosteriorDataset, "latents", "latent cache"
    facts = ("latent_channels", "num_classes", "latent_size")


def sample_posteriors(moments_BEhw: Tensor) -> Tensor:
    """Latents [B, D, h, w] drawn from the posteriors N(mean, exp(log-variance)); torch's global generator decides."""
    mean, log_variance = moments_BEhw.chunk(2, dim=1)
    return mean + (0.5 * log_variance).exp() * draw_rows(torch.randn, mean.shape, device=mean.device)


def latent_statistics(cached: PosteriorDataset) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation [D] of each channel of the latents that `sample_posteriors` draws, over all copies.

    Exact, without drawing: Var z = Var E[z | x] + E Var[z | x], in float64.

    Raises:
        ValueError: a channel is constant, or not finite: no scale can be estimated.
    """
    mean, log_variance = cached.moments_NCEhw.chunk(2, dim=2)
    over = (0, 1, 3, 4)
    centre_D = mean.mean(over, dtype=torch.float64)
    variance_D = (mean.double() - centre_D.view(-1, 1, 1)).square().mean(over) + log_variance.double().exp().mean(over)
    std_D = variance_D.sqrt()
    if not (centre_D.isfinite().all() and std_D.isfinite().all() and (std_D > 0).all()):
        raise ValueError(
            f"the latents' standard deviations by channel are {std_D.tolist()}: expected finite, positive ones. Has the "
            "autoencoder diverged, or its latent collapsed (autoencoder.kl.kl_weight)?"
        )
    return centre_D.float(), std_D.float()
