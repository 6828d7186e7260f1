"""Trainings to plan and to measure: with all losses on, on random images or encodings."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from dae.config import Config
from dae.data.cache import EncodingCache, Fingerprint
from dae.data.loader import TrainLoader
from dae.losses import PerceptualLoss
from dae.models import Autoencoder, choose_kernels
from dae.priors import prior_family
from dae.quantizers import bottleneck_class
from dae.training.autoencoder import StageTraining
from dae.training.encodings import build_cache, cache_class
from dae.training.engine import Engine
from dae.training.prior import PriorTraining
from dae.training.stages import Stage


def stage_training(config: Config, stage: Stage, autoencoder: Autoencoder, engine: Engine, data: Any = None) -> StageTraining:
    """The training of a stage, with the adversarial loss on from the first step and no codebook initialisation.

    Without `data` (an `ImageData`) the images are random. The perceptual loss's weights always are: they cost the same as trained
    ones.
    """
    loss = dataclasses.replace(stage.config.loss, adversarial_start=0)
    stage = dataclasses.replace(stage, config=dataclasses.replace(stage.config, loss=loss))
    torch.manual_seed(0)
    perceptual = PerceptualLoss() if loss.perceptual else None

    def loaders(stage: Stage, _: str) -> Any:
        if data is None:
            return synthetic_images(config, stage)
        return TrainLoader(data.train, stage.config.train_batch_size, seed=0, num_workers=config.data.num_workers)

    autoencoder = autoencoder.to(engine.device).train()
    stage.freeze(autoencoder)
    return StageTraining(config, stage, autoencoder, loaders, engine, perceptual, new_codebook=False)


def synthetic_images(config: Config, stage: Stage) -> Iterator[dict]:
    """Endless repetition of the same random images, as drawing them is not part of the step."""
    shape = (stage.config.train_batch_size, config.data.channels, config.data.resolution, config.data.resolution)
    return itertools.repeat({"image": torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 2 - 1})


def prior_training(config: Config, autoencoder: Autoencoder, num_classes: int, engine: Engine) -> PriorTraining:
    """The training of a prior that is trained in steps, on random encodings of the latent of an autoencoder."""
    torch.manual_seed(0)
    family, settings = prior_family(config), config.prior
    cache = random_cache(config, autoencoder, num_classes, settings.train_batch_size)
    prior = family.build(settings, cache).to(engine.device).train()
    choose_kernels(prior, config.kernels)
    encoded = cache.train
    batch = {encoded.name: encoded.values_NC.to(encoded.given), "label": encoded.labels_N}
    loader: Any = itertools.repeat(batch)
    return PriorTraining(config, family, prior, loader, engine)


def random_cache(config: Config, autoencoder: Autoencoder, num_classes: int, rows: int) -> EncodingCache:
    """Random encodings as recipes/encode.py would cache them."""
    side, bottleneck = autoencoder.latent_size, bottleneck_class(config.autoencoder)
    values: Tensor
    if bottleneck.discrete:
        values = torch.randint(bottleneck.num_codes(config.autoencoder), (rows, 1, side**2))
    else:
        values = torch.randn(rows, 1, 2 * config.autoencoder.latent_channels, side, side)
    encoded = cache_class(bottleneck).dataset(values, torch.randint(num_classes, (rows,)))
    return build_cache(autoencoder, encoded, encoded, num_classes, Fingerprint("", "", ""))
