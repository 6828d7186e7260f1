"""Checkpoints in the layouts of taming-transformers, latent-diffusion and LlamaGen, written here by networks with their names."""

import runpy
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from dae.config import AutoencoderConfig
from dae.models import Autoencoder
from dae.models.legacy_weights import check_against

RECIPE = Path(__file__).parents[2] / "recipes" / "import_legacy.py"
import_legacy = runpy.run_path(str(RECIPE))["import_legacy"]


class Block(nn.Module):
    def __init__(self, before, after):
        super().__init__()
        self.norm1, self.norm2 = (nn.GroupNorm(32, channels, eps=1e-6) for channels in (before, after))
        self.conv1, self.conv2 = nn.Conv2d(before, after, 3, padding=1), nn.Conv2d(after, after, 3, padding=1)
        if before != after:
            self.nin_shortcut = nn.Conv2d(before, after, 1)

    def forward(self, x):
        h = self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class Attention(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.norm = nn.GroupNorm(32, channels, eps=1e-6)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x):
        q, k, v = (f(self.norm(x)).flatten(2) for f in (self.q, self.k, self.v))
        weights = (q.mT @ k * q.shape[1] ** -0.5).softmax(-1)
        return x + self.proj_out((v @ weights.mT).view(x.shape))


class Resample(nn.Module):
    def __init__(self, channels, up):
        super().__init__()
        self.up, self.conv = up, nn.Conv2d(channels, channels, 3, stride=1 if up else 2, padding=1 if up else 0)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2.0) if self.up else F.pad(x, (0, 1, 0, 1)))


def level(blocks, attentions, resample, resample_name, layout):
    names = {"ldm": ("block", "attn"), "llamagen": ("res", "attn")}[layout]
    module = nn.Module()
    for name, parts in zip(names, (blocks, attentions), strict=True):
        setattr(module, name, nn.ModuleList(parts))
    if resample:
        setattr(module, resample_name, resample)
    module.run = lambda x: run_level(blocks, attentions, resample, x)
    return module


def run_level(blocks, attentions, resample, x):
    for index, block in enumerate(blocks):
        x = block(x)
        x = attentions[index](x) if attentions else x
    return resample(x) if resample else x


def middle(channels, attention, layout):
    parts = [Block(channels, channels), *([Attention(channels)] if attention else []), Block(channels, channels)]
    if layout == "llamagen":
        return nn.ModuleList(parts), parts
    module = nn.Module()
    for name, part in zip(["block_1", *["attn_1"] * attention, "block_2"], parts, strict=True):
        setattr(module, name, part)
    return module, parts


class Coder(nn.Module):
    def __init__(self, layout, up, ends, widths, blocks, attends, attention):
        super().__init__()
        order = list(range(len(widths)))[:: -1 if up else 1]
        channels = widths[-1] if up else widths[0]
        self.up_first, levels = up, {}
        self.conv_in = nn.Conv2d(ends[0], channels, 3, padding=1)
        self.mid, middle_parts = middle(widths[-1], attention, layout)
        for number in order:
            made = []
            for _ in range(blocks):
                made.append(Block(channels, widths[number]))
                channels = widths[number]
            attentions = [Attention(channels) for _ in made] if attends[number] else []
            resample = Resample(channels, up) if number != order[-1] else None
            levels[number] = level(made, attentions, resample, "upsample" if up else "downsample", layout)
        self.norm_out = nn.GroupNorm(32, channels, eps=1e-6)
        self.conv_out = nn.Conv2d(channels, ends[1], 3, padding=1)
        if layout == "llamagen":
            self.conv_blocks = nn.ModuleList([levels[number] for number in order])
        else:
            setattr(self, "up" if up else "down", nn.ModuleList([levels[number] for number in range(len(widths))]))
        self.sequence = [levels[number].run for number in order]
        self.sequence = [*middle_parts, *self.sequence] if up else [*self.sequence, *middle_parts]

    def forward(self, x):
        x = self.conv_in(x)
        for part in self.sequence:
            x = part(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class Theirs(nn.Module):
    """An autoencoder as the three projects have it. `codes`: of a codebook; None is a Gaussian posterior."""

    def __init__(
        self, layout, codes, z=6, latent=4, attends=(False, True), widths=(32, 64), blocks=1, channels=3, attention=True
    ):
        super().__init__()
        self.codes, self.sphere, twice = codes, layout == "llamagen", 1 if codes else 2
        shape = {"widths": widths, "attends": attends, "attention": attention}
        self.encoder = Coder(layout, False, (channels, twice * z), blocks=blocks, **shape)
        self.decoder = Coder(layout, True, (z, channels), blocks=blocks + 1, **shape)
        self.quant_conv, self.post_quant_conv = nn.Conv2d(twice * z, twice * latent, 1), nn.Conv2d(latent, z, 1)
        if codes:
            self.quantize = nn.Module()
            self.quantize.embedding = nn.Embedding(codes, latent)
        for parameter in self.parameters():
            parameter.data += 0.05 * torch.randn_like(parameter)

    def forward(self, x):
        """Features (of a posterior its mean), indices, reconstruction."""
        h = self.quant_conv(self.encoder(x))
        if not self.codes:
            mean = h.chunk(2, dim=1)[0]
            return mean, None, self.decoder(self.post_quant_conv(mean))
        z, table = h.movedim(1, -1), self.quantize.embedding.weight
        if self.sphere:
            z, table = F.normalize(z, dim=-1), F.normalize(table, dim=-1)
        indices = (z[..., None, :] - table).square().sum(-1).argmin(-1)
        return h, indices, self.decoder(self.post_quant_conv(table[indices].movedim(-1, 1)))


def network(layout="ldm", codes=None, **options):
    torch.manual_seed(0)
    return Theirs(layout, codes, **options).eval()


def assert_same(ours, theirs, size=16):
    """Values of about 1 after a few dozen layers, each of which rounds by 2^-24."""
    x = torch.rand(2, ours.image_channels, size, size, generator=torch.Generator().manual_seed(1)) * 2 - 1
    with torch.no_grad():
        features, indices, sample = theirs(x)
        encoding = ours.encode(x)
        torch.testing.assert_close(encoding.features, features, rtol=1e-5, atol=1e-5)
        assert indices is None or (torch.equal(encoding.indices, indices) and len(indices.unique()) > 2)
        torch.testing.assert_close(ours.decode(encoding.latents).sample, sample, rtol=1e-5, atol=1e-5)


VARIANTS = {
    "taming, codes": ("ldm", 20, {}),
    "latent-diffusion, posterior": ("ldm", None, {"widths": (32, 64, 64), "attends": (False,) * 3, "z": 4, "blocks": 2}),
    "without attention in the middle": ("ldm", None, {"attention": False, "channels": 1}),
    "LlamaGen": ("llamagen", 20, {}),
}


@pytest.mark.parametrize("wrap", ["state_dict", "model", "ema", "bare", "whole model", "safetensors"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_outputs_are_theirs(variant, wrap, tmp_path):
    layout, codes, options = VARIANTS[variant]
    theirs = network(layout, codes, **options)
    weights, noise = theirs.state_dict(), torch.randn(3)
    path = tmp_path / ("a.safetensors" if wrap == "safetensors" else "a.ckpt")
    inside = weights | {"loss.discriminator.main.0.weight": noise, "model_ema.decay": noise}
    checkpoints = {
        "state_dict": {"state_dict": inside, "epoch": 3, "callbacks": {}},
        "model": {"model": {f"module.{name}": w for name, w in inside.items()}, "optimizer": {"state": {}}},
        "ema": {"ema": weights, "model": {name: torch.zeros_like(w) for name, w in weights.items()}},
        "bare": weights | ({"quantize.codebook_used": noise} if layout == "llamagen" else {}),
        "whole model": {"state_dict": {f"first_stage_model.{name}": w for name, w in inside.items()} | {"encoder.of": noise}},
    }
    if wrap == "safetensors":
        save_file(weights, path)
    else:
        torch.save(checkpoints[wrap], path)
    ours = import_legacy(path, tmp_path / "ours", resolution=16)
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())
    assert_same(Autoencoder.from_pretrained(tmp_path / "ours"), theirs)
    assert ours.config.architecture == "ldm" and ours.config.vq.metric == ("cosine" if layout == "llamagen" else "l2")


CONFIG = """
model:
  base_learning_rate: 4.5e-6
  params:
    embed_dim: 4
    n_embed: 20
    ddconfig: {double_z: false, z_channels: 6, resolution: 32, in_channels: 3, out_ch: 3, ch: 32, ch_mult: [1, 2],
               num_res_blocks: 1, attn_resolutions: [16], dropout: 0.0}
"""
DIFFUSION = """
model:
  params:
    scale_factor: 0.25
    first_stage_config:
      params:
        embed_dim: 4
        ddconfig: {double_z: true, z_channels: 4, resolution: 32, in_channels: 3, ch: 32, ch_mult: [1, 2], num_res_blocks: 1,
                   attn_resolutions: [16]}
"""


def test_their_configuration_tells_the_resolution_and_is_compared(tmp_path):
    torch.save({"state_dict": network(codes=20).state_dict()}, tmp_path / "a.ckpt")
    path = tmp_path / "theirs.yaml"
    path.write_text(CONFIG)
    ours = import_legacy(tmp_path / "a.ckpt", tmp_path / "ours", config=path)
    assert ours.resolution == 32 and ours.config.attention_resolutions == [16]
    wrong = {"ch: 32": "ddconfig.ch is 64 there, 32 in", "n_embed: 20": "n_embed is 21 there, 20 in"}
    wrong |= {"attn_resolutions: [16]": r"ddconfig.attn_resolutions is \[32\] there, \[16\] in"}
    changed = {"ch: 32": "ch: 64", "n_embed: 20": "n_embed: 21", "attn_resolutions: [16]": "attn_resolutions: [32]"}
    for given, message in wrong.items():
        path.write_text(CONFIG.replace(given, changed[given]))
        with pytest.raises(ValueError, match=f"theirs.yaml is of another network: {message} the checkpoint"):
            import_legacy(tmp_path / "a.ckpt", tmp_path / "other", config=path)
    for text, message in (
        ("a: 1", "describes no autoencoder"),
        ("a: [", "is not valid YAML"),
        ("- 1", "describes no autoencoder"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            import_legacy(tmp_path / "a.ckpt", tmp_path / "other", config=path)
    assert not (tmp_path / "other").exists()


def test_nonsense_in_their_configuration_is_a_message():
    path = ("model", "params", "ddconfig", "ch_mult")
    for depth in range(1, 5):
        for value in (None, 0, 1.5, "x", [], [["a"]], {}, True):
            for key in ("ch_mult", "attn_resolutions", "resolution", "z_channels"):
                theirs = value
                for name in reversed([*path[: depth - (depth == 4)], *[key] * (depth == 4)]):
                    theirs = {name: theirs}
                try:
                    check_against(AutoencoderConfig(), 3, theirs, "theirs.yaml")
                except ValueError as error:
                    assert str(error).startswith("theirs.yaml") and "\n" not in str(error)


def test_a_diffusers_folder_too(tmp_path):
    diffusers = pytest.importorskip("diffusers", reason="the extra `peers` is not installed: the folder is read with diffusers")
    theirs = network(z=4)
    torch.save({"state_dict": {f"first_stage_model.{k}": v for k, v in theirs.state_dict().items()}}, tmp_path / "a.ckpt")
    (tmp_path / "theirs.yaml").write_text(DIFFUSION)
    options = {"config": tmp_path / "theirs.yaml", "diffusers": tmp_path / "vae"}
    import_legacy(tmp_path / "a.ckpt", tmp_path / "ours", **options)
    peer = diffusers.AutoencoderKL.from_pretrained(tmp_path / "vae").eval()
    assert (peer.config.scaling_factor, peer.config.sample_size) == (0.25, 32)
    assert Autoencoder.from_pretrained(tmp_path / "ours").latent.scale == 0.25
    assert_same(Autoencoder.from_diffusers(tmp_path / "vae"), theirs)
    x = torch.rand(1, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(peer.encode(x).latent_dist.mean, theirs(x)[0], rtol=1e-5, atol=1e-5)
    with pytest.raises(FileExistsError, match="ours holds a model: choose another folder"):
        import_legacy(tmp_path / "a.ckpt", tmp_path / "ours", **options)
    torch.save(network().state_dict(), tmp_path / "b.ckpt")  # 6 channels beside 4: none of diffusers'
    with pytest.raises(ValueError, match=r"z_channels=6 has no counterpart"):
        import_legacy(tmp_path / "b.ckpt", tmp_path / "b", diffusers=tmp_path / "b-diffusers")
    assert not (tmp_path / "b").exists()


class Command:
    """Unpickled by plain pickle it runs a program."""

    def __reduce__(self):
        import os

        return os.system, ("echo sprung > sprung.txt",)


@pytest.mark.parametrize("old", [False, True], ids=["zip", "before 1.6"])
def test_a_booby_trap_is_refused_and_not_run(old, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    weights = network(codes=20).state_dict()
    torch.save({"state_dict": weights, "callbacks": Command()}, "a.ckpt", _use_new_zipfile_serialization=not old)
    monkeypatch.setattr(sys, "argv", [str(RECIPE), "a.ckpt", "ours"])
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(RECIPE), run_name="__main__")
    shown = capsys.readouterr().err
    assert caught.value.code == 2 and shown.count("\n") == 1 and shown.startswith("import_legacy.py: error: a.ckpt")
    assert "posix.system" in shown and "save its state dict as .safetensors" in shown
    assert not Path("sprung.txt").exists() and not Path("ours").exists()


def test_classes_of_lightning_are_read_over(tmp_path, monkeypatch):
    """Its checkpoints name the class of a callback, and LlamaGen's hold the script's options."""
    import argparse
    import types

    module = types.ModuleType("pytorch_lightning.callbacks.model_checkpoint")
    parts = module.__name__.split(".")
    for depth in range(1, len(parts)):
        monkeypatch.setitem(sys.modules, ".".join(parts[:depth]), types.ModuleType(parts[depth - 1]))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    module.ModelCheckpoint = type("ModelCheckpoint", (), {"__module__": module.__name__})
    callbacks, theirs = {module.ModelCheckpoint: {"best": 1.0}}, network(codes=20)
    saved = {
        "state_dict": theirs.state_dict(),
        "callbacks": callbacks,
        "args": argparse.Namespace(lr=1),
        "now": module.ModelCheckpoint(),
    }
    torch.save(saved, tmp_path / "last.ckpt")
    assert_same(import_legacy(tmp_path / "last.ckpt", tmp_path / "ours", resolution=16), theirs)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda w: {}, "a.ckpt holds no autoencoder: expected tensors named encoder. and decoder., found nothing"),
        (lambda w: {"model.a": torch.zeros(1)}, "holds no autoencoder: .*, found model.a"),
        (lambda w: {"encoder.down_blocks.0.resnets.0.conv1.weight": torch.zeros(1)}, "has diffusers' names: .*from_diffusers"),
        (lambda w: {"encoder.a.weight": torch.zeros(1)}, "is of no network that can be read: expected encoder.down.0.block.0"),
        (lambda w: w | {"quantize.proj.weight": torch.zeros(1)}, "has a Gumbel quantizer"),
        (lambda w: w | {"quantize.embedding.embed_avg": torch.zeros(1)}, "1 unknown: quantize.embedding.embed_avg"),
        (lambda w: without(w, "decoder.conv_in.weight"), "has no tensor decoder.conv_in.weight, which an autoencoder of taming"),
        (lambda w: without(w, "decoder.up.0.block.1.conv1.bias"), "1 missing: decoder.up.0.block.1.conv1.bias"),
        (lambda w: w | {"decoder.norm_out.bias": torch.zeros(5)}, r"decoder.norm_out.bias is \[5\], expected \[32\]"),
        (
            lambda w: w | {"encoder.conv_in.weight": torch.zeros(0, 3)},
            r"encoder.conv_in.weight is \[0, 3\], expected the weights",
        ),
        (lambda w: w | {"decoder.conv_in.weight": torch.tensor(1.0)}, r"decoder.conv_in.weight is \[\], expected the weights"),
        (lambda w: [w], "a.ckpt holds a list, expected a dictionary"),
    ],
)
def test_what_is_refused(change, message, tmp_path):
    torch.save(change(network(codes=20).state_dict()), tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match=message) as caught:
        import_legacy(tmp_path / "a.ckpt", tmp_path / "ours", resolution=16)
    assert "\n" not in str(caught.value) and not (tmp_path / "ours").exists()


def without(weights, name):
    return {key: tensor for key, tensor in weights.items() if key != name}


def test_files_that_are_refused(tmp_path):
    (tmp_path / "a.ckpt").write_bytes(b"not a checkpoint")
    (tmp_path / "a.safetensors").write_bytes(b"short")
    with pytest.raises(FileNotFoundError, match=r"no checkpoint .*b.ckpt; did you mean '.*a.ckpt'\?"):
        import_legacy(tmp_path / "b.ckpt", tmp_path / "ours")
    with pytest.raises(ValueError, match=r"a.ckpt cannot be read as tensors and plain containers \(.*\): if you trust it"):
        import_legacy(tmp_path / "a.ckpt", tmp_path / "ours")
    with pytest.raises(ValueError, match=r"a.safetensors is damaged"):
        import_legacy(tmp_path / "a.safetensors", tmp_path / "ours")
    with pytest.raises(FileNotFoundError, match="no configuration file"):
        torch.save(network().state_dict(), tmp_path / "c.ckpt")
        import_legacy(tmp_path / "c.ckpt", tmp_path / "ours", config=tmp_path / "nowhere.yaml")
