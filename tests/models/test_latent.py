"""The identity of a latent: what changes it and what does not, who may swap decoders, and what is measured of its values."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import dae.training.latent
from dae.config import AutoencoderConfig, Config, DataConfig, DecoderConfig, VQConfig, config_differences, describe
from dae.hub import fingerprint
from dae.models import Autoencoder
from dae.models.latent import NO_LATENT, Latent, described, identify, identities
from dae.training.latent import latent_with_moments


def make(bottleneck="vq", seed=0, resolution=8, **changes):
    torch.manual_seed(seed)
    config = AutoencoderConfig(base_channels=4, latent_channels=3, bottleneck=bottleneck, vq=VQConfig(codebook_size=5))
    for key, value in changes.items():
        section, _, name = key.rpartition("__")
        setattr(getattr(config, section) if section else config, name, value)
    return Autoencoder(config, 1, resolution).eval()


def images(count=6):
    return torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1


def changed(model, change):
    model = copy.deepcopy(model)
    with torch.no_grad():
        change(model)
    return identify(model).id


@pytest.mark.parametrize("bottleneck", ["vq", "vq_gradient", "simvq", "kl"])
def test_what_changes_an_identity(bottleneck):
    model = make(bottleneck)
    one = identify(model).id
    assert one == identify(make(bottleneck)).id and len(one) == 64
    assert one == changed(model, lambda m: m.replace_decoder(DecoderConfig("linear")))
    assert one == changed(model, lambda m: [p.add_(1) for p in m.decoder.parameters()])
    assert one == identify(make(bottleneck, vq__commitment_weight=9.0, kl__kl_weight=0.5)).id
    others = {
        changed(model, lambda m: next(m.encoder.parameters()).view(-1)[0].add_(1e-3)),
        identify(make(bottleneck, seed=1)).id,
        identify(make(bottleneck, resolution=16)).id,
        *(identify(model, center_crop=crop).id for crop in (True, False)),
    }
    assert len(others | {one}) == 6
    if bottleneck != "kl":
        assert one != identify(make(bottleneck, vq__metric="cosine")).id
        assert one == changed(model, lambda m: m.bottleneck.average_counts.add_(1))
        part = "basis" if bottleneck == "simvq" else "codebook"
        assert one != changed(model, lambda m: getattr(m.bottleneck, part).view(-1)[0].add_(1e-3))


def test_knobs_that_change_no_latent_exist():
    sections = {row.key.rpartition(".")[0] for row in describe(AutoencoderConfig)} | {
        row.key for row in describe(AutoencoderConfig)
    }
    assert set(NO_LATENT) <= sections
    config = AutoencoderConfig(latent_channels=7, vq=VQConfig(ema_decay=0.5, codebook_size=9), preset="kl_f8")
    config.decoder.family, config.kl.kl_weight = "linear", 1.0
    assert described(config) == {"latent_channels": 7, "vq.codebook_size": 9}
    assert len(config_differences(AutoencoderConfig(), config)) == 6


@pytest.mark.parametrize("bottleneck", ["vq", "vq_gradient", "kl"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_model_saved_in_another_dtype_keeps_its_identity(tmp_path, bottleneck, dtype):
    model = make(bottleneck)
    model.save_pretrained(tmp_path / "whole")
    known = identities(tmp_path / "whole")[0]
    Autoencoder.from_pretrained(tmp_path / "whole", torch_dtype=dtype).save_pretrained(tmp_path / "half")
    assert load_file(tmp_path / "half" / "model.safetensors")["encoder.conv_in.weight"].dtype == dtype
    assert known == identify(model).id == identities(tmp_path / "half")[0]
    again = Autoencoder.from_pretrained(tmp_path / "half", torch_dtype=dtype)
    assert again.latent.id == known
    swapped = again.with_decoder(tmp_path / "whole")
    assert swapped.dtype == dtype and not swapped.training and swapped.latent.id == known
    assert all(torch.equal(value, again.encoder.state_dict()[key]) for key, value in swapped.encoder.state_dict().items())


def test_with_decoder(tmp_path):
    model, better, foreign = make(), make(), make(seed=1)
    better.replace_decoder(DecoderConfig("linear"))
    for name, each in {"better": better, "foreign": foreign}.items():
        each.save_pretrained(tmp_path / name)
    swapped = model.with_decoder(tmp_path / "better")
    assert swapped.config.decoder.family == "linear" and model.config.decoder.family == "full"
    x = images()
    assert torch.equal(swapped.encode(x).latents, model.encode(x).latents)
    assert torch.equal(swapped(x).sample, better(x).sample) and not torch.equal(swapped(x).sample, model(x).sample)
    ids = [identify(each).id[:12] for each in (foreign, model)]
    with pytest.raises(ValueError, match=rf"foreign reads the latent {ids[0]}, this autoencoder's is {ids[1]}: take a decoder"):
        model.with_decoder(tmp_path / "foreign")
    with pytest.raises(FileNotFoundError, match=rf"holds no config.json: .*, such as {tmp_path}/better or {tmp_path}/foreign$"):
        model.with_decoder(tmp_path)


def test_folders_of_earlier_versions(tmp_path):
    model = make()
    model.latent = identify(model, center_crop=True)
    for name in ("new", "old"):
        model.save_pretrained(tmp_path / name)
    (tmp_path / "old" / "latent.json").unlink()
    assert identities(tmp_path / "old") == (fingerprint(tmp_path / "old"),)
    assert identities(tmp_path / "new") == (model.latent.id, fingerprint(tmp_path / "old"))
    old, new = (Autoencoder.from_pretrained(tmp_path / name) for name in ("old", "new"))
    assert old.latent is None and new.latent == model.latent
    assert old.with_decoder(tmp_path / "new").factor == new.with_decoder(tmp_path / "old").factor == 2
    assert identify(old).id != new.latent.id  # nobody knows how its images were cropped


def test_files_that_do_not_belong_together(tmp_path):
    make().save_pretrained(tmp_path)
    known = Latent.load(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["encoder.conv_in.bias"] += 1
    save_file(weights, tmp_path / "model.safetensors")
    for read in (identities, Autoencoder.from_pretrained):
        with pytest.raises(ValueError, match=rf"latent.json is of the encoder {known.weights[:12]}, .*delete latent.json"):
            read(tmp_path)
    (tmp_path / "latent.json").write_text("{")
    for read in (identities, Autoencoder.from_pretrained):
        with pytest.raises(ValueError, match=r"latent\.json is damaged"):
            read(tmp_path)
    (tmp_path / "latent.json").write_text(json.dumps({"id": 1}))
    with pytest.raises(ValueError, match=r"latent\.json is damaged"):
        Autoencoder.from_pretrained(tmp_path)


@pytest.mark.parametrize("bottleneck", ["vq", "kl"])
def test_measured(bottleneck):
    """In batches, and of the posteriors without drawing from them."""
    model, x = make(bottleneck).train(), images(7)
    config = Config(data=DataConfig(center_crop=False))
    batches = [{"image": part} for part in x.split(3)] * 2  # more than asked for
    found = latent_with_moments(config, model, batches, 7)
    assert model.training and found.images == 7 and found.transform["center_crop"] is False
    assert (found.kind, found.num_codes) == (("discrete", 5) if bottleneck == "vq" else ("continuous", None))
    with torch.no_grad():
        parts = [model.eval().encode(part) for part in (x[:3], x[3:6], x[6:])]  # in larger ones, convolutions round otherwise
    z = torch.cat([part.latents if bottleneck == "vq" else part.features for part in parts]).double()
    noise = 0 if bottleneck == "vq" else torch.cat([part.log_variance for part in parts]).double().exp()
    square = z.square() + noise
    # Sums of a hundred float64 numbers of about 1.
    close = {"rtol": 1e-12, "atol": 1e-13}
    mean, std = torch.tensor(found.mean, dtype=torch.float64), torch.tensor(found.std, dtype=torch.float64)
    torch.testing.assert_close(mean, z.mean((0, 2, 3)), **close)
    torch.testing.assert_close(std.square(), square.mean((0, 2, 3)) - mean.square(), **close)
    assert found.shift == pytest.approx(z.mean().item(), abs=1e-13)
    assert found.scale == pytest.approx((square.mean() - z.mean().square()).item() ** -0.5, rel=1e-10)
    assert found.range == [z.min().item(), z.max().item()]
    assert found.id == identify(model, center_crop=False).id


def test_a_collapsed_latent_has_no_scale(tmp_path):
    model = make()
    model.bottleneck.codebook.zero_()
    found = latent_with_moments(Config(), model, [{"image": images()}], 6)
    assert found.scale is None and found.std == [0, 0, 0] and found.range == [0, 0]
    model.latent = found
    model.save_pretrained(tmp_path)
    assert Autoencoder.from_pretrained(tmp_path).latent == found


def test_diffusers_factors_are_the_measured_ones_or_those_of_the_source(tmp_path):
    torch.manual_seed(0)
    config = AutoencoderConfig(architecture="ldm", base_channels=8, latent_channels=3, bottleneck="kl")
    config.ldm.norm_num_groups = 8
    model = Autoencoder(config, 1, 8).eval()
    model.latent = latent_with_moments(Config(), model, [{"image": images()}], 6)
    model.save_pretrained(tmp_path / "ours")
    Autoencoder.from_pretrained(tmp_path / "ours").to_diffusers(tmp_path / "theirs")
    given = json.loads((tmp_path / "theirs" / "config.json").read_text())
    assert (given["scaling_factor"], given["shift_factor"]) == (model.latent.scale, model.latent.shift)
    back = Autoencoder.from_diffusers(tmp_path / "theirs")
    assert back.latent == model.latent
    assert Autoencoder.from_diffusers(tmp_path / "theirs", resolution=16).latent is None

    (tmp_path / "theirs" / "latent.json").unlink()
    given.pop("shift_factor")
    (tmp_path / "theirs" / "config.json").write_text(json.dumps(given | {"scaling_factor": 0.5, "latents_std": [1, 2, 3]}))
    foreign = Autoencoder.from_diffusers(tmp_path / "theirs")
    foreign.latent = latent_with_moments(Config(), foreign, [{"image": images()}], 6)
    assert (foreign.latent.scale, foreign.latent.shift) == (0.5, None) and foreign.latent.mean == model.latent.mean
    foreign.save_pretrained(tmp_path / "saved")
    Autoencoder.from_pretrained(tmp_path / "saved").to_diffusers(tmp_path / "again")
    again = json.loads((tmp_path / "again" / "config.json").read_text())
    assert (again["scaling_factor"], again["latents_std"]) == (0.5, [1, 2, 3]) and again.get("shift_factor") is None


@pytest.mark.parametrize("bottleneck", ["vq", "kl"])
def test_processes_measure_the_images_of_all(bottleneck, monkeypatch):
    """Sums of two processes, given by hand, are those of one that has the images of both."""
    model, x, parts = make(bottleneck), images(6), []
    whole = latent_with_moments(Config(), model, [{"image": x[:2]}, {"image": x[2:4]}, {"image": x[4:]}], 6)
    monkeypatch.setattr(dae.training.latent, "gather_objects", lambda part: parts.append(part) or [part])
    for share in ([x[:2]], [x[2:4], x[4:]]):
        latent_with_moments(Config(), model, [{"image": images} for images in share], 6)
    monkeypatch.setattr(dae.training.latent, "gather_objects", lambda part: parts)
    both = latent_with_moments(Config(), model, [{"image": x[:1]}], 1)
    assert (both.images, both.range, both.id) == (6, whole.range, whole.id)
    for name in ("mean", "std", "scale", "shift"):  # sums of some hundreds of float64 numbers in another order
        assert getattr(both, name) == pytest.approx(getattr(whole, name), rel=1e-11, abs=1e-13)
