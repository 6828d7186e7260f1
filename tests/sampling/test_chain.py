"""Autoencoder and prior of one run: they must belong together, and a seed gives the same images."""

import pytest
import torch

from dae.config import AutoencoderConfig, PriorConfig, SamplingConfig, VQConfig
from dae.hub import fingerprint
from dae.models import ARPrior, Autoencoder, DiT
from dae.sampling import generate, load_chain


@pytest.fixture
def chain(tmp_path):
    torch.manual_seed(0)
    autoencoder = Autoencoder(AutoencoderConfig(base_channels=8, latent_channels=4, vq=VQConfig(codebook_size=16)), 1, 8)
    autoencoder.save_pretrained(tmp_path / "autoencoder")
    shape = {"vocab_size": 16, "sequence_length": 16, "num_classes": 3}
    prior = ARPrior(PriorConfig(width=8, depth=1, num_heads=1), **shape, tokenizer=fingerprint(tmp_path / "autoencoder"))
    prior.save_pretrained(tmp_path / "prior")
    return tmp_path


def test_load_and_generate(chain):
    autoencoder, prior = load_chain(chain)
    assert not autoencoder.training and not prior.training
    labels, settings = torch.arange(5) % 3, SamplingConfig(batch_size=2, cfg_scale=1.5)
    batches = list(generate(autoencoder, prior, labels, settings, seed=4))
    assert [b.shape for b in batches] == [(2, 1, 8, 8), (2, 1, 8, 8), (1, 1, 8, 8)]
    again = torch.cat(list(generate(autoencoder, prior, labels, settings, seed=4)))
    assert torch.equal(torch.cat(batches), again)
    assert not torch.equal(torch.cat(list(generate(autoencoder, prior, labels, settings, seed=5))), again)


@pytest.mark.parametrize("cfg_scale", [3.0, 0.0])
def test_a_prior_trained_without_class_dropout_is_not_guided(chain, cfg_scale):
    """By what it was trained with, whatever is configured today: its prediction without a class was never trained."""
    autoencoder, prior = load_chain(chain)
    dit = DiT(prior.config, latent_channels=4, latent_size=4, num_classes=3)
    for each in (prior, dit.eval()):
        each.config.class_dropout = 0.0
        with pytest.raises(ValueError, match=rf"guidance scale of {cfg_scale:g} needs .*class_dropout.*this one had 0"):
            next(generate(autoencoder, each, torch.arange(3), SamplingConfig(cfg_scale=cfg_scale), seed=0))
        next(generate(autoencoder, each, torch.arange(3), SamplingConfig(num_inference_steps=1), seed=0))


def test_a_prior_of_another_tokenizer_is_refused(chain):
    autoencoder, _ = load_chain(chain)
    with torch.no_grad():
        autoencoder.bottleneck.codebook[0, 0] += 1
    autoencoder.save_pretrained(chain / "autoencoder")
    with pytest.raises(ValueError, match=r"tokens of another autoencoder.*encode\.py.*train_prior\.py"):
        load_chain(chain)


@pytest.mark.parametrize("part", ["autoencoder", "prior"])
def test_half_a_chain(chain, part):
    (chain / part / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=rf"{part}: make it with recipes/train_"):
        load_chain(chain)
    with pytest.raises(FileNotFoundError, match=r"no trained model in .*nowhere"):
        load_chain(chain / "nowhere")
