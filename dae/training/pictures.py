"""Pictures for trackers at each validation: held-out images beside their reconstructions, and samples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dae.config import Config
from dae.data.pictures import grid, to_uint8
from dae.models import Autoencoder, Prior
from dae.sampling import balanced_labels, generate
from dae.seeding import seed_for

if TYPE_CHECKING:
    import numpy as np


@torch.no_grad()
def reconstruction_sheet(autoencoder: Autoencoder, images_BCHW: Tensor) -> np.ndarray:
    """One picture, uint8 [H, W, C]: the images above, the autoencoder's reconstructions below."""
    device = next(autoencoder.parameters()).device
    images_BCHW = images_BCHW.to(device)
    rebuilt = autoencoder.eval()(images_BCHW).sample
    return grid(to_uint8(torch.cat([images_BCHW, rebuilt.float()])), columns=len(images_BCHW))


def sample_sheet(autoencoder: Autoencoder, prior: Prior, config: Config, classes: Sequence[int] = ()) -> np.ndarray:
    """One picture, uint8 [H, W, C]: `config.logged_images` samples, `classes` (none: all) in turn, always of the same noise."""
    labels_N = balanced_labels(config.logged_images, prior.num_classes, classes)
    batches = generate(autoencoder, prior.eval(), labels_N, config.sampling, seed_for(config.seed, "prior", "pictures"))
    return grid(to_uint8(torch.cat([batch.float() for batch in batches])), columns=min(len(labels_N), 8))
