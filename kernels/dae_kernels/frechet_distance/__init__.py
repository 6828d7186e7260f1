"""Fréchet distance: the squared 2-Wasserstein distance of Gaussians, from moments, statistics of a stream, or samples."""

from dae_kernels.frechet_distance.api import frechet_distance, gaussian_w2
from dae_kernels.frechet_distance.statistics import GaussianStatistics

__all__ = ["GaussianStatistics", "frechet_distance", "gaussian_w2"]
