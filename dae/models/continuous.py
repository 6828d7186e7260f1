"""The base class of priors over a continuous latent: its shape and its checks."""

from __future__ import annotations

from dae_kernels.checks import check_floating
from torch import Tensor

from dae.config import PriorConfig
from dae.models.prior import Prior


class ContinuousPrior(Prior):
    """A prior over latents [D, h, h].

    Args:
        config: of the prior.
        latent_channels: D.
        latent_size: h, of the square grid of positions.
        num_classes: C of the data; label C is the null class.
        tokenizer: identity of the latent.

    Raises:
        ValueError: a size below 1.
    """

    shape = ("latent_channels", "latent_size")

    def __init__(self, config: PriorConfig, *, latent_channels: int, latent_size: int, num_classes: int, tokenizer: str = ""):
        super().__init__(config, num_classes, tokenizer)
        sizes = {"latent_channels": latent_channels, "latent_size": latent_size, "num_classes": num_classes}
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name}: expected at least 1, got {size}")
        self.latent_channels, self.latent_size = latent_channels, latent_size

    def check_latents(self, latents_BDhw: Tensor) -> None:
        """TypeError unless the latents are floating; ValueError unless they are [B, D, h, h]."""
        check_floating(type(self).__name__, "latents", latents_BDhw, "tokens take prior.family=ar")
        shape = (self.latent_channels, self.latent_size, self.latent_size)
        if latents_BDhw.ndim != 4 or latents_BDhw.shape[1:] != shape:
            raise ValueError(
                f"latents: expected [B, {', '.join(map(str, shape))}], got {list(latents_BDhw.shape)}; "
                "make the prior with the autoencoder's latent_channels and latent_size"
            )
