"""What recipes/refit.py measures: held-out images through the decoder that a latent had and through the one that was refitted."""

from __future__ import annotations

import datetime
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from dae.config import Config
from dae.data import ImageData, in_memory
from dae.data.loader import AnyDataset
from dae.data.pictures import to_uint8
from dae.evaluation.decoders import (
    Features,
    Worst,
    checksums,
    compare_decoders,
    crop_side,
    decoded,
    local_perceptual,
    require_equal,
    weighs_channels,
)
from dae.evaluation.extractor import train_extractor
from dae.losses import PerceptualLoss
from dae.metrics import as_float, versions
from dae.models import Autoencoder, choose_kernels
from dae.models.pretrained import PretrainedNetwork

SHOWN = 12  # pictures of a kind on the page
CLASSIFIER_PIXELS = 8


@dataclass
class Refitted:
    """What the page shows.

    Attributes:
        facts: JSON-able, for refit.json.
        pictures: uint8 [N, H, W, C] by name: `originals`, `before`, `after` of images spread over the held-out ones; and
            `worst originals`, `worst before`, `worst after` of those with the largest local error.
        places: of the latter.
        crop: side of a magnified crop in pixels.
    """

    facts: dict[str, Any]
    pictures: dict[str, Any]
    places: list[Worst]
    crop: int


@dataclass
class RefitEvaluation:
    """The measurement of a refit, prepared before the training: `start`, and afterwards `finish`.

    Attributes:
        images: held-out, 8 bits [N, C, H, W].
        before: `checksums` of the autoencoder whose latent it is.
    """

    config: Config
    data: ImageData
    source: Autoencoder
    images: Tensor
    network: PretrainedNetwork | None
    perceptual: PerceptualLoss | None
    before: dict[str, str]

    @classmethod
    def start(cls, config: Config, data: ImageData, source: Autoencoder, device: torch.device) -> Self:
        """Load what measures, and take the checksums of the latent.

        Raises:
            ImportError, FileNotFoundError, ValueError: what measures is not there, or there are too few or too small images.
        """
        settings, resolution = config.evaluation, config.data.resolution
        if config.refit.features is None and resolution < CLASSIFIER_PIXELS:
            raise ValueError(
                f"data.resolution={resolution}: the classifier whose features compare the decoders takes images from "
                f"{CLASSIFIER_PIXELS} x {CLASSIFIER_PIXELS} pixels; choose a larger one, or refit.features"
            )
        network = PretrainedNetwork.load(config.refit.features, "refit.features") if config.refit.features else None
        perceptual = None
        if resolution >= PerceptualLoss.minimum_size:
            perceptual = local_perceptual(config.stage2.loss.perceptual_weights)
        images, _ = _held(config, data.validation)
        if len(images) < 2:
            raise ValueError(f"decoders are compared on held-out images: expected at least 2, got {len(images)}; hold more out")
        for model in (source.to(device), network, perceptual):
            if model is not None:
                choose_kernels(model.to(device), config.kernels)
        return cls(config, data, source, images, network, perceptual, checksums(source, images, settings.batch_size))

    def finish(self, refitted: Autoencoder) -> Refitted:
        """Compare with the refitted autoencoder, as it was saved, on the same device.

        RuntimeError: its latent is not bit by bit the one it was to keep.
        """
        config, settings, device = self.config, self.config.evaluation, self.source.device
        choose_kernels(refitted.to(device), config.kernels)
        after = checksums(refitted, self.images, settings.batch_size)
        require_equal(self.before, after)
        features, identifier = self._features(device)
        values, worst = compare_decoders(
            self.source, refitted, self.images, features, self.perceptual, batch_size=settings.batch_size, seed=config.seed
        )
        count = len(self.images)
        shown = torch.arange(min(SHOWN, count)) * count // min(SHOWN, count)
        places = worst[: min(SHOWN, count)]
        pictures = {}
        for prefix, rows in (("", shown), ("worst ", torch.tensor([place.row for place in places]))):
            chosen = self.images[rows]
            pictures[f"{prefix}originals"] = to_uint8(as_float(chosen))
            pictures[f"{prefix}before"] = to_uint8(decoded(self.source, chosen))
            pictures[f"{prefix}after"] = to_uint8(decoded(refitted, chosen))
        perceptual = self.perceptual and ("LPIPS" if weighs_channels(self.perceptual) else "VGG16 distance")
        machine = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
        facts = {
            "source": config.init_from,
            "decoder": config.refit.decoder,
            "latent": refitted.latent.id if refitted.latent else None,
            "checksums": {"before": self.before, "after": after},
            "measures": values,
            "perceptual": perceptual,
            "features": identifier,
            "held_out_images": count,
            "steps": config.stage2.max_train_steps,
            "data": self.data.describe(),
            "seed": config.seed,
            "versions": versions(),
            "measured": {"at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), "device": machine},
        }
        return Refitted(facts, pictures, places, crop_side(self.images))

    def _features(self, device: torch.device) -> tuple[Features, str]:
        if self.network is not None:
            return self.network, str(self.network.description["model"])
        settings = self.config.evaluation
        train, labels = _held(self.config, self.data.train)
        classifier = train_extractor(
            train, labels, self.data, steps=settings.classifier_steps, seed=self.config.seed, device=device
        )
        return classifier.features, classifier.identifier


def _held(config: Config, part: AnyDataset) -> tuple[Tensor, Tensor]:
    """Images of 8 bits and labels, at most `evaluation.max_images`."""
    settings, workers = config.evaluation, config.data.num_workers
    return in_memory(
        part, settings.max_images, seed=config.seed, batch_size=settings.batch_size, num_workers=workers, as_bytes=True
    )
