"""Metrics of reconstructions, codebooks and samples, with their conventions and sources.

Importing this package needs torch alone; torchmetrics is imported by the function that uses it.
"""

from dae.metrics.classifier import Classifier, accuracy, extract_features, predict, rotation_task, train_classifier
from dae.metrics.codebook import CodebookUsage
from dae.metrics.frechet import EqualCountFrechet, FeatureStatistics, equal_count_frechet, frechet_distance
from dae.metrics.kernel import KernelDistance, kernel_distance
from dae.metrics.manifolds import PrecisionRecall, precision_recall
from dae.metrics.memorisation import Memorisation, memorisation
from dae.metrics.provenance import versions
from dae.metrics.psnr import psnr
from dae.metrics.rate import bits_back, code_entropy_rate, gaussian_rate
from dae.metrics.structural_similarity import ssim
from dae.metrics.validation import as_float

__all__ = [
    "Classifier", "CodebookUsage", "EqualCountFrechet", "FeatureStatistics", "KernelDistance", "Memorisation", "PrecisionRecall",
    "accuracy", "as_float", "bits_back", "code_entropy_rate", "equal_count_frechet", "extract_features", "frechet_distance",
    "gaussian_rate", "kernel_distance", "memorisation", "precision_recall", "predict", "psnr", "rotation_task", "ssim",
    "train_classifier", "versions",
]  # fmt: skip
