"""fp16's loss scales, one for each optimiser: exact, independent of each other, and resumed."""

import json

import pytest
import torch
from accelerate import Accelerator
from tiny_training import ScalingEngine, autoencoder_training, weights

from dae.training.checkpoint import Checkpoint
from dae.training.engine import AcceleratorEngine

GAN = ("stage1.loss.adversarial=1.0", "stage1.loss.discriminator_channels=8")


def accelerated():
    accelerator = Accelerator(cpu=True)
    accelerator.scaler = torch.amp.GradScaler("cpu")  # as with fp16 on a GPU
    return AcceleratorEngine(accelerator)


@pytest.mark.parametrize("engine", [ScalingEngine, accelerated])
def test_scales_are_divided_out_to_the_bit(engine):
    """In float32 powers of two are multiplied and divided without rounding; clipping and accumulation see true gradients."""
    options = (*GAN, "stage1.gradient_accumulation_steps=2", "stage1.max_grad_norm=0.1")
    plain, scaled = (autoencoder_training(*options, engine=given) for given in (None, engine()))
    for training in (plain, scaled):
        for number in range(4):
            training.step(number)
    (expected, _), (found, state) = weights(plain), weights(scaled)
    assert expected.keys() == found.keys() and all(torch.equal(value, found[key]) for key, value in expected.items())
    assert state["scalers"].keys() == {"optimizer", "discriminator_optimizer"}


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")  # a step that is left out is none to torch
@pytest.mark.parametrize("engine", [ScalingEngine, accelerated])
@pytest.mark.parametrize("overflowing", ["optimizer", "discriminator_optimizer"])
def test_an_overflow_costs_its_own_optimizer_a_step(engine, overflowing):
    plain, training = autoencoder_training(*GAN), autoencoder_training(*GAN, engine=engine())
    plain.step(0)
    before, state = weights(training)[0], training.state
    scalers = {name: state.scalers[optimizer] for name, optimizer in state.optimizers.items()}
    other = next(name for name in scalers if name != overflowing)
    first = scalers[other].get_scale()
    scalers[overflowing].load_state_dict(scalers[overflowing].state_dict() | {"scale": 2.0**127})
    training.step(0)
    after, expected = weights(training)[0], weights(plain)[0]
    assert scalers[overflowing].get_scale() == 2.0**126 and scalers[other].get_scale() == first

    def belongs(key, optimizer):
        return key.startswith("discriminator/" if optimizer == "discriminator_optimizer" else ("model/encoder", "model/decoder"))

    for key, value in after.items():
        if belongs(key, overflowing):
            assert torch.equal(value, before[key])
        elif belongs(key, other):
            assert torch.equal(value, expected[key])
    assert any(not torch.equal(value, before[key]) for key, value in after.items() if belongs(key, other))


def test_resuming_fp16_is_exact(tmp_path):
    """Both scales grow within the steps before and after, at different steps."""
    whole, first, second = (autoencoder_training(*GAN, engine=ScalingEngine(torch.float16, growth_interval=3)) for _ in range(3))
    for training in (whole, first):
        scaler = training.state.scalers[training.state.optimizers["optimizer"]]
        scaler.load_state_dict(scaler.state_dict() | {"scale": 2.0**9, "_growth_tracker": 1})
    for number in range(4):
        whole.step(number)
    for number in range(2):
        first.step(number)
    tensors, state = first.state.pack()
    copies = {file: {key: value.clone() for key, value in part.items()} for file, part in tensors.items()}
    second.state.restore(Checkpoint(tmp_path, copies, json.loads(json.dumps(state)) | {"stage_step": 2}))
    for number in range(2, 4):
        second.step(number)
    (expected, state), (found, other) = weights(whole), weights(second)
    assert json.dumps(state) == json.dumps(other) and all(torch.equal(value, found[key]) for key, value in expected.items())
    assert [scaler["scale"] for scaler in state["scalers"].values()] == [2.0**10, 2.0**11]


def test_checkpoints_of_one_scale(tmp_path):
    """Those of earlier versions, which trained one optimiser in fp16."""
    training = autoencoder_training(engine=ScalingEngine(torch.float16))
    tensors, state = training.state.pack()
    scale = state.pop("scalers")["optimizer"] | {"scale": 8.0}
    training.state.restore(Checkpoint(tmp_path, tensors, state | {"scaler": scale, "stage_step": 0}))
    assert [scaler.get_scale() for scaler in training.state.scalers.values()] == [8.0]
