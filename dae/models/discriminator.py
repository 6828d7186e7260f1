"""Patch discriminator (Isola et al. 2017, "Image-to-Image Translation with Conditional Adversarial Networks", section 3.2.2)."""

from __future__ import annotations

from typing import Any, Self

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from dae.hub import PretrainedModel
from dae.models.layers import GroupNorm


class PatchDiscriminator(PretrainedModel):
    """Images [B, C, H, W] to one real-or-fake logit for each overlapping patch, [B, 1, h, w].

    GroupNorm instead of BatchNorm: a verdict then does not depend on the other images of the batch, nor on how many
    processes share it. With `spectral_norm` each convolution is divided by its largest singular value (Miyato et al. 2018,
    arXiv 1802.05957), as one step of power iteration per forward pass in training estimates it.
    """

    def __init__(self, image_channels: int, channels: int = 64, num_layers: int = 2, spectral_norm: bool = False):
        super().__init__()
        names = ("image_channels", "channels", "num_layers", "spectral_norm")
        self.config = dict(zip(names, (image_channels, channels, num_layers, spectral_norm), strict=True))
        self.conv_in = nn.Conv2d(image_channels, channels, 4, stride=2, padding=1)
        self.convs, self.norms = nn.ModuleList(), nn.ModuleList()
        for layer in range(1, num_layers + 1):
            wider = min(channels * 2, 512)
            stride = 2 if layer < num_layers else 1
            self.convs.append(nn.Conv2d(channels, wider, 3, stride=stride, padding=1, bias=False))
            self.norms.append(GroupNorm(wider, activation=None))
            channels = wider
        self.conv_out = nn.Conv2d(channels, 1, 3, padding=1)
        if spectral_norm:
            for conv in (self.conv_in, *self.convs, self.conv_out):
                parametrizations.spectral_norm(conv)

    def forward(self, x: Tensor) -> Tensor:
        h = F.leaky_relu(self.conv_in(x), 0.2)
        for conv, norm in zip(self.convs, self.norms, strict=True):
            h = F.leaky_relu(norm(conv(h)), 0.2)
        return self.conv_out(h)

    def to_config(self) -> dict[str, Any]:
        return self.config

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        return cls(**config)
