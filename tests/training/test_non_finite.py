"""Where a loss stopped being finite is named: step, module, rows of the batch."""

import json

import pytest
import torch
from tiny_training import GAN, autoencoder_training, prior_training

from dae.training.autoencoder import train_stage
from dae.training.prior import train_by_steps
from dae.training.run import Run

TOKENS = torch.arange(40 * 2 * 16).view(40, 2, 16) % 16


def stopped(training, run=None, start=0):
    """The message with which it stops; rows of the history that warn."""
    torch.manual_seed(0)
    if run is not None:
        run.open(None)
    with pytest.raises(FloatingPointError) as caught:
        if training.name == "prior":
            train_by_steps(training, None, run=run)
        else:
            train_stage(training, None, run, 0, start)
    assert "\n" not in str(caught.value) and f"lower {training.name}.learning_rate" in str(caught.value)
    warned = [] if run is None else [row for row in run.history() if row["split"] == "warning"]
    assert json.dumps(warned).count('"non_finite"') == (run is not None)
    return str(caught.value)


def poison(training, number, change):
    """Before step `number`, counted from 0."""
    step = training.step

    def poisoned(now):
        if now == number:
            change(training)
        return step(now)

    training.step = poisoned


def overflowing(module, rows, number):
    """The module's output at its call `number`, and where it is computed again, is infinite in some rows: as if it overflowed."""

    calls = []

    def hook(module, args, output):
        calls.append(1)
        if module.training and (len(calls) > number):
            output = output.clone()
            output[rows] = torch.inf
            return output

    module.register_forward_hook(hook)


@pytest.mark.parametrize("back", [0, 2])
def test_rows_of_the_data(tmp_path, back):
    """Also where the log is written some steps after the batch with the NaN."""
    training = autoencoder_training("logging_steps=3", f"output_dir={tmp_path}")
    order = training.state.loader._order
    *earlier, batch = (rows for rows, _ in zip(order._row_numbers(0), range(3 - back), strict=False))
    place = next(place for place, row in enumerate(batch) if not any(row in rows for rows in earlier))
    order.dataset[batch[place]]["image"][:] = torch.nan
    message = stopped(training, Run(training.config, "autoencoder"))
    assert message.startswith(
        f"stage1: the loss is nan at step 3. It first was not finite at step {3 - back}. The batch itself holds"
    )
    assert f"in row {place} of 16: look at the data" in message


def test_a_module_that_overflows_in_some_rows(tmp_path):
    """The update has broken the weights: those of the checkpoint show where it began."""
    training = autoencoder_training(
        "checkpointing_steps=2", "logging_steps=1", f"output_dir={tmp_path}", "autoencoder.num_blocks=1"
    )
    training.config.checkpointing_steps = 2
    overflowing(training.autoencoder.encoder.conv_in, [2, 5], number=5)
    message = stopped(training, Run(training.config, "autoencoder"))
    assert "checkpoint-" in message and "it arises in model.encoder.conv_in (Conv2d), in rows 2, 5 of the batch's 16." in message


def test_without_a_checkpoint_it_says_what_it_knows():
    training = autoencoder_training("logging_steps=1")
    overflowing(training.autoencoder.encoder.conv_in, [2, 5], number=3)
    message = stopped(training)
    assert "tensors are not finite, such as model." in message and "there is no checkpoint" in message


def test_weights_that_stayed_whole():
    """As under fp16, where a step whose gradients overflow is left out."""
    training = autoencoder_training("logging_steps=1")
    training.engine.step = lambda optimizers: [optimizer.zero_grad() for optimizer in optimizers]
    training.update_codebook = lambda: training.autoencoder.bottleneck.__dict__.update(_counts=None, _sums=None, _latest=None)
    overflowing(training.autoencoder.decoder.conv_out, [0], number=2)
    message = stopped(training)
    assert "Computed again with its weights, it arises in model.decoder.conv_out (Conv2d), in row 0 of the batch's 16." in message


def test_a_loss_whose_modules_are_finite(monkeypatch):
    training = autoencoder_training("logging_steps=1")
    training.engine.step = lambda optimizers: [optimizer.zero_grad() for optimizer in optimizers]
    training.update_codebook = lambda: training.autoencoder.bottleneck.__dict__.update(_counts=None, _sums=None, _latest=None)
    from dae.losses import reconstruction_loss

    monkeypatch.setattr("dae.training.autoencoder.reconstruction_loss", lambda *args: reconstruction_loss(*args) / 0)
    assert "every module's output is finite: the loss itself is not" in stopped(training)


def test_weights_that_diverged(tmp_path):
    """The step is finite with the weights of the checkpoint."""
    training = autoencoder_training("logging_steps=1", f"output_dir={tmp_path}")
    training.config.checkpointing_steps = 1

    def explode(training):
        with torch.no_grad():
            training.autoencoder.decoder.conv_out.weight.fill_(torch.inf)

    poison(training, 4, explode)
    message = stopped(training, Run(training.config, "autoencoder"))
    assert "with the weights of checkpoint-4, the step is finite: the weights diverged after that" in message


@pytest.mark.parametrize("accumulation", [1, 3])
def test_a_prior(accumulation, tmp_path):
    training = prior_training(
        "logging_steps=2", f"prior.gradient_accumulation_steps={accumulation}", f"output_dir={tmp_path}", values=TOKENS
    )
    training.config.checkpointing_steps = 1
    overflowing(training.prior.blocks[0], [1], number=3 * accumulation)
    message = stopped(training, Run(training.config, "prior"))
    assert "at step 4. It first was not finite at step 4" in message
    assert "it arises in model.blocks.0 " in message and "in row 1 of the batch's 16" in message


def test_it_changes_nothing_that_it_looks_at(tmp_path):
    training = autoencoder_training(*GAN, "logging_steps=1", "stage2.loss.lecam=0.1", which=1)
    for number in range(2):
        training.step(number)
    from dae.training.non_finite import _replay

    before = {k: v.clone() for m in training.state.modules.values() for k, v in m.state_dict().items()}
    position, gradients = training.state.loader.state_dict(), [p.grad for p in training.parameters]
    assert "the step is finite" in _replay(training, 1, 0, 0, None) and "the step is finite" in _replay(training, 0, 0, 1, None)
    after = {k: v for m in training.state.modules.values() for k, v in m.state_dict().items()}
    assert all(torch.equal(after[k], v) for k, v in before.items())
    assert training.state.loader.state_dict() == position and [p.grad for p in training.parameters] == gradients == [None] * len(
        gradients
    )
