"""What a data set is called in headings, cards and notes: by the files that were read, without the folders they lie in."""

import dataclasses
import os

import pytest

from dae.config import Config, DataConfig
from dae.data import load_data
from dae.data.sources import source_title
from dae.priors import PRIORS
from dae.reporting.cards import autoencoder_card, prior_card


@pytest.mark.parametrize(
    ("changes", "title"),
    [
        ({}, "digits"),
        ({"dataset_name": "user/faces"}, "user/faces"),
        ({"dataset_name": "/data/faces/"}, "faces"),
        ({"dataset_name": "~/faces"}, "faces"),
        ({"dataset_name": "."}, os.path.basename(os.getcwd())),
        ({"dataset_name": "/data/faces/*.png"}, "faces/*.png"),
        ({"dataset_name": "/data/*/train/*.png"}, "data/*/train/*.png"),
        ({"train_files": ["/data/a, b.parquet"]}, "a, b.parquet"),
        ({"train_files": ["/data/a.parquet", "../b"], "validation_files": ["/data/c"]}, "a.parquet, b"),
        ({"train_files": [f"/data/{i}.tar" for i in range(9)]}, "0.tar, 1.tar, 2.tar, 3.tar, 4.tar and 4 more"),
        ({"dataset_name": "/", "train_files": []}, "/"),
    ],
)
def test_titles(changes, title):
    assert source_title(DataConfig(**changes)) == title


def test_an_existing_path_with_magic_is_a_path(tmp_path):
    (tmp_path / "faces[1]").mkdir()
    assert source_title(DataConfig(dataset_name=str(tmp_path / "faces[1]"))) == "faces[1]"


def test_what_is_read_names_the_models(tmp_path, png):
    """Not `data.dataset_name`, which stays at its default."""
    for name in ("ant", "bee"):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for i in range(12):
            (tmp_path / "pictures" / name / f"{i}.png").write_bytes(png(100 * len(name) + i))
    config = DataConfig(train_files=[str(tmp_path / "pictures")], resolution=6, channels=3)
    data = load_data(config, 0)
    assert data.title == "pictures" and data.name == str(tmp_path / "pictures") and data.describe()["title"] == "pictures"
    whole = dataclasses.replace(Config(), data=config)
    cards = [autoencoder_card(whole, data.describe(), [])]
    cards += [prior_card(whole, family, data.describe(), []) for family in PRIORS.values()]
    for card in cards:
        title = next(line for line in card.splitlines() if line.startswith("# "))
        assert " of pictures" in title and "digits" not in title
