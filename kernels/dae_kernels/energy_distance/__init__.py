"""Energy distance of two weighted clouds."""

from dae_kernels.energy_distance.api import energy_distance

__all__ = ["energy_distance"]
