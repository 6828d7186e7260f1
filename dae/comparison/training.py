"""Training in memory: what recipes/train_dae.py and recipes/train_prior.py do, for data sets that fit and runs of seconds.

The same stages, seeds, order of images, losses and optimisers as the recipes; no checkpoints, processes or trackers. A test
holds that recipe and function end with the same weights, so that what is compared here is what the recipes train.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from dae.config import Config
from dae.data.augmentation import augment
from dae.losses import adaptive_weight, discriminator_loss, flow_matching_loss, generator_loss, reconstruction_loss
from dae.models import ARPrior, Autoencoder, DiT, GaussianMixturePrior, PatchDiscriminator, choose_kernels
from dae.quantizers import VectorQuantizer
from dae.training import EMA, Stage, build_optimizer, build_scheduler, plan_stages
from dae.training.loop import refuse_non_finite, seed_for


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
    stages = plan_stages(config)
    for stage in stages:
        if stage.config.loss.perceptual or stage.config.gradient_accumulation_steps > 1:
            raise ValueError(
                f"{stage.name}: training in memory has no perceptual loss and no gradient accumulation; set "
                "loss.perceptual=0 and gradient_accumulation_steps=1, or train with recipes/train_dae.py"
            )
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
            nn.utils.clip_grad_norm_(trained.parameters(), settings.max_grad_norm)
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


@dataclasses.dataclass
class Latents:
    """What an encoder makes of a data set: tokens [N, T] of VQ, or mean and log-variance [N, D, h, w] of a KL posterior."""

    tokens: Tensor | None
    mean: Tensor | None
    log_variance: Tensor | None

    def __len__(self) -> int:
        return len(self.tokens if self.tokens is not None else self.mean)

    def sample(self, rows: Tensor) -> Tensor:
        """Tokens of the rows, or posterior samples [B, D, h, w], drawn from the global generator."""
        if self.tokens is not None:
            return self.tokens[rows]
        mean, deviation = self.mean[rows], (0.5 * self.log_variance[rows]).exp()
        return mean + deviation * torch.randn_like(mean)


@torch.no_grad()
def encode(autoencoder: Autoencoder, images_NCHW: Tensor, batch_size: int = 500) -> Latents:
    """`Latents` of images, each encoded once as it is."""
    encodings = [autoencoder.encode(part) for part in images_NCHW.split(batch_size)]
    if encodings[0].indices is not None:
        return Latents(torch.cat([e.indices.flatten(1) for e in encodings]), None, None)
    return Latents(None, torch.cat([e.features for e in encodings]), torch.cat([e.log_variance for e in encodings]))


def prior_family(config: Config) -> str:
    """`config.prior.family`, or what `auto` stands for. ValueError: it cannot model the bottleneck's latent."""
    bottleneck, family = config.autoencoder.bottleneck, config.prior.family
    if family == "auto":
        return "ar" if bottleneck == "vq" else "dit"
    if (family == "ar") != (bottleneck == "vq"):
        fits = "ar" if bottleneck == "vq" else "dit or mixture"
        raise ValueError(f"prior.family={family} cannot model the latent of autoencoder.bottleneck={bottleneck}; expected {fits}")
    return family


Prior = ARPrior | DiT | GaussianMixturePrior


def train_prior(
    autoencoder: Autoencoder, latents: Latents, labels_N: Tensor, num_classes: int, config: Config, name: str = "prior"
) -> Prior:
    """Train the prior that `config.prior` describes; returns it in evaluation mode.

    Args:
        latents: of the training images.
        labels_N: their classes, int64.
        name: of the prior among several of one run; decides its random numbers.

    Raises:
        ValueError: further encodings of each image (prior.augmented_copies), or a prior that cannot model the latent.
        FloatingPointError: the loss is not finite.
    """
    settings, family, device = config.prior, prior_family(config), labels_N.device
    if settings.augmented_copies:
        raise ValueError("training in memory encodes each image once: set prior.augmented_copies=0")
    with _own_random_state():
        _seed(config.seed, name)
        if family == "ar":
            tokens = {"vocab_size": config.autoencoder.vq.codebook_size, "sequence_length": autoencoder.latent_size**2}
            prior = ARPrior(settings, **tokens, num_classes=num_classes).to(device)
        else:
            shape = {"latent_channels": config.autoencoder.latent_channels, "latent_size": autoencoder.latent_size}
            kind = DiT if family == "dit" else GaussianMixturePrior
            prior = kind(settings, **shape, num_classes=num_classes).to(device)
        if family == "mixture":
            everything = torch.arange(len(latents), device=device)
            return prior.fit(latents.sample(everything), seed_for(config.seed, name, "fit") % 2**32).eval()
        if family == "dit":  # the scale of this autoencoder's latent, whatever it is
            variance = latents.log_variance.exp().mean((0, 2, 3)) + latents.mean.var((0, 2, 3))
            prior.set_latent_statistics(latents.mean.mean((0, 2, 3)), variance.sqrt())
        choose_kernels(prior, config.kernels)
        _train_by_steps(prior, latents, labels_N, config, name)
    return prior.eval()


def _train_by_steps(prior: ARPrior | DiT, latents: Latents, labels_N: Tensor, config: Config, name: str) -> None:
    settings = config.prior
    ema = EMA(prior, settings.ema_decay) if settings.use_ema else None
    optimizer = build_optimizer(prior, settings)
    scheduler = build_scheduler(optimizer, settings)
    order = batches(len(latents), settings.train_batch_size, seed_for(config.seed, name, "order"))
    prior.train()
    for step in range(settings.max_train_steps):
        _seed(config.seed, name, step, 0)
        rows = next(order).to(labels_N.device)
        x, labels = latents.sample(rows), prior.hide_classes(labels_N[rows])
        if isinstance(prior, ARPrior):
            loss = prior(labels, prior.corrupt(x[:, :-1]), targets_BT=x)
        else:
            loss = flow_matching_loss(prior, prior.normalise(x), labels)
        loss.backward()
        if settings.max_grad_norm > 0:
            nn.utils.clip_grad_norm_(prior.parameters(), settings.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        if ema:
            ema.update(prior)
        if (step + 1) % config.logging_steps == 0 or step + 1 == settings.max_train_steps:
            refuse_non_finite(loss.item(), "prior", step + 1)
    if ema:
        prior.load_state_dict(ema.state_dict())


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
