"""Which rows are held out, where a data set has no held-out split. Always the same rows, whatever the seed of the run."""

from __future__ import annotations

import numpy as np


def hold_out(rows: int, size: int, labels: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Rows to train on and rows held out, both ascending; stratified by `labels` where each class has room for it.

    Args:
        rows: number of rows.
        size: how many of them to hold out; 1 <= size < rows.
        labels: [rows] integers, or None.
    """
    from sklearn.model_selection import train_test_split

    if labels is not None:
        counts = np.unique(labels, return_counts=True)[1]
        if counts.min() < 2 or min(size, rows - size) < len(counts):
            labels = None
    train, held_out = train_test_split(np.arange(rows), test_size=size, random_state=0, stratify=labels)
    return np.sort(train), np.sort(held_out)
