"""What a later recipe of the chain would refuse is refused before the first model is trained, and trying it changes nothing."""

import contextlib

import pytest
import torch

from dae.config import load_config
from dae.models import Autoencoder
from dae.training import plan_stages
from dae.training.rehearsal import rehearse_prior, rehearse_stage, require_batches, require_measurable, sampled_classes

SMALL = (
    "data.resolution=16", "data.channels=3", "autoencoder.base_channels=8", "autoencoder.latent_channels=4",
    "autoencoder.vq.codebook_size=16", "prior.width=16", "prior.num_heads=2", "stage2.loss.discriminator_channels=8",
)  # fmt: skip
ATTENTIVE = "autoencoder.attention_resolutions=[8]"
KL, MIXTURE = "autoencoder.bottleneck=kl", "prior.family=mixture"
WIDE = "autoencoder.latent_channels=256"


@pytest.fixture(autouse=True)
def without_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def rehearse(*overrides, rows=50, heldout=10):
    """All that recipes/train_dae.py asks before it trains."""
    config = load_config(None, [*SMALL, *overrides])
    for stage in plan_stages(config):
        autoencoder = Autoencoder(config.autoencoder, config.data.channels, config.data.resolution)
        rehearse_stage(config, stage, autoencoder, None, contextlib.nullcontext)
    require_batches(config, rows, 2)
    sampled_classes(config, ["ant", "bee", "cat"], None)
    rehearse_prior(config, autoencoder, 3, rows, contextlib.nullcontext)
    require_measurable(config, training_images=rows, held_out_images=heldout)


@pytest.mark.parametrize(
    ("overrides", "kind", "message"),
    [
        (["prior.num_heads=3"], ValueError, r"the prior \(ar\) cannot run: prior.width=16 over prior.num_heads=3"),
        ([KL, "prior.width=18"], ValueError, r"the prior \(dit\) cannot run: prior.width=18"),
        (["kernels.linear_cross_entropy=triton"], ValueError, r"the prior .*kernels.linear_cross_entropy=triton"),
        (["kernels.vector_quantize=triton"], ValueError, r"the autoencoder .*kernels.vector_quantize=triton"),
        (["kernels.group_norm_silu=triton"], ValueError, r"the autoencoder .*kernels.group_norm_silu=triton"),
        (["kernels.attention=flash_attn"], ValueError, r"the prior .*kernels.attention=flash_attn"),
        ([KL, "kernels.attention=xformers"], ValueError, r"the prior .*kernels.attention=xformers"),
        ([ATTENTIVE, "kernels.attention=flash_attn"], ValueError, r"the autoencoder .*kernels.attention=flash_attn"),
        ([KL, MIXTURE, "prior.num_components=51"], ValueError, "only 50 encodings.*fewer components"),
        ([KL, MIXTURE, "prior.num_components=50000", "prior.num_augmentations=1000", WIDE], ValueError, "GB of memory"),
        ([KL, MIXTURE, "sampling.classes=[0]"], ValueError, "a mixture knows no classes"),
        (["sampling.classes=[3]"], ValueError, "'3' is neither .*There are 3 classes: ant, bee, cat"),
        (["prior.train_batch_size=26"], ValueError, "prior.train_batch_size=26 x 2 processes.*50 rows"),
        (["evaluation.neighbours=10"], ValueError, "11 held out images, got 10.*evaluation.neighbours=9"),
        (["evaluation.max_images=3"], ValueError, "4 training images, got 3"),
        (
            ["autoencoder.channel_multipliers=[1,1,1,1,1]", "stage2.train_batch_size=1"],
            ValueError,
            "autoencoder .*more than 1 value",
        ),
        (["data.resolution=4"], ValueError, "data.resolution=4.*8 x 8"),
        (
            ["sampling.cuda_graphs=true"],
            ValueError,
            "^sampling.cuda_graphs=true needs a CUDA device, this run is on cpu; leave it out",
        ),
        (
            ["stage2.loss.adversarial=1", "stage2.loss.discriminator_layers=5"],
            ValueError,
            "less than a pixel: expected at most 4",
        ),
    ],
)
def test_refused_before_training(overrides, kind, message):
    batch = [] if any("train_batch_size" in each for each in overrides) else ["prior.train_batch_size=8"]
    with pytest.raises(kind, match=message) as caught:
        rehearse(*batch, *overrides)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        [ATTENTIVE, "stage2.loss.adversarial=1"],
        [KL, ATTENTIVE],
        [KL, MIXTURE],
        ["autoencoder.channel_multipliers=[1,1,1,1,1]"],  # one position
        ["method=joint", "kernels.attention=reference"],
        ["prior.dropout=0.5", "prior.token_noise=0.5", "prior.gradient_checkpointing=true"],
    ],
)
def test_what_can_run_is_let_through_and_draws_nothing(overrides):
    torch.manual_seed(3)
    config = load_config(None, [*SMALL, *overrides])
    autoencoder = Autoencoder(config.autoencoder, 3, 16)
    after = torch.get_rng_state()
    for stage in plan_stages(config):
        rehearse_stage(config, stage, autoencoder, None, contextlib.nullcontext)
    rehearse_prior(config, autoencoder, 3, 50, contextlib.nullcontext)
    require_measurable(config, training_images=None, held_out_images=4)
    assert torch.equal(torch.get_rng_state(), after)


def test_no_gradient_mode_of_the_caller():
    """Inside no_grad a backward would fail."""
    with torch.no_grad():
        rehearse("prior.train_batch_size=8")
