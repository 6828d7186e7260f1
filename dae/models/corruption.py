"""Noise on latents, and masking of them, for a decoder in training: a latent is robust if a decoder reads it all the same."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dae.distributed import draw_rows, summed_with_gradients
from dae.precision import wide


class LatentCorruption:
    """Forward pre-hook of a decoder: in training its latents [B, D, h, w] pass `corrupted` first.

    A hook, not a module around the decoder: the names of the weights stay those of its family.
    """

    def __init__(self, noise: float, mask: float):
        self.noise, self.mask = noise, mask

    def __call__(self, decoder: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if not decoder.training:
            return None
        latents, *others = arguments
        return corrupted(latents, self.noise, self.mask), *others


def corrupted(latents_BDhw: Tensor, noise: float, mask: float) -> Tensor:
    """z + noise * std * e with e ~ N(0, 1), of which a share `mask` of the positions becomes the mean latent.

    Mean and std [D] are those of the global batch, over images and positions; they are differentiated, too, so that an encoder
    gains nothing by larger latents. Draws are of the global batch (`dae.distributed.draw_rows`); 0 draws nothing.

    Args:
        latents_BDhw: floating; the result has its shape and dtype.
        noise: in standard deviations of each channel.
        mask: probability of each position, the same for all of its channels.
    """
    z_BDhw = latents_BDhw.to(wide(latents_BDhw.dtype))
    mean_D, std_D = (x.to(z_BDhw.dtype).view(-1, 1, 1) for x in channel_moments(z_BDhw))
    if noise > 0:
        z_BDhw = z_BDhw + noise * std_D * draw_rows(torch.randn, z_BDhw.shape, device=z_BDhw.device, dtype=z_BDhw.dtype)
    if mask > 0:
        batch, _, height, width = z_BDhw.shape
        hidden_B1hw = draw_rows(torch.rand, (batch, 1, height, width), device=z_BDhw.device) < mask
        z_BDhw = torch.where(hidden_B1hw, mean_D, z_BDhw)
    return z_BDhw.to(latents_BDhw.dtype)


def channel_moments(z_BDhw: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation [D], float64, over images and positions of the global batch; a collective."""
    z_BDhw = z_BDhw.double()
    count = z_BDhw.new_full((1,), z_BDhw[:, 0].numel())  # a graph cannot record a copy from the host
    sums = summed_with_gradients(torch.cat([z_BDhw.sum((0, 2, 3)), z_BDhw.square().sum((0, 2, 3)), count]))
    mean_D, square_D = (sums[:-1] / sums[-1]).chunk(2)
    variance_D = (square_D - mean_D.square()).clamp_min(torch.finfo(torch.float64).tiny)  # of a constant channel no gradient
    return mean_D, variance_D.sqrt()
