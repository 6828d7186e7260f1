"""Two decoders of one latent, compared on held-out images: is it the same latent, and which decoder is better, and where?"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dae.hub import WEIGHTS
from dae.losses import PerceptualLoss
from dae.metrics import as_float, frechet_distance, psnr, ssim
from dae.models import Autoencoder
from dae.models.latent import PARTS
from dae.statistics import Interval, paired_bootstrap

BATCH_PIXELS = 16 * 256 * 256  # to decode at once
CROP = 24  # pixels of a side of a magnified crop
FEW_FEATURES, REPEATS, FEWER_REPEATS = 256, 200, 40  # samples of the bootstrap of a Frechet distance, whose cost is D^3

Features = Callable[[Tensor], Tensor]


@dataclass
class Worst:
    """A place of an image where the first decoder errs most.

    Attributes:
        row: number of the image.
        top, left: first row and column of its crop.
    """

    row: int
    top: int
    left: int


@torch.inference_mode()
def checksums(autoencoder: Autoencoder, images: Tensor, batch_size: int) -> dict[str, str]:
    """SHA-256 of an autoencoder's `encoder`, its `bottleneck`, and its `latents` of images [N, C, H, W], also of 8 bits.

    The latents are all that `Bottleneck.kept` names, and what the decoder reads. Convolutions are computed by deterministic
    algorithms, so that equal weights on one machine give equal bits.
    """
    states = {part: sorted(getattr(autoencoder, part).state_dict().items()) for part in PARTS}
    digests = {name: hashlib.sha256() for name, state in states.items() if state} | {"latents": hashlib.sha256()}
    for part, state in states.items():  # a Gaussian bottleneck has no weights
        for name, tensor in state:
            digests[part].update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode() + _bytes(tensor))
    with reproducible():
        for batch in images.split(_at_once(images, batch_size)):
            encoding = autoencoder.encode(as_float(batch).to(autoencoder.device))
            for name in dict.fromkeys(("latents", *autoencoder.bottleneck.kept)):
                digests["latents"].update(_bytes(getattr(encoding, name)))
    return {name: digest.hexdigest() for name, digest in digests.items()}


def reproducible() -> AbstractContextManager:
    """Deterministic algorithms of cuDNN in float32."""
    return torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)


def require_equal(before: dict[str, str], after: dict[str, str]) -> None:
    """RuntimeError unless two results of `checksums` are equal: the latent is not what it was."""
    if changed := [name for name in before if before[name] != after[name]]:
        shown = "; ".join(f"{name}: {before[name][:12]} before, {after[name][:12]} after" for name in changed)
        raise RuntimeError(
            f"the latent has changed ({shown}): the new decoder must not be used with what was made for the old one"
        )


@torch.inference_mode()
def compare_decoders(
    first: Autoencoder,
    second: Autoencoder,
    images: Tensor,
    features: Features,
    perceptual: PerceptualLoss | None,
    *,
    batch_size: int,
    seed: int,
) -> tuple[dict[str, Any], list[Worst]]:
    """Measure both decoders on images [N, C, H, W] of 8 bits, N >= 2, and find where the first is worst.

    Args:
        first, second: of one latent, on one device; the latents are the first's (continuous: the posteriors' means).
        features: images [B, C, H, W] in [-1, 1] to features [B, D] on their device.
        perceptual: LPIPS; None leaves it out.
        batch_size: images at once, fewer if they are large.
        seed: of the bootstrap over images.

    Returns:
        For `psnr`, `ssim`, `lpips` (each a mean over images) and `frechet` (distance of features to those of the images) the
        intervals of `first`, `second` and `difference`, for `frechet` also `repeats`, the samples of its bootstrap; and one
        `Worst` per image, the largest error first: the place where the first decoder's squared error, averaged over a square
        of `crop_side` pixels, is largest.
    """
    found: dict[str, list[tuple[Tensor, Tensor]]] = {"psnr": [], "ssim": [], "lpips": [], "features": []}
    real, errors, worst = [], [], []
    for start, batch in zip(_starts(images, batch_size), images.split(_at_once(images, batch_size)), strict=True):
        x = as_float(batch).to(first.device)
        latents = first.encode(x).latents
        pair = [model.decode(latents).sample.float().clamp(-1, 1) for model in (first, second)]
        for name, measure in {"psnr": psnr, "ssim": ssim, "lpips": perceptual}.items():
            if measure is not None:
                found[name].append((measure(pair[0], x).cpu(), measure(pair[1], x).cpu()))
        found["features"].append((features(pair[0]).float().cpu(), features(pair[1]).float().cpu()))
        real.append(features(x).float().cpu())
        for row, (error, top, left) in enumerate(worst_places(pair[0], x), start=start):
            errors.append(error)
            worst.append(Worst(row, top, left))
    values: dict[str, Any] = {}
    for name in ("psnr", "ssim", "lpips"):
        if found[name]:
            a, b = (torch.cat(parts).double().numpy() for parts in zip(*found[name], strict=True))
            values[name] = _named(paired_bootstrap(_means(a, b), len(a), seed=seed))
    reference, (one, two) = torch.cat(real), (torch.cat(parts) for parts in zip(*found["features"], strict=True))

    def distances(rows: np.ndarray) -> tuple[float, float]:
        chosen = torch.from_numpy(rows)
        return tuple(frechet_distance(reference[chosen], each[chosen]) for each in (one, two))  # type: ignore[return-value]

    repeats = REPEATS if reference.shape[1] <= FEW_FEATURES else FEWER_REPEATS
    found_frechet = paired_bootstrap(distances, len(images), repeats=repeats, seed=seed)
    values["frechet"] = _named(found_frechet) | {"repeats": repeats}
    return values, [worst[i] for i in np.argsort(errors, kind="stable")[::-1]]


def worst_places(rebuilt: Tensor, images: Tensor) -> list[tuple[float, int, int]]:
    """Per image [B, C, H, W] the largest mean squared error over a square of `CROP` pixels, and the square's top and left."""
    side = crop_side(images)
    error_B1hw = F.avg_pool2d((rebuilt - images).square().mean(1, keepdim=True), side, stride=1)
    width = error_B1hw.shape[3]
    largest, place = error_B1hw.flatten(1).max(1)
    return [(e, p // width, p % width) for e, p in zip(largest.tolist(), place.tolist(), strict=True)]


def crop_side(images: Tensor) -> int:
    """Side of a magnified crop of images [N, C, H, W]: `CROP` pixels, at most half of the image."""
    return max(1, min(CROP, min(images.shape[2:]) // 2))


@torch.inference_mode()
def decoded(autoencoder: Autoencoder, images: Tensor) -> Tensor:
    """Reconstructions [N, C, H, W] in [-1, 1] on the CPU, one by one."""
    parts = [autoencoder(as_float(image[None]).to(autoencoder.device)).sample.float().clamp(-1, 1).cpu() for image in images]
    return torch.cat(parts)


def local_perceptual(weights: str) -> PerceptualLoss | None:
    """LPIPS with the weights of `loss.perceptual_weights`, if they are on this machine: nothing is downloaded to measure.

    ValueError: there is such a file, and it does not hold them.
    """
    if not Path(weights).exists():
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError

        try:
            cached = try_to_load_from_cache(weights, WEIGHTS)
        except HFValidationError:
            return None
        if not isinstance(cached, str):
            return None
        weights = cached
    return PerceptualLoss.from_pretrained(weights)


def weighs_channels(perceptual: PerceptualLoss) -> bool:
    """Whether LPIPS's own weights of the channels were in the file; without, all channels weigh 1."""
    return any(not torch.equal(w, torch.ones_like(w)) for name, w in perceptual.state_dict().items() if name.startswith("lin"))


def _means(a: np.ndarray, b: np.ndarray) -> Callable[[np.ndarray], tuple[float, float]]:
    return lambda rows: (a[rows].mean(), b[rows].mean())


def _named(intervals: tuple[Interval, Interval, Interval]) -> dict[str, dict[str, float]]:
    return {name: each._asdict() for name, each in zip(("first", "second", "difference"), intervals, strict=True)}


def _at_once(images: Tensor, batch_size: int) -> int:
    return min(batch_size, max(1, BATCH_PIXELS // (images.shape[2] * images.shape[3])))


def _starts(images: Tensor, batch_size: int) -> range:
    return range(0, len(images), _at_once(images, batch_size))


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
