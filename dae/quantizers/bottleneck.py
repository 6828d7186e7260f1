"""The interface of a bottleneck: what it computes, and what others need to know of its latent."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from dae_kernels.checks import check_floating
from torch import Tensor, nn

from dae.config import AutoencoderConfig


@dataclass
class Encoding:
    """All but `loss` and `indices` in the dtype of the features; `loss` is never narrower than float32."""

    latents: Tensor  # [B, D, h, w]: what the decoder reads
    loss: Tensor  # scalar: the bottleneck's own term of the objective, weighted
    features: Tensor  # [B, D, h, w]: the encoder's output before the bottleneck (KL: the posterior's mean)
    indices: Tensor | None = None  # [B, h, w] int64, of discrete bottlenecks only
    log_variance: Tensor | None = None  # [B, D, h, w] of the posterior, of continuous bottlenecks only

    def detached(self) -> Encoding:
        """The same without gradients."""
        rest = (None if x is None else x.detach() for x in (self.indices, self.log_variance))
        return Encoding(self.latents.detach(), self.loss.detach(), self.features.detach(), *rest)


class Bottleneck(nn.Module, ABC):
    """Between encoder and decoder: features [B, features_per_latent D, h, w] to an `Encoding`.

    One subclass per paper, in `dae.quantizers.BOTTLENECKS` under its name in `autoencoder.bottleneck`. Caches, priors, metrics,
    comparisons and pages ask it what its latent is, and never for its name.

    Attributes:
        discrete: its latent is a grid of indices, which a prior models as tokens; else it is a Gaussian posterior.
        learns_codebook: training calls `initialize_codebook`, `observe` and `update_codebook`.
        draws_codes: `resample` draws other codes than the nearest.
        keeps_features: the latent is the encoder's output itself, so that nothing needs to be learned of a frozen encoder.
        features_per_latent: channels that the encoder puts out per channel of the latent.
        kept: fields of an `Encoding` that describe the latent of an image completely.
        rate_knob: key of the configuration that sets how much the latent can tell of an image.
        rate_plural, rate_setting: its values in words, and one of them, to be formatted.
        statistics: last parts of the names of buffers that only training reads.
        frozen: its state does not change any more.
    """

    discrete: ClassVar[bool]
    learns_codebook: ClassVar[bool] = False
    draws_codes: ClassVar[bool] = False
    keeps_features: ClassVar[bool] = False
    features_per_latent: ClassVar[int] = 1
    kept: ClassVar[tuple[str, ...]]
    rate_knob: ClassVar[str]
    rate_plural: ClassVar[str]
    rate_setting: ClassVar[str]
    statistics: ClassVar[tuple[str, ...]] = ()
    frozen: bool = False

    @classmethod
    @abstractmethod
    def build(cls, config: AutoencoderConfig) -> Self:
        """A new one for latents of `config.latent_channels` channels."""

    @abstractmethod
    def forward(self, features: Tensor, sample_posterior: bool = False) -> Encoding: ...

    @abstractmethod
    def pack(self, encoding: Encoding) -> Tensor:
        """What a cache keeps of each image: integer tokens [B, h w] in raster order, or moments [B, 2D, h, w] in float32."""

    def resample(self, encoding: Encoding, temperature: float) -> Encoding:
        """Another encoding of the same features, drawn at `temperature` if it `draws_codes`: see `prior.code_temperature`."""
        return encoding

    @staticmethod
    @abstractmethod
    def rate(config: AutoencoderConfig) -> float:
        """The value of `rate_knob`."""

    @staticmethod
    @abstractmethod
    def check_rates(rates: list[float]) -> None:
        """ValueError unless `rate_knob` can take all of these values."""

    @classmethod
    def num_codes(cls, config: AutoencoderConfig) -> int:
        """K, how many values an index has; ValueError for a continuous bottleneck."""
        raise ValueError(f"autoencoder.bottleneck={config.bottleneck} has no codes")

    @classmethod
    def factors(cls, config: AutoencoderConfig) -> tuple[int, ...]:
        """Sizes of the digits of an index, the lowest first, that a prior should predict one by one; (K,) is the index itself."""
        return (cls.num_codes(config),)

    @classmethod
    def vocabulary(cls, config: AutoencoderConfig) -> tuple[int, tuple[int, ...]]:
        """`num_codes` and `factors`."""
        return cls.num_codes(config), cls.factors(config)

    def initialize_codebook(self, features_NDhw: Tensor, generator: torch.Generator) -> None:
        """Place the codes before training, on what the encoder makes of some images."""

    def observe(self, encoding: Encoding) -> None:
        """Count what a micro-batch used."""

    def update_codebook(self) -> None:
        """Move the codes by all that was observed since the last call."""

    def lookup(self, indices_Bhw: Tensor) -> Tensor:
        """Latents [B, D, h, w] of indices [B, h, w]; ValueError for a continuous bottleneck."""
        raise ValueError(f"{type(self).__name__} has no codes to look up")


def check_feature_map(bottleneck: str, features: Tensor, channels: int | None = None) -> None:
    """TypeError unless the features are floating; ValueError unless they are [B, channels, h, w], of any even number if None."""
    check_floating(bottleneck, "features", features)
    if features.ndim != 4 or (features.shape[1] % 2 if channels is None else features.shape[1] != channels):
        expected = "2 D" if channels is None else channels
        raise ValueError(f"{bottleneck} needs features [B, {expected}, h, w], got {list(features.shape)}")
