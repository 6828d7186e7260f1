"""A run that is stopped anywhere and resumed ends bit by bit as if nothing had happened; what cannot be resumed is refused."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

# Everything that has a state or draws numbers. Epochs of 4 micro-steps; checkpoints, validations and the log out of step.
STEPS = (
    "data.max_train_samples=64", "checkpointing_steps=3", "validation_steps=5", "logging_steps=4",
    "auxiliary_decoder.family=dropout", "data.random_flip=true", "data.random_affine=0.5",
    "stage1.gradient_accumulation_steps=2", "autoencoder.vq.revive_threshold=0.5",
    "stage2.loss.adversarial=0.1", "stage2.loss.adversarial_start=2", "stage2.loss.discriminator_channels=8",
    "prior.num_augmentations=2", "prior.dropout=0.2", "prior.token_noise=0.2",
)  # fmt: skip
LATEST = "resume_from_checkpoint=latest"


@pytest.fixture(scope="module")
def whole(made_once):
    """The run that nothing interrupts."""
    return made_once("whole", ("train_dae", "encode", "train_prior"), *STEPS)


@pytest.fixture
def assert_same_run(history):
    def compare(folder, other):
        assert history(folder) == history(other)
        tensors = sorted(str(p.relative_to(folder)) for p in folder.rglob("*.safetensors"))
        assert tensors == sorted(str(p.relative_to(other)) for p in other.rglob("*.safetensors")) and len(tensors) > 4
        for name in tensors:
            a, b = load_file(folder / name), load_file(other / name)
            assert a.keys() == b.keys() and [key for key, value in a.items() if not torch.equal(value, b[key])] == [], name

    return compare


def with_tokens(whole, folder):
    """A folder in which the prior can be trained."""
    for part in ("autoencoder", "tokens"):
        shutil.copytree(whole / part, folder / part)
    return folder


# Updates of stage 1: 1 to 10; of stage 2: two a step (decoder, discriminator), 11 to 22.
# Checkpoints follow the steps 3, 6, 9, 10, 12, 15 and 16.
@pytest.mark.parametrize(
    "kills",
    [
        [{"before_update": 1}],  # there is no checkpoint yet: start over
        [{"before_update": 7}],  # from checkpoint 6, in the middle of the third epoch and of a window of the log
        [{"saving": "stage1"}],  # checkpoint 10 is there, the model at the switch is not
        [{"before_update": 11}],  # after the switch, from its last checkpoint of stage 1
        [{"before_update": 18}],  # stage 2, after the adversarial loss has started
        [{"saving": "autoencoder"}],  # all is trained, the model is not saved
        [{"before_update": 8}, {"before_update": 2}, {"before_update": 5}],  # again and again
    ],
    ids=lambda kills: "-".join(str(v) for k in kills for v in k.values()),
)  # fmt: skip
def test_autoencoder(whole, tmp_path, run, kill, assert_same_run, kills):
    for number, where in enumerate(kills):
        kill(**where)
        with pytest.raises(kill.Killed):
            run("train_dae", tmp_path, *STEPS, *([LATEST] if number else []))
    run("train_dae", tmp_path, *STEPS, LATEST)
    assert_same_run(whole / "autoencoder", tmp_path / "autoencoder")


@pytest.mark.parametrize("kills", [[{"before_update": 8}], [{"saving": "prior"}], [{"before_update": 5}, {"before_update": 4}]])
def test_prior(whole, tmp_path, run, kill, assert_same_run, kills):
    with_tokens(whole, tmp_path)
    for number, where in enumerate(kills):
        kill(**where)
        with pytest.raises(kill.Killed):
            run("train_prior", tmp_path, *STEPS, *([LATEST] if number else []))
    run("train_prior", tmp_path, *STEPS, LATEST)
    assert_same_run(whole / "prior", tmp_path / "prior")


@pytest.fixture(scope="module")
def whole_kl(made_once):
    """The same over a continuous latent."""
    return made_once("whole_kl", ("train_dae", "encode", "train_prior"), *STEPS, "autoencoder.bottleneck=kl")


@pytest.mark.parametrize("kills", [[{"before_update": 8}, {"before_update": 3}], [{"saving": "prior"}]])
def test_diffusion_transformer(whole_kl, tmp_path, run, kill, assert_same_run, kills):
    """Posterior samples, times and noise are drawn again as they were, and the bits at the end are the same."""
    for part in ("autoencoder", "latents"):
        shutil.copytree(whole_kl / part, tmp_path / part)
    for number, where in enumerate(kills):
        kill(**where)
        with pytest.raises(kill.Killed):
            run("train_prior", tmp_path, *STEPS, "autoencoder.bottleneck=kl", *([LATEST] if number else []))
    run("train_prior", tmp_path, *STEPS, "autoencoder.bottleneck=kl", LATEST)
    assert_same_run(whole_kl / "prior", tmp_path / "prior")


@pytest.mark.slow
def test_sigkill_at_any_moment(whole, tmp_path, run, tiny, assert_same_run):
    """A process that is killed from outside as soon as its second checkpoint exists."""
    script = Path(__file__).parents[2] / "recipes" / "train_dae.py"
    arguments = [*tiny, *STEPS, f"output_dir={tmp_path}"]
    process = subprocess.Popen(
        [sys.executable, script, *arguments], env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE
    )
    while not (tmp_path / "autoencoder" / "checkpoint-6").exists():
        assert process.poll() is None, process.stderr.read().decode()[-2000:]
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stderr.close()
    run("train_dae", tmp_path, *STEPS, LATEST)
    assert_same_run(whole / "autoencoder", tmp_path / "autoencoder")
    assert not list(tmp_path.rglob(".*"))


def test_stream(tmp_path, run, kill, image_folder, assert_same_run):
    options = (
        f"data.dataset_name={image_folder}", "data.streaming=true", "data.shuffle_buffer_size=20", "data.channels=3",
        "checkpointing_steps=3",
    )  # fmt: skip
    run("train_dae", tmp_path / "whole", *options)
    kill(before_update=8)
    with pytest.raises(kill.Killed):
        run("train_dae", tmp_path / "killed", *options)
    run("train_dae", tmp_path / "killed", *options, LATEST)
    assert_same_run(tmp_path / "whole" / "autoencoder", tmp_path / "killed" / "autoencoder")


def damage(checkpoint, how):
    file = checkpoint / "model.safetensors"
    if how == "flipped":
        data = bytearray(file.read_bytes())
        data[-5] ^= 1
        file.write_bytes(data)
    elif how == "cut":
        file.write_bytes(file.read_bytes()[:100])
    elif how == "lost":
        file.unlink()
    else:
        (checkpoint / "manifest.json").unlink()


@pytest.mark.parametrize("how", ["flipped", "cut", "lost", "no manifest"])
def test_damaged_checkpoint(whole, tmp_path, run, kill, assert_same_run, caplog, how):
    kill(before_update=8)
    with pytest.raises(kill.Killed):
        run("train_dae", tmp_path, *STEPS)
    damage(tmp_path / "autoencoder" / "checkpoint-6", how)
    run("train_dae", tmp_path, *STEPS, LATEST)
    assert "checkpoint-6" in caplog.text and "trying the one before" in caplog.text
    assert_same_run(whole / "autoencoder", tmp_path / "autoencoder")


def test_all_checkpoints_damaged(whole, tmp_path, run, contents):
    """Training does not silently start over."""
    shutil.copytree(whole / "autoencoder", tmp_path / "autoencoder")
    for checkpoint in (tmp_path / "autoencoder").glob("checkpoint-*"):
        damage(checkpoint, "cut")
    before = contents(tmp_path)
    with pytest.raises(ValueError, match="no checkpoint can be read"):
        run("train_dae", tmp_path, *STEPS, LATEST)
    assert contents(tmp_path) == before


def test_back_to_an_older_checkpoint(whole, tmp_path, run, kill, assert_same_run):
    """What was written after it is an abandoned future: it goes when the new run saves, and `latest` does not return there."""
    shutil.copytree(whole / "autoencoder", tmp_path / "autoencoder")
    kill(before_update=5)
    with pytest.raises(kill.Killed):
        run("train_dae", tmp_path, *STEPS, f"resume_from_checkpoint={tmp_path / 'autoencoder' / 'checkpoint-6'}")
    left = sorted(int(p.name.split("-")[1]) for p in (tmp_path / "autoencoder").glob("checkpoint-*"))
    assert left == [3, 6, 9, 10]
    run("train_dae", tmp_path, *STEPS, LATEST)
    assert_same_run(whole / "autoencoder", tmp_path / "autoencoder")


def test_half_a_line_of_the_log(whole, tmp_path, run, assert_same_run):
    shutil.copytree(whole / "autoencoder", tmp_path / "autoencoder")
    for later in ("model.safetensors", "checkpoint-16"):
        shutil.move(tmp_path / "autoencoder" / later, tmp_path / later)
    log = tmp_path / "autoencoder" / "logs" / "history.jsonl"
    log.write_text(log.read_text()[:-20])
    run("train_dae", tmp_path, *STEPS, LATEST)
    assert_same_run(whole / "autoencoder", tmp_path / "autoencoder")


def test_limit_of_checkpoints(tmp_path, run):
    run("train_dae", tmp_path, "checkpoints_total_limit=2")
    assert sorted(p.name for p in (tmp_path / "autoencoder").glob("checkpoint-*")) == ["checkpoint-12", "checkpoint-16"]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (["stage1.learning_rate=1e-4", "seed=3"], ["stage1.learning_rate: 0.003 -> 0.0001", "seed: 0 -> 3"]),
        (["autoencoder.base_channels=16"], ["autoencoder.base_channels: 8 -> 16"]),
        (["stage2.train_batch_size=8"], ["stage2: global batch 16 -> 8"]),
        (["stage1.max_train_steps=20"], ["stage1.max_train_steps: 10 -> 20"]),  # over: stage 2 has begun
        (["method=joint"], ["method: 'dae' -> 'joint'"]),
    ],
)
def test_other_configuration_is_refused(whole, tmp_path, run, contents, changes, named):
    shutil.copytree(whole / "autoencoder", tmp_path / "autoencoder")
    before = contents(tmp_path)
    with pytest.raises(ValueError, match="another configuration") as caught:
        run("train_dae", tmp_path, *STEPS, *changes, LATEST)
    assert all(name in str(caught.value) for name in named), caught.value
    assert contents(tmp_path) == before


def test_what_may_change(whole, tmp_path, run):
    """Where things are written and what other recipes do has no influence on the training."""
    shutil.copytree(whole / "autoencoder", tmp_path / "autoencoder")
    run("train_dae", tmp_path, *STEPS, LATEST, "prior.width=32", "sampling.cfg_scale=3", "logging_steps=2", "data.num_workers=1")


def test_other_data_are_refused(tmp_path, run, kill, image_folder, picture, contents):
    """The configuration is the same, the pictures in the folder are not."""
    pictures = Path(shutil.copytree(image_folder, tmp_path / "pictures"))
    options = (f"data.dataset_name={pictures}", "data.channels=3")
    kill(before_update=8)
    with pytest.raises(kill.Killed):
        run("train_dae", tmp_path / "run", *options)
    (pictures / "a" / "0.png").write_bytes(picture(1000, 16, 16))
    before = contents(tmp_path / "run")
    with pytest.raises(ValueError, match="another data set"):
        run("train_dae", tmp_path / "run", *options, LATEST)
    assert contents(tmp_path / "run") == before


def test_prior_of_other_tokens_is_refused(whole, tmp_path, run, contents):
    """The prior's own configuration is the same; the tokenizer was trained again."""
    run("train_dae", tmp_path, *STEPS, "seed=0", "stage1.learning_rate=1e-4")
    run("encode", tmp_path, *STEPS)
    shutil.copytree(whole / "prior", tmp_path / "prior")
    before = contents(tmp_path / "prior")
    with pytest.raises(ValueError, match="another tokenizer"):
        run("train_prior", tmp_path, *STEPS, LATEST)
    assert contents(tmp_path / "prior") == before


@pytest.mark.parametrize("name", ["train_dae", "train_prior"])
def test_latest_without_checkpoint_starts_anew(whole, tmp_path, run, history, name):
    with_tokens(whole, tmp_path)
    folder = {"train_dae": "autoencoder", "train_prior": "prior"}[name]
    if name == "train_dae":
        shutil.rmtree(tmp_path / folder)
    run(name, tmp_path, *STEPS, LATEST)
    assert history(tmp_path / folder) == history(whole / folder)


@pytest.mark.parametrize("name", ["train_dae", "train_prior"])
def test_occupied_folder(whole, tmp_path, run, contents, name):
    copy = Path(shutil.copytree(whole, tmp_path / "copy"))
    before = contents(copy)
    with pytest.raises(FileExistsError, match=r"holds another run.*resume_from_checkpoint=latest.*another output_dir"):
        run(name, copy, *STEPS)
    assert contents(copy) == before


@pytest.mark.parametrize("left", ["model.safetensors", "checkpoint-16", "logs"])
def test_any_trace_of_a_run_occupies_a_folder(whole, tmp_path, run, left):
    (tmp_path / "autoencoder").mkdir()
    source = whole / "autoencoder" / left
    (shutil.copytree if source.is_dir() else shutil.copy)(source, tmp_path / "autoencoder" / left)
    with pytest.raises(FileExistsError):
        run("train_dae", tmp_path, *STEPS)


def test_latest_without_checkpoint_spares_a_model(whole, tmp_path, run, contents):
    """Its checkpoints are lost; starting over would replace it."""
    shutil.copytree(whole / "autoencoder", tmp_path / "autoencoder", ignore=shutil.ignore_patterns("checkpoint-*"))
    before = contents(tmp_path)
    with pytest.raises(FileExistsError, match=r"model\.safetensors.*no checkpoint to continue from.*another output_dir"):
        run("train_dae", tmp_path, *STEPS, LATEST)
    assert contents(tmp_path) == before


def test_checkpoint_from_elsewhere_does_not_replace_a_run(whole, tmp_path, run, contents):
    shutil.copytree(whole / "autoencoder", tmp_path / "autoencoder")
    before = contents(tmp_path)
    with pytest.raises(FileExistsError, match="another output_dir"):
        run("train_dae", tmp_path, *STEPS, f"resume_from_checkpoint={whole / 'autoencoder' / 'checkpoint-6'}")
    assert contents(tmp_path) == before


def test_no_checkpoint_at_that_path(whole, tmp_path, run):
    with pytest.raises(FileNotFoundError, match="is no checkpoint"):
        run("train_dae", tmp_path / "run", f"resume_from_checkpoint={tmp_path / 'checkpoint-3'}")
    assert not (tmp_path / "run").exists()


def test_checkpoint_of_an_autoencoder_does_not_resume_a_prior(whole, tmp_path, run):
    with_tokens(whole, tmp_path)
    with pytest.raises(ValueError, match="run 'autoencoder', this one is 'prior'"):
        run("train_prior", tmp_path, *STEPS, f"resume_from_checkpoint={whole / 'autoencoder' / 'checkpoint-3'}")
    assert not (tmp_path / "prior").exists()


def test_state_of_a_checkpoint_is_readable(whole):
    state = json.loads((whole / "autoencoder" / "checkpoint-12" / "state.json").read_text())
    assert (state["step"], state["stage"], state["stage_step"], state["processes"]) == (12, "stage2", 2, 1)
    assert len(state["losses"][0]) == 2 and state["config"]["stage1"]["max_train_steps"] == 10
