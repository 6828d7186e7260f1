"""Softmax attention behind one signature and one causal convention."""

from dae_kernels.attention.api import attention

__all__ = ["attention"]
