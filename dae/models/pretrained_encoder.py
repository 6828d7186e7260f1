"""A frozen pretrained network as encoder: representation autoencoders (Zheng et al. 2025, arXiv 2510.11690)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dae.config import AutoencoderConfig
from dae.models.pretrained import PretrainedNetwork
from dae.precision import WideBuffers, wide
from dae.quantizers import bottleneck_class


class PretrainedEncoder(WideBuffers, nn.Module):
    """Images [B, C, H, W] to (f - mean) / std [B, D, H / factor, W / factor], with f the last feature map of a frozen network.

    f is the end of the last stage of a convolutional network, or the patch tokens of a Transformer after its last normalisation,
    on their grid and without class and register tokens. The images are resized so that the network's stride gives this grid, and
    normalised as it expects. mean and std are of each channel of f over training images, see `set_latent_statistics`; before
    they are measured they are 0 and 1.

    Args:
        config: `encoder` names the network, `latent_channels` is D.
        grid: height and width of the latent of the images that it is made for.
        factor: by which the decoder enlarges a latent.
        description: of a network whose weights will be loaded into this module (`PretrainedNetwork.build`); None loads those
            that `config.encoder` names.

    Raises:
        ImportError, FileNotFoundError, ValueError: as `PretrainedNetwork.load`; or the network has another number of channels, or
            another bottleneck than `identity` is configured.
    """

    gradient_checkpointing = False  # nothing is differentiated
    latent_mean: Tensor
    latent_std: Tensor

    def __init__(self, config: AutoencoderConfig, grid: int, factor: int, description: dict[str, Any] | None = None):
        super().__init__()
        self.name, self.factor = f"autoencoder.encoder={config.encoder}", factor
        if not bottleneck_class(config).keeps_features:
            raise ValueError(
                f"{self.name} is frozen, and its features are the latent: expected autoencoder.bottleneck=identity, got "
                f"{config.bottleneck}"
            )
        if description is None:
            self.backbone = PretrainedNetwork.load(str(config.encoder), self.name, grid=grid)
        else:
            self.backbone = PretrainedNetwork.build(description, self.name)
        expected, channels = (config.latent_channels, grid, grid), self.backbone.description["input_size"][0]
        with torch.no_grad():
            found = tuple(self.features(torch.zeros(1, channels, grid * factor, grid * factor)).shape[1:])
        if found != expected:
            what = "set autoencoder.latent_channels to the first" if found[1:] == expected[1:] else "take another network"
            raise ValueError(f"{self.name} has feature maps [D, h, w] = {list(found)}, expected {list(expected)}: {what}")
        self.register_buffer("latent_mean", torch.zeros(config.latent_channels))
        self.register_buffer("latent_std", torch.ones(config.latent_channels))

    def features(self, images: Tensor) -> Tensor:
        """The feature map f [B, D, h, w], not normalised. ValueError: images of another size for a network that has one alone."""
        size = [side // self.factor * self.backbone.stride for side in images.shape[2:]]
        made_for = list(self.backbone.description["input_size"][1:])
        if self.backbone.description["fixed_input_size"] and size != made_for:
            sides = " x ".join(str(side // self.backbone.stride * self.factor) for side in made_for)
            raise ValueError(f"{self.name} was made for images of {sides} pixels, got {list(images.shape[2:])}")
        return self.backbone.feature_maps(images, [self.backbone.num_layers - 1], normalised=True, size=size)[0]

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        found = self.features(images)
        exact = found.to(wide(found.dtype))
        return ((exact - self.latent_mean.view(-1, 1, 1)) / self.latent_std.view(-1, 1, 1)).to(found.dtype)

    def set_latent_statistics(self, mean_D: Tensor, std_D: Tensor) -> None:
        """Mean and standard deviation of each channel of f. ValueError: a channel is constant, or not finite."""
        wrong = ~(mean_D.isfinite() & std_D.isfinite() & (std_D > 0))
        if wrong.any():
            raise ValueError(
                f"{self.name}: channels {wrong.nonzero().flatten().tolist()[:5]} of its last feature map are constant over the "
                "training images, or not finite: a prior cannot model them; take another network, or other images"
            )
        self.latent_mean.copy_(mean_D)
        self.latent_std.copy_(std_D)
