"""Precision, recall, density and coverage of a generated cloud, and their k-nearest-neighbour search."""

from dae_kernels.precision_recall_density_coverage.api import (
    PrecisionRecallDensityCoverage,
    k_nearest_distances,
    precision_recall_density_coverage,
)

__all__ = ["PrecisionRecallDensityCoverage", "k_nearest_distances", "precision_recall_density_coverage"]
