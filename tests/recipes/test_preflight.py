"""The recipes take preflight's steps before theirs, and theirs are the same with and without."""

import sys

import pytest
import torch
from safetensors.torch import load

SHORT = ("stage1.max_train_steps=2", "stage2.max_train_steps=2", "prior.max_train_steps=2", "data.random_flip=true")


def test_a_run_is_the_same_with_preflight_and_without(tmp_path, run, history, contents):
    for name, preflight in (("with", "true"), ("without", "false")):
        for each in ("train_dae", "encode", "train_prior"):
            run(each, tmp_path / name, *SHORT, f"preflight={preflight}")
    (one, other), weights = (contents(tmp_path / name) for name in ("with", "without")), 0
    assert one.keys() == other.keys()
    for file in (f for f in one if f.endswith(".safetensors")):
        mine, theirs = load(one[file]), load(other[file])  # the order of a file's metadata is by chance
        assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine), file
        weights += 1
    assert weights >= 10
    for part in ("autoencoder", "prior"):
        assert history(tmp_path / "with" / part) == history(tmp_path / "without" / part)


def test_what_does_not_train_is_refused_before_the_first_step(tmp_path, run, history, monkeypatch):
    def detached(self, images, original=None):
        output = original(self, images)
        output.sample = output.sample.detach().requires_grad_()
        return output

    from dae.models import Autoencoder

    forward = Autoencoder.forward
    with monkeypatch.context() as broken:
        broken.setattr(Autoencoder, "forward", lambda self, images: detached(self, images, forward))
        with pytest.raises(ValueError, match=r"^stage1: .*preflight=false$"):
            run("train_dae", tmp_path, *SHORT, "preflight=true")
    assert history(tmp_path / "autoencoder") == []
    run("train_dae", tmp_path, *SHORT, "preflight=true")  # the folder is free


@pytest.mark.slow
def test_all_processes_refuse_together(tmp_path, script, tiny):
    """One of two takes the steps; both end with its line, and neither waits for the other."""
    from PIL import Image

    folder = tmp_path / "grey" / "train"
    folder.mkdir(parents=True)
    for level in range(120):
        Image.new("L", (8, 8), level).save(folder / f"{level}.png")
    options = [
        "preflight=true",
        f"data.dataset_name={tmp_path / 'grey'}",
        "data.validation_size=5",
        f"output_dir={tmp_path / 'run'}",
    ]
    options += [f"{section}.train_batch_size=8" for section in ("stage1", "stage2", "prior")]
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    done = script("train_dae", *tiny, *options, launcher=launcher)
    assert done.returncode != 0
    for process in (0, 1):
        assert f"error in process {process} of 2: stage1: each of the 40 images of the first batches is one colour" in done.stderr
