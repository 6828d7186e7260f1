"""A small classifier: its predictions label samples, its penultimate features serve the Fréchet distance."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dae.files import write_file
from dae.metrics.validation import as_float, check_images, check_values
from dae.precision import own_arithmetic

_FORMAT = "dae-classifier-1"


class Classifier(nn.Module):
    """Convolutional classifier of images of 8 x 8 pixels or more, with features designed for the Fréchet distance.

        features = standardised concatenation of the means over positions after each of three levels,   logits = linear(features)

    Each level is one or two 3 x 3 convolutions with batch normalization and GELU; the resolution halves between levels. The
    first level's mean captures strokes and textures, the last one's shapes; in the last level alone, which is invariant to
    whatever does not change the class, a Fréchet distance hardly responds to noise and blur. Features are few (64) and
    standardised to mean 0 and variance 1 over the training batches, so that none dominates and distances are in units of that
    variance. Training and loading return it in eval mode, where an image's output does not depend on its batch.

    Args:
        channels: channels of the images.
        num_classes: number of logits.
        width: channels of the first two levels, and half of the third's: the feature dimension is 4 width.
        patch: stride of the first convolution, 1 to 8; limits the cost of large images.
        name: of its training data, for `identifier`.

    Raises:
        ValueError: a number below 1, or a patch above 8.
    """

    def __init__(self, channels: int, num_classes: int, *, width: int = 16, patch: int = 1, name: str = "images") -> None:
        super().__init__()
        if min(channels, num_classes, width, patch) < 1 or patch > 8:
            expected = "expected channels, num_classes, width and patch of at least 1, patch at most 8"
            raise ValueError(f"{expected}, got {channels}, {num_classes}, {width} and {patch}")
        self.channels, self.num_classes, self.width, self.patch, self.name = channels, num_classes, width, patch, name
        self.feature_dim = 4 * width
        first = nn.Sequential(*_convolution(channels, width, patch + 2, patch), *_convolution(width, width))
        second = nn.Sequential(*_convolution(width, width, stride=2), *_convolution(width, width))
        self.levels = nn.ModuleList([first, second, nn.Sequential(*_convolution(width, 2 * width, stride=2))])
        self.standardise = nn.BatchNorm1d(self.feature_dim, affine=False)
        self.to_logits = nn.Linear(self.feature_dim, num_classes)

    def features(self, x: Tensor) -> Tensor:
        """Features [N, feature_dim] of images [N, C, H, W] in [-1, 1]. ValueError: other channels, or a side below 8."""
        check_images(x=x)
        if x.shape[1] != self.channels or min(x.shape[2:]) < 8:
            raise ValueError(f"x: expected [N, {self.channels}, H, W], H and W at least 8, got shape {tuple(x.shape)}; convert")
        means = []
        for level in self.levels:
            x = level(x)
            means.append(x.mean((2, 3)))
        return self.standardise(torch.cat(means, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Logits [N, num_classes] of images as in `features`."""
        return self.to_logits(self.features(x))

    @property
    def identifier(self) -> str:
        """`<name>-classifier-<12 hex digits>`, the digits from the SHA-256 of the weights."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        return f"{self.name}-classifier-{digest.hexdigest()[:12]}"

    def save(self, path: str | Path) -> None:
        """Write one safetensors file with the architecture as JSON metadata; `load` restores the same classifier."""
        from safetensors.torch import save

        architecture = {key: getattr(self, key) for key in ("channels", "num_classes", "width", "patch", "name")}
        weights = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        write_file(Path(path), save(weights, metadata={"format": "pt", _FORMAT: json.dumps(architecture)}))

    @classmethod
    def load(cls, path: str | Path, device: str | torch.device = "cpu") -> Classifier:
        """Read what `save` wrote. FileNotFoundError: no such file. ValueError: not a classifier of this format."""
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


def _convolution(channels_in: int, channels_out: int, size: int = 3, stride: int = 1) -> tuple[nn.Module, ...]:
    convolution = nn.Conv2d(channels_in, channels_out, size, stride, padding=1, bias=False)
    return convolution, nn.BatchNorm2d(channels_out), nn.GELU()


@own_arithmetic(gradients=True)
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
    """A `Classifier` in eval mode, trained by AdamW: one-cycle learning rate, weight decay, label smoothing, affine jitter.

    A seed gives bit-identical weights on the same hardware and number of threads, in each process that calls it. All random
    draws are made on the CPU and leave the global random state unchanged. The patch is the shorter side / 16, clamped to 1..8.

    Args:
        images: [N, C, H, W], float, in [-1, 1], or held as 8 bits (uint8, x / 127.5 - 1).
        labels: int64 [N] in 0..num_classes-1.
        seed: for weights, batches and augmentation.
        batch_size: images per step, at least 2, drawn per epoch without replacement; at most N.
        device: where to train; the classifier stays there.
        name: of the images, for `Classifier.identifier`.

    Raises:
        TypeError: images that are neither floating point nor uint8, or labels that are not int64.
        ValueError: shapes, labels or steps out of range.
    """
    from tqdm import tqdm

    _check_labels(images, labels)
    if steps < 1 or batch_size < 2:
        raise ValueError(f"expected at least 1 step and a batch_size of at least 2, got {steps} and {batch_size}")
    if len(images) < 2:
        raise ValueError(f"images: expected at least 2, got {len(images)}; batch statistics need two")
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
        patch = min(max(min(images.shape[2:]) // 16, 1), 8)
        classifier = Classifier(images.shape[1], num_classes, patch=patch, name=name).to(device).train()
        peak, total = 3e-3, max(steps, 3)
        matrices, vectors = ([p for p in classifier.parameters() if (p.ndim > 1) == matrix] for matrix in (True, False))
        groups = [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=peak)
        warm_up = max(0.2, 2 / total)  # at least one step: OneCycleLR divides by its length
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, peak, total_steps=total, pct_start=warm_up)
        order = torch.empty(0, dtype=torch.int64)
        for _ in tqdm(range(steps), desc=f"{name} classifier", disable=not progress):
            if len(order) < batch_size:
                order = torch.randperm(len(images))
            rows, order = order[:batch_size], order[batch_size:]
            logits = classifier(_jitter(as_float(images[rows]).float()).to(device))
            loss = F.cross_entropy(logits, labels[rows].to(device), label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
    return classifier.eval()


def _jitter(images: Tensor) -> Tensor:
    """Apply a random near-identity affine map per image: up to 10 % scale and shear (including rotation), 7 % shift.

    Not `dae.data.augment`, which splits draws over processes and would make the classifier depend on their number. No
    mirroring: it changes digits, and swaps the quarter turns of `rotation_task`.
    """
    # Coordinates span -1 to 1, so a shift of 0.14 is 7 % of the side.
    amount = torch.tensor([0.1, 0.1, 0.14]) * (2 * torch.rand(len(images), 2, 3) - 1)
    grid = F.affine_grid(torch.eye(2, 3) + amount, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def _check_labels(images: Tensor, labels: Tensor) -> None:
    check_images(held=True, images=images)
    check_values("labels", labels, "int64 in a dense tensor", "convert them by labels.long()", (torch.int64,))
    if labels.shape != (len(images),):
        raise ValueError(f"labels: expected shape ({len(images)},), one label an image, got {tuple(labels.shape)}")


@own_arithmetic(gradients=False)
def extract_features(classifier: Classifier, images: Tensor, batch_size: int = 500) -> Tensor:
    """Features float32 [N, D] in eval mode, on the CPU, of images [N, C, H, W] on any device."""
    return _in_batches(classifier, classifier.features, images, batch_size)


@own_arithmetic(gradients=False)
def predict(classifier: Classifier, images: Tensor, batch_size: int = 500) -> Tensor:
    """The most likely class of each image [N, C, H, W] in eval mode, int64 [N], on the CPU."""
    return _in_batches(classifier, lambda x: classifier(x).argmax(1), images, batch_size)


@torch.no_grad()
def _in_batches(classifier: Classifier, function: Callable[[Tensor], Tensor], images: Tensor, batch_size: int) -> Tensor:
    if batch_size < 1:
        raise ValueError(f"batch_size: expected at least 1 image, got {batch_size}")
    check_images(held=True, images=images)
    device, training = classifier.to_logits.weight.device, classifier.training
    classifier.eval()
    try:
        return torch.cat([function(as_float(x.to(device)).float()).cpu() for x in images.split(batch_size)])
    finally:
        classifier.train(training)


@own_arithmetic(gradients=False)
def accuracy(classifier: Classifier, images: Tensor, labels: Tensor, batch_size: int = 500) -> float:
    """Share of the images [N, C, H, W] whose most likely class is their label (int64 [N]), in [0, 1]."""
    _check_labels(images, labels)
    if len(images) == 0:
        raise ValueError("images: expected at least 1, got none")
    return (predict(classifier, images, batch_size) == labels.cpu()).double().mean().item()


@own_arithmetic(gradients=False)
def rotation_task(images: Tensor) -> tuple[Tensor, Tensor]:
    """A self-supervised task for images without labels: predict by how many quarter turns an image was rotated.

    Args:
        images: square images [N, C, S, S].

    Returns:
        images [4 N, C, S, S], rotated by 0, 90, 180 and 270 degrees counter-clockwise, grouped by angle, and int64
        labels [4 N] in 0..3.

    Raises:
        TypeError: images that are neither floating point nor uint8.
        ValueError: images that are not square.

    Source: Gidaris, Singh and Komodakis, "Unsupervised Representation Learning by Predicting Image Rotations", ICLR 2018
    (arXiv 1803.07728).
    """
    check_images(held=True, images=images)
    if images.shape[2] != images.shape[3]:
        raise ValueError(f"images: expected square images, got {images.shape[2]} x {images.shape[3]}; crop them")
    rotated = torch.cat([images.rot90(turns, (2, 3)) for turns in range(4)])
    return rotated, torch.arange(4, device=images.device).repeat_interleave(len(images))
