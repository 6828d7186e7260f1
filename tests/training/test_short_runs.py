"""A run of few steps is not mostly validation; the shipped configurations still validate on all that they hold out."""

from pathlib import Path

import pytest
import torch

from dae.config import load_config
from dae.data.cache import TokenDataset
from dae.priors import require_guidance
from dae.training.loop import validation_images
from dae.training.stages import plan_stages

CONFIGS = sorted((Path(__file__).parents[2] / "recipes" / "configs").glob("*.yaml"))
HELDOUT = {"digits": 360, "photos": 512, "imagenet256": 50_000, "cifar10": 10_000, "fashion_mnist": 10_000}
HELDOUT |= {"clothing128": 341, "faceshq256": 1000, "refit": 1000}  # rows of the held-out split; refit is for any


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configurations_validate_on_all(path):
    config = load_config(path)
    name = next(name for name in HELDOUT if name in path.stem)
    for stage in plan_stages(config):
        assert validation_images(config, stage.config) >= min(config.data.validation_size, HELDOUT[name])
    assert validation_images(config, config.prior) >= HELDOUT[name]


def test_three_steps():
    config = load_config(None, ["stage1.max_train_steps=3", "stage1.train_batch_size=16", "stage1.gradient_accumulation_steps=2"])
    assert validation_images(config, config.stage1) == 96
    config.validation_steps = 2
    assert validation_images(config, config.stage1) == 64


def test_rows_are_spread():
    rows = TokenDataset(torch.arange(10).view(10, 1, 1), torch.arange(10))
    assert rows.spread(10) is rows and rows.spread(99) is rows
    assert rows.spread(4).labels_N.tolist() == [0, 2, 5, 7] and rows.spread(1).labels_N.tolist() == [0]


@pytest.mark.parametrize(("key", "value"), [("sampling.cfg_scale", "3"), ("evaluation.cfg_scales", "[1.0,2.0]")])
def test_guidance_without_class_dropout_is_refused_before_training(key, value):
    plain = ["prior.class_dropout=0", "sampling.cfg_scale=1", "evaluation.cfg_scales=[1.0]"]
    require_guidance(load_config(None, plain))
    with pytest.raises(ValueError, match=f"{key}: a guidance scale of [23] needs a prior trained with prior.class_drop"):
        require_guidance(load_config(None, [*plain, f"{key}={value}"]))
    require_guidance(load_config(None, [*plain, f"{key}={value}", "prior.class_dropout=0.1"]))
    mixture = ["autoencoder.bottleneck=kl", "prior.family=mixture"]  # knows no guidance
    require_guidance(load_config(None, [*plain, f"{key}={value}", *mixture]))
