"""The chain on a frozen pretrained encoder: one stage, cache, Diffusion Transformer, samples, metrics and page."""

import json

import pytest
import torch
from safetensors.torch import load_file
from timm_stand_in import write_folder

RAE = (
    "autoencoder.encoder=timm:tokens", "autoencoder.bottleneck=identity", "autoencoder.latent_channels=8",
    "autoencoder.channel_multipliers=[1,1,2]", "validation_steps=4", "checkpointing_steps=3",
)  # fmt: skip


FEATURES = (
    "stage2.loss.adversarial=0.1", "stage2.loss.discriminator=features", "stage2.loss.discriminator_features=stages",
    "stage2.loss.discriminator_heads=3", "stage2.loss.augment=[translation,cutout]", "save_discriminator=true",
    "autoencoder.decoder.latent_noise=0.2", "preflight=true",
)  # fmt: skip


def test_the_chain(tmp_path, timm, run, read_page):
    for name in ("train_dae", "encode", "train_prior", "sample", "evaluate", "report"):
        run(name, tmp_path, *RAE)
    rows = [json.loads(line) for line in (tmp_path / "autoencoder" / "logs" / "history.jsonl").read_text().splitlines()]
    assert {row["stage"] for row in rows} == {"stage2"} and max(row["step"] for row in rows) == 6
    assert not (tmp_path / "autoencoder" / "stage1").exists()
    moments = load_file(tmp_path / "latents" / "moments.safetensors")
    mean, log_variance = moments["train.moments"].chunk(2, dim=2)
    assert mean.shape[1:] == (1, 8, 2, 2) and (log_variance == -30).all()
    # statistics of whole batches of the same images, but for those that did not fill the last one: 1,437 of 16 each
    assert mean.mean().abs() < 0.02 and abs(mean.std() - 1) < 0.02
    assert torch.isfinite(torch.tensor(json.loads((tmp_path / "metrics.json").read_text())["latent"]["gaussian_bits"]))
    words = read_page(tmp_path / "report.html").words
    assert "stage 2" in words and "Representation autoencoder on" in words and "weak decoder" not in words
    assert "a pretrained network, timm:tokens, which was not trained" in words and "a little noise" not in words
    assert "decoder on the frozen encoder timm:tokens" in (tmp_path / "autoencoder" / "README.md").read_text()


def test_resumed(tmp_path, timm, run):
    """With a discriminator on features and noise on the latent; statistics come from the checkpoint."""
    run("train_dae", tmp_path / "whole", *RAE, *FEATURES)
    checkpoint = tmp_path / "whole" / "autoencoder" / "checkpoint-3"
    run("train_dae", tmp_path / "part", *RAE, *FEATURES, f"resume_from_checkpoint={checkpoint}")
    for file in ("model.safetensors", "discriminator/model.safetensors"):
        whole, part = (load_file(tmp_path / name / "autoencoder" / file) for name in ("whole", "part"))
        assert whole.keys() == part.keys() and all(torch.equal(whole[key], part[key]) for key in whole)
    assert not any("backbone." in key for key in whole), "the discriminator is its heads alone"


def test_resumed_on_another_network(tmp_path, timm, run):
    """The heads were trained on the features of other weights."""
    folder, options = write_folder(tmp_path / "network", "stages"), [*RAE, *FEATURES, "preflight=false"]
    options.append(f"stage2.loss.discriminator_features={folder}")
    run("train_dae", tmp_path / "run", *options)
    write_folder(folder, "stages", seed=1)
    checkpoint = tmp_path / "run" / "autoencoder" / "checkpoint-3"
    with pytest.raises(ValueError, match=r"loss.discriminator_features=.* has other weights \(SHA-256 .*") as caught:
        run("train_dae", tmp_path / "other", *options, f"resume_from_checkpoint={checkpoint}")
    assert "\n" not in str(caught.value)
