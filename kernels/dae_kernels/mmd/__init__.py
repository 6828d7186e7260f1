"""Maximum mean discrepancy of two weighted clouds under a sum of Gaussian kernels."""

from dae_kernels.mmd.api import mmd

__all__ = ["mmd"]
