"""Compares generated images with real ones, whose features are prepared once."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from dae import metrics
from dae.evaluation.extractor import prediction_task
from dae.metrics import Classifier, EqualCountFrechet, Memorisation
from dae.metrics.kernel import MAX_SUBSET


@dataclass
class Judge:
    """Compares generated images with real ones in a classifier's features.

    Args:
        train, heldout: images [N, C, H, W] in [-1, 1] or as 8 bits.
        train_labels, heldout_labels: int64 [N].
        labelled: whether the labels are real.
        neighbours: k of precision and recall.
        seed: for all subsets.
    """

    classifier: Classifier
    train: Tensor
    train_labels: Tensor
    heldout: Tensor
    heldout_labels: Tensor
    labelled: bool
    neighbours: int
    seed: int

    @cached_property
    def train_features(self) -> Tensor:
        return metrics.extract_features(self.classifier, self.train)

    @cached_property
    def heldout_features(self) -> Tensor:
        return metrics.extract_features(self.classifier, self.heldout)

    @cached_property
    def count(self) -> int:
        """Number of images in every Frechet distance, so that distances compare."""
        return min(len(self.train), len(self.heldout))

    @cached_property
    def floor(self) -> EqualCountFrechet:
        """Distance between two sets of real images, training and held-out."""
        return metrics.equal_count_frechet(self.heldout_features, self.train_features, count=self.count, seed=self.seed)

    @cached_property
    def heldout_copies(self) -> Memorisation:
        """Near-copies among held-out images: the level expected of a model that does not memorise."""
        return metrics.memorisation(self.heldout, self.train, self.heldout)

    @cached_property
    def accuracy(self) -> float:
        """The classifier's accuracy on held-out images."""
        return metrics.accuracy(self.classifier, *prediction_task(self.heldout, self.heldout_labels, self.labelled))

    def samples(
        self, images: Tensor, classes: Tensor | None, features: Tensor | None = None, copies: Memorisation | None = None
    ) -> dict:
        """Distance to held-out images, recognition, variety and near-copies of training images.

        Args:
            images: [M, C, H, W], as the real ones.
            classes: int64 [M], the requested classes; None for unconditional samples, without recognition.
            features, copies: `extract_features` and `near_copies` of the images, if computed already.
        """
        features = metrics.extract_features(self.classifier, images) if features is None else features
        rows = min(self.count, len(images))
        distance = metrics.equal_count_frechet(self.heldout_features, features, count=rows, seed=self.seed)
        manifold = metrics.precision_recall(self.heldout_features, features[: self.count], self.neighbours)
        copies = self.near_copies(images) if copies is None else copies
        return self._recognised(images, classes if self.labelled else None) | {
            "frechet": distance.mean,
            "frechet_std": distance.std,
            "frechet_ratio": distance.mean / self.floor.mean,
            **manifold._asdict(),
            "memorised": copies.share_samples,
            "memorised_heldout": copies.share_heldout,
            "memorised_threshold": copies.threshold,
        }

    def _recognised(self, images: Tensor, classes: Tensor | None) -> dict:
        if classes is None:
            return {"recognised": None, "recognised_interval": None}
        from scipy.stats import binomtest

        right = int((metrics.predict(self.classifier, images) == classes.cpu()).sum())
        interval = binomtest(right, len(images)).proportion_ci(method="wilson")
        return {"recognised": right / len(images), "recognised_interval": list(interval)}

    def near_copies(self, images: Tensor) -> Memorisation:
        """Each image's nearest training image, and how many are nearer than 99 % of the held-out images are."""
        return metrics.memorisation(images, self.train, self.heldout, heldout_distance=self.heldout_copies.heldout_distance)

    def kernel(self, features: Tensor) -> dict:
        """Kernel distance of features to the held-out images', and the subsets it is averaged over."""
        rows = max(2, min(MAX_SUBSET, min(len(features), len(self.heldout)) // 2))  # half of small sets, so that subsets differ
        found = metrics.kernel_distance(self.heldout_features, features, subset_size=rows, seed=self.seed)
        keys = ("kernel_distance", "kernel_distance_std", "kernel_subsets", "kernel_subset_size")
        return dict(zip(keys, found, strict=True))

    def reconstructions(self, features: Tensor) -> dict:
        """Distances of the reconstructed held-out images' features."""
        manifold = metrics.precision_recall(self.heldout_features, features, self.neighbours)
        return {"frechet": metrics.frechet_distance(self.heldout_features, features), **manifold._asdict()}
