"""The adaptive weight under accumulation, two processes, compilation and bf16; and a discriminator that is trained and saved.

A peer's script never updated its discriminator (diffusers, pull request 10605): here its optimiser's steps are counted.
"""

import functools
import sys

import pytest
import torch
from safetensors.torch import load_file
from tiny_training import CPU, GAN, Replicated, autoencoder_training, weights

from dae.losses import adaptive_weight
from dae.models import PatchDiscriminator
from dae.training import adversary
from dae.training.engine import LocalEngine

PLAIN = (*GAN, "data.random_flip=false", "stage2.loss.adversarial=1.0")  # nothing is drawn
BATCH = "stage2.train_batch_size"


def trained(*overrides, steps=3, engine=None, batches=None):
    """Adaptive weights, losses, and all tensors after some steps of stage 2."""
    seen = []

    def watched(*arguments):
        seen.append(adaptive_weight(*arguments))
        return seen[-1]

    before, adversary.adaptive_weight = adversary.adaptive_weight, watched
    try:
        training = autoencoder_training(*PLAIN, *overrides, which=1, engine=engine)
        if batches is not None:
            training.next_batch = iter(batches(training)).__next__
        for number in range(steps):
            training.step(number)
        return torch.stack(seen), torch.stack(training.state.losses), weights(training)[0]
    finally:
        adversary.adaptive_weight = before


def test_equal_micro_batches_are_one_batch():
    """x / 2 + x / 2 is x without rounding: the weight is not that of a loss divided by the number of micro-batches."""

    def each(times):
        def batches(training):
            given = [training.next_batch() for _ in range(3)]
            return [batch for batch in given for _ in range(times)]

        return batches

    one = trained("stage2.gradient_accumulation_steps=1", batches=each(1))
    two = trained("stage2.gradient_accumulation_steps=2", batches=each(2))
    assert torch.equal(one[0], two[0][::2]) and torch.equal(two[0][::2], two[0][1::2]) and (one[0] > 0).all()
    state = {key for key in one[2] if key.startswith(("model/", "discriminator"))}
    assert len(state) > 20 and all(torch.equal(one[2][key], two[2][key]) for key in state)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_two_processes_have_one_weight(in_processes, accumulation):
    options = (
        f"stage2.gradient_accumulation_steps={accumulation}",
        "stage2.loss.lecam=0.1",
        "stage2.loss.augment=[color,cutout]",
    )
    one = trained(*options, f"{BATCH}=16")
    two = in_processes(2, lambda rank: trained(*options, f"{BATCH}=8", engine=Replicated(CPU)))
    assert torch.equal(two[0][0], two[1][0]), "the same in both"
    for key in ("model/decoder.conv_out.weight", "discriminator/conv_in.weight"):
        assert torch.equal(two[0][2][key], two[1][2][key])
    # Sums of float32 in another order, 1e-6; AdamW, which divides by the gradients' size, raises them in three steps.
    torch.testing.assert_close(two[0][0], one[0], rtol=1e-3, atol=0)
    torch.testing.assert_close((two[0][1] + two[1][1]) / 2, one[1], rtol=1e-3, atol=0)
    first, whole = (each[0][0] for each in (two[0], one))
    torch.testing.assert_close(first, whole, rtol=1e-5, atol=0)


def test_compiled(monkeypatch):
    """The gradients at the output of a compiled decoder, which AOTAutograd differentiates as one function."""
    eager = trained()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    compiled = trained("compile=true")
    # the first step computes the same; later ones the same up to rounding and what AdamW makes of it
    torch.testing.assert_close(compiled[0][0], eager[0][0], rtol=1e-5, atol=0)
    torch.testing.assert_close(compiled[0], eager[0], rtol=1e-3, atol=0)
    torch.testing.assert_close(compiled[1], eager[1], rtol=1e-4, atol=0)


def test_bf16(monkeypatch):
    """Norms of many gradients are sums in float32: in bf16 they would stall after 256 equal terms."""

    def exact(*losses_and_sample):
        *losses, sample = losses_and_sample
        gradients = [torch.autograd.grad(loss, sample, retain_graph=True)[0] for loss in losses]
        seen.append(gradients[0].double().norm() / gradients[1].double().norm())
        return watched(*losses_and_sample)

    seen, watched = [], adaptive_weight
    monkeypatch.setattr(sys.modules[__name__], "adaptive_weight", exact)
    weights_of_steps, losses, _ = trained(engine=LocalEngine(CPU, "bf16"))
    assert weights_of_steps.dtype == torch.float32 and losses.isfinite().all()
    # 1,024 squares of float32 summed in pairs: a few rounding errors of 6e-8
    torch.testing.assert_close(weights_of_steps.double(), torch.stack(seen), rtol=1e-6, atol=0)


@pytest.mark.parametrize("engine", [None, "bf16"])
@pytest.mark.parametrize("accumulation", [1, 3])
def test_as_many_steps_as_the_decoder(engine, accumulation):
    given = None if engine is None else LocalEngine(CPU, engine)
    _, _, tensors = trained(f"stage2.gradient_accumulation_steps={accumulation}", engine=given)
    for optimizer in ("optimizer", "discriminator_optimizer"):
        steps = [value for key, value in tensors.items() if key.startswith(f"{optimizer}/") and key.endswith(".step")]
        assert steps and all(step == 3 for step in steps)


@pytest.fixture
def recipe():
    from importlib.util import module_from_spec, spec_from_file_location
    from pathlib import Path

    spec = spec_from_file_location("recipe_train_dae", Path(__file__).parents[2] / "recipes" / "train_dae.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_trained_by_the_recipe_and_saved(recipe, tmp_path, capsys):
    """Both stages, under accelerate: the optimisers' steps in the checkpoints, and the weights in the folders."""
    from tiny_training import TINY

    from dae.config import load_config

    losses = [
        f"{stage}.loss.{option}" for stage in ("stage1", "stage2") for option in ("adversarial=0.1", "discriminator_channels=8")
    ]
    lengths = ["stage1.max_train_steps=4", "stage2.max_train_steps=3", "checkpointing_steps=10"]
    options = [*losses, *lengths, "save_discriminator=true", f"output_dir={tmp_path}"]
    folder = recipe.train(load_config(TINY, options))
    for place, checkpoint, steps in ((folder / "stage1", "checkpoint-4", 4), (folder, "checkpoint-7", 3)):
        state = load_file(folder / checkpoint / "discriminator_optimizer.safetensors")
        assert {int(value) for key, value in state.items() if key.endswith(".step")} == {steps}
        saved, last = (
            load_file(place / "discriminator" / "model.safetensors"),
            load_file(folder / checkpoint / "discriminator.safetensors"),
        )
        assert saved.keys() == last.keys() and all(torch.equal(saved[key], last[key]) for key in saved)
        assert PatchDiscriminator.from_pretrained(place / "discriminator")(torch.zeros(1, 1, 8, 8)).shape[:2] == (1, 1)
    shown = capsys.readouterr().out
    assert "saved" in shown and load_file(folder / "model.safetensors")
