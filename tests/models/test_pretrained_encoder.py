"""A frozen pretrained network as encoder: its latent, the statistics of it, what is saved, and what is refused."""

import dataclasses
import json
import sys

import pytest
import torch
from timm_stand_in import real_weights, write_folder
from tiny_training import TINY, autoencoder_training, weights

from dae.config import load_config
from dae.models import Autoencoder
from dae.models.latent import identify, saved_latent
from dae.models.pretrained import weights_sha256
from dae.models.pretrained_encoder import PretrainedEncoder
from dae.planning.plan import plan_autoencoder
from dae.training.autoencoder import measure_latent
from dae.training.stages import plan_stages

RAE = ("autoencoder.encoder=timm:stages", "autoencoder.bottleneck=identity", "autoencoder.latent_channels=8",
       "autoencoder.channel_multipliers=[1,1,2]")  # fmt: skip
TOKENS = (*RAE, "autoencoder.encoder=tokens")
IMAGES = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1


def made(*overrides, images=IMAGES):
    config = load_config(TINY, list(overrides))
    return Autoencoder(config.autoencoder, images.shape[1], images.shape[2]).eval()


@pytest.mark.parametrize("options", [RAE, TOKENS], ids=["stages", "tokens"])
def test_the_latent_is_the_normalised_last_map(timm, options):
    autoencoder = made(*options)
    encoder = autoencoder.encoder
    assert isinstance(encoder, PretrainedEncoder) and autoencoder.factor == 4 and autoencoder.latent_size == 2
    side = 2 * encoder.backbone.stride
    assert encoder.backbone.description["input_size"] == (3, side, side)
    prepared = encoder.backbone.prepare(IMAGES, size=(side, side))
    last = len(encoder.backbone.network.feature_info) - 1
    [expected] = encoder.backbone.network.forward_intermediates(prepared, [last], True, "NCHW", True)
    mean, std = torch.randn(8), torch.rand(8) + 0.5
    encoder.set_latent_statistics(mean, std)
    encoding = autoencoder.encode(IMAGES, sample_posterior=True)
    torch.testing.assert_close(encoding.latents, (expected - mean.view(-1, 1, 1)) / std.view(-1, 1, 1))
    assert torch.equal(encoding.latents, encoding.features) and (encoding.log_variance == -30).all() and encoding.loss == 0
    assert autoencoder(IMAGES).sample.shape == IMAGES.shape
    larger = torch.zeros(1, 1, 16, 8)
    if options is RAE:
        assert autoencoder.encode(larger).latents.shape == (1, 8, 4, 2)
    else:
        with pytest.raises(ValueError, match=r"autoencoder.encoder=tokens was made for images of 8 x 8 pixels, got \[16, 8\]"):
            autoencoder.encode(larger)


def test_frozen_in_training(timm):
    training = autoencoder_training(*RAE, which=0)
    encoder = training.autoencoder.encoder
    before, _ = weights(training)
    for number in range(3):
        training.step(number)
    after, _ = weights(training)
    changed = {key for key, value in before.items() if key.startswith("model/") and not torch.equal(value, after[key])}
    assert changed and all(key.startswith("model/decoder.") for key in changed)
    assert encoder.backbone.description["weights_sha256"] == weights_sha256(encoder.backbone.network)
    assert not any(module.training for module in encoder.backbone.modules())


def test_statistics_are_those_of_the_training_images(timm):
    """Sums in float64, and the float32 of the latents: rounding errors of 6e-8 of values up to some units."""
    training = autoencoder_training(*RAE, "stage2.train_batch_size=8", which=0)
    images = torch.rand(40, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents = training.autoencoder.encode(images).latents.double()
    torch.testing.assert_close(latents.mean((0, 2, 3)), torch.zeros(8, dtype=torch.float64), rtol=0, atol=1e-5)
    torch.testing.assert_close(latents.var((0, 2, 3), correction=0), torch.ones(8, dtype=torch.float64), rtol=1e-5, atol=0)


def test_statistics_do_not_depend_on_the_number_of_processes(timm, in_processes):
    def measured(batch):
        def body(rank):
            encoder = autoencoder_training(*RAE, f"stage2.train_batch_size={batch}", which=0).autoencoder.encoder
            return encoder.latent_mean, encoder.latent_std

        return body

    whole = measured(12)(0)
    for part in in_processes(3, measured(4)):
        assert all(torch.equal(a, b) for a, b in zip(whole, part, strict=True)), "not one bit"


def test_constant_channels_are_refused(timm):
    encoder = made(*RAE).encoder
    loader = type("Loader", (), {"rows": 4, "__iter__": lambda self: iter([{"image": torch.zeros(4, 1, 8, 8)}])})()
    encoder.backbone.network.convs[2].weight.data.zero_()
    with pytest.raises(ValueError, match=r"timm:stages: channels \[0, 1, 2, 3, 4\] of its last feature map are constant"):
        measure_latent(encoder, loader, 4)


@pytest.mark.parametrize("options", [RAE, TOKENS], ids=["stages", "tokens"])
def test_loaded_without_the_weights_of_the_network(timm, tmp_path, options):
    """They are in our file: what the name meant then is not looked up again."""
    torch.manual_seed(0)
    folder = write_folder(tmp_path / "network", options[0].rpartition(":")[2] if options is RAE else "tokens", seed=3)
    autoencoder = made(*options, f"autoencoder.encoder={folder}")
    autoencoder.encoder.set_latent_statistics(torch.randn(8), torch.rand(8) + 0.5)
    autoencoder.save_pretrained(tmp_path / "saved")
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()
    timm.asked.clear()
    again = Autoencoder.from_pretrained(tmp_path / "saved")
    assert [pretrained for _, pretrained, _ in timm.asked] == [False]
    assert torch.equal(again.encode(IMAGES).latents, autoencoder.encode(IMAGES).latents)
    described = json.loads((tmp_path / "saved" / "config.json").read_text())["pretrained"]
    assert described["model"] == str(folder) and len(described["weights_sha256"]) == 64
    half = Autoencoder.from_pretrained(tmp_path / "saved", torch_dtype=torch.bfloat16)
    assert half.encoder.latent_mean.dtype == torch.float32 and half.encode(IMAGES).latents.dtype == torch.bfloat16
    sys.modules["timm"] = None
    with pytest.raises(ImportError, match=r"autoencoder.encoder=.* needs the package timm .*pip install timm"):
        Autoencoder.from_pretrained(tmp_path / "saved")


@pytest.mark.parametrize(
    ("overrides", "kind", "message"),
    [
        (["autoencoder.bottleneck=vq"], ValueError, "expected autoencoder.bottleneck=identity, got vq"),
        (["autoencoder.latent_channels=4"], ValueError, r"\[8, 2, 2\], expected \[4, 2, 2\]: set autoencoder.latent_channels to"),
        (
            ["autoencoder.encoder=timm:smal"],
            ValueError,
            "^autoencoder.encoder=timm:smal: expected .*near names are small",
        ),
        (["autoencoder.encoder=small"], ValueError, "small: timm gives no feature maps of this network"),
        (["data.resolution=10"], ValueError, "divides the resolution by 4; data.resolution=10 is not divisible"),
        (
            ["method=joint"],
            ValueError,
            "^method=joint trains an encoder, autoencoder.encoder=.* is frozen: set method=dae",
        ),
        (["auxiliary_decoder.keep=true"], ValueError, "^auxiliary_decoder.keep=true: with .* there is no stage 1"),
        (["autoencoder.encoder=/nowhere"], ValueError, "^autoencoder.encoder=/nowhere: expected a folder with config.json and"),
    ],
)
def test_refused_before_training(timm, overrides, kind, message):
    config = load_config(TINY, [*RAE, *overrides])
    with pytest.raises(kind, match=message) as caught:
        plan_stages(config)
        Autoencoder(config.autoencoder, config.data.channels, config.data.resolution)
    assert "\n" not in str(caught.value)


def test_a_network_of_one_size_for_good(timm, monkeypatch):
    def create_model(name, pretrained, num_classes, **options):
        assert not options, "window size must divide 8\nby 3"
        return make(name, pretrained, num_classes)

    make = timm.create_model
    monkeypatch.setattr(timm, "create_model", create_model)
    with pytest.raises(ValueError, match=r"tokens: timm cannot make it for a feature map of 2 x 2 \(window size must divide"):
        made(*TOKENS)


def test_stage_2_alone():
    [stage] = plan_stages(load_config(TINY, list(RAE)))
    assert (stage.name, stage.latent_frozen, stage.decoder.family) == ("stage2", True, "full")


def test_a_real_network():
    folder = real_weights()
    config = dataclasses.replace(load_config(TINY, list(RAE)).autoencoder, encoder=str(folder), latent_channels=320)
    autoencoder = Autoencoder(config, 3, 8).eval()
    assert autoencoder.encode(torch.zeros(2, 3, 8, 8)).latents.shape == (2, 320, 2, 2)


def test_noise_on_the_latent_is_of_decoder_training_alone(timm):
    """`decoder.latent_noise` is the weakener of `auxiliary_decoder`: the real decoder takes it, too."""
    plain, noisy = (made(*RAE, f"autoencoder.decoder.latent_noise={noise}") for noise in (0.0, 0.5))
    noisy.load_state_dict(plain.state_dict())
    latents = plain.encode(IMAGES).latents
    assert torch.equal(plain.decode(latents).sample, noisy.decode(latents).sample)
    noisy.train()
    assert not noisy.encoder.backbone.training and torch.equal(noisy.encode(IMAGES).latents, latents)
    assert not torch.equal(plain.decode(latents).sample, noisy.decode(latents).sample)
    training = autoencoder_training(*RAE, "autoencoder.decoder.latent_noise=0.5", which=0)
    quiet = autoencoder_training(*RAE, which=0)
    losses = []
    for each in (training, quiet):
        each.step(0)
        losses.append(each.state.losses[0])
    assert losses[0] != losses[1]


def test_the_latent_has_an_identity(timm, tmp_path):
    """The network's weights, its input and the statistics make it; the name under which it was found does not."""
    folders = [write_folder(tmp_path / name, "stages", seed=seed) for name, seed in (("a", 0), ("b", 0), ("c", 1))]
    ids = []
    for folder in folders:
        torch.manual_seed(0)
        autoencoder = made(*RAE, f"autoencoder.encoder={folder}")
        autoencoder.save_pretrained(tmp_path / "saved" / folder.name)
        ids.append(identify(autoencoder).id)
        assert saved_latent(tmp_path / "saved" / folder.name).id == ids[-1]
        half = Autoencoder.from_pretrained(tmp_path / "saved" / folder.name, torch_dtype=torch.bfloat16)
        half.save_pretrained(tmp_path / "half")
        assert saved_latent(tmp_path / "half").id == ids[-1]
    assert ids[0] == ids[1] != ids[2]
    autoencoder.encoder.set_latent_statistics(torch.randn(8), torch.rand(8) + 0.5)
    assert identify(autoencoder).id != ids[2]


def test_planned_without_weights(timm, monkeypatch):
    """`--plan` traces the step on tensors without values, for which no weights are read."""
    features = ("stage2.loss.adversarial=1", "stage2.loss.discriminator=features", "stage2.loss.discriminator_features=tokens")
    config = load_config(TINY, [*RAE, *features, "stage2.loss.discriminator_heads=2"])
    lines = "\n".join(plan_autoencoder(config, "H100"))
    assert "latents of 8 channels" in lines and "its network" in lines and "stage1" not in lines
    assert not any(pretrained for _, pretrained, _ in timm.asked)
