"""Sinkhorn divergence: entropic optimal transport between point clouds, without its bias."""

from dae_kernels.sinkhorn_divergence.api import sinkhorn_divergence

__all__ = ["sinkhorn_divergence"]
