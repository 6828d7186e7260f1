"""Trainings of a few seconds: stages and priors of the smallest models, on random data."""

from pathlib import Path

import torch

from dae.config import load_config
from dae.data import TrainLoader
from dae.data.cache import Fingerprint
from dae.losses import PerceptualLoss
from dae.priors import prior_family
from dae.training import plan_stages
from dae.training.autoencoder import StageTraining, build_autoencoder
from dae.training.encodings import build_cache, cache_class
from dae.training.engine import LocalEngine
from dae.training.prior import PriorTraining

CPU = torch.device("cpu")
TINY = Path(__file__).parent / "recipes" / "tiny.yaml"
GAN = ("stage2.loss.adversarial=0.1", "stage2.loss.discriminator_channels=8", "autoencoder.vq.revive_threshold=0.5")


def autoencoder_training(*overrides, which=0, device=CPU):
    config = load_config(TINY, ["data.random_flip=true", "autoencoder.vq.kmeans_iterations=1", *overrides])
    stage = plan_stages(config)[which]
    images = torch.rand(40, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    data = [{"image": image} for image in images]
    autoencoder = build_autoencoder(config, stage)
    if stage.latent_frozen:
        autoencoder.freeze_latent()
    autoencoder.to(device).train()

    def loaders(stage, purpose):
        return TrainLoader(data, stage.config.train_batch_size, seed=3)

    perceptual = PerceptualLoss() if stage.config.loss.perceptual else None
    return StageTraining(config, stage, autoencoder, loaders, LocalEngine(device), perceptual)


def prior_training(*overrides, values, device=CPU):
    config = load_config(TINY, ["prior.num_augmentations=1", "prior.token_noise=0.1", "prior.dropout=0.1", *overrides])
    autoencoder = build_autoencoder(config, plan_stages(config)[0])
    parts = [cache_class(autoencoder.bottleneck).dataset(values, torch.arange(len(values)) % 3)] * 2
    cache = build_cache(autoencoder, *parts, 3, Fingerprint("", "", ""))
    family = prior_family(config)
    torch.manual_seed(0)
    prior = family.build(config.prior, cache)
    loader = TrainLoader(cache.train, config.prior.train_batch_size, seed=1)
    return PriorTraining(config, family, prior.train().to(device), loader, LocalEngine(device))


def weights(training):
    tensors, state = training.state.pack()
    return {f"{file}/{name}": value.clone() for file, part in tensors.items() for name, value in part.items()}, state
