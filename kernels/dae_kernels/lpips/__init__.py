"""One layer's term of LPIPS: the distance of two feature maps after normalising each position's channels."""

from dae_kernels.lpips.api import lpips, perceptual_tap

__all__ = ["lpips", "perceptual_tap"]
