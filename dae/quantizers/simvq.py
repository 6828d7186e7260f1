"""SimVQ (Zhu et al. 2024, arXiv 2411.02038): codes that one trained linear map makes of fixed ones, so that all of them move."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dae.config import VQConfig
from dae.quantizers.vq_gradient import GradientVectorQuantizer


class SimVectorQuantizer(GradientVectorQuantizer):
    """code_k = W basis_k, with a fixed basis and a trained W [D, D]; the loss is that of `GradientVectorQuantizer`.

    A step that moves W moves each code, used or not, so none is revived. W begins as the identity; the basis is random, or the
    centres of k-means (`autoencoder.vq.kmeans_iterations`).
    """

    revives = False
    basis: Tensor  # [K, D]

    def __init__(self, config: VQConfig, channels: int):
        super().__init__(config, channels)
        basis = self.codebook.detach()
        del self.codebook
        self.register_buffer("basis", basis)
        self.map = nn.Linear(channels, channels, bias=False)
        nn.init.eye_(self.map.weight)

    def codes(self) -> Tensor:
        return self.placed(self.basis @ self.map.weight.float().T)

    @torch.no_grad()
    def _set_codes(self, which_K: Tensor, codes_KD: Tensor) -> None:
        """Codes become the basis; before training, when W is the identity."""
        self.basis.copy_(torch.where(which_K[:, None], codes_KD, self.basis))
