"""Fused operations for latent generative models; works with torch alone, uses Triton where it launches."""

from dae_kernels.attention import attention
from dae_kernels.nearest_code import nearest_code

__all__ = ["attention", "nearest_code"]
