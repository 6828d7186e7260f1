"""The whole chain over a continuous latent: Diffusion Transformer, Gaussian mixture, and what does not go together."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from dae.data import load_data
from dae.hub import fingerprint
from dae.models import Autoencoder, DiT, GaussianMixturePrior
from dae.quantizers import latent_statistics
from dae.sampling import load_chain

KL = ("autoencoder.bottleneck=kl", "autoencoder.kl.kl_weight=1e-4", "prior.num_components=3", "sampling.num_inference_steps=4")
MIXTURE = (*KL, "prior.family=mixture")
RECIPES = ("train_dae", "encode", "train_prior", "sample", "evaluate", "report")


@pytest.fixture(scope="session")
def flow(made_once):
    """The folder of a whole chain with a Diffusion Transformer. For reading only."""
    return made_once("flow", RECIPES, *KL)


@pytest.fixture
def encoded(flow, tmp_path):
    """A folder in which a prior over the same latents can be trained."""
    for part in ("autoencoder", "latents"):
        shutil.copytree(flow / part, tmp_path / "run" / part)
    return tmp_path / "run"


def test_cached_posteriors_are_what_the_autoencoder_says(flow, configure):
    cached = load_file(flow / "latents" / "moments.safetensors")
    assert cached["train.moments"].shape == (1437, 1, 8, 4, 4) and cached["validation.moments"].shape == (360, 1, 8, 4, 4)
    assert cached["train.moments"].dtype == torch.float32 and not (flow / "tokens").exists()
    data = load_data(configure(flow).data, 0)
    images = torch.stack([data.validation[i]["image"] for i in range(20)])
    with torch.inference_mode():
        encoding = Autoencoder.from_pretrained(flow / "autoencoder").encode(images)
    expected = torch.cat([encoding.features, encoding.log_variance], dim=1)
    # batches of 20 and of 360 images may be convolved in another order of sums
    torch.testing.assert_close(cached["validation.moments"][:20, 0], expected, rtol=1e-4, atol=1e-5)


def test_diffusion_transformer_is_trained_and_delivered(flow, history):
    rows = history(flow / "prior")
    assert [row["step"] for row in rows if row["split"] == "train"] == list(range(1, 13))
    validations = [row for row in rows if row["split"] == "validation"]
    assert [row["step"] for row in validations] == [4, 8, 12] and all(0 < row["loss"] < 10 for row in validations)
    assert rows[-1].keys() == {"step", "stage", "split", "bits_per_image"} and rows[-1]["split"] == "delivered"
    prior = load_chain(flow)[1]
    assert isinstance(prior, DiT) and prior.tokenizer == load_chain(flow)[0].latent.id and not prior.training
    best = min(validations, key=lambda row: row["loss"])
    average = load_file(flow / "prior" / f"checkpoint-{best['step']}" / "ema.safetensors")
    assert all(torch.equal(value, average[key]) for key, value in load_file(flow / "prior" / "model.safetensors").items())
    cached = load_file(flow / "latents" / "moments.safetensors")
    mean, std = latent_statistics(cached["train.moments"])
    assert torch.equal(prior.latent_mean.flatten(), mean) and torch.equal(prior.latent_std.flatten(), std)
    card = (flow / "prior" / "README.md").read_text()
    assert "Diffusion Transformer of digits" in card and "sample_latents" in card and "bits_per_image" in card


def test_diffusion_transformer_is_sampled_measured_and_shown(flow):
    samples = np.load(flow / "samples" / "samples.npz")
    assert samples["arr_0"].shape == (40, 8, 8, 1) and (np.bincount(samples["arr_1"], minlength=10) == 4).all()
    metrics = json.loads((flow / "metrics.json").read_text())
    assert metrics["codebook"] is None and metrics["latent"]["channels"] == 4 and metrics["latent"]["size"] == 4
    assert sum(metrics["latent"]["gaussian_bits_by_channel"]) == pytest.approx(metrics["latent"]["gaussian_bits"])
    prior = metrics["prior"]
    assert (prior["family"], prior["tokens_an_image"]) == ("dit", None) and prior["heldout_bits_per_image"] > 0
    assert 0 <= metrics["generation"]["recognised"] <= 1
    assert {"heldout_loss", "cfg_scale", "prior_step"} <= metrics["guidance_sweep"][0].keys()
    assert {row["prior_step"] for row in metrics["guidance_sweep"]} == {4, 8, 12}
    page = (flow / "report.html").read_text()
    for words in (
        "a Diffusion Transformer, the prior", "64 numbers (4 channels of 4 × 4)", "Bits per image, held-out images",
        "<h2>Latent</h2>", "flow-matching loss", "4 steps from noise to latent", "decoder is trained on its latents",
    ):  # fmt: skip
        assert words in page, words
    assert "token" not in page.split("<details>")[0] and "codebook" not in page.split("<details>")[0].lower()


def test_gaussian_mixture(encoded, run, history):
    for name in ("train_prior", "sample", "evaluate", "report"):
        run(name, encoded, *MIXTURE)
    rows = history(encoded / "prior")
    assert [(row["step"], row["split"]) for row in rows] == [(1, "train"), (1, "validation")]
    assert rows[0]["bits_per_image"] < rows[1]["bits_per_image"], "it was fitted to the first"
    prior = load_chain(encoded)[1]
    assert isinstance(prior, GaussianMixturePrior) and len(prior.weights) == 3
    assert prior.weights.sum().item() == pytest.approx(1, abs=1e-5)
    assert (np.load(encoded / "samples" / "samples.npz")["arr_1"] == 0).all(), "it knows no classes"
    for asked in ("sampling.classes=[3]", "sampling.cfg_scale=2"):
        with pytest.raises(ValueError, match="this prior knows no classes; leave it out"):
            run("sample", encoded, *MIXTURE, asked)
    metrics = json.loads((encoded / "metrics.json").read_text())
    assert metrics["generation"]["recognised"] is None and metrics["guidance_sweep"] == []
    assert metrics["prior"]["heldout_bits_per_image"] == rows[1]["bits_per_image"]
    page = (encoded / "report.html").read_text()
    assert "a mixture of 3 Gaussians, the prior" in page and "10 classes, which this prior does not know" in page
    assert "fitted at once" in page and "recognised as their class" not in page
    assert "telling their classes apart" in page and "quarter turns" not in page
    before = fingerprint(encoded / "prior")
    run("train_prior", encoded, *MIXTURE, "resume_from_checkpoint=latest")
    assert fingerprint(encoded / "prior") == before and history(encoded / "prior") == rows


def test_a_gan_over_an_encoder(tmp_path, run):
    """A generator with a discriminator, on latents of an encoder that was trained with a weak decoder; unlabelled data."""
    gan = ("stage2.loss.adversarial=0.5", "stage2.loss.discriminator_channels=8", "data.label_column=none")
    for name in RECIPES:
        run(name, tmp_path / "run", *MIXTURE, *gan)
    page = (tmp_path / "run" / "report.html").read_text()
    assert "deceive a discriminator, as the generator of a GAN does" in page and "without classes" in page


def test_copies_are_posteriors_of_augmented_images(flow, tmp_path, run, capsys):
    shutil.copytree(flow / "autoencoder", tmp_path / "run" / "autoencoder")
    copies = (*KL, "prior.num_augmentations=1", "data.random_affine=1", "prior.code_temperature=0.5")
    run("encode", tmp_path / "run", *copies)
    assert "code_temperature has no effect" in capsys.readouterr().out
    moments = load_file(tmp_path / "run" / "latents" / "moments.safetensors")["train.moments"]
    assert moments.shape == (1437, 2, 8, 4, 4) and (moments[:, 0] != moments[:, 1]).flatten(1).any(1).all()
    run("train_prior", tmp_path / "run", *copies[:-1], "prior.max_train_steps=2")  # the temperature makes no other cache
    with pytest.raises(ValueError, match=r"latent cache .* stale.*another augmentation.*recipes/encode\.py"):
        run("train_prior", tmp_path / "run", *KL)


@pytest.mark.parametrize(("bottleneck", "family"), [("vq", "dit"), ("vq", "mixture"), ("kl", "ar")])
def test_families_that_cannot_model_the_latent(encoded, run, contents, bottleneck, family):
    before = contents(encoded)
    with pytest.raises(ValueError, match=rf"prior\.family={family} cannot model .* autoencoder\.bottleneck={bottleneck}"):
        run("train_prior", encoded, f"autoencoder.bottleneck={bottleneck}", f"prior.family={family}")
    assert contents(encoded) == before


def test_another_bottleneck_than_it_was_trained_with(encoded, run, contents):
    before = contents(encoded)
    with pytest.raises(ValueError, match=r"autoencoder\.bottleneck=vq.*trained with kl"):
        run("encode", encoded)
    with pytest.raises(FileNotFoundError, match=r"no token cache.*recipes/encode\.py"):
        run("train_prior", encoded)
    assert contents(encoded) == before


def test_latents_of_another_autoencoder(flow, tmp_path, run):
    copy = shutil.copytree(flow, tmp_path / "copy")
    weights = Autoencoder.from_pretrained(copy / "autoencoder")
    with torch.no_grad():
        weights.encoder.conv_out.bias += 1
    weights.save_pretrained(copy / "autoencoder")
    with pytest.raises(ValueError, match=r"latents of another autoencoder.*encode\.py.*train_prior\.py"):
        run("sample", copy, *KL)
    shutil.rmtree(copy / "prior")
    with pytest.raises(ValueError, match=r"latent cache .* stale: it was made with another tokenizer"):
        run("train_prior", copy, *KL)


def test_more_components_than_latents(encoded, run):
    with pytest.raises(ValueError, match=r"prior\.num_components=2000, got 1437"):
        run("train_prior", encoded, *MIXTURE, "prior.num_components=2000")
    run("train_prior", encoded, *MIXTURE)  # nothing of the failed run is in the way
