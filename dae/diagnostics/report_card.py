"""The latent report card: predictors of generation quality, computed from an autoencoder before a prior is trained."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from dae.diagnostics import predictors as measure
from dae.metrics import CodebookUsage, gaussian_rate
from dae.metrics.validation import check_images, check_integers, check_same_pixels
from dae.models import Autoencoder
from dae.precision import own_arithmetic

FEWEST_IMAGES = 10
BATCH = 256
ANSWERING = 256  # maximum of held-out images to decode and perturb, which dominates the time for large images


@dataclass(frozen=True)
class Predictor:
    """One line of the card."""

    title: str
    unit: str  # empty for a plain number
    meaning: str  # for readers new to the field
    direction: str  # the desired one, "lower" or "higher"; "either" for a trade-off

    @property
    def sign(self) -> int:
        """Expected sign of the correlation with a distance (lower is better); 0 if there is none."""
        return {"lower": 1, "higher": -1, "either": 0}[self.direction]


PREDICTORS = {
    "codebook_usage": Predictor(
        "Codebook usage", "share", "Share of the codes that occur at all in held-out images. An unused code is idle.", "higher"
    ),
    "codebook_perplexity": Predictor(
        "Codebook perplexity", "codes", "How many equally frequent codes would be as varied. More carry more detail, fewer are "
        "easier to predict.", "either",
    ),
    "code_entropy": Predictor(
        "Entropy of a code", "bits per token", "The same in bits: what a token costs if only the frequency of each code is "
        "known.", "either",
    ),
    "ngram_bits": Predictor(
        "Code length, neighbours only", "bits per image", "What an image costs if each code is guessed from its left and upper "
        "neighbour. Few bits: the codes follow simple rules.", "lower",
    ),
    "prior_bits": Predictor(
        "Code length, tiny prior", "bits per image", "What an image costs under a very small generative model of the latent: "
        "a Transformer trained for a second (tokens), or a Gaussian (continuous latents, at the precision of their noise).",
        "lower",
    ),
    "gaussian_rate": Predictor(
        "Gaussian rate", "bits per image", "What a continuous latent costs if each of its values is guessed alone, from a bell "
        "curve.", "lower",
    ),
    "spectrum_slope": Predictor(
        "Slope of the spectrum", "", "How fast the variance falls from one direction of the latent to the next, on logarithmic "
        "axes. Steep (very negative): few directions carry most of it.", "lower",
    ),
    "effective_dimension": Predictor(
        "Effective dimension", "directions", "How many directions of equal variance would spread the latent as widely.", "lower"
    ),
    "sensitivity": Predictor(
        "Sensitivity", "share", "How much a decoded image changes, relative to how images differ, if each latent value is "
        "disturbed by 10\u00a0% of its usual spread: how far a prior's small errors show.", "lower",
    ),
    "shift_error": Predictor(
        "Error under a shift", "share", "Whether the latent shifts along if the image is shifted by one latent position: "
        "0\u00a0%, it does; 100\u00a0%, it becomes as different as that of another image.", "lower",
    ),
    "flip_error": Predictor(
        "Error under mirroring", "share", "The same if the image is mirrored, left to right.", "lower"
    ),
    "linear_probe": Predictor(
        "Classes by a linear reader", "share", "Held-out images whose class one linear map can read off the latent.", "higher"
    ),
    "interpolation_distance": Predictor(
        "Distance of interpolations", "share", "How far images decoded half-way between two latents are from real images as a "
        "set: 0\u00a0%, not to be told apart; 100\u00a0%, two separate points.", "lower",
    ),
    "reconstruction_error": Predictor(
        "Reconstruction error", "squared error", "Mean squared error per pixel of held-out images that were encoded and decoded; "
        "black and white are 2 apart.", "lower",
    ),
    "linear_distance": Predictor(
        "Distance for linear generators", "squared error", "How well the best linear map makes held-out images from the latent: "
        "the paper's distance for the simplest generators. Low: even these can use the latent.", "lower",
    ),
    "mlp_distance": Predictor(
        "Distance for slightly richer generators", "squared error", "The same with a small hidden layer beside the linear map.",
        "lower",
    ),
    "linear_sliced_distance": Predictor(
        "Distance for linear generators, as sets", "pixel units", "How far the linear map's images are, as a set, from the real "
        "ones whose latents they were made from (sliced Wasserstein distance).", "lower",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Encoded:
    """Images with their latents, on the CPU; `indices` only for VQ, `log_variance` only for KL."""

    images: Tensor  # [N, C, H, W]
    latents: Tensor  # [N, D, h, w]: codes (VQ), the posterior's mean (KL)
    indices: Tensor | None  # [N, h, w]
    log_variance: Tensor | None  # [N, D, h, w]


def require_images(**counts: int) -> None:
    """Raise ValueError if there are too few images for a report card."""
    for name, count in counts.items():
        if count < FEWEST_IMAGES:
            raise ValueError(f"{name}: expected at least {FEWEST_IMAGES} images, got {count}; give more")


@own_arithmetic(gradients=True)
def report_card(
    autoencoder: Autoencoder,
    train_images: Tensor,
    train_labels: Tensor | None,
    heldout_images: Tensor,
    heldout_labels: Tensor | None,
    *,
    seed: int,
) -> dict[str, float | None]:
    """Measure every entry of `PREDICTORS`.

    Fits use the training images, and every value is measured on held-out images, except the spectrum and the Gaussian rate,
    which are of the training latents. Perturbations, interpolations and the reconstruction error use at most `ANSWERING`
    held-out images and the decoder's input: codes for VQ, without searching the nearest again; posterior means for KL.

    Args:
        autoencoder: with either bottleneck, on any device; measured in eval mode, its own mode is restored.
        train_images, heldout_images: [N, C, H, W] and [M, C, H, W] in [-1, 1], at least 10 each.
        train_labels, heldout_labels: int64 [N] and [M]; None without labels.
        seed: for noise, pairs, weights and batches. The global random state is not used.

    Returns:
        One value per predictor; None where not applicable (codes of a continuous latent, a probe without labels or with
        one class, the spectrum of a collapsed latent).

    Raises:
        TypeError: images that are not floating point, labels that are not integers.
        ValueError: too few images, images of another size than the autoencoder's, NaN in images, labels of one set only or of
            another number.
        FloatingPointError: the autoencoder returns NaN or infinity: its training diverged.
    """
    check_images_and_labels(autoencoder, train=(train_images, train_labels), heldout=(heldout_images, heldout_labels))
    train, heldout = (encode_images(autoencoder, images) for images in (train_images, heldout_images))
    card: dict[str, float | None] = dict.fromkeys(PREDICTORS)
    eigenvalues = measure.spectrum(train.latents)
    card["spectrum_slope"] = measure.spectrum_slope(eigenvalues)
    card["effective_dimension"] = measure.effective_dimension(eigenvalues)
    card |= code_length(autoencoder, train, heldout, seed) | answers(autoencoder, heldout, seed) | readers(train, heldout, seed)
    if train_labels is not None and heldout_labels is not None and len(train_labels.unique()) > 1:
        card["linear_probe"] = measure.probe_accuracy(train.latents, train_labels.cpu(), heldout.latents, heldout_labels.cpu())
    return card


def code_length(autoencoder: Autoencoder, train: Encoded, heldout: Encoded, seed: int) -> dict[str, float]:
    """Code lengths of the latent, by the predictors for its bottleneck."""
    if train.indices is None or heldout.indices is None:
        ours, theirs = (train.latents, cast(Tensor, train.log_variance)), (heldout.latents, cast(Tensor, heldout.log_variance))
        rate = gaussian_rate(*ours, covariance="diagonal")
        return {"gaussian_rate": rate, "prior_bits": measure.gaussian_prior_bits(*ours, *theirs)}
    K, factors = autoencoder.bottleneck.vocabulary(autoencoder.config)
    usage = CodebookUsage(K, factors).update(heldout.indices)
    return {
        "codebook_usage": usage.usage,
        "codebook_perplexity": usage.perplexity,
        "code_entropy": usage.entropy,
        "ngram_bits": measure.ngram_bits(train.indices, heldout.indices, K),
        "prior_bits": measure.tiny_transformer_bits(train.indices, heldout.indices, K, seed=seed, factors=factors),
    }


def answers(autoencoder: Autoencoder, heldout: Encoded, seed: int) -> dict[str, float | None]:
    """Reconstruction error and sensitivity to changes of latents and images, on `some_of` the held-out images."""
    chosen = some_of(heldout.images)
    images, latents, f = heldout.images[chosen], heldout.latents[chosen], autoencoder.factor
    decoded = decode_latents(autoencoder, latents)
    card: dict[str, float | None] = {"reconstruction_error": measure.mean_squared_error(decoded.clamp(-1, 1), images)}
    if not (latents == latents[:1]).all():
        disturbed = decode_latents(autoencoder, measure.perturb(latents, seed=seed))
        card["sensitivity"] = measure.relative_change(disturbed, decoded)
        between = decode_latents(autoencoder, measure.midpoints(latents, seed=seed)[0])
        card["interpolation_distance"] = measure.energy_coefficient(between.clamp(-1, 1), images)
        flipped = encode_images(autoencoder, images.flip(-1)).latents
        card["flip_error"] = measure.equivariance_error(flipped, latents.flip(-1))
        if latents.shape[-1] > 1:
            shifted = encode_images(autoencoder, measure.shift_images(images, f)).latents
            card["shift_error"] = measure.equivariance_error(shifted[..., 1:], latents[..., :-1])
    return card


def some_of(images: Tensor) -> Tensor:
    """At most `ANSWERING` random images, independent of the card's seed, so that all cards use the same."""
    return torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:ANSWERING]


def readers(train: Encoded, heldout: Encoded, seed: int) -> dict[str, float]:
    """D^G for two families of generators."""
    linear = measure.Ridge(train.latents, train.images)
    made = linear(heldout.latents)
    return {
        "linear_distance": measure.mean_squared_error(made, heldout.images),
        "mlp_distance": measure.mlp_distance(linear, train.latents, heldout.latents, heldout.images, seed=seed),
        "linear_sliced_distance": measure.sliced_distance(made, heldout.images, seed=seed),
    }


# ---- encoding and decoding ----


@contextmanager
def in_evaluation_mode(autoencoder: Autoencoder) -> Iterator[torch.device]:
    """No gradients and eval mode inside the block, then restore every module's mode; yields the device."""
    modes = {module: module.training for module in autoencoder.modules()}
    autoencoder.eval()
    try:
        with torch.no_grad():
            yield autoencoder.device
    finally:
        for module, training in modes.items():
            module.training = training


def encode_images(autoencoder: Autoencoder, images: Tensor) -> Encoded:
    """Encode images [N, C, H, W]. FloatingPointError: the encoder returns NaN or infinity."""
    with in_evaluation_mode(autoencoder) as device:
        found = [autoencoder.encode(batch.to(device)) for batch in images.float().split(BATCH)]

    def joined(name: str) -> Tensor | None:
        parts = [getattr(encoding, name) for encoding in found]
        return None if parts[0] is None else torch.cat(parts).cpu()

    for name in ("features", "latents", "log_variance"):  # NaN features still have a finite nearest code
        if (values := joined(name)) is not None and not values.isfinite().all():
            raise FloatingPointError(
                f"the encoder gives NaN or infinity ({name}): its training diverged; lower stage1.learning_rate"
            )
    return Encoded(images.float().cpu(), cast(Tensor, joined("latents")), joined("indices"), joined("log_variance"))


def decode_latents(autoencoder: Autoencoder, latents: Tensor) -> Tensor:
    """Decode latents [N, D, h, w] to unclipped images on the CPU. FloatingPointError: the decoder returns NaN or infinity."""
    with in_evaluation_mode(autoencoder) as device:
        images = torch.cat([autoencoder.decode(batch.to(device)).sample.float().cpu() for batch in latents.split(BATCH)])
    if not images.isfinite().all():
        raise FloatingPointError("the decoder gives NaN or infinity: its training diverged; lower the learning_rate of its stage")
    return images


def check_images_and_labels(autoencoder: Autoencoder, **sets: tuple[Tensor, Tensor | None]) -> None:
    """Check the images and labels of `report_card`, by name of their set."""
    by_name = {f"{name}_images": images for name, (images, _) in sets.items()}
    check_images(False, **by_name)  # floating point, as encoders do not take bytes
    check_same_pixels(**by_name)
    require_images(**{name: len(images) for name, images in by_name.items()})
    expected = (autoencoder.image_channels, autoencoder.resolution, autoencoder.resolution)
    for name, images in by_name.items():
        if tuple(images.shape[1:]) != expected:
            raise ValueError(
                f"{name}: expected the autoencoder's images {expected}, got {tuple(images.shape[1:])}; "
                "give those that it was trained on"
            )
        if not images.isfinite().all():
            raise ValueError(f"{name}: expected finite pixels, got NaN or infinity; look for broken images")
    for name, (images, labels) in sets.items():
        if labels is not None:
            check_integers(f"{name}_labels", labels, "convert them by labels.long()")
            if tuple(labels.shape) != (len(images),):
                raise ValueError(f"{name}_labels: expected one label an image, [{len(images)}], got {list(labels.shape)}")
        elif any(others is not None for _, others in sets.values()):
            raise ValueError(f"{name}_labels are missing: expected labels of both sets, or None for both")
