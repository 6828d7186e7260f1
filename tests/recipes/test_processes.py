"""Two processes are one: the same losses, codebooks, tokens and logs; and they refuse to train apart."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from dae.training import make_accelerator

DRIVER = Path(__file__).with_name("two_processes.py")
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
STAGES = ("stage1", "stage2", "prior")
# Every source of randomness there is: order, mirror, affine maps, channel masks, revived codes, copies, noise, hidden classes.
DRAWING = (
    "auxiliary_decoder.family=dropout", "auxiliary_decoder.dropout=0.3", "autoencoder.vq.revive_threshold=0.5",
    "data.random_flip=true", "data.random_affine=0.5", "prior.num_augmentations=2", "prior.code_temperature=0.5",
    "prior.dropout=0.2", "prior.token_noise=0.2", "prior.class_dropout=0.3",
    "stage1.max_train_steps=24", "stage2.max_train_steps=24", "prior.max_train_steps=24",
    "validation_steps=12", "checkpointing_steps=12",
)  # fmt: skip


def batch(size):
    return [f"{stage}.train_batch_size={size}" for stage in STAGES]


@pytest.fixture
def two(tmp_path, tiny):
    """`two([recipe, overrides], ...)`: the recipes in two processes of one launch."""

    def launch(*jobs):
        file = tmp_path / "jobs.json"
        file.write_text(json.dumps([[name, *tiny[1:], overrides] for name, overrides in jobs]))
        done = subprocess.run([*TORCHRUN, str(DRIVER), str(file)], capture_output=True, text=True, cwd=DRIVER.parents[2])
        assert done.returncode == 0, done.stderr[-3000:]
        return done

    return launch


@pytest.mark.slow
def test_two_processes_are_one(tmp_path, run, two, history, same_log, assert_frozen):
    """Stage 1, stage 2, token cache and prior: half the batch in each of two processes gives the same losses.

    fp32 sums in another order: 1e-4 is what they may grow to in 24 steps; a mask drawn otherwise is off by 1e-2 at once.
    The prior of both is trained on the tokens of one, for one token that lies between two codes changes all later losses.
    """
    for name in ("train_dae", "encode", "train_prior"):
        run(name, tmp_path / "one", *DRAWING, *batch(16))
    shared = tmp_path / "shared"
    shared.mkdir()
    for part in ("autoencoder", "tokens"):
        (shared / part).symlink_to(tmp_path / "one" / part)
    encoded = tmp_path / "encoded"
    encoded.mkdir()
    (encoded / "autoencoder").symlink_to(tmp_path / "one" / "autoencoder")
    done = two(
        ("train_dae", [*DRAWING, *batch(8), f"output_dir={tmp_path / 'two'}"]),
        ("train_prior", [*DRAWING, *batch(8), f"output_dir={shared}"]),
        ("encode", [*DRAWING, *batch(8), f"output_dir={encoded}"]),
    )
    for a, b in (("one/autoencoder", "two/autoencoder"), ("one/prior", "shared/prior")):
        same_log(history(tmp_path / a), history(tmp_path / b), validation=1e-2)
    assert (tmp_path / "one" / "tokens" / "cache.json").read_text() == (encoded / "tokens" / "cache.json").read_text()
    one, other = (load_file(folder / "tokens" / "tokens.safetensors") for folder in (tmp_path / "one", encoded))
    assert one["train.tokens"].shape == (1437, 3, 16)
    assert one.keys() == other.keys() and all(torch.equal(value, other[key]) for key, value in one.items())
    assert done.stdout.count("saved ") == 3, "one process writes and speaks"
    assert_frozen(tmp_path / "two" / "autoencoder", steps=(36, 48))


@pytest.mark.slow
def test_two_processes_are_one_over_a_continuous_latent(tmp_path, run, two, history, same_log):
    """Posteriors in the cache, samples of them, times and noise of the flow: tolerance as above, in 8 steps."""
    kl = ("autoencoder.bottleneck=kl", "prior.num_augmentations=1", "data.random_flip=true", "prior.dropout=0.2")
    kl += ("stage1.max_train_steps=4", "stage2.max_train_steps=2", "prior.max_train_steps=8")
    for name in ("train_dae", "encode", "train_prior"):
        run(name, tmp_path / "one", *kl, *batch(16))
    for folder in ("encoded", "trained"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "autoencoder").symlink_to(tmp_path / "one" / "autoencoder")
    (tmp_path / "trained" / "latents").symlink_to(tmp_path / "one" / "latents")
    two(
        ("encode", [*kl, *batch(8), f"output_dir={tmp_path / 'encoded'}"]),
        ("train_prior", [*kl, *batch(8), f"output_dir={tmp_path / 'trained'}"]),
    )
    one, other = (load_file(tmp_path / folder / "latents" / "moments.safetensors") for folder in ("one", "encoded"))
    assert one.keys() == other.keys() and all(torch.equal(value, other[key]) for key, value in one.items())
    rows, others = ([row for row in history(tmp_path / f / "prior") if row["split"] != "delivered"] for f in ("one", "trained"))
    same_log(rows, others)


@pytest.mark.slow
def test_resumed_by_another_number_of_processes(tmp_path, run, two, history, same_log):
    """One process stops in the middle of a window of the log; two finish, and adversarial training of stage 2 with them."""
    options = [
        "stage1.max_train_steps=6", "stage2.max_train_steps=6", "stage2.loss.adversarial=0.1",
        "stage2.loss.discriminator_channels=8", "logging_steps=3", f"output_dir={tmp_path / 'moved'}",
    ]  # fmt: skip
    run("train_dae", tmp_path / "whole", *options[:-1], *batch(16))
    run("train_dae", tmp_path / "moved", *options[:-1], *batch(16))
    folder = tmp_path / "moved" / "autoencoder"
    for stale in (folder / "model.safetensors", folder / "checkpoint-12", folder / "checkpoint-8"):
        stale.rename(tmp_path / stale.name)
    two(("train_dae", [*options, *batch(8), "resume_from_checkpoint=latest"]))
    same_log(history(tmp_path / "whole" / "autoencoder"), history(folder), train=1e-3, validation=1e-2)


def test_processes_that_would_train_apart_are_refused(tmp_path, configure, monkeypatch):
    make_accelerator(configure(tmp_path))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RuntimeError, match="2 processes were started, accelerate sees 1: launch with torchrun"):
        make_accelerator(configure(tmp_path))


def test_recipes_that_write_one_file_refuse_several_processes(tmp_path, configure, recipe, monkeypatch):
    monkeypatch.setattr(
        "dae.training.accelerator.make_accelerator", lambda config: SimpleNamespace(num_processes=2, device="cpu")
    )
    for name in ("sample", "evaluate"):
        with pytest.raises(ValueError, match="runs in one process, 2 were launched: start it with `python`"):
            getattr(recipe(name), name)(configure(tmp_path))


@pytest.mark.slow
def test_accelerate_launch_as_the_docstring_says(tmp_path, script, recipe):
    assert "accelerate launch recipes/train_dae.py --config recipes/configs/digits.yaml" in recipe("train_dae").__doc__
    launcher = (sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch")
    options = ["stage1.max_train_steps=2", "stage2.max_train_steps=2", f"output_dir={tmp_path / 'run'}"]
    done = script("train_dae", "--config", "recipes/configs/digits.yaml", *options, launcher=launcher)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "run" / "autoencoder" / "model.safetensors").is_file()
