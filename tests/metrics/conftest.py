"""Processes simulated by threads, and the digits."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch


@pytest.fixture
def processes(monkeypatch):
    """`processes(world, function)`: the results of function(rank), run at once with sums over the `world` callers."""

    def run(world, function):
        barrier, local, slots = threading.Barrier(world, timeout=1800), threading.local(), [None] * world

        def summed(x):
            slots[local.rank] = x.clone()
            barrier.wait()
            total = sum(slots[1:], start=slots[0])
            barrier.wait()
            return x.copy_(total)

        def process(rank):
            local.rank = rank
            return function(rank)

        for module in ("codebook", "frechet"):
            monkeypatch.setattr(f"dae.metrics.{module}.sum_over_processes", summed)
        with ThreadPoolExecutor(world) as pool:
            return list(pool.map(process, range(world)))

    return run


@pytest.fixture(scope="session")
def digits():
    """images, labels of the training part, then of the held-out part (20 %, stratified), of scikit-learn's digits."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 8 - 1
    labels = torch.tensor(data.target, dtype=torch.int64)
    train, heldout = train_test_split(range(len(images)), test_size=0.2, stratify=data.target, random_state=0)
    return images[train], labels[train], images[heldout], labels[heldout]
