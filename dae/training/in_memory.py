"""Train the chain on images in memory, on one device and without files; bit for bit the weights of the recipes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from dae.config import Config
from dae.data.cache import EncodedDataset, EncodingCache, Fingerprint, transform_fingerprint
from dae.data.tensors import TensorLoader
from dae.models import Autoencoder, Prior, choose_kernels
from dae.priors import prior_family
from dae.seeding import seed_for, set_seed
from dae.training.autoencoder import build_autoencoder, train_stages
from dae.training.encodings import build_cache, cache_class, encode_views
from dae.training.engine import LocalEngine, backends
from dae.training.initialization import load_prior
from dae.training.prior import PriorTraining, train_by_steps
from dae.training.stages import plan_stages


def train_autoencoder(images_NCHW: Tensor, config: Config) -> Autoencoder:
    """Train the stages of `config.method`; returns the model in evaluation mode, on the images' device.

    Args:
        images_NCHW: in [-1, 1].
        config: the whole configuration; its seed decides the result. The global random state is left as it was.

    Raises:
        ValueError: a data set smaller than a batch, or other images than `config.data` says.
        FloatingPointError: the loss is not finite.
    """
    with _own_random_state(), backends(config, images_NCHW.device):
        autoencoder = build_autoencoder(config, plan_stages(config)[0]).to(images_NCHW.device)
        autoencoder.refuse_other_data(images_NCHW.shape[1], images_NCHW.shape[2])

        def loader(stage, purpose: str) -> TensorLoader:
            seed = seed_for(config.seed, stage.name, purpose)
            return TensorLoader({"image": images_NCHW}, stage.config.train_batch_size, seed=seed)

        train_stages(config, autoencoder, loader, LocalEngine(images_NCHW.device, config.mixed_precision))
    return autoencoder.eval()


@torch.no_grad()
def encode(
    autoencoder: Autoencoder, train: tuple[Tensor, Tensor], heldout: tuple[Tensor, Tensor], num_classes: int, config: Config
) -> EncodingCache:
    """What recipes/encode.py caches: tokens of VQ, moments of the posteriors of KL, with `prior.num_augmentations`.

    Args:
        train, heldout: images [N, C, H, W] in [-1, 1] and their labels, int64 [N].
    """

    def rows(name: str, images: Tensor, labels: Tensor, copies: int) -> EncodedDataset:
        views = []
        for number, part in enumerate(images.split(config.evaluation.batch_size)):
            set_seed(config.seed, "encode", name, number)
            views.append(encode_views(autoencoder, part, copies, config))
        return cache_class(autoencoder.bottleneck).dataset(torch.cat(views), labels)

    with _own_random_state():
        parts = rows("train", *train, config.prior.num_augmentations), rows("validation", *heldout, 0)
    return build_cache(autoencoder, *parts, num_classes, Fingerprint("", "", transform_fingerprint(config)))


def train_prior(cache: EncodingCache, config: Config) -> Prior:
    """Train the prior that `config.prior` describes; returns it in evaluation mode, on the device of the encodings.

    With `prior.early_stopping` it is the one of the best validation, every `validation_steps`, as the recipe delivers it.

    Raises:
        ValueError: a prior that cannot model the latent, or fewer encodings than a batch.
        FloatingPointError: the loss is not finite.
    """
    settings, family, encoded = config.prior, prior_family(config), cache.train
    with _own_random_state(), backends(config, encoded.values_NC.device):
        set_seed(config.seed, "prior")
        prior = family.build(settings, cache).to(encoded.values_NC.device)
        if settings.init_from:
            load_prior(prior, settings.init_from)
        choose_kernels(prior, config.kernels)
        if family.fitted:
            family.fit(prior, cache, config)
        else:
            columns = {encoded.name: encoded.values_NC.to(encoded.given), "label": encoded.labels_N}
            loader = TensorLoader(columns, settings.train_batch_size, seed=seed_for(config.seed, "prior", "order"))
            engine = LocalEngine(encoded.values_NC.device, config.mixed_precision)
            training = PriorTraining(config, family, prior, loader, engine)
            train_by_steps(training, cache.validation if settings.early_stopping else None)
    return prior.eval()


@contextlib.contextmanager
def _own_random_state() -> Iterator[None]:
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        yield
