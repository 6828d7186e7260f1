"""The architectures behind one interface: shapes, weak decoders, kernels, checkpointing, dtypes, compilation, refusals."""

import copy
import dataclasses
import importlib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from dae.config import AutoencoderConfig, DecoderConfig, KernelsConfig, LDMConfig, ViTConfig, VQConfig, load_config
from dae.models import Autoencoder, choose_kernels
from dae.models.architectures import ARCHITECTURES, downsampling_factor, latent_size
from dae.models.layers import GroupNorm, ResidualBlock, SelfAttention2d, TransformerBlock
from dae.training import plan_stages

NEW = ("ldm", "vit")
FAMILIES = ("full", "linear", "overlap", "projection", "narrow", "shallow", "dropout")
SETTINGS = {
    "conv": {"base_channels": 8, "channel_multipliers": [1, 2], "attention_resolutions": [4]},
    "ldm": {"base_channels": 8, "channel_multipliers": [1, 2], "attention_resolutions": [4], "ldm": LDMConfig(z_channels=6)},
    "vit": {"vit": ViTConfig(patch_size=2, width=16, depth=2, num_heads=2)},
}


def make(architecture, channels=1, resolution=8, seed=0, **changes) -> Autoencoder:
    settings = {"architecture": architecture, "latent_channels": 4, "vq": VQConfig(codebook_size=16), **SETTINGS[architecture]}
    torch.manual_seed(seed)
    return Autoencoder(AutoencoderConfig(**settings | changes), channels, resolution)


def pictures(batch=2, channels=1, height=8, width=8, seed=1):
    return torch.rand(batch, channels, height, width, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_the_knob_offers_what_is_registered():
    assert (
        tuple(ARCHITECTURES)
        == next(f for f in dataclasses.fields(AutoencoderConfig) if f.name == "architecture").metadata["choices"]
    )
    with pytest.raises(ValueError, match=r"autoencoder.architecture: expected 'conv' or 'ldm' or 'vit', got 'unet'"):
        downsampling_factor(AutoencoderConfig(architecture="unet"))


@pytest.mark.parametrize("bottleneck", ["vq", "kl"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("architecture", NEW)
def test_shapes(architecture, family, bottleneck):
    model = make(architecture, 3, bottleneck=bottleneck, decoder=DecoderConfig(family, num_blocks=1))
    assert model.factor == 2 and model.latent_size == 4 == latent_size(model.config, 8)
    for height, width in ((8, 8), (4, 12)):  # not only the size that it was made for
        output = model(pictures(2, 3, height, width))
        assert output.sample.shape == (2, 3, height, width)
        assert output.encoding.latents.shape == output.encoding.features.shape == (2, 4, height // 2, width // 2)
    model.eval()
    assert model.encode(pictures(0, 3)).latents.shape == (0, 4, 4, 4)
    rebuilt = Autoencoder.from_config(model.to_config())
    rebuilt.load_state_dict(model.state_dict())
    assert torch.equal(rebuilt.eval()(pictures(2, 3)).sample, model.eval()(pictures(2, 3)).sample)


@pytest.mark.parametrize("architecture", NEW)
def test_weak_decoders_are_weaker(architecture):
    def size(family, **options):
        return sum(p.numel() for p in make(architecture, decoder=DecoderConfig(family, **options)).decoder.parameters())

    def blocks(count):
        decoder = make(architecture, decoder=DecoderConfig("shallow", num_blocks=count)).decoder
        return sum(isinstance(m, (ResidualBlock, TransformerBlock)) for m in decoder.modules())

    full = size("full")
    assert size("linear") < size("narrow", width_factor=0.5) < size("narrow", width_factor=1.0) == full == size("dropout")
    assert [blocks(count) for count in (0, 1, 2)] == {"ldm": [0, 4, 6], "vit": [0, 1, 2]}[architecture]  # ldm: two in the middle
    assert size("shallow", num_blocks=2) == full
    with pytest.raises(ValueError, match=r"num_blocks of a shallow decoder lies in 0\.\.2"):
        make(architecture, decoder=DecoderConfig("shallow", num_blocks=3))


@pytest.mark.parametrize("architecture", NEW)
def test_dropout_drops_in_training_only(architecture):
    model, full = (make(architecture, decoder=DecoderConfig(family)) for family in ("dropout", "full"))
    full.load_state_dict(model.state_dict())
    latents = torch.randn(2, 4, 4, 4)
    assert torch.equal(model.eval().decode(latents).sample, full.eval().decode(latents).sample)
    assert not torch.equal(model.train().decode(latents).sample, model.decode(latents).sample)


@pytest.mark.parametrize("architecture", NEW)
def test_the_switch_replaces_the_decoder_alone(architecture):
    model = make(architecture, decoder=DecoderConfig("linear")).train()
    before = copy.deepcopy(model.encoder.state_dict())
    model.freeze_latent()
    model.replace_decoder(DecoderConfig("full"))
    assert model.decode(model.encode(pictures()).latents).sample.shape == (2, 1, 8, 8)
    assert all(torch.equal(value, before[name]) for name, value in model.encoder.state_dict().items())


@pytest.mark.parametrize("family", ["full", "dropout"])
@pytest.mark.parametrize("architecture", NEW)
def test_gradient_checkpointing_recomputes_equal_gradients(architecture, family, monkeypatch):
    gradients, calls = [], []
    for name in ("layers", "vit"):
        module = __import__(f"dae.models.{name}", fromlist=["checkpoint"])
        original = module.checkpoint
        monkeypatch.setattr(module, "checkpoint", lambda f, *x, o=original, **k: calls.append(f) or o(f, *x, **k))
    for enabled in (False, True):
        model = make(architecture, decoder=DecoderConfig(family)).train()
        model.enable_gradient_checkpointing(enabled)
        torch.manual_seed(3)
        output = model(pictures())
        (output.sample.square().mean() + output.encoding.loss).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
        assert len(calls) == 4 * enabled, "two levels, or two blocks, of encoder and of decoder"
    for name, gradient in gradients[0].items():
        assert gradient is not None and torch.equal(gradient, gradients[1][name]), name


@pytest.mark.parametrize("architecture", NEW)
def test_kernels_are_chosen(architecture):
    model = make(architecture)
    choose_kernels(model, KernelsConfig(attention="reference", group_norm_silu="reference"))
    runs = [m for m in model.modules() if isinstance(m, (GroupNorm, SelfAttention2d, TransformerBlock))]
    assert runs and all(m.impl == "reference" for m in runs)
    others = [m for m in model.modules() if isinstance(m, (nn.GroupNorm, nn.MultiheadAttention)) and not isinstance(m, GroupNorm)]
    assert not others


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("architecture", NEW)
def test_saved_and_loaded_in_a_dtype(architecture, dtype, tmp_path):
    model = make(architecture, bottleneck="kl").eval()
    model.save_pretrained(tmp_path)
    loaded = Autoencoder.from_pretrained(tmp_path, torch_dtype=dtype)
    images = pictures().to(dtype)
    sample = loaded(images).sample
    assert sample.dtype == dtype and loaded.encode(images).latents.dtype == dtype
    exact = copy.deepcopy(loaded).double()(images.double()).sample
    # A few dozen layers round their results by eps / 2 each; errors add in quadrature.
    assert (sample.double() - exact).norm() <= len(list(model.modules())) ** 0.5 * torch.finfo(dtype).eps * exact.norm()
    with torch.autocast("cpu", torch.bfloat16):
        assert model.encode(pictures()).features.dtype == torch.float32


@pytest.mark.parametrize("architecture", NEW)
def test_channels_last_computes_the_same(architecture):
    model = make(architecture, bottleneck="kl").double().eval()
    last = copy.deepcopy(model).to(memory_format=torch.channels_last)
    images = pictures().double()
    one, two = model(images).sample, last(images.contiguous(memory_format=torch.channels_last)).sample
    torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-10)  # sums in another order, in float64


@pytest.mark.parametrize("architecture", NEW)
def test_compiled_as_one_graph(architecture):
    model = make(architecture, bottleneck="kl").eval()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    images = pictures()
    torch.testing.assert_close(compiled(images).sample, model(images).sample, rtol=1e-5, atol=1e-5)  # float32 in another order


def test_time_of_a_network_without_levels_is_one_block(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "profiling"))
    clock = importlib.import_module("clock")
    watched, model = [], make("vit")
    watcher = SimpleNamespace(watch=lambda module, block: watched.append((module, block)))
    clock.watch_encoder(watcher, model)
    clock.watch_decoder(watcher, model)
    assert watched == [(model.encoder, "encoder"), (model.bottleneck, "bottleneck"), (model.decoder, "decoder")]


def test_a_transformer_knows_where_its_patches_are():
    """Without rotary positions the encoder could not tell patches apart: swapping two would swap their features."""
    model = make("vit", bottleneck="kl").double().eval()
    images = pictures(1).double()
    swapped = images.clone()
    swapped[..., 0:2, 0:2], swapped[..., 4:6, 6:8] = images[..., 4:6, 6:8], images[..., 0:2, 0:2]
    one, two = model.encode(images).latents, model.encode(swapped).latents
    assert not torch.allclose(one[..., 0, 0], two[..., 2, 3], rtol=1e-4)
    model.encoder.rotary[0], model.encoder.rotary[1] = 1.0, 0.0  # no angle turns
    one, two = model.encode(images).latents, model.encode(swapped).latents
    torch.testing.assert_close(one[..., 0, 0], two[..., 2, 3], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "architecture, changes, resolution, message",
    [
        ("vit", {}, 7, r"vit.patch_size=2: the encoder divides the resolution by 2; data.resolution=7 is not .* are: 6, 8$"),
        ("vit", {"vit": ViTConfig(patch_size=16, width=8, num_heads=1)}, 8, r"The nearest that are: 16$"),
        ("vit", {"vit": ViTConfig(patch_size=2, width=18, num_heads=4)}, 8, r"head dimension that 4 divides, as 16 over 4"),
        (
            "ldm",
            {"ldm": LDMConfig(z_channels=6, quant_conv=False)},
            8,
            r"z_channels=6 and .*=4 differ: that needs autoencoder.ldm.quant_conv=true",
        ),
        ("ldm", {"ldm": LDMConfig(z_channels=6, post_quant_conv=False)}, 8, r"that needs autoencoder.ldm.post_quant_conv=true"),
        ("ldm", {"channel_multipliers": []}, 8, "channel_multipliers is empty"),
    ],
)
def test_what_is_refused(architecture, changes, resolution, message):
    with pytest.raises(ValueError, match=message):
        make(architecture, resolution=resolution, **changes)


def test_stages_refuse_what_an_architecture_lacks():
    with pytest.raises(ValueError, match=r"attention_resolutions: no level has \[5\]; the feature maps' sizes are \[8, 4\]"):
        plan_stages(load_config(None, ["autoencoder.architecture=ldm", "autoencoder.attention_resolutions=[5]"]))
    with pytest.raises(ValueError, match="head dimension that 4 divides"):
        plan_stages(load_config(None, ["autoencoder.architecture=vit", "autoencoder.vit.num_heads=7"]))
