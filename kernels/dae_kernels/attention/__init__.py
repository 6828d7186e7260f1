"""Softmax attention behind one signature and one causal convention."""

from dae_kernels.attention.api import attention, attention_varlen

__all__ = ["attention", "attention_varlen"]
