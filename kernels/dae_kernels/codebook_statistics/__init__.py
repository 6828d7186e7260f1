"""Counts and sums of the vectors of every code: what a codebook that follows its data needs."""

from dae_kernels.codebook_statistics.api import codebook_statistics

__all__ = ["codebook_statistics"]
