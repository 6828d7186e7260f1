"""The perceptual loss in the recipe: trained with, kept out of what is saved, refused before anything is written."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from dae.losses import PerceptualLoss

SMALL = ("data.resolution=16", "stage1.max_train_steps=2", "stage2.max_train_steps=2", "stage1.train_batch_size=4")
SMALL += ("stage2.train_batch_size=4", "data.validation_size=8", "data.max_train_samples=64")


@pytest.fixture
def vgg(tmp_path, monkeypatch):
    monkeypatch.setattr(PerceptualLoss, "widths", (4, 4, 8, 8, 8))
    torch.manual_seed(0)
    path = tmp_path / "vgg.safetensors"
    save_file(PerceptualLoss().state_dict(), path)
    return path


def weigh(weight, path):
    return [
        f"{stage}.loss.{key}" for stage in ("stage1", "stage2") for key in (f"perceptual={weight}", f"perceptual_weights={path}")
    ]


def test_both_stages_train_with_it(tmp_path, run, history, vgg, monkeypatch):
    calls = []
    forward = PerceptualLoss.forward

    def counted(self, sample, images):
        distance = forward(self, sample, images)
        calls.append((self.impl, sample.requires_grad, distance.mean().item()))
        return distance

    monkeypatch.setattr(PerceptualLoss, "forward", counted)
    adversarial = ["stage2.loss.adversarial=0.1", "stage2.loss.discriminator_channels=4"]
    pixels = [f"{stage}.loss.l2=0" for stage in ("stage1", "stage2")]  # the decoder then learns from this loss alone
    run("train_dae", tmp_path / "with", *SMALL, *weigh(2, vgg), *adversarial, *pixels, "kernels.lpips=reference")
    assert [call[:2] for call in calls] == [("reference", True)] * 6
    calls = calls[2:]  # both stages are rehearsed first
    logged = [row["loss"] for row in history(tmp_path / "with" / "autoencoder") if row["split"] == "train"]
    assert logged == pytest.approx([2 * distance for _, _, distance in calls], rel=1e-5) and min(logged) > 0

    folder = tmp_path / "with" / "autoencoder"
    files = list(folder.rglob("*.safetensors"))
    assert len(files) > 4
    assert not [path for path in files if any("features" in key or key.startswith("lin") for key in load_file(path))]
    # In stage 2 the decoder alone is trained, and all that it learns from hangs on this loss.
    state = load_file(folder / "checkpoint-4" / "optimizer.safetensors")
    moments = [value for key, value in state.items() if key.endswith("exp_avg")]
    assert moments and all(value.isfinite().all() and value.any() for value in moments)


def test_weight_zero_reads_nothing(tmp_path, run, history, vgg):
    run("train_dae", tmp_path / "a", *SMALL)
    run("train_dae", tmp_path / "b", *SMALL, *weigh(0, "/nowhere/vgg.safetensors"))
    assert history(tmp_path / "a" / "autoencoder") == history(tmp_path / "b" / "autoencoder")


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_refused_before_anything_is_written(tmp_path, run, vgg, stage):
    for overrides, kind, message in (
        (["data.resolution=8", f"{stage}.loss.perceptual_weights={vgg}"], ValueError, f"{stage}.*at least 16, got 8"),
        ([f"{stage}.loss.perceptual_weights=/nowhere/vgg.safetensors"], FileNotFoundError, "no file /nowhere/vgg"),
    ):
        with pytest.raises(kind, match=message):
            run("train_dae", tmp_path / "run", *SMALL, f"{stage}.loss.perceptual=1", *overrides)
        assert not (tmp_path / "run").exists()
