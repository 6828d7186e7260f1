"""Everything that differs between prior families: data, model, loss, held-out score.

ar       autoregressive Transformer over VQ tokens; held-out bits per token
dit      Diffusion Transformer over a KL latent; held-out flow-matching loss, and bits per image once it is trained
mixture  Gaussian mixture over a KL latent, fitted at once; held-out bits per image
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dae.config import Config, PriorConfig
from dae.data.augmentation import augment
from dae.data.cache import (
    EncodedDataset,
    EncodingCache,
    LatentCache,
    PosteriorDataset,
    TokenCache,
    TokenDataset,
    choose_augmentations,
    latent_statistics,
    sample_posteriors,
)
from dae.distributed import as_single_process, draw_rows, world_size
from dae.hub import PretrainedModel
from dae.losses import flow_matching_loss
from dae.metrics import bits_back
from dae.models import ARPrior, Autoencoder, DiT, GaussianMixturePrior
from dae.quantizers import Encoding
from dae.sampling import log_likelihood
from dae.seeding import seed_for

LIKELIHOOD_STEPS = 32  # of the ODE whose likelihood gives a DiT's bits per image
LIKELIHOOD_IMAGES = 256  # held-out images of which it is taken at most
SCORE_BATCH = 64  # latents at once where numbers are drawn for each batch: no setting may change the score


def prior_family(config: Config) -> str:
    """`config.prior.family`, or what `auto` stands for: ar for vq, dit for kl.

    Raises:
        ValueError: the family cannot model the latent of `config.autoencoder.bottleneck`.
    """
    bottleneck, family = config.autoencoder.bottleneck, config.prior.family
    if family == "auto":
        return "ar" if bottleneck == "vq" else "dit"
    if (family == "ar") != (bottleneck == "vq"):
        fits = "ar models its tokens" if bottleneck == "vq" else "dit and mixture model its continuous latent"
        raise ValueError(
            f"prior.family={family} cannot model the latent of autoencoder.bottleneck={bottleneck}: {fits}. Set prior.family, or "
            "train an autoencoder with the other bottleneck"
        )
    return family


def require_guidance(config: Config) -> None:
    """Before anything is trained: guidance subtracts the prediction without a class, which only class dropout teaches.

    Raises:
        ValueError: a scale other than 1 is configured for sampling or evaluation, and `prior.class_dropout` is 0.
    """
    if config.prior.class_dropout > 0 or prior_family(config) == "mixture":
        return
    scales = {"sampling.cfg_scale": [config.sampling.cfg_scale], "evaluation.cfg_scales": config.evaluation.cfg_scales}
    for key, values in scales.items():
        if guided := [value for value in values if value != 1]:
            raise ValueError(
                f"{key}: a guidance scale of {guided[0]:g} needs a prior trained with prior.class_dropout above 0, got 0; "
                f"set {key}={'1' if key.endswith('scale') else '[1.0]'}, or prior.class_dropout=0.1"
            )


# ---- what priors read ----


def encode_views(autoencoder: Autoencoder, images: Tensor, copies: int, config: Config) -> Tensor:
    """Encodings [B, 1 + copies, ...] of images: the plain one, then others of augmented images, with codes drawn, or both.

    Tokens [T] of VQ, means and log-variances [2D, h, w] of a KL posterior. Draws from the global generator; the caller decides
    how processes share the draws.
    """
    vq = autoencoder.config.bottleneck == "vq"

    def stored(encoding: Encoding) -> Tensor:
        return encoding.indices.flatten(1).int() if vq else torch.cat([encoding.features, encoding.log_variance], dim=1).float()

    def further() -> Tensor:
        changed = images
        if config.prior.augment_images:
            changed = augment(images, random_flip=config.data.random_flip, random_affine=config.data.random_affine)
        encoding = autoencoder.encode(changed)
        if vq and config.prior.code_temperature > 0:
            encoding.indices = autoencoder.bottleneck.sample_indices(encoding.features, config.prior.code_temperature)
        return stored(encoding)

    return torch.stack([stored(autoencoder.encode(images)), *(further() for _ in range(copies))], dim=1)


# ---- ar ----


def build_ar(settings: PriorConfig, cache: TokenCache) -> ARPrior:
    return ARPrior(
        settings,
        vocab_size=cache.vocab_size,
        sequence_length=cache.latent_size**2,
        num_classes=cache.num_classes,
        tokenizer=cache.fingerprint.tokenizer,
    )


def token_loss(model: nn.Module, prior: ARPrior, batch: dict[str, Tensor]) -> Tensor:
    """Mean of -log p(token | class, earlier tokens) in nats, with hidden classes and noise on what is read."""
    tokens = choose_augmentations(batch["tokens"], draw_rows(torch.rand, batch["label"].shape, device=batch["label"].device))
    return model(prior.drop_labels(batch["label"]), prior.corrupt(tokens[:, :-1]), targets_BT=tokens)


@torch.inference_mode()
def bits_per_token(prior: ARPrior, tokens: TokenDataset, config: Config) -> float:
    """Code length: mean of -log2 p(token | class, earlier tokens) over the plain encodings."""
    prior.eval()
    batch_size = config.evaluation.batch_size
    device, total = prior.head.weight.device, 0.0
    for labels, batch in zip(tokens.labels_N.split(batch_size), tokens.tokens_NCT[:, 0].split(batch_size), strict=True):
        batch = batch.long().to(device)
        total += prior(labels.to(device), batch[:, :-1], targets_BT=batch).item() * len(labels)
    return total / len(tokens) / math.log(2)


# ---- dit ----


def build_dit(settings: PriorConfig, cache: LatentCache) -> DiT:
    """A new model that knows the scale of this autoencoder's latent."""
    prior = DiT(settings, **latent_shape(cache))
    prior.set_latent_statistics(*latent_statistics(cache.train))
    return prior


def latent_shape(cache: LatentCache) -> dict:
    shape = {"latent_channels": cache.latent_channels, "latent_size": cache.latent_size, "num_classes": cache.num_classes}
    return shape | {"tokenizer": cache.fingerprint.tokenizer}


def normalised_posteriors(prior: DiT, moments_BEhw: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance [B, D, h, w] of cached posteriors, in the prior's scale."""
    mean, log_variance = moments_BEhw.chunk(2, dim=1)
    return prior.normalise(mean), log_variance.exp() / prior.latent_std.square()


def velocity_loss(model: nn.Module, prior: DiT, batch: dict[str, Tensor]) -> Tensor:
    """`flow_matching_loss` of each image's posterior, with hidden classes."""
    moments = choose_augmentations(batch["moments"], draw_rows(torch.rand, batch["label"].shape, device=batch["label"].device))
    mean, variance = normalised_posteriors(prior, moments)
    return flow_matching_loss(model, mean, prior.drop_labels(batch["label"]), variance_BDhw=variance)


@torch.no_grad()
def steady_velocity_loss(prior: DiT, encoded: PosteriorDataset, config: Config) -> float:
    """`flow_matching_loss` of the plain encodings, at the same times and noise whenever it is called."""
    prior.eval()
    device, total = prior.latent_mean.device, 0.0
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), as_single_process():
        torch.manual_seed(seed_for(config.seed, "prior", "validation"))
        plain = encoded.moments_NCEhw[:, 0]
        for labels, moments in zip(encoded.labels_N.split(SCORE_BATCH), plain.split(SCORE_BATCH), strict=True):
            mean, variance = normalised_posteriors(prior, moments.to(device))
            total += flow_matching_loss(prior, mean, labels.to(device), variance_BDhw=variance).item() * len(labels)
    return total / len(encoded)


def dit_bits_per_image(prior: DiT, encoded: PosteriorDataset, config: Config) -> float:
    """Code length of the latent given the class, see `dae.metrics.bits_back`; of `LIKELIHOOD_IMAGES` images at most.

    After a short training of fewer: they cost `LIKELIHOOD_STEPS` evaluations each, together no more than the training did.
    """
    prior.eval()
    settings = config.prior
    trained = settings.max_train_steps * settings.train_batch_size * settings.gradient_accumulation_steps * world_size()
    order = torch.randperm(len(encoded), generator=torch.Generator().manual_seed(seed_for(config.seed, "prior", "bits")))
    rows, device = order[: min(LIKELIHOOD_IMAGES, max(1, trained // LIKELIHOOD_STEPS))], prior.latent_mean.device
    labels_N = encoded.labels_N[rows].to(device)
    generator = torch.Generator(device).manual_seed(seed_for(config.seed, "prior", "likelihood"))

    def log_prob(latents: Tensor) -> Tensor:
        batches = zip(latents.split(SCORE_BATCH), labels_N.split(SCORE_BATCH), strict=True)
        return torch.cat([log_likelihood(prior, *batch, num_steps=LIKELIHOOD_STEPS, generator=generator) for batch in batches])

    mean, log_variance = encoded.moments_NCEhw[rows, 0].to(device).chunk(2, dim=1)
    return bits_back(mean, log_variance, log_prob, generator)


# ---- mixture ----


def build_mixture(settings: PriorConfig, cache: LatentCache) -> GaussianMixturePrior:
    return GaussianMixturePrior(settings, **latent_shape(cache))


def fit_mixture(prior: GaussianMixturePrior, cache: LatentCache, config: Config) -> None:
    """Fit it to one posterior sample of every encoding of every training image."""
    with torch.random.fork_rng(devices=[]), as_single_process():
        torch.manual_seed(seed_for(config.seed, "prior", "posterior"))
        latents = sample_posteriors(cache.train.moments_NCEhw.flatten(0, 1))
    prior.fit(latents, seed_for(config.seed, "prior", "fit") % 2**32)  # scikit-learn takes 32 bits


@torch.no_grad()
def mixture_bits_per_image(prior: GaussianMixturePrior, encoded: PosteriorDataset, config: Config) -> float:
    """Code length of the latent of the plain encodings, see `dae.metrics.bits_back`; of `evaluation.max_images` at most."""
    device, limit, rows = prior.means.device, config.evaluation.max_images, torch.arange(len(encoded))
    if len(rows) > limit:  # not the first ones, which may be of one class
        generator = torch.Generator().manual_seed(seed_for(config.seed, "prior", "bits"))
        rows = torch.randperm(len(rows), generator=generator)[:limit]
    mean, log_variance = encoded.moments_NCEhw[rows, 0].to(device).chunk(2, dim=1)
    generator = torch.Generator(device).manual_seed(seed_for(config.seed, "prior", "likelihood"))
    return bits_back(mean, log_variance, lambda x: torch.cat([prior.log_prob(part) for part in x.split(256)]), generator)


# ---- the families ----


@dataclass(frozen=True)
class Family:
    """What a prior is to the recipe that trains it.

    Attributes:
        model: its class.
        cache: the kind of encodings it reads.
        build: a new model for what a cache holds; ValueError if settings and latent do not go together.
        loss: of the wrapped model, the model itself and a batch of the cache, with draws through `draw_rows`; None is fitted.
        score, criterion: measures encoded images, less is better, and leaves the global random state; its name in the log.
        final_bits: bits per image, if that takes too long for every validation.
    """

    model: type[PretrainedModel]
    cache: type[EncodingCache]
    build: Callable[[PriorConfig, EncodingCache], nn.Module]
    loss: Callable[[nn.Module, nn.Module, dict[str, Tensor]], Tensor] | None
    score: Callable[[nn.Module, EncodedDataset, Config], float]
    criterion: str
    final_bits: Callable[[nn.Module, EncodedDataset, Config], float] | None = None


PRIOR_FAMILIES = {
    "ar": Family(ARPrior, TokenCache, build_ar, token_loss, bits_per_token, "bits_per_token"),
    "dit": Family(DiT, LatentCache, build_dit, velocity_loss, steady_velocity_loss, "loss", dit_bits_per_image),
    "mixture": Family(GaussianMixturePrior, LatentCache, build_mixture, None, mixture_bits_per_image, "bits_per_image"),
}
