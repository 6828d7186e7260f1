"""What is trained in memory is tried first: the arms of a comparison, and autoencoders among the latents that are measured."""

import pytest
import torch

from dae.comparison.jobs import check_comparison
from dae.complexity.latents import AUTOENCODERS, rehearse_training
from dae.config import load_config
from dae.training.engine import LocalEngine
from dae.training.rehearsal import rehearse_autoencoder, rehearse_chain

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
    ],
)
def test_arms(overrides, message):
    with pytest.raises(ValueError, match=message):
        rehearse_chain(configure(*overrides), 3, 50, LocalEngine())
    rehearse_chain(configure(), 3, 50, LocalEngine())


@pytest.mark.parametrize("given", ["init_from=runs/x", "prior.init_from=runs/x"])
def test_arms_start_from_their_seeds(given):
    with pytest.raises(ValueError, match=r"set init_from=null and prior\.init_from=null"):
        check_comparison(configure(given))


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
    assert rehearse_autoencoder(configure(), None, LocalEngine()).latent_size == 4
