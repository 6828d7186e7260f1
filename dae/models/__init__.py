from dae.models.ar_prior import ARPrior
from dae.models.autoencoder import Autoencoder
from dae.models.discriminator import PatchDiscriminator

__all__ = ["ARPrior", "Autoencoder", "PatchDiscriminator"]
