"""Fused operations for latent generative models; works with torch alone, uses Triton if available."""

from dae_kernels.attention import attention, attention_varlen
from dae_kernels.clouds import Convention
from dae_kernels.codebook_statistics import codebook_statistics
from dae_kernels.energy_distance import energy_distance
from dae_kernels.frechet_distance import GaussianStatistics, frechet_distance, gaussian_w2
from dae_kernels.group_norm_silu import group_norm_silu
from dae_kernels.linear_cross_entropy import linear_cross_entropy
from dae_kernels.lpips import lpips
from dae_kernels.lpips import perceptual_tap as perceptual_tap  # the old name, for one release
from dae_kernels.mmd import mmd
from dae_kernels.nearest_code import nearest_code
from dae_kernels.precision_recall_density_coverage import k_nearest_distances, precision_recall_density_coverage
from dae_kernels.sinkhorn_divergence import barycentric_map, sinkhorn_divergence, sinkhorn_transport
from dae_kernels.sliced_wasserstein import max_sliced_wasserstein, sliced_wasserstein
from dae_kernels.transformer_layers import (
    gated_residual,
    layer_norm_modulate,
    qk_norm,
    rms_norm,
    rotary_table,
    rotary_table_2d,
    rotate,
    swiglu,
)
from dae_kernels.vector_quantize import vector_quantize

__all__ = [
    "Convention",
    "GaussianStatistics",
    "attention",
    "attention_varlen",
    "barycentric_map",
    "codebook_statistics",
    "energy_distance",
    "frechet_distance",
    "gated_residual",
    "gaussian_w2",
    "group_norm_silu",
    "k_nearest_distances",
    "layer_norm_modulate",
    "linear_cross_entropy",
    "lpips",
    "max_sliced_wasserstein",
    "mmd",
    "nearest_code",
    "precision_recall_density_coverage",
    "qk_norm",
    "rms_norm",
    "rotary_table",
    "rotary_table_2d",
    "rotate",
    "sinkhorn_divergence",
    "sinkhorn_transport",
    "sliced_wasserstein",
    "swiglu",
    "vector_quantize",
]
