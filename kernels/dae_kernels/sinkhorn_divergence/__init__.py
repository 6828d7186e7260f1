"""Entropic optimal transport between point clouds: its debiased divergence, and products with its plan."""

from dae_kernels.sinkhorn_divergence.api import barycentric_map, sinkhorn_divergence, sinkhorn_transport

__all__ = ["barycentric_map", "sinkhorn_divergence", "sinkhorn_transport"]
