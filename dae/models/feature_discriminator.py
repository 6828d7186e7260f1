"""Discriminator on the features of a frozen pretrained network (Sauer et al. 2021, arXiv 2111.01007; 2023, arXiv 2301.09515)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from dae.hub import PretrainedModel
from dae.models.layers import GroupNorm
from dae.models.pretrained import PretrainedNetwork

ASKED_BY = "loss.discriminator_features"


class Head(nn.Module):
    """A feature map [B, D, h, w] to a real-or-fake logit for each of its places, [B, 1, h / 2^halvings, w / 2^halvings].

    A 1 x 1 convolution, `halvings` strided ones, a residual one and one to the logit, each but the last with GroupNorm and
    LeakyReLU: as in `PatchDiscriminator`, no verdict depends on another image of the batch.
    """

    def __init__(self, in_channels: int, channels: int, halvings: int, spectral_norm: bool):
        super().__init__()
        wrap = parametrizations.spectral_norm if spectral_norm else lambda conv: conv
        self.conv_in = wrap(nn.Conv2d(in_channels, channels, 1))
        self.halving = nn.ModuleList(wrap(nn.Conv2d(channels, channels, 3, stride=2, padding=1)) for _ in range(halvings))
        self.residual = wrap(nn.Conv2d(channels, channels, 3, padding=1))
        self.norms = nn.ModuleList(GroupNorm(channels, activation=None) for _ in range(halvings + 2))
        self.conv_out = wrap(nn.Conv2d(channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        h = F.leaky_relu(self.norms[0](self.conv_in(x)), 0.2)
        for conv, norm in zip(self.halving, self.norms[1:-1], strict=True):
            h = F.leaky_relu(norm(conv(h)), 0.2)
        h = (h + F.leaky_relu(self.norms[-1](self.residual(h)), 0.2)) / math.sqrt(2)
        return self.conv_out(h)


class FeatureDiscriminator(PretrainedModel):
    """Images [B, C, H, W] in [-1, 1] to the logits [B, P] of all heads, one head for each of some layers of a frozen network.

    The layers are evenly spaced up to the last, and all heads have the resolution of the deepest map, so each has as many logits
    (Sauer et al. 2021, section 3.2). The network is no part of the module: its weights are not trained, not saved, and known by
    their SHA-256, a buffer, which loaded weights must agree with.

    Args:
        features: the network, as `PretrainedNetwork.load` takes it.
        channels: of each head.
        num_heads: layers that are read.
        spectral_norm: of each convolution of the heads (Miyato et al. 2018, arXiv 1802.05957).

    Raises:
        ImportError, FileNotFoundError, ValueError: as `PretrainedNetwork.load`; a network without feature maps or with fewer
            layers than `num_heads`.
    """

    backbone: PretrainedNetwork
    backbone_sha256: Tensor

    def __init__(self, features: str, channels: int = 64, num_heads: int = 4, spectral_norm: bool = False):
        super().__init__()
        self.config = {"features": features, "channels": channels, "num_heads": num_heads, "spectral_norm": spectral_norm}
        backbone = PretrainedNetwork.load(features, f"{ASKED_BY}={features}")
        object.__setattr__(self, "backbone", backbone)  # not registered
        if num_heads > (most := backbone.num_layers):
            raise ValueError(f"loss.discriminator_heads={num_heads}: {features} has {most} layers; expected at most as many")
        self.layers = [(i + 1) * most // num_heads - 1 for i in range(num_heads)]
        with torch.no_grad():
            maps = backbone.feature_maps(torch.zeros(1, *backbone.description["input_size"]), self.layers)
        least = min(min(each.shape[2:]) for each in maps)
        self.heads = nn.ModuleList(
            Head(each.shape[1], channels, round(math.log2(min(each.shape[2:]) / least)), spectral_norm) for each in maps
        )
        digest = bytes.fromhex(backbone.description["weights_sha256"])
        self.register_buffer("backbone_sha256", torch.tensor(list(digest), dtype=torch.uint8))
        self.register_load_state_dict_pre_hook(_refuse_other_backbone)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.backbone.feature_maps(images, self.layers, clip=False)
        return torch.cat([head(each).flatten(1) for head, each in zip(self.heads, maps, strict=True)], 1)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self.backbone._apply(fn)
        return super()._apply(fn, recurse)

    def to_config(self) -> dict[str, Any]:
        return self.config | {"weights_sha256": self.backbone.description["weights_sha256"]}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        return cls(**{name: value for name, value in config.items() if name != "weights_sha256"})


def _refuse_other_backbone(module: nn.Module, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    saved, own = state.get(f"{prefix}backbone_sha256"), cast(Tensor, module.backbone_sha256)
    if saved is not None and not torch.equal(saved.cpu(), own.cpu()):
        then, now = (bytes(each.tolist()).hex()[:12] for each in (saved, own))
        raise ValueError(
            f"{ASKED_BY}={module.config['features']} has other weights (SHA-256 {now}...) than those on which these heads were "  # type: ignore[index]
            f"trained ({then}...): give the network that they were trained on"
        )
