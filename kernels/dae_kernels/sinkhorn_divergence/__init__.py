"""Entropic optimal transport between point clouds: its divergence without bias, and what its plan does."""

from dae_kernels.sinkhorn_divergence.api import barycentric_map, sinkhorn_divergence, sinkhorn_transport

__all__ = ["barycentric_map", "sinkhorn_divergence", "sinkhorn_transport"]
