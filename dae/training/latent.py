"""Measure the latent of a trained autoencoder for its `latent.json`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable

import torch
from torch import Tensor

from dae.config import Config
from dae.distributed import failing_together, gather_objects, world_size
from dae.models import Autoencoder
from dae.models.latent import Latent, identify
from dae.training.stages import Stage

MOST_IMAGES = 2048


def images_to_measure(stage: Stage) -> int:
    """Images per process: together `MOST_IMAGES`, or an eighth of those that the stage trained on, at least a batch.

    A forward pass of the encoder, over so few images, is about a fiftieth of a short training.
    """
    settings = stage.config
    trained = settings.max_train_steps * settings.train_batch_size * settings.gradient_accumulation_steps
    return min(-(-MOST_IMAGES // world_size()), max(settings.train_batch_size, trained // 8))


@torch.no_grad()
def latent_with_moments(config: Config, autoencoder: Autoencoder, batches: Iterable[dict[str, Tensor]], images: int) -> Latent:
    """The identity of a latent with the moments and range of its values, the same on all processes.

        mean_c = E z_c,  std_c^2 = E z_c^2 - mean_c^2,  scale = 1 / standard deviation of all values,  shift = their mean

    z are the codes, or samples of the posteriors, whose moments need no drawing: E z^2 = mean^2 + variance of the posterior.
    Sums over images, positions and processes are taken in float64.

    Args:
        config: of the run, whose `data` prepared the images.
        batches: this process's training images, {"image": [B, C, H, W]}, not augmented.
        images: how many of them to measure, at least one.

    Returns:
        scale and shift are those that the model came with, if it was imported with some. Without spread there is no scale.
    """
    latent = identify(autoencoder, center_crop=config.data.center_crop)
    training, left, channels = autoencoder.training, images, autoencoder.config.latent_channels
    sums = torch.zeros(2, channels, dtype=torch.float64)  # of z and z^2
    seen, values, low, high = 0, 0, math.inf, -math.inf
    autoencoder.eval()
    with failing_together():
        for batch in batches:
            encoding = autoencoder.encode(batch["image"][:left].to(autoencoder.device))
            mean, variance = encoding.latents.double().cpu(), torch.zeros(())
            if encoding.log_variance is not None:
                mean, variance = encoding.features.double().cpu(), encoding.log_variance.double().cpu().exp()
            square = mean.square() + variance
            sums += torch.stack([mean.sum((0, 2, 3)), square.sum((0, 2, 3))])
            seen, values = seen + len(mean), values + mean[:, 0].numel()
            low, high = min(low, mean.min().item()), max(high, mean.max().item())
            left -= len(mean)
            if left <= 0:
                break
    autoencoder.train(training)
    parts = gather_objects((seen, values, sums.tolist(), low, high))
    total = torch.tensor([part[2] for part in parts], dtype=torch.float64).sum(0) / sum(part[1] for part in parts)
    mean_C, square_C = total
    std_C = (square_C - mean_C.square()).clamp(min=0).sqrt()
    whole = total.mean(1)
    spread = math.sqrt(max(0.0, (whole[1] - whole[0].square()).item()))
    return dataclasses.replace(
        latent,
        images=sum(part[0] for part in parts),
        mean=mean_C.tolist(),
        std=std_C.tolist(),
        range=[min(part[3] for part in parts), max(part[4] for part in parts)],
        scale=latent.scale if latent.diffusers else 1 / spread if spread else None,
        shift=latent.shift if latent.diffusers else whole[0].item(),
    )
