"""What every bottleneck returns."""

from __future__ import annotations

from dataclasses import dataclass

from dae_kernels.checks import check_floating
from torch import Tensor


@dataclass
class Encoding:
    """All but `loss` and `indices` in the dtype of the features; `loss` is never narrower than float32."""

    latents: Tensor  # [B, D, h, w]: what the decoder reads
    loss: Tensor  # scalar: the bottleneck's own term of the objective, weighted
    features: Tensor  # [B, D, h, w]: the encoder's output before the bottleneck (KL: the posterior's mean)
    indices: Tensor | None = None  # [B, h, w] int64, VQ only
    log_variance: Tensor | None = None  # [B, D, h, w] of the posterior, KL only


def check_features(bottleneck: str, features: Tensor, channels: int | None = None) -> None:
    """TypeError unless the features are floating; ValueError unless they are [B, channels, h, w], of any even number if None."""
    check_floating(bottleneck, "features", features)
    if features.ndim != 4 or (features.shape[1] % 2 if channels is None else features.shape[1] != channels):
        expected = "2 D" if channels is None else channels
        raise ValueError(f"{bottleneck} needs features [B, {expected}, h, w], got {list(features.shape)}")
