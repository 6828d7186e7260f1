"""Vector quantization with a codebook trained by gradients (van den Oord et al. 2017, arXiv 1711.00937, equation 3)."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dae.config import VQConfig
from dae.precision import wide
from dae.quantizers.bottleneck import Encoding
from dae.quantizers.vq import VectorQuantizer


class GradientVectorQuantizer(VectorQuantizer):
    """As `VectorQuantizer`, but the codes are parameters of the optimiser, drawn to their latents by a loss.

        loss = commitment_weight * mean |z - sg(code)|^2 + mean |sg(z) - code|^2

    The moving average of counts remains: it says which codes are dead, and these move onto latents as there.
    """

    def __init__(self, config: VQConfig, channels: int):
        super().__init__(config, channels)
        codebook = self.codebook
        del self.codebook, self.average_sums
        self.codebook = nn.Parameter(codebook)

    def codes(self) -> Tensor:
        return self.placed(self.codebook.float())

    def forward(self, features: Tensor, sample_posterior: bool = False) -> Encoding:
        encoding = super().forward(features, sample_posterior)
        z_BhwD = self.placed(features.detach().to(wide(features.dtype)).movedim(1, -1))
        square = (F.embedding(cast(Tensor, encoding.indices), self.codes()) - z_BhwD).square().sum()
        encoding.loss = encoding.loss + square / max(1, z_BhwD.numel())
        return encoding

    def _follow(self, sums_KD: Tensor) -> None:
        """The optimiser moves the codes."""

    @torch.no_grad()
    def _set_codes(self, which_K: Tensor, codes_KD: Tensor) -> None:
        self.average_counts.copy_(torch.where(which_K, self.average_counts.mean(), self.average_counts))
        self.codebook.copy_(torch.where(which_K[:, None], codes_KD.to(self.codebook), self.codebook))
