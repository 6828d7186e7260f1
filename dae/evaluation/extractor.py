"""The classifier behind all feature metrics: it predicts labels, or rotations if there are none."""

from __future__ import annotations

import torch
from torch import Tensor

from dae.data import ImageData
from dae.metrics import Classifier, rotation_task, train_classifier
from dae.seeding import seed_for


def prediction_task(images: Tensor, labels: Tensor, labelled: bool) -> tuple[Tensor, Tensor]:
    """Training images and labels of the classifier; without labels, each image in four rotations labelled by rotation."""
    return (images, labels) if labelled else rotation_task(images)


def train_extractor(
    images: Tensor, labels: Tensor, data: ImageData, *, steps: int, seed: int, device: torch.device, progress: bool = True
) -> Classifier:
    """Train the classifier on images [N, C, H, W] in [-1, 1] or as 8 bits, and labels int64 [N].

    Args:
        data: source of the images, for names and counts of the classes.
        seed: the run's; the classifier is a function of it.
    """
    name = data.title if data.labelled else f"{data.title}-rotations"
    options = {"steps": steps, "seed": seed_for(seed, "classifier"), "device": device, "name": name, "progress": progress}
    return train_classifier(*prediction_task(images, labels, data.labelled), data.num_classes if data.labelled else 4, **options)
