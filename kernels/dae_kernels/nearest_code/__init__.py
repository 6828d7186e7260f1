"""Nearest codebook entry: the assignment step of vector quantization."""

from dae_kernels.nearest_code.api import nearest_code

__all__ = ["nearest_code"]
