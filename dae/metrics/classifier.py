"""A small classifier: its verdicts label samples, its penultimate features carry the Fréchet distance."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dae.metrics.validation import check_images

_FORMAT = "dae-classifier-1"


class Classifier(nn.Module):
    """Convolutional classifier of images of any size from 8 x 8 pixels, with smooth features for the Fréchet distance.

    Two 3 x 3 convolutions a level at 32, 64 and 128 channels, each with group normalization and GELU, the resolution halved
    between levels; the mean over positions; a linear map to the features; GELU and a linear map to the logits. The
    features are the linear map's output: unbounded and smooth in the image, few (32), so that some hundred rows
    determine their covariance. There is no dropout and no batch statistic: an image's output does not depend on
    its batch or on train and eval mode.

    Args:
        channels: channels of the images.
        num_classes: number of logits.
        feature_dim: dimension of the features.
        width: channels of the first level, divisible by 8.
        name: what it was trained on, for `identifier`.

    Raises:
        ValueError: a number below 1, or width not divisible by 8.
    """

    def __init__(self, channels: int, num_classes: int, *, feature_dim: int = 32, width: int = 32, name: str = "images") -> None:
        super().__init__()
        if min(channels, num_classes, feature_dim, width) < 1 or width % 8:
            raise ValueError(
                "expected channels, num_classes, feature_dim and width of at least 1, width divisible by 8, "
                f"got {channels}, {num_classes}, {feature_dim} and {width}"
            )
        self.channels, self.num_classes, self.feature_dim, self.width, self.name = channels, num_classes, feature_dim, width, name
        self.levels = nn.Sequential(
            _convolution(channels, width, 1),
            _convolution(width, width, 1),
            _convolution(width, 2 * width, 2),
            _convolution(2 * width, 2 * width, 1),
            _convolution(2 * width, 4 * width, 2),
        )
        self.to_features = nn.Linear(4 * width, feature_dim)
        self.to_logits = nn.Linear(feature_dim, num_classes)

    def features(self, x: Tensor) -> Tensor:
        """Features [N, feature_dim] of images [N, C, H, W] in [-1, 1]. ValueError: other channels, or a side below 8."""
        check_images(x=x)
        if x.shape[1] != self.channels or min(x.shape[2:]) < 8:
            raise ValueError(f"x: expected [N, {self.channels}, H, W] with H and W at least 8, got shape {tuple(x.shape)}; resize them")
        return self.to_features(self.levels(x).mean((2, 3)))

    def forward(self, x: Tensor) -> Tensor:
        """Logits [N, num_classes]."""
        return self.to_logits(F.gelu(self.features(x)))

    @property
    def identifier(self) -> str:
        """`<name>-classifier-<12 hex digits>`, the digits from the SHA-256 of the weights: equal extractors have equal names."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        return f"{self.name}-classifier-{digest.hexdigest()[:12]}"

    def save(self, path: str | Path) -> None:
        """Write one safetensors file, the architecture as JSON in its metadata; `load` of it gives the same classifier."""
        from safetensors.torch import save_file

        architecture = {key: getattr(self, key) for key in ("channels", "num_classes", "feature_dim", "width", "name")}
        weights = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        save_file(weights, str(path), metadata={"format": "pt", _FORMAT: json.dumps(architecture)})

    @classmethod
    def load(cls, path: str | Path, device: str | torch.device = "cpu") -> Classifier:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: no such file.
            ValueError: the file is not a classifier of this format.
        """
        from safetensors import SafetensorError, safe_open

        if not Path(path).is_file():
            raise FileNotFoundError(f"no classifier file {str(path)!r}; train one and save it there")
        try:
            with safe_open(str(path), framework="pt") as file:
                metadata = file.metadata() or {}
                weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        except SafetensorError as error:
            raise ValueError(f"{path} is not a safetensors file: {error}") from error
        if _FORMAT not in metadata:
            raise ValueError(f"{path}: expected {_FORMAT!r} in the metadata, got {sorted(metadata)}; save it by Classifier.save")
        classifier = cls(**json.loads(metadata[_FORMAT]))
        classifier.load_state_dict(weights)
        return classifier.to(device).eval()


def _convolution(channels_in: int, channels_out: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_out, 3, stride, 1, bias=False), nn.GroupNorm(8, channels_out), nn.GELU()
    )


def train_classifier(
    images: Tensor,
    labels: Tensor,
    num_classes: int,
    *,
    steps: int,
    seed: int,
    batch_size: int = 128,
    device: str | torch.device = "cpu",
    progress: bool = True,
    name: str = "images",
) -> Classifier:
    """Train a `Classifier` by AdamW with a one-cycle learning rate, weight decay, and slight random shift, rotation and scale.

    One seed gives the same weights bit by bit on the same hardware and number of threads. All random draws are made on the
    CPU, and the global random state is left as it was.

    Args:
        images: [N, C, H, W], float, in [-1, 1].
        labels: int64 [N] in 0..num_classes-1.
        num_classes: number of classes.
        steps: optimiser steps.
        seed: of the weights, the batches and the augmentation.
        batch_size: images a step, drawn epoch by epoch without replacement; at most N are used.
        device: where to train; the classifier stays there.
        progress: show a progress bar.
        name: what the images are, for `Classifier.identifier`.

    Returns:
        The classifier, in eval mode.

    Raises:
        TypeError: images that are not floating point, or labels that are not int64.
        ValueError: shapes, labels or steps out of range.
    """
    from tqdm import tqdm

    from dae.data import augment

    _check_labels(images, labels)
    if min(steps, batch_size, num_classes) < 1:
        raise ValueError(f"expected steps, batch_size and num_classes of at least 1, got {steps}, {batch_size} and {num_classes}")
    if len(images) == 0:
        raise ValueError("images: expected at least 1, got none")
    if labels.min() < 0 or labels.max() >= num_classes:
        raise ValueError(f"labels: expected 0 to {num_classes - 1}, got {labels.min().item()} to {labels.max().item()}")
    images, labels = images.cpu(), labels.cpu()
    batch_size = min(batch_size, len(images))
    with (
        torch.random.fork_rng(devices=[]),
        torch.enable_grad(),
        torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False),
    ):
        torch.random.default_generator.manual_seed(seed)
        classifier = Classifier(images.shape[1], num_classes, name=name).to(device).train()
        matrices = [p for p in classifier.parameters() if p.ndim > 1]
        vectors = [p for p in classifier.parameters() if p.ndim == 1]
        optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}], lr=_LEARNING_RATE
        )
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, _LEARNING_RATE, total_steps=max(steps, 2), pct_start=0.2)
        order = torch.empty(0, dtype=torch.int64)
        for _ in tqdm(range(steps), desc=f"{name} classifier", disable=not progress):
            if len(order) < batch_size:
                order = torch.randperm(len(images))
            rows, order = order[:batch_size], order[batch_size:]
            batch = augment(images[rows], random_flip=False, random_affine=_RANDOM_AFFINE)
            loss = F.cross_entropy(classifier(batch.to(device)), labels[rows].to(device), label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
    return classifier.eval()


_LEARNING_RATE = 3e-3
_RANDOM_AFFINE = 0.5


def _check_labels(images: Tensor, labels: Tensor) -> None:
    check_images(images=images)
    if labels.dtype != torch.int64:
        raise TypeError(f"labels: expected int64, got {labels.dtype}; convert them by labels.long()")
    if labels.shape != (len(images),):
        raise ValueError(f"labels: expected shape ({len(images)},), one label an image, got {tuple(labels.shape)}")


@torch.no_grad()
def extract_features(classifier: Classifier, images: Tensor, batch_size: int = 500) -> Tensor:
    """Features float32 [N, D], on the CPU, of images [N, C, H, W] on any device."""
    device = next(classifier.parameters()).device
    return torch.cat([classifier.features(x.to(device, torch.float32)).cpu() for x in images.split(batch_size)])


@torch.no_grad()
def predict(classifier: Classifier, images: Tensor, batch_size: int = 500) -> Tensor:
    """The likeliest class of each image, int64 [N], on the CPU."""
    device = next(classifier.parameters()).device
    return torch.cat([classifier(x.to(device, torch.float32)).argmax(1).cpu() for x in images.split(batch_size)])


def accuracy(classifier: Classifier, images: Tensor, labels: Tensor, batch_size: int = 500) -> float:
    """Share of the images [N, C, H, W] whose likeliest class is their label (int64 [N]), in [0, 1]."""
    _check_labels(images, labels)
    if len(images) == 0:
        raise ValueError("images: expected at least 1, got none")
    return (predict(classifier, images, batch_size) == labels.cpu()).double().mean().item()


def rotation_task(images: Tensor) -> tuple[Tensor, Tensor]:
    """A self-supervised task for images without labels: by how many quarter turns was the image rotated?

    Train a classifier with 4 classes on it where there are no labels, so that features exist; name it after the task
    (`name="photos-rotation"`), for its features are others than those of a classifier of objects.

    Args:
        images: square images [N, C, S, S].

    Returns:
        images [4 N, C, S, S], rotated by 0, 90, 180 and 270 degrees counter-clockwise, all of one angle together, and int64
        labels [4 N] in 0..3.

    Raises:
        TypeError: images that are not floating point.
        ValueError: images that are not square.

    Source: Gidaris, Singh and Komodakis, "Unsupervised Representation Learning by Predicting Image Rotations", ICLR 2018
    (arXiv 1803.07728).
    """
    check_images(images=images)
    if images.shape[2] != images.shape[3]:
        raise ValueError(f"images: expected square images, got {images.shape[2]} x {images.shape[3]}; crop them")
    rotated = torch.cat([images.rot90(turns, (2, 3)) for turns in range(4)])
    return rotated, torch.arange(4, device=images.device).repeat_interleave(len(images))
