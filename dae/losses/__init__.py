from dae.losses.adversarial import adaptive_weight, discriminator_loss, generator_loss
from dae.losses.flow_matching import flow_matching_loss
from dae.losses.perceptual import PerceptualLoss
from dae.losses.reconstruction import reconstruction_loss

__all__ = [
    "PerceptualLoss",
    "adaptive_weight",
    "discriminator_loss",
    "flow_matching_loss",
    "generator_loss",
    "reconstruction_loss",
]
