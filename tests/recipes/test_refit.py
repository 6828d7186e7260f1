"""recipes/refit.py: the same latent to the bit, a decoder that learned, and folders that diffusers loads."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from dae.hub import fingerprint
from dae.models import Autoencoder
from dae.models.latent import identities

QUICK = (
    "stage2.max_train_steps=4",
    "validation_steps=2",
    "checkpointing_steps=2",
    "evaluation.max_images=40",
    "evaluation.classifier_steps=2",
)
LATENT = ("encoder.", "quant_conv.", "quantize.")
BLOCKS = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
SIZES = {"in_channels": 1, "out_channels": 1, "block_out_channels": (4, 8), "norm_num_groups": 4, "sample_size": 8}


@pytest.fixture
def theirs(tmp_path):
    """`theirs(kind)`: folder of a tiny model of diffusers with random weights."""
    diffusers = pytest.importorskip("diffusers", reason="the extra `peers` is not installed: its folders are refitted")

    def make(kind):
        torch.manual_seed(0)
        more = {"num_vq_embeddings": 6} if kind == "VQModel" else {"scaling_factor": 0.3, "shift_factor": 0.1}
        model = getattr(diffusers, kind)(**BLOCKS, **SIZES, latent_channels=3, **more)
        if kind == "VQModel":
            torch.nn.init.normal_(model.quantize.embedding.weight)
        model.save_pretrained(tmp_path / kind)
        return tmp_path / kind

    return make


@pytest.mark.parametrize(("kind", "decoder"), [("AutoencoderKL", "old"), ("VQModel", "new")])
def test_a_model_of_diffusers(kind, decoder, theirs, tmp_path, run, read_page, capsys):
    import diffusers

    given, out = theirs(kind), tmp_path / "run"
    folder = run("refit", out, *QUICK, f"init_from={given}", f"refit.decoder={decoder}")
    before, after = (load_file(path / "diffusion_pytorch_model.safetensors") for path in (given, folder / "diffusers"))
    assert before.keys() == after.keys()
    changed = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert not [name for name in changed if name.startswith(LATENT)] and "decoder.conv_in.weight" in changed

    config, factors = getattr(diffusers, kind).from_pretrained(folder / "diffusers").config, ("scaling_factor", "shift_factor")
    source = getattr(diffusers, kind).from_pretrained(given).config
    assert [config.get(name) for name in factors] == [source.get(name) for name in factors]
    ours = Autoencoder.from_pretrained(folder)
    assert ours.latent.id == identities(folder)[0] == Autoencoder.from_diffusers(folder / "diffusers").latent.id
    assert ours.latent.scale == source.get("scaling_factor") and ours.latent.images == 16

    found, shown = json.loads((out / "refit.json").read_text()), capsys.readouterr().out
    assert found["checksums"]["before"] == found["checksums"]["after"] and found["latent"] == ours.latent.id
    assert set(found["measures"]) == {"psnr", "ssim", "frechet"} and found["held_out_images"] == 40
    for part, digest in found["checksums"]["before"].items():
        assert f"{part:<12}{digest[:16]} before, {digest[:16]} after: equal" in shown
    page = read_page(out / "refit.html")
    gain = found["measures"]["psnr"]["difference"]
    assert f"{gain['mean']:+.2f}\u00a0dB [{gain['low']:+.2f}, {gain['high']:+.2f}]" in page.words
    assert all(
        word in page.words for word in ("Under the magnifier", "Warnings", "SHA-256", "LPIPS was not measured", ours.latent.id)
    )
    assert len([source for source in page.values("img", "src") if source.startswith("data:image/png")]) == 3 + 4
    if decoder == "new":
        assert found["measures"]["psnr"]["first"]["mean"] != found["measures"]["psnr"]["second"]["mean"]


def test_one_of_ours_and_its_prior(chain, copied_chain, tmp_path, run, contents, history):
    """Resumed in the middle it is the same; tokens, prior and sampling go on with the new decoder."""
    options = (*QUICK, f"init_from={chain}")
    folder = run("refit", tmp_path / "whole", *options)
    shutil.copytree(tmp_path / "whole", tmp_path / "part")
    shutil.rmtree(tmp_path / "part" / "autoencoder" / "checkpoint-4")
    (tmp_path / "part" / "autoencoder" / "model.safetensors").unlink()
    again = run("refit", tmp_path / "part", *options, "resume_from_checkpoint=latest")
    assert history(folder) == history(again)
    assert fingerprint(folder) == fingerprint(again)
    assert (folder / "latent.json").read_bytes() == (again / "latent.json").read_bytes()

    assert identities(folder)[0] == identities(chain / "autoencoder")[0]
    swapped = Autoencoder.from_pretrained(chain / "autoencoder").with_decoder(folder)
    assert torch.equal(swapped.decoder.conv_in.weight, load_file(folder / "model.safetensors")["decoder.conv_in.weight"])
    shutil.rmtree(copied_chain / "autoencoder")
    shutil.copytree(folder, copied_chain / "autoencoder")
    run("train_prior", copied_chain, "resume_from_checkpoint=latest")
    run("sample", copied_chain, "sampling.num_samples=10")
    assert not (folder / "diffusers").exists()  # it is no `ldm`


def test_a_latent_that_changed_is_an_error(chain, tmp_path, run, monkeypatch):
    original = Autoencoder.save_pretrained

    def save(self, folder, **options):
        if folder.name == "autoencoder":
            with torch.no_grad():
                next(self.encoder.parameters()).view(-1)[0] += 1e-4
        original(self, folder, **options)

    monkeypatch.setattr(Autoencoder, "save_pretrained", save)
    with pytest.raises(RuntimeError, match=r"the latent has changed \(encoder: .* before, .* after"):
        run("refit", tmp_path, *QUICK, f"init_from={chain}")
    assert not (tmp_path / "refit.html").exists()


def no_model(folder):
    (folder / "model.safetensors").unlink()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ((), r"init_from is not given: expected the autoencoder whose decoder is to be refitted"),
        (("init_from={chain}", "data.resolution=16"), r"trained on 1-channel images of 8 pixels, .*data\.resolution=16"),
        (("init_from={chain}", "data.center_crop=false"), r"data\.center_crop=false: the images of .*center_crop=true"),
        (("init_from={chain}", "stage2.codebook=trainable"), r"stage2\.codebook=trainable would change the latent"),
        (("init_from={kl}", "data.resolution=1"), r"divides the resolution by 2; data\.resolution=1 is not divisible.*: 2"),
        (("init_from={kl}", "data.resolution=9"), r"data\.resolution=9 is not divisible. The nearest that are: 8, 10"),
        (("init_from={kl}", "data.channels=3"), r"trained on 1-channel images .*data\.channels=3"),
        (("init_from={unet}",), r"holds a 'UNet2DModel': of diffusers' autoencoders AutoencoderKL and VQModel can be read"),
        (("init_from={pickle}",), r"holds its weights as a pickle alone .*safe_serialization=True"),
        (("init_from={kl}", "evaluation.max_images=1"), r"held-out images: expected at least 2, got 1"),
        (("init_from={kl}", "data.resolution=4"), r"data\.resolution=4: the classifier .* refit\.features"),
        (("init_from={kl}", "refit.features=/nowhere/net"), r"refit\.features"),
    ],
)  # fmt: skip
def test_bad_input(chain, theirs, tmp_path, run, overrides, message):
    kl = theirs("AutoencoderKL")
    unet, pickle = (shutil.copytree(kl, tmp_path / name) for name in ("unet", "pickle"))
    (unet / "config.json").write_text(json.dumps({"_class_name": "UNet2DModel"}))
    (pickle / "diffusion_pytorch_model.safetensors").rename(pickle / "diffusion_pytorch_model.bin")
    places = {"chain": chain, "kl": kl, "unet": unet, "pickle": pickle}
    with pytest.raises((ValueError, FileNotFoundError, ImportError), match=message) as caught:
        run("refit", tmp_path / "run", *QUICK, *(each.format(**places) for each in overrides))
    assert "\n" not in str(caught.value) and not (tmp_path / "run" / "autoencoder").exists()


def test_train_dae_does_not_refit(tmp_path, run):
    with pytest.raises(ValueError, match=r"method=refit .*recipes/refit\.py"):
        run("train_dae", tmp_path, "method=refit")


def test_lpips_where_its_weights_are(theirs, tmp_path, run, read_page):
    from dae.losses import PerceptualLoss

    torch.manual_seed(0)
    weights = {name: w for name, w in PerceptualLoss().state_dict().items() if not name.startswith("lin")}
    save_file(weights, tmp_path / "vgg.safetensors")
    options = (
        f"init_from={theirs('AutoencoderKL')}",
        "data.resolution=16",
        f"stage2.loss.perceptual_weights={tmp_path / 'vgg.safetensors'}",
    )
    run("refit", tmp_path / "run", *QUICK, *options, "evaluation.max_images=4", "stage2.max_train_steps=1")
    found = json.loads((tmp_path / "run" / "refit.json").read_text())
    assert found["perceptual"] == "VGG16 distance" and found["measures"]["lpips"]["first"]["mean"] > 0
    assert "VGG16 distance" in read_page(tmp_path / "run" / "refit.html").words
