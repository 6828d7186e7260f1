from dae.models.ar_prior import ARPrior
from dae.models.autoencoder import Autoencoder
from dae.models.discriminator import PatchDiscriminator
from dae.models.kernels import choose_kernels

__all__ = ["ARPrior", "Autoencoder", "PatchDiscriminator", "choose_kernels"]
