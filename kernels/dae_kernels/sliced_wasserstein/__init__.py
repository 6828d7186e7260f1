"""Sliced and max-sliced Wasserstein distances between weighted point clouds."""

from dae_kernels.sliced_wasserstein.api import max_sliced_wasserstein, sliced_wasserstein

__all__ = ["max_sliced_wasserstein", "sliced_wasserstein"]
