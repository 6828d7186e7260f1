"""Counts and sums of the vectors of every code, for a codebook trained by moving averages."""

from dae_kernels.codebook_statistics.api import codebook_statistics

__all__ = ["codebook_statistics"]
