from dae.losses.adversarial import GAN_LOSSES, LeCam, adaptive_weight, discriminator_loss, generator_loss, gradient_penalty
from dae.losses.differentiable_augmentation import AUGMENTATIONS, differentiable_augmentation
from dae.losses.flow_matching import flow_matching_loss
from dae.losses.perceptual import PerceptualLoss
from dae.losses.reconstruction import reconstruction_loss

__all__ = [
    "AUGMENTATIONS",
    "GAN_LOSSES",
    "LeCam",
    "PerceptualLoss",
    "adaptive_weight",
    "differentiable_augmentation",
    "discriminator_loss",
    "flow_matching_loss",
    "generator_loss",
    "gradient_penalty",
    "reconstruction_loss",
]
