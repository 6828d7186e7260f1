"""What is trained in memory is tried first: the arms of a comparison, and autoencoders among the latents that are measured."""

import pytest
import torch

from dae.comparison.jobs import check_comparison
from dae.comparison.training import rehearse, rehearse_autoencoder
from dae.complexity.latents import AUTOENCODERS, rehearse_training
from dae.config import load_config

SMALL = (
    "data.resolution=8", "data.channels=1", "autoencoder.base_channels=8", "autoencoder.latent_channels=4",
    "autoencoder.vq.codebook_size=16", "prior.width=16", "prior.num_heads=2", "prior.train_batch_size=8",
    "stage1.train_batch_size=8", "stage2.train_batch_size=8",
)  # fmt: skip


@pytest.fixture(autouse=True)
def without_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def configure(*overrides):
    return load_config(None, [*SMALL, *overrides])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["prior.num_heads=3"], "the prior .*prior.num_heads=3"),
        (["stage2.train_batch_size=51"], "stage2: the training set has 50 rows"),
        (["prior.train_batch_size=51"], "prior.train_batch_size=51"),
        (["kernels.group_norm_silu=triton"], "kernels.group_norm_silu=triton"),
        (["stage1.gradient_accumulation_steps=2"], "no gradient accumulation"),
    ],
)
def test_arms(overrides, message):
    with pytest.raises(ValueError, match=message):
        rehearse(configure(*overrides), 3, 50)
    rehearse(configure(), 3, 50)


def test_guidance_without_class_dropout():
    with pytest.raises(ValueError, match=r"sampling.cfg_scale.*prior.class_dropout"):
        check_comparison(configure("prior.class_dropout=0", "sampling.cfg_scale=2", "evaluation.cfg_scales=[1.0]"))


@pytest.mark.parametrize("spec", AUTOENCODERS)
def test_latents_trained_here(spec):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    assert rehearse_training(spec, configure(), 50) == (4, 4, 4)
    assert torch.equal(torch.get_rng_state(), before)
    with pytest.raises(ValueError, match="50 rows"):
        rehearse_training(spec, configure("stage1.train_batch_size=51"), 50)


def test_latents_that_are_not():
    assert rehearse_training("pca", configure("stage1.train_batch_size=51"), 50) is None
    assert rehearse_autoencoder(configure(), None).latent_size == 4
