"""What every bottleneck returns."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass
class Encoding:
    """All but `loss` and `indices` in the dtype of the features; `loss` is never narrower than float32."""

    latents: Tensor  # [B, D, h, w]: what the decoder reads
    loss: Tensor  # scalar: the bottleneck's own term of the objective, weighted
    features: Tensor  # [B, D, h, w]: the encoder's output before the bottleneck (KL: the posterior's mean)
    indices: Tensor | None = None  # [B, h, w] int64, VQ only
    log_variance: Tensor | None = None  # [B, D, h, w] of the posterior, KL only
