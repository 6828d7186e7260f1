"""Training in memory: what recipes/train_dae.py and recipes/train_prior.py do, for data sets that fit and runs of seconds.

The same stages, seeds, order of images, losses and optimisers as the recipes; no checkpoints, processes or trackers. A test
holds that recipe and function end with the same weights, so that what is compared here is what the recipes train.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from dae.config import Config
from dae.data.augmentation import augment
from dae.data.cache import EncodedDataset, EncodingCache, Fingerprint, transform_fingerprint
from dae.data.latents import LatentCache
from dae.data.tokens import TokenCache
from dae.losses import adaptive_weight, discriminator_loss, generator_loss, reconstruction_loss
from dae.models import Autoencoder, PatchDiscriminator, choose_kernels
from dae.quantizers import VectorQuantizer
from dae.sampling.chain import Prior
from dae.training import EMA, Stage, build_optimizer, build_scheduler, plan_stages
from dae.training.loop import refuse_non_finite, seed_for, validation_images
from dae.training.priors import FAMILIES, Family, encode_views, fit_mixture, prior_family
from dae.training.rehearsal import rehearse_prior, rehearse_stage, require_batches


def refuse_unsupported(config: Config) -> None:
    """ValueError if the configuration asks for what the recipes can do and training in memory cannot."""
    sections = {"stage1": config.stage1, "stage2": config.stage2, "prior": config.prior}
    found = [f"{name}.gradient_accumulation_steps=1" for name, part in sections.items() if part.gradient_accumulation_steps > 1]
    found += [f"{name}.loss.perceptual=0" for name, part in sections.items() if name != "prior" and part.loss.perceptual]
    given = {"init_from": config.init_from, "prior.init_from": config.prior.init_from}
    found += [f"{key}=null" for key, source in given.items() if source]
    if found:
        raise ValueError(
            "training in memory has no perceptual loss, no gradient accumulation and no given weights: set "
            f"{' and '.join(found)}, or train with the recipes"
        )


def rehearse(config: Config, num_classes: int, rows: int | None) -> None:
    """Before anything is trained in memory: `dae.training.rehearsal` of what `config` trains, autoencoder and prior.

    Raises:
        ValueError, TypeError, ImportError: what a model, a loss or a kernel refuses, or fewer `rows` than a batch.
    """
    autoencoder = rehearse_autoencoder(config, rows)
    require_batches(config, rows, 1)
    rehearse_prior(config, autoencoder, num_classes, rows, contextlib.nullcontext)


def rehearse_autoencoder(config: Config, rows: int | None) -> Autoencoder:
    """The part of `rehearse` that concerns the autoencoder, of the last stage, which it returns untrained."""
    refuse_unsupported(config)
    for stage in plan_stages(config):
        if rows is not None and rows < (batch := stage.config.train_batch_size):
            raise ValueError(f"{stage.name}: the training set has {rows} rows, fewer than one batch of {batch}; make it smaller")
        architecture = dataclasses.replace(config.autoencoder, decoder=stage.decoder)
        with _own_random_state():
            autoencoder = Autoencoder(architecture, config.data.channels, config.data.resolution)
        rehearse_stage(config, stage, autoencoder, None, contextlib.nullcontext)
    return autoencoder


def batches(rows: int, batch_size: int, seed: int) -> Iterator[Tensor]:
    """Row numbers [batch_size] of batch after batch, without end: the order of `dae.data.TrainLoader` in one process.

    Raises:
        ValueError: fewer rows than a batch.
    """
    if rows < batch_size:
        raise ValueError(f"the training set has {rows} rows, fewer than one batch of {batch_size}; make the batch smaller")
    epoch = 0
    while True:
        order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed + epoch))
        yield from order[: rows // batch_size * batch_size].split(batch_size)
        epoch += 1


def train_autoencoder(images_NCHW: Tensor, config: Config) -> Autoencoder:
    """Train the stages of `config.method` on images in memory; returns the model in evaluation mode, on the images' device.

    Args:
        images_NCHW: in [-1, 1].
        config: the whole configuration; its seed decides the result. The global random state is left as it was.

    Raises:
        ValueError: a loss network (stage*.loss.perceptual), gradient accumulation, or a data set smaller than a batch.
        FloatingPointError: the loss is not finite.
    """
    refuse_unsupported(config)
    stages = plan_stages(config)
    with _own_random_state():
        _seed(config.seed, "autoencoder")
        architecture = dataclasses.replace(config.autoencoder, decoder=stages[0].decoder)
        autoencoder = Autoencoder(architecture, config.data.channels, config.data.resolution).to(images_NCHW.device)
        autoencoder.refuse_other_data(images_NCHW.shape[1], images_NCHW.shape[2])
        for stage in stages:
            if stage is not stages[0] and not stage.keeps_decoder:
                _seed(config.seed, stage.name, "decoder")
                autoencoder.replace_decoder(stage.decoder)
            if stage.latent_frozen:
                autoencoder.freeze_latent()
            _train_stage(config, stage, autoencoder, images_NCHW)
    return autoencoder.eval()


def _train_stage(config: Config, stage: Stage, autoencoder: Autoencoder, images_NCHW: Tensor) -> None:
    settings, loss_config, seed = stage.config, stage.config.loss, config.seed
    choose_kernels(autoencoder, config.kernels)
    learns_codebook = isinstance(autoencoder.bottleneck, VectorQuantizer) and not stage.latent_frozen
    if learns_codebook:
        _initialize_codebook(config, stage, autoencoder, images_NCHW)
    trained = autoencoder.decoder if stage.latent_frozen else autoencoder
    parameters = list(trained.parameters())  # to walk through the module at each step would take a twentieth of it
    ema = EMA(trained, settings.ema_decay) if settings.use_ema else None
    optimizer = build_optimizer(trained, settings)
    scheduler = build_scheduler(optimizer, settings)
    critic = None
    if loss_config.adversarial > 0:
        _seed(seed, stage.name, "discriminator")
        critic = PatchDiscriminator(config.data.channels, loss_config.discriminator_channels, loss_config.discriminator_layers)
        critic_optimizer = build_optimizer(critic, settings, loss_config.discriminator_learning_rate)
        choose_kernels(critic.to(images_NCHW.device), config.kernels)

    autoencoder.train()
    order = batches(len(images_NCHW), settings.train_batch_size, seed_for(seed, stage.name, "order"))
    for step in range(settings.max_train_steps):
        _seed(seed, stage.name, step, 0)
        images = images_NCHW[next(order)]
        images = augment(images, random_flip=config.data.random_flip, random_affine=config.data.random_affine)
        with torch.no_grad() if stage.latent_frozen else contextlib.nullcontext():
            encoding = autoencoder.encode(images, sample_posterior=True)
        sample = autoencoder.decoder(encoding.latents)
        reconstruction = reconstruction_loss(sample, images, loss_config)
        loss = reconstruction if stage.latent_frozen else reconstruction + encoding.loss
        if critic is not None and step >= loss_config.adversarial_start:
            critic.requires_grad_(False)
            adversarial = generator_loss(critic(sample))
            loss = loss + loss_config.adversarial * adaptive_weight(reconstruction, adversarial, sample) * adversarial
            critic.requires_grad_(True)
        loss.backward()
        if settings.max_grad_norm > 0:
            nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        if critic is not None:
            discriminator_loss(critic(images), critic(sample.detach())).backward()
            critic_optimizer.step()
            critic_optimizer.zero_grad()
        scheduler.step()
        if learns_codebook:
            autoencoder.bottleneck.observe(encoding)
            autoencoder.bottleneck.update_codebook()
        if ema:
            ema.update(trained)
        if (step + 1) % config.logging_steps == 0 or step + 1 == settings.max_train_steps:
            refuse_non_finite(reconstruction.item(), stage.name, step + 1)
    if ema:
        trained.load_state_dict(ema.state_dict())


@torch.no_grad()
def _initialize_codebook(config: Config, stage: Stage, autoencoder: Autoencoder, images_NCHW: Tensor) -> None:
    wanted = -(-16 * config.autoencoder.vq.codebook_size // autoencoder.latent_size**2)
    order = batches(len(images_NCHW), stage.config.train_batch_size, seed_for(config.seed, stage.name, "codebook"))
    rows = torch.cat([next(order) for _ in range(min(64, -(-wanted // stage.config.train_batch_size)))])
    features = [autoencoder.encode(images_NCHW[part]).features for part in rows.split(stage.config.train_batch_size)]
    generator = torch.Generator().manual_seed(seed_for(config.seed, "codebook"))
    autoencoder.bottleneck.initialize_codebook(torch.cat(features)[:wanted], generator)


# ---- priors ----


@torch.no_grad()
def encode(
    autoencoder: Autoencoder, train: tuple[Tensor, Tensor], heldout: tuple[Tensor, Tensor], num_classes: int, config: Config
) -> EncodingCache:
    """What recipes/encode.py caches: tokens of VQ, moments of the posteriors of KL, with `prior.augmented_copies`.

    Args:
        train, heldout: images [N, C, H, W] in [-1, 1] and their labels, int64 [N].
    """
    vq = autoencoder.config.bottleneck == "vq"
    kind = TokenCache if vq else LatentCache

    def rows(name: str, images: Tensor, labels: Tensor, copies: int) -> EncodedDataset:
        views = []
        for number, part in enumerate(images.split(config.evaluation.batch_size)):
            _seed(config.seed, "encode", name, number)
            views.append(encode_views(autoencoder, part, copies, config))
        return kind.dataset(torch.cat(views), labels)

    shape = {"num_classes": num_classes, "latent_size": autoencoder.latent_size}
    if vq:
        shape["vocab_size"] = autoencoder.config.vq.codebook_size
    else:
        shape["latent_channels"] = autoencoder.config.latent_channels
    with _own_random_state():
        parts = rows("train", *train, config.prior.augmented_copies), rows("validation", *heldout, 0)
    return kind(*parts, **shape, fingerprint=Fingerprint("", "", transform_fingerprint(config)))


def train_prior(cache: EncodingCache, config: Config) -> Prior:
    """Train the prior that `config.prior` describes on encodings in memory; returns it in evaluation mode, where they are.

    With `prior.early_stopping` it is the one of the best validation, every `validation_steps`, as the recipe delivers it.

    Raises:
        ValueError: gradient accumulation, or a prior that cannot model the latent.
        FloatingPointError: the loss is not finite.
    """
    refuse_unsupported(config)
    settings, family = config.prior, FAMILIES[prior_family(config)]
    with _own_random_state():
        _seed(config.seed, "prior")
        prior = family.build(settings, cache).to(cache.train.values_NC.device)
        choose_kernels(prior, config.kernels)
        if family.loss is None:
            fit_mixture(prior, cache, config)
        else:
            _train_by_steps(prior, family, cache, config)
    return prior.eval()


def _train_by_steps(prior: Prior, family: Family, cache: EncodingCache, config: Config) -> None:
    settings, parameters, encoded = config.prior, list(prior.parameters()), cache.train
    ema = EMA(prior, settings.ema_decay) if settings.use_ema else None
    optimizer = build_optimizer(prior, settings)
    scheduler = build_scheduler(optimizer, settings)
    order = batches(len(encoded), settings.train_batch_size, seed_for(config.seed, "prior", "order"))
    heldout = cache.validation.spread(validation_images(config, settings))
    best, delivered = math.inf, None
    for step in range(settings.max_train_steps):
        prior.train()
        _seed(config.seed, "prior", step, 0)
        rows = next(order).to(encoded.labels_N.device)
        batch = {encoded.name: encoded.values_NC[rows].to(encoded.given), "label": encoded.labels_N[rows]}
        loss = family.loss(prior, prior, batch)
        loss.backward()
        if settings.max_grad_norm > 0:
            nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        if ema:
            ema.update(prior)
        done, last = step + 1, step + 1 == settings.max_train_steps
        if done % config.logging_steps == 0 or last:
            refuse_non_finite(loss.item(), "prior", done)
        if settings.early_stopping and (done % config.validation_steps == 0 or last):
            with ema.swapped_in(prior) if ema else contextlib.nullcontext():
                if (score := family.score(prior, heldout, config)) < best:
                    best, delivered = score, {k: v.clone() for k, v in prior.state_dict().items()}
    if delivered is None:
        delivered = ema.state_dict() if ema else prior.state_dict()
    prior.load_state_dict(delivered)


def _seed(*names: object) -> None:
    """What torch.manual_seed does, without the stack traces that it takes for a GPU which is not in use: 0.2 ms a step."""
    seed = seed_for(*names)
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)


@contextlib.contextmanager
def _own_random_state() -> Iterator[None]:
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        yield
