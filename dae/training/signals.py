"""Numbers of a training's last micro-step that say how it fares, read at the steps that are logged."""

from __future__ import annotations

import torch
from torch import Tensor

from dae.distributed import in_global_order, sum_over_processes, world_size
from dae.quantizers import Encoding

IDLE = 0.05  # nats per image, of a channel: less tells one image from another hardly ever


def averaged(values: dict[str, Tensor]) -> dict[str, float]:
    """The mean of each scalar over all processes, which must call it with the same names; one read from the device."""
    if not values:
        return {}
    stacked = torch.stack([value.detach().double().reshape(()) for value in values.values()])
    return dict(zip(values, (sum_over_processes(stacked) / world_size()).tolist(), strict=True))


@torch.no_grad()
def latent_signals(encoding: Encoding, num_codes: int | None) -> dict[str, float]:
    """What the latents of the global batch use of their bottleneck.

    Args:
        encoding: of this process's images.
        num_codes: K of a discrete bottleneck.

    Returns:
        Of codes: `code_usage`, the share of min(K, latents of the batch) that occurs, and `code_perplexity`. Of posteriors:
        `posterior_kl`, KL(q || N(0, I)) of an image in nats, and `idle_channels`, the share of channels with less than `IDLE`.
    """
    if encoding.indices is not None and num_codes is not None:
        indices = in_global_order(encoding.indices).flatten()
        counts = indices.unique(return_counts=True)[1].double()
        entropy = torch.special.entr(counts / counts.sum()).sum()
        return {"code_usage": len(counts) / min(num_codes, len(indices)), "code_perplexity": entropy.exp().item()}
    if encoding.log_variance is not None:
        mean, log_variance = encoding.features.double(), encoding.log_variance.double()
        kl_D = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum((2, 3)).mean(0)
        kl_D = sum_over_processes(kl_D) / world_size()
        return {"posterior_kl": kl_D.sum().item(), "idle_channels": (kl_D < IDLE).double().mean().item()}
    return {}
