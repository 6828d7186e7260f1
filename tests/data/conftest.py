import io

import numpy as np
import pytest
from PIL import Image

from dae.config import DataConfig


def encode(seed: int, size: int = 6) -> bytes:
    """PNG of a random picture."""
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def make_table(rows: int, label=lambda i: i % 3, start: int = 0, class_names=("a", "b", "c"), feature=None):
    """A data set of distinct random pictures; `label` gives the class of row i, None makes it unlabelled."""
    from datasets import ClassLabel, Dataset, Features
    from datasets import Image as ImageFeature

    columns = {"image": [{"bytes": encode(start + i), "path": None} for i in range(rows)]}
    features = {"image": ImageFeature()}
    if label is not None:
        columns["label"] = [label(i) for i in range(rows)]
        features["label"] = feature or ClassLabel(names=list(class_names))
    return Dataset.from_dict(columns, features=Features(features))


# Test modules cannot import each other under --import-mode=importlib, so helpers come as fixtures.
@pytest.fixture
def png():
    return encode


@pytest.fixture
def table():
    return make_table


@pytest.fixture
def saved(tmp_path):
    """`saved(table or {split: table})`: configuration of a set written by `save_to_disk`."""
    from datasets import Dataset, DatasetDict

    def save(rows, **changes):
        folder = tmp_path / f"saved{len(list(tmp_path.iterdir()))}"
        (rows if isinstance(rows, Dataset) else DatasetDict(rows)).save_to_disk(str(folder))
        return configuration(folder, **changes)

    return save


def configuration(name, **changes) -> DataConfig:
    files = {key: [value] for key, value in changes.items() if key.endswith("_files") and isinstance(value, str)}
    return DataConfig(dataset_name=str(name), **{"resolution": 6, "channels": 3, **changes, **files})


@pytest.fixture
def configure():
    return configuration


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """Files that `datasets` converts go to a folder of the test run."""
    import datasets

    datasets.disable_progress_bars()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.fixture
def processes(monkeypatch):
    """`processes(r, W)`: from now on this process is number r of W."""
    import dae.data.loader
    import dae.distributed

    def become(rank, world_size):
        for module in (dae.distributed, dae.data.loader):
            monkeypatch.setattr(module, "rank", lambda: rank)
            monkeypatch.setattr(module, "world_size", lambda: world_size)

    return become
