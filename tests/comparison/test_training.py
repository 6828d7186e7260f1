"""What is trained in memory is what the recipes train."""

import importlib.util
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from dae.config import load_config
from dae.data import TrainLoader, evaluation_batches, load_data
from dae.data.tensors import TensorLoader
from dae.models import Autoencoder
from dae.training.in_memory import encode, train_autoencoder, train_prior

ROOT = Path(__file__).parents[2]
TINY = ROOT / "tests" / "recipes" / "tiny.yaml"
KL = [
    "method=joint_finetuned", "autoencoder.bottleneck=kl", "autoencoder.kl.kl_weight=1e-3", "stage2.loss.adversarial=0.5",
    "stage2.loss.adversarial_start=2", "stage2.loss.discriminator_channels=8", "prior.num_heads=2", "data.random_affine=0.5",
]  # fmt: skip


@pytest.fixture(autouse=True)
def fresh_accelerator():
    yield
    AcceleratorState._reset_state(True)


def recipe(name):
    spec = importlib.util.spec_from_file_location(f"recipe_{name}", ROOT / "recipes" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def load_all(dataset):
    rows = list(evaluation_batches(dataset, 500))
    return torch.cat([b["image"] for b in rows]), torch.cat([b["label"] for b in rows])


GAN = [
    "autoencoder.bottleneck=kl", "autoencoder.kl.kl_weight=1e-3", "stage2.loss.adversarial=0.5", "stage2.max_grad_norm=0",
    "stage2.loss.discriminator_channels=8", "stage1.gradient_accumulation_steps=2", "prior.gradient_accumulation_steps=2",
    "prior.num_heads=2", "mixed_precision=bf16", "stage2.loss.adversarial_start=1",
]  # fmt: skip
VQ = ["prior.num_augmentations=2", "prior.code_temperature=0.5", "data.random_affine=0.5", "prior.early_stopping=false"]


@pytest.mark.parametrize("overrides", [VQ, KL, GAN], ids=["vq-dae-ar", "kl-finetuned-gan-dit", "bf16"])
def test_memory_and_recipes_train_the_same_weights(tmp_path, overrides):
    config = load_config(TINY, [f"output_dir={tmp_path}", *overrides])
    data = load_data(config.data, config.seed)
    train, heldout = load_all(data.train), load_all(data.validation)
    autoencoder = train_autoencoder(train[0], config)
    cache = encode(autoencoder, train, heldout, data.num_classes, config)
    prior = train_prior(cache, config)

    AcceleratorState._reset_state(True)  # else the precision is that of whoever came first
    recipe("train_dae").train(config)
    recipe("encode").encode(config)
    recipe("train_prior").train(config)
    for name, model in (("autoencoder", autoencoder), ("prior", prior)):
        saved = load_file(tmp_path / name / "model.safetensors")
        ours = model.state_dict()
        assert saved.keys() == ours.keys()
        for key in saved:
            torch.testing.assert_close(ours[key], saved[key], rtol=0, atol=0, msg=f"{name}: {key}")


def test_order_is_that_of_the_loader():
    rows = [{"row": i} for i in range(23)]
    loader, ours = iter(TrainLoader(rows, 5, seed=7)), iter(TensorLoader({"row": torch.arange(23)}, 5, seed=7))
    for _ in range(10):  # past two epochs
        assert torch.equal(next(loader)["row"], next(ours)["row"])
    with pytest.raises(ValueError, match="3 rows, fewer than one batch of 5"):
        TensorLoader({"row": torch.arange(3)}, 5, seed=0)


def test_refusals_and_random_state():
    config = load_config(TINY, ["stage1.max_train_steps=1", "stage2.max_train_steps=1"])
    images = torch.rand(32, 1, 8, 8) * 2 - 1
    state = torch.get_rng_state()
    first, second = train_autoencoder(images, config), train_autoencoder(images, config)
    assert torch.equal(torch.get_rng_state(), state)
    assert isinstance(first, Autoencoder) and not first.training
    for key, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[key])
    for override, words in (
        ("stage1.train_batch_size=33", "32 rows, fewer than one batch of 33"),
        ("mixed_precision=fp16", "fp16 has no effect on cpu"),
        ("data.resolution=16", "images of 16 pixels|16 are asked for|8 pixels|of 16"),
    ):
        with pytest.raises(ValueError, match=words):
            train_autoencoder(images, load_config(TINY, [override]))
    rows = images, torch.zeros(32).long()
    cache = encode(first, rows, rows, 1, config)
    with pytest.raises(ValueError, match=r"prior\.family=dit"):
        train_prior(cache, load_config(TINY, ["prior.family=dit"]))
    with pytest.raises(FloatingPointError, match="stage1: the loss is nan"):
        train_autoencoder(images * torch.nan, config)
