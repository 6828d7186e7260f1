"""Models on disk and on the Hub: what is saved comes back to the bit, and whatever is not a model is named."""

import inspect
import json
import os
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import dae.hub
from dae.config import AutoencoderConfig, DecoderConfig, PriorConfig, VQConfig
from dae.hub import fingerprint, require_model
from dae.models import ARPrior, Autoencoder, PatchDiscriminator
from dae.models.latent import identities


def make(kind):
    torch.manual_seed(0)
    if kind == "prior":
        shape = {"vocab_size": 16, "sequence_length": 9, "num_classes": 3}
        return ARPrior(PriorConfig(width=8, depth=2, num_heads=2), **shape, tokenizer="abc").eval()
    config = AutoencoderConfig(base_channels=8, latent_channels=4, bottleneck=kind, vq=VQConfig(codebook_size=16))
    config.decoder = DecoderConfig("narrow", width_factor=0.5)
    return Autoencoder(config, 3, 12).eval()


def result(model):
    if isinstance(model, ARPrior):
        return model(torch.tensor([0, 3]), torch.arange(16).view(2, 8))
    return model(torch.linspace(-1, 1, 2 * 3 * 144).view(2, 3, 12, 12)).sample


@pytest.fixture(params=["vq", "kl", "prior"])
def model(request):
    return make(request.param)


@pytest.fixture
def saved(tmp_path):
    make("vq").save_pretrained(tmp_path / "model", card="# A card")
    return tmp_path / "model"


def test_round_trip(model, tmp_path):
    model.save_pretrained(tmp_path / "new" / "folder", card="# Ü")
    written = {"config.json", "model.safetensors", "README.md"} | ({"latent.json"} if isinstance(model, Autoencoder) else set())
    assert {p.name for p in (tmp_path / "new" / "folder").iterdir()} == written
    torch.manual_seed(9)
    for where in (tmp_path / "new" / "folder", str(tmp_path / "new" / "folder")):
        loaded = type(model).from_pretrained(where)
        assert not loaded.training and loaded.to_config() == model.to_config()
        assert loaded.state_dict().keys() == model.state_dict().keys()
        for name, tensor in model.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], tensor), name
        assert torch.equal(result(loaded), result(model))


def test_the_configuration_travels_with_the_weights(model, tmp_path):
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        inside = json.loads(file.metadata()["config"])
    assert inside == json.loads((tmp_path / "config.json").read_text())
    assert inside["_class_name"] == type(model).__name__ and inside["_dae_version"] == dae.__version__
    rebuilt = type(model).from_config({k: v for k, v in inside.items() if not k.startswith("_")})
    assert rebuilt.state_dict().keys() == model.state_dict().keys()


def test_other_weights_than_its_own(tmp_path):
    model = make("vq")
    weights = {k: v.half().double() + 1 for k, v in model.state_dict().items()}
    model.save_pretrained(tmp_path, state_dict=weights)
    loaded = Autoencoder.from_pretrained(tmp_path)
    assert torch.equal(loaded.bottleneck.codebook, weights["bottleneck.codebook"].float())
    assert not (tmp_path / "README.md").exists()


def test_another_class(saved):
    with pytest.raises(ValueError, match="holds a 'Autoencoder', expected a 'ARPrior'"):
        ARPrior.from_pretrained(saved)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_missing_file(saved, name):
    (saved / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"holds no {name}: expected a folder written by Autoencoder.save_pretrained"):
        Autoencoder.from_pretrained(saved)
    with pytest.raises(FileNotFoundError, match=r"make it with recipes/train_dae\.py"):
        require_model(saved, "train_dae")


@pytest.mark.parametrize("damage", [lambda d: b"", lambda d: d[:100], lambda d: d[:-7], lambda d: b"\xff" * 9 + d])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_damaged_file(saved, name, damage):
    (saved / name).write_bytes(damage((saved / name).read_bytes()))
    with pytest.raises(ValueError, match=rf"{name} is damaged"):
        Autoencoder.from_pretrained(saved)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda c: c.pop("autoencoder"), "does not describe this version's Autoencoder"),
        (lambda c: c["autoencoder"].update(new_knob=1), "has no field 'new_knob'"),
        (lambda c: c["autoencoder"].update(vq=3), "AutoencoderConfig.vq: expected a section"),
        (lambda c: c["autoencoder"].update(latent_channels=5), r"another architecture \(.*encoder\.conv_out\.weight is \[4"),
        (
            lambda c: c["autoencoder"]["decoder"].update(family="linear"),
            r"another architecture \(2 missing: decoder\.bias, decod",
        ),
        (lambda c: c["autoencoder"].update(bottleneck="vqq"), "expected 'vq' or .* or 'kl' or 'identity', got 'vqq'"),
    ],
)
def test_a_configuration_that_does_not_fit(saved, change, message):
    config = json.loads((saved / "config.json").read_text())
    change(config)
    (saved / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        Autoencoder.from_pretrained(saved)


@pytest.fixture
def unreachable(monkeypatch, tmp_path):
    """A Hub at a port of this machine where nobody listens."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("name", ["nobody/nothing", "nothing", "a/b/c", "/no/such/folder", "../x", ""])
def test_a_repository_that_cannot_be_reached(unreachable, name, monkeypatch):
    pauses = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    with pytest.raises(FileNotFoundError, match=r"neither a folder nor a repository|holds no config"):
        Autoencoder.from_pretrained(name)
    assert sum(pauses) < 5  # seconds between attempts


def test_a_path_is_never_looked_for_on_the_hub(monkeypatch, tmp_path):
    """`runs/prior` is a name that a repository could have: a missing folder must not become a stranger's model."""
    monkeypatch.setattr(dae.hub, "download", lambda *_: pytest.fail("asked the Hub"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="no folder runs/prior"):
        ARPrior.from_pretrained(Path("runs/prior"))


def test_download(monkeypatch, saved):
    import huggingface_hub

    asked = {}

    def download(repo_id, **options):
        asked.update(repo_id=repo_id, **options)
        return str(saved)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    loaded = Autoencoder.from_pretrained("me/model", revision="v1")
    assert torch.equal(result(loaded), result(make("vq")))
    assert asked["repo_id"] == "me/model" and asked["revision"] == "v1"
    assert set(asked["allow_patterns"]) == {"config.json", "model.safetensors", "README.md", "latent.json"}


def test_push_uploads_the_files(monkeypatch, saved):
    """A stand-in that keeps to the real signatures and applies the patterns as the real one does."""
    import huggingface_hub
    from huggingface_hub.utils import filter_repo_objects

    real, calls = huggingface_hub.HfApi, []
    (saved / "optimizer.bin").write_bytes(b"secret")
    (saved / "checkpoint-5").mkdir()
    (saved / "checkpoint-5" / "state.json").write_text("{}")
    (saved / "config.yaml").write_text("seed: 0")
    PatchDiscriminator(1, 4, 0).save_pretrained(saved / "discriminator")

    class Api:
        def __init__(self, **options):
            inspect.signature(real).bind(**options)
            calls.append(("token", options["token"]))

        def create_repo(self, *args, **options):
            inspect.signature(real.create_repo).bind(self, *args, **options)
            calls.append(("create", args[0], options))

        def upload_folder(self, **options):
            inspect.signature(real.upload_folder).bind(self, **options)
            files = [str(p.relative_to(saved)) for p in saved.rglob("*") if p.is_file()]
            calls.append((options["repo_id"], sorted(filter_repo_objects(files, allow_patterns=options["allow_patterns"]))))
            return "https://hub/commit/1"

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    url = make("vq").push_to_hub("me/model", folder=saved, private=True, token="t")
    assert url == "https://hub/commit/1"
    assert calls[0] == ("token", "t")
    assert calls[1] == ("create", "me/model", {"private": True, "exist_ok": True})
    beside = ["discriminator/config.json", "discriminator/model.safetensors"]
    assert calls[2] == ("me/model", ["README.md", "config.json", *beside, "latent.json", "model.safetensors"])


def test_fingerprints(model, tmp_path):
    for name in ("one", "again"):
        model.save_pretrained(tmp_path / name)
    one = fingerprint(tmp_path / "one")
    assert one == fingerprint(str(tmp_path / "again")) and len(one) == 64
    with torch.no_grad():
        list(model.parameters())[-1].view(-1)[0] += 1e-3
    model.save_pretrained(tmp_path / "weights")
    config = json.loads((tmp_path / "one" / "config.json").read_text())
    (tmp_path / "again" / "config.json").write_text(json.dumps(config | {"_dae_version": "9"}))
    assert len({one, fingerprint(tmp_path / "weights"), fingerprint(tmp_path / "again")}) == 3


def test_a_failed_save_leaves_the_old_model(monkeypatch, tmp_path):
    model = make("vq")
    model.save_pretrained(tmp_path)
    before, latent = fingerprint(tmp_path), identities(tmp_path)

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with torch.no_grad():
        model.bottleneck.codebook += 1
    with pytest.raises(OSError, match="free space"):
        model.save_pretrained(tmp_path)
    assert fingerprint(tmp_path) == before and identities(tmp_path) == latent
    assert {p.name for p in tmp_path.iterdir()} == {"config.json", "model.safetensors", "latent.json"}
