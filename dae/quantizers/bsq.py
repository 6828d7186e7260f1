"""Binary spherical quantization (Zhao et al. 2024, arXiv 2406.07548): the signs of a unit vector."""

from __future__ import annotations

from typing import Self

import torch.nn.functional as F
from torch import Tensor

from dae.config import AutoencoderConfig, BSQConfig
from dae.precision import wide
from dae.quantizers.bottleneck import Encoding, check_feature_map
from dae.quantizers.lfq import BinaryBottleneck
from dae.quantizers.tokens import entropy_loss


class BinarySphericalQuantizer(BinaryBottleneck):
    """u = z / |z|, code = sign(u) / sqrt(D) on the same sphere, straight-through gradient, and entropies of a soft assignment.

        p(code | u) ~ exp(-inverse_temperature |u - code|^2),  so  P(bit d = 1 | u) = sigmoid(4 inverse_temperature u_d / sqrt(D))
        loss = entropy_weight * (mean H(code | u) - diversity * H(code))

    in nats, see `dae.quantizers.tokens.entropy_loss`. |u - code| is bounded, so there is no commitment.
    """

    def __init__(self, config: BSQConfig, channels: int):
        super().__init__(channels)
        self.config = config

    def code_size(self) -> float:
        return self.channels**-0.5

    @classmethod
    def build(cls, config: AutoencoderConfig) -> Self:
        return cls(config.bsq, config.latent_channels)

    def forward(self, features: Tensor, sample_posterior: bool = False) -> Encoding:
        """Features [B, D, h, w] to latents of the same shape and dtype and indices [B, h, w]; a code is never sampled."""
        check_feature_map("BinarySphericalQuantizer", features, self.channels)
        config = self.config
        u_BhwD = F.normalize(features.to(wide(features.dtype)).movedim(1, -1), dim=-1)
        codes_BhwD, indices = self.quantize(u_BhwD)
        loss = u_BhwD.new_zeros(())
        if config.entropy_weight:
            logits_BhwD = 4 * config.inverse_temperature * self.code_size() * u_BhwD
            loss = config.entropy_weight * entropy_loss(logits_BhwD, config.diversity)
        latents = u_BhwD + (codes_BhwD - u_BhwD).detach()
        return Encoding(latents.movedim(-1, 1).to(features.dtype), loss, features, indices)
