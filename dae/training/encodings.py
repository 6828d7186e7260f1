"""Encode images for a prior, in the form that a cache keeps."""

from __future__ import annotations

import torch
from torch import Tensor

from dae.config import Config
from dae.data.augmentation import augment
from dae.data.cache import EncodedDataset, EncodingCache, Fingerprint, LatentCache, TokenCache
from dae.models import Autoencoder
from dae.quantizers import Bottleneck


def cache_class(bottleneck: type[Bottleneck] | Bottleneck) -> type[EncodingCache]:
    """The class of cache for the encodings of a bottleneck."""
    return TokenCache if bottleneck.discrete else LatentCache


def encode_views(autoencoder: Autoencoder, images: Tensor, augmentations: int, config: Config) -> Tensor:
    """Encodings [B, 1 + augmentations, ...]: of each image, then of its augmentations, with resampled codes, or both.

    Each as `Bottleneck.pack` gives it. Draws from the global generator; the caller decides how processes share the draws.
    """
    bottleneck = autoencoder.bottleneck

    def further() -> Tensor:
        changed = images
        if config.prior.augment_images:
            changed = augment(images, random_flip=config.data.random_flip, random_affine=config.data.random_affine)
        return bottleneck.pack(bottleneck.resample(autoencoder.encode(changed), config.prior.code_temperature))

    return torch.stack([bottleneck.pack(autoencoder.encode(images)), *(further() for _ in range(augmentations))], dim=1)


def build_cache(
    autoencoder: Autoencoder, train: EncodedDataset, validation: EncodedDataset, num_classes: int, fingerprint: Fingerprint
) -> EncodingCache:
    """The cache of the encodings of a training and a held-out set."""
    kind, config = cache_class(autoencoder.bottleneck), autoencoder.config
    if autoencoder.bottleneck.discrete:
        factors = autoencoder.bottleneck.factors(config)
        latent = {"vocab_size": autoencoder.bottleneck.num_codes(config), "factors": list(factors) if len(factors) > 1 else None}
    else:
        latent = {"latent_channels": config.latent_channels}
    return kind(
        train, validation, num_classes=num_classes, latent_size=autoencoder.latent_size, fingerprint=fingerprint, **latent
    )
