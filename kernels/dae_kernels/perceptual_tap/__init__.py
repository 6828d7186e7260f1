"""One layer's term of LPIPS: the distance of two feature maps after normalising each position's channels."""

from dae_kernels.perceptual_tap.api import perceptual_tap

__all__ = ["perceptual_tap"]
