"""A run that goes on: with more steps than it was planned with, on new data from given weights."""

import math
import shutil

import pytest
from safetensors.torch import load_file

LATEST = "resume_from_checkpoint=latest"
CONSTANT = ["prior.early_stopping=false", *(f"{part}.lr_scheduler=constant" for part in ("stage1", "stage2", "prior"))]


def same_tensors(a, b):
    a, b = load_file(a / "model.safetensors"), load_file(b / "model.safetensors")
    return a.keys() == b.keys() and all(a[name].equal(b[name]) for name in a)


@pytest.fixture
def copied(tmp_path):
    """`copied(folder)`: a copy of a run to go on with; of None, a folder for a new one."""
    numbers = iter(range(100))

    def make(folder):
        target = tmp_path / str(next(numbers))
        return target if folder is None else shutil.copytree(folder, target)

    return make


@pytest.fixture(scope="module")
def finished(made_once):
    """Stages of 10 and 6 steps and a prior of 12, all at a constant rate."""
    return made_once("finished", ("train_dae", "encode", "train_prior"), *CONSTANT)


def test_more_steps_of_the_last_stage(finished, copied, run):
    folder = copied(finished)
    run("train_dae", folder, *CONSTANT, LATEST, "stage2.max_train_steps=9")
    run("train_dae", planned := copied(None), *CONSTANT, "stage2.max_train_steps=9")
    assert same_tensors(folder / "autoencoder", planned / "autoencoder")
    assert not same_tensors(folder / "autoencoder", finished / "autoencoder")


def test_more_steps_of_the_prior(finished, copied, run):
    folder, planned = copied(finished), copied(finished)
    run("train_prior", folder, *CONSTANT, LATEST, "prior.max_train_steps=15")
    (planned / "prior").rename(planned / "old")
    run("train_prior", planned, *CONSTANT, "prior.max_train_steps=15")
    assert same_tensors(folder / "prior", planned / "prior")


def test_the_schedule_is_that_of_the_new_length(chain, copied, run, history):
    """Half a cosine over 9 steps after a warm-up of 3, from the step on at which it went on."""
    folder = copied(chain)
    run("train_dae", folder, LATEST, "stage2.max_train_steps=9")
    rates = {row["step"]: row["lr"] for row in history(folder / "autoencoder") if row["split"] == "train"}
    after = {10 + step: 0.5 * (1 + math.cos(math.pi * (step - 3) / 6)) * 3e-3 for step in (7, 8, 9)}
    assert {step: rates[step] for step in after} == pytest.approx(after, abs=1e-12)
    assert rates[16] == 0.0  # where the run first ended


def test_stage_1_may_grow_while_it_trains(copied, run, kill, history):
    from_stage1 = copied(None)
    kill(before_update=9)
    with pytest.raises(kill.Killed):
        run("train_dae", from_stage1, *CONSTANT)
    run("train_dae", from_stage1, *CONSTANT, LATEST, "stage1.max_train_steps=11", "stage2.max_train_steps=7")
    run("train_dae", planned := copied(None), *CONSTANT, "stage1.max_train_steps=11", "stage2.max_train_steps=7")
    assert same_tensors(from_stage1 / "autoencoder", planned / "autoencoder")
    assert [r["step"] for r in history(from_stage1 / "autoencoder") if r["split"] == "train"] == list(range(1, 19))


@pytest.mark.parametrize(
    ("recipe", "override", "message"),
    [
        ("train_dae", "stage2.max_train_steps=5", "stands at step 6 of stage2, stage2.max_train_steps now ends it at 5"),
        ("train_dae", "stage1.max_train_steps=12", "stage1.max_train_steps: 10 -> 12"),
        ("train_prior", "prior.max_train_steps=11", "stands at step 12 of prior, prior.max_train_steps now ends it at 11"),
    ],
)
def test_what_is_over_cannot_change(finished, copied, run, contents, recipe, override, message):
    folder = copied(finished)
    before = contents(folder)
    with pytest.raises(ValueError, match=message):
        run(recipe, folder, *CONSTANT, LATEST, override)
    assert contents(folder) == before
