"""The classifier whose features all feature metrics use: of the labels, or of quarter turns where there are none."""

from __future__ import annotations

import torch
from torch import Tensor

from dae.data import ImageData
from dae.metrics import Classifier, rotation_task, train_classifier
from dae.seeding import seed_for


def prediction_task(images: Tensor, labels: Tensor, labelled: bool) -> tuple[Tensor, Tensor]:
    """Images and labels that the classifier is trained on; without labels each image four times, labelled by its rotation."""
    return (images, labels) if labelled else rotation_task(images)


def train_extractor(
    images: Tensor, labels: Tensor, data: ImageData, *, steps: int, seed: int, device: torch.device, progress: bool = True
) -> Classifier:
    """Train it on images [N, C, H, W] in [-1, 1] or as 8 bits, and labels int64 [N].

    Args:
        data: whose images these are: names and counts of the classes.
        seed: of the run; one seed, one classifier.
    """
    name = data.title if data.labelled else f"{data.title}-rotations"
    options = {"steps": steps, "seed": seed_for(seed, "classifier"), "device": device, "name": name, "progress": progress}
    return train_classifier(*prediction_task(images, labels, data.labelled), data.num_classes if data.labelled else 4, **options)
