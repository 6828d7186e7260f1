"""LPIPS as a training loss (Zhang et al. 2018, "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric").

Weights are read from safetensors files, never from pickles.
"""

from __future__ import annotations

from pathlib import Path
from typing import Self

import torch
from dae_kernels.lpips import lpips
from torch import Tensor, nn

from dae.hub import WEIGHTS, download, load_weights
from dae.precision import ordinary


class PerceptualLoss(nn.Module):
    """Distance of VGG16's features (Simonyan & Zisserman 2015, configuration D) at relu1_2, 2_2, 3_3, 4_3 and 5_3.

        loss = sum over the five taps of mean over positions of sum_c weight_c (u_c - v_c)^2       (dae_kernels.lpips)

    with unit vectors u and v of the two images' features. All parameters are frozen and have the names that they have in
    torchvision's and lpips's files: `features.0.weight`, ..., `features.28.bias` and `lin0.weight`, ..., `lin4.weight`.
    They start at random, `lin` at ones; `from_pretrained` reads them.
    """

    operation, impl = "lpips", "auto"  # for dae.models.kernels
    depths, widths = (2, 2, 3, 3, 3), (64, 128, 256, 512, 512)
    shift: Tensor
    scale: Tensor
    minimum_size = 16  # pixels: four poolings leave one position

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for tap, (depth, width) in enumerate(zip(self.depths, self.widths, strict=True)):
            for _ in range(depth):
                layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
                channels = width
            layers.append(nn.MaxPool2d(2))
            lin = nn.Conv2d(width, 1, 1, bias=False)
            nn.init.ones_(lin.weight)
            self.add_module(f"lin{tap}", lin)
        self.features = nn.Sequential(*layers[:-1])
        # LPIPS's: ImageNet's mean and standard deviation, for images in [-1, 1].
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1), persistent=False)
        self.requires_grad_(False)

    def taps(self, images: Tensor) -> list[Tensor]:
        """Feature maps of images [B, 1 or 3, H, W] in [-1, 1]; grey ones are repeated to three channels."""
        x, found = (images.expand(-1, 3, -1, -1) - self.shift) / self.scale, []
        for layer in self.features:
            if isinstance(layer, nn.MaxPool2d):
                found.append(x)
            x = layer(x)
        return [*found, x]

    def forward(self, sample: Tensor, images: Tensor) -> Tensor:
        """The distance [B] of each pair of images [B, 1 or 3, H, W] in [-1, 1]; differentiable by both.

        Raises:
            ValueError: two shapes, another number of channels, or less than 16 pixels in a direction.
        """
        if sample.shape != images.shape or sample.dim() != 4 or sample.shape[1] not in (1, 3):
            raise ValueError(
                "PerceptualLoss needs two batches of images [B, 1 or 3, H, W] of one shape, "
                f"got {list(sample.shape)} and {list(images.shape)}"
            )
        if min(sample.shape[2:]) < self.minimum_size:
            raise ValueError(f"PerceptualLoss needs images of at least {self.minimum_size} pixels, got {list(sample.shape[2:])}")
        sample, images = ordinary((sample, images))
        pairs = zip(self.taps(sample), self.taps(images), strict=True)
        weights = [self.get_parameter(f"lin{tap}.weight").flatten() for tap in range(len(self.widths))]
        terms = [lpips(a, b, weight, impl=self.impl) for (a, b), weight in zip(pairs, weights, strict=True)]
        return torch.stack(terms).sum(dim=0)

    @classmethod
    def from_pretrained(cls, weights: str | Path) -> Self:
        """Load the weights from one safetensors file; other tensors in it, such as VGG16's classifier, are ignored.

        Args:
            weights: a .safetensors file, a folder with `model.safetensors`, or a repository of the Hub that has it, such as
                timm/vgg16.tv_in1k. LPIPS's own weights of the channels, `lin0.weight` or `lin0.model.1.weight` and so on of
                shape [1, C, 1, 1], are taken if they are there; without them all channels weigh 1.

        Raises:
            FileNotFoundError: no such file, folder or repository, or no `model.safetensors` in it.
            ValueError: it is no safetensors file, or tensors are missing, unknown or of another shape (the message names them).
        """
        from safetensors import SafetensorError, safe_open

        path, loss = find_weights(weights), cls()
        try:
            with safe_open(path, framework="pt") as file:
                found = {key: file.get_tensor(key) for key in file.keys() if key.startswith(("features.", "lin"))}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged, or not a safetensors file: {error}") from error
        found = {key.replace(".model.1.", ".") if key.startswith("lin") else key: value for key, value in found.items()}
        if not any(key.startswith("lin") for key in found):
            found |= {key: value for key, value in loss.state_dict().items() if key.startswith("lin")}
        load_weights(loss, found, str(path))
        return loss


def find_weights(weights: str | Path) -> Path:
    """Path of the safetensors file; a `Path`, or a string ending in .safetensors, is never looked up on the Hub."""
    path, expected = Path(weights), "expected VGG16's weights by torchvision's names (loss.perceptual_weights)"
    if path.is_file():
        return path
    if path.is_dir():
        folder = path
    elif isinstance(weights, Path) or weights.endswith(".safetensors"):
        raise FileNotFoundError(f"no file {path}: {expected}")
    else:
        try:
            folder = download(weights, None)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{error}. The perceptual loss needs a file, a folder or a repository: {expected}") from error
    if not (folder / WEIGHTS).is_file():
        raise FileNotFoundError(f"{weights} holds no {WEIGHTS}: {expected}")
    return folder / WEIGHTS
