"""Vector quantization with its gradient: the code in the forward pass, straight through or rotated in the backward pass."""

from dae_kernels.vector_quantize.api import VectorQuantized, vector_quantize

__all__ = ["VectorQuantized", "vector_quantize"]
