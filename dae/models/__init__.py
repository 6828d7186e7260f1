from dae.models.ar_prior import ARPrior
from dae.models.autoencoder import Autoencoder
from dae.models.discriminator import PatchDiscriminator
from dae.models.dit import DiT
from dae.models.feature_discriminator import FeatureDiscriminator
from dae.models.kernels import choose_kernels
from dae.models.mixture import GaussianMixturePrior
from dae.models.prior import Prior

__all__ = [
    "ARPrior",
    "Autoencoder",
    "DiT",
    "FeatureDiscriminator",
    "GaussianMixturePrior",
    "PatchDiscriminator",
    "Prior",
    "choose_kernels",
]
