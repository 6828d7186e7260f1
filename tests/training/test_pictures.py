"""The picture of samples shows the classes that sampling would draw."""

from types import SimpleNamespace

import pytest
import torch

from dae.config import load_config
from dae.training import pictures


@pytest.mark.parametrize(("classes", "labels"), [((), [0, 1, 2, 0]), ((2, 1), [2, 1, 2, 1])])
def test_samples_of_the_chosen_classes(monkeypatch, classes, labels):
    drawn = []

    def generate(_autoencoder, _prior, labels_N, *_):
        drawn.extend(labels_N.tolist())
        return iter([torch.zeros(len(labels_N), 1, 8, 8)])

    monkeypatch.setattr(pictures, "generate", generate)
    prior = SimpleNamespace(num_classes=3, eval=lambda: None)
    sheet = pictures.sample_sheet(None, prior, load_config(None, ["logged_images=4"]), classes)
    assert drawn == labels and sheet.shape[1] >= 4 * 8
