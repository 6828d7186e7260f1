"""Variants of the two stages: a decoder that is kept, a codebook that goes on learning; and what resumes of weak decoders."""

import copy
import functools
import json

import pytest
import torch
from tiny_training import CPU, GAN, TINY, Replicated, autoencoder_training, weights

import dae.training.autoencoder as autoencoder_module
from dae.config import load_config
from dae.training import plan_stages
from dae.training.checkpoint import Checkpoint
from dae.training.in_memory import train_autoencoder

IMAGES = torch.rand(40, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
SHORT = ("stage1.max_train_steps=3", "stage2.max_train_steps=3")


@pytest.fixture
def switch(monkeypatch):
    """Weights of the autoencoder before each stage; `.run(overrides)` trains both and returns the final autoencoder."""
    starts, train = [], autoencoder_module.train_stage

    def record(training, *arguments):
        starts.append(copy.deepcopy(training.autoencoder))
        train(training, *arguments)

    monkeypatch.setattr(autoencoder_module, "train_stage", record)

    def run(*overrides):
        starts.clear()
        final = train_autoencoder(IMAGES, load_config(TINY, [*SHORT, *overrides]))
        return starts[1], final

    return run


def differing(a, b):
    theirs = b.state_dict()
    return {name.split(".")[0] for name, value in a.state_dict().items() if not torch.equal(value, theirs[name])}


def test_the_kept_decoder_goes_on_without_dropout(switch, monkeypatch):
    weak = ("auxiliary_decoder.family=dropout", "auxiliary_decoder.latent_noise=0.1", "auxiliary_decoder.keep=true")
    still = ("stage2.learning_rate=0", "stage2.use_ema=false")
    start, final = switch(*weak, *still)
    assert final.config.decoder.family == "full" and final.config.decoder.latent_noise == 0
    assert not differing(start, final)  # nothing was learned, so these are the weights of stage 1 ...
    again, _ = switch(*weak)
    fresh, _ = switch(*weak[:2])
    assert not differing(start, again) and differing(start, fresh) == {"decoder"}  # ... and not those of a new decoder
    z = torch.randn(2, 4, 4, 4)
    assert torch.equal(start.train().decoder(z), start.decoder(z))  # no dropout, no noise
    moved, final = switch(*weak)
    assert differing(moved, final) == {"decoder"}


def test_only_the_same_network_can_be_kept():
    for family, real in (("narrow", "full"), ("linear", "full"), ("full", "narrow"), ("shallow", "shallow")):
        chosen = [f"auxiliary_decoder.family={family}", f"autoencoder.decoder.family={real}", "auxiliary_decoder.keep=true"]
        with pytest.raises(ValueError, match=f"keep=true: .*family={family} and .*family={real} are not the same network"):
            plan_stages(load_config(None, chosen))


@pytest.mark.parametrize("bottleneck", ["vq", "vq_gradient", "simvq", "rvq", "gvq"])
def test_a_trainable_codebook_learns_and_the_encoder_stays(switch, bottleneck):
    start, final = switch(f"autoencoder.bottleneck={bottleneck}", "stage2.codebook=trainable")
    assert differing(start, final) == {"bottleneck", "decoder"}
    assert all(not p.requires_grad for p in final.encoder.parameters())
    start, final = switch(f"autoencoder.bottleneck={bottleneck}")
    assert differing(start, final) == {"decoder"}  # the default


def test_it_is_not_started_anew(switch, monkeypatch):
    calls, initialize = [], autoencoder_module.initialize_codebook
    monkeypatch.setattr(autoencoder_module, "initialize_codebook", lambda *arguments: (calls.append(1), initialize(*arguments)))
    switch("stage2.codebook=trainable")
    assert len(calls) == 1


@pytest.mark.parametrize("bottleneck", ["kl", "fsq", "lfq", "bsq"])
@pytest.mark.parametrize("method", ["dae", "joint_finetuned"])
def test_without_codebook_there_is_none_to_train(bottleneck, method):
    chosen = [f"method={method}", f"autoencoder.bottleneck={bottleneck}", "stage2.codebook=trainable"]
    known = "vq, vq_gradient, simvq, rvq, gvq"
    with pytest.raises(ValueError, match=f"codebook=trainable: autoencoder.bottleneck={bottleneck} learns no codebook.*{known}$"):
        plan_stages(load_config(None, chosen))
    plan_stages(load_config(None, [*chosen, "method=joint"]))  # which has no second stage


WEAK = {
    "overlap": (0, "auxiliary_decoder.family=overlap", "auxiliary_decoder.latent_noise=0.3"),
    "projection": (0, "auxiliary_decoder.family=projection", "auxiliary_decoder.latent_mask=0.3"),
    "projection, accumulated": (0, "auxiliary_decoder.family=projection", "stage1.gradient_accumulation_steps=2"),
    "codebook": (1, "stage2.codebook=trainable", *GAN),
    "codebook, gradients": (1, "stage2.codebook=trainable", "autoencoder.bottleneck=vq_gradient"),
}


@pytest.mark.parametrize("name", WEAK)
def test_resuming_is_exact(name, tmp_path):
    which, *overrides = WEAK[name]
    whole, first, second = (autoencoder_training(*overrides, which=which) for _ in range(3))
    for step in range(4):
        whole.step(step)
    for step in range(2):
        first.step(step)
    tensors, state = first.state.pack()
    copies = {file: {key: value.clone() for key, value in part.items()} for file, part in tensors.items()}
    with torch.no_grad():
        for parameter in second.autoencoder.parameters():
            parameter += 1
    assert second.state.restore(Checkpoint(tmp_path, copies, json.loads(json.dumps(state)) | {"stage_step": 2})) == 2
    for step in range(2, 4):
        second.step(step)
    (expected, state), (found, other) = weights(whole), weights(second)
    assert expected.keys() == found.keys() and json.dumps(state) == json.dumps(other)
    assert all(torch.equal(value, found[key]) for key, value in expected.items())


@pytest.mark.parametrize("family, compiled", [("projection", False), ("overlap", False), ("projection", True)])
def test_two_processes_train_as_one(in_processes, monkeypatch, family, compiled):
    """Normal equations and moments are of the global batch, under DistributedDataParallel and with its gradients summed."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    weak = f"auxiliary_decoder.family={family}", "data.random_flip=false", f"compile={str(compiled).lower()}"
    drawn = ("auxiliary_decoder.latent_noise=0.2", "auxiliary_decoder.latent_mask=0.2")

    def run(batch, engine=None):
        training = autoencoder_training(*weak, *drawn, f"stage1.train_batch_size={batch}", engine=engine)
        for step in range(2):
            training.step(step)
        return weights(training)[0]

    two = in_processes(2, lambda rank: run(8, Replicated(CPU)))
    assert all(torch.equal(value, two[1][key]) for key, value in two[0].items() if key.startswith("model/"))
    one = two[0] if compiled else run(16)  # compiled code draws other numbers, but the same in all processes
    for key in ("model/encoder.conv_out.weight", "model/bottleneck.codebook", "model/decoder.weight", "model/decoder.bias"):
        # Sums of float32 in another order, 1e-6, which AdamW raises where gradients are small.
        torch.testing.assert_close(two[0][key], one[key], rtol=1e-3, atol=1e-4)


def test_the_projection_learns_its_encoder():
    """Its loss falls although no decoder is trained, and validation's decoder is the average of solutions."""
    training = autoencoder_training("auxiliary_decoder.family=projection", "stage1.max_train_steps=60", "data.random_flip=false")
    for step in range(60):
        training.step(step)
    losses = torch.stack(training.state.losses)
    assert losses[-10:].mean() < 0.97 * losses[:10].mean()
    with training.averaged():
        averaged = training.autoencoder.decoder.weight.clone()
    assert averaged.abs().sum() > 0 and not torch.equal(averaged, training.autoencoder.decoder.weight)
