"""Weights both ways between our `ldm` and diffusers' AutoencoderKL and VQModel: same outputs, same sizes, the same bits back."""

import dataclasses
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from dae.config import AutoencoderConfig, DecoderConfig, LDMConfig, VQConfig
from dae.models import Autoencoder
from dae.models.diffusers_weights import OPTIONS, config_from_diffusers
from dae.training.initialization import load_decoder, load_encoder

diffusers = pytest.importorskip("diffusers", reason="the extra `peers` is not installed: outputs are compared with diffusers'")

DOWN, UP = ("DownEncoderBlock2D", "AttnDownEncoderBlock2D"), ("UpDecoderBlock2D", "AttnUpDecoderBlock2D")
WEIGHTS = "diffusion_pytorch_model.safetensors"


def options(attends=(False, False), widths=(32, 64), **others):
    return {
        "block_out_channels": widths,
        "down_block_types": tuple(DOWN[a] for a in attends),
        "up_block_types": tuple(UP[a] for a in attends[::-1]),
        "sample_size": 16,
        **others,
    }


KL = {
    "plain": options(),
    "attention in some levels": options((False, True, False), (32, 32, 64), layers_per_block=2),
    "without 1 x 1 convolutions": options(use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.5, scaling_factor=0.3),
    "one 1 x 1 convolution": options(use_quant_conv=False),
    "no attention in the middle": options(mid_block_add_attention=False),
    "few groups": options(widths=(8, 12), norm_num_groups=4, latent_channels=2),
    "grey": options(in_channels=1, out_channels=1, act_fn="swish"),
    "one level": options((True,), (32,)),
}
VQ = {
    "plain": options(num_vq_embeddings=20),
    "narrow codes": options((False, True), latent_channels=6, vq_embed_dim=4, num_vq_embeddings=16),
}
CASES = [("AutoencoderKL", name) for name in KL] + [("VQModel", name) for name in VQ]


def theirs(kind, name, folder, seed=0):
    """Their model with random weights, saved into `folder`."""
    torch.manual_seed(seed)
    model = getattr(diffusers, kind)(**(KL if kind == "AutoencoderKL" else VQ)[name]).eval()
    for parameter in model.parameters():  # norms and biases too, where a wrong map would not show
        parameter.data += 0.1 * torch.randn_like(parameter)
    if kind == "VQModel":
        torch.nn.init.normal_(model.quantize.embedding.weight)
    model.save_pretrained(folder)
    return model


def pictures(model, size=16):
    return torch.rand(2, model.config.in_channels, size, size, generator=torch.Generator().manual_seed(1)) * 2 - 1


@torch.no_grad()
def assert_same_outputs(ours, peer, size=16):
    """Twice: in float32 to what roundings allow here, and in float64, where a wrong formula could not hide in them."""
    images = pictures(peer, size)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-11)):
        # Dozens of layers with values of about 1: roundings of 2^-24 resp. 2^-53 each.
        one, two, x = ours.to(dtype), peer.to(dtype), images.to(dtype)
        close = {"rtol": tolerance, "atol": tolerance}
        encoding = one.encode(x)
        if isinstance(two, diffusers.AutoencoderKL):
            posterior = two.encode(x).latent_dist
            torch.testing.assert_close(encoding.features, posterior.mean, **close)
            torch.testing.assert_close(encoding.log_variance, posterior.logvar, **close)
            torch.testing.assert_close(one.decode(posterior.mean).sample, two.decode(posterior.mean).sample, **close)
        else:
            features = two.encode(x).latents
            torch.testing.assert_close(encoding.features, features, **close)
            indices = two.quantize(features)[2][2].view(encoding.indices.shape)
            assert torch.equal(encoding.indices, indices) and len(indices.unique()) > 2
            torch.testing.assert_close(one(x).sample, two.decode(features).sample, rtol=1e-5, atol=1e-5)  # codes stay float32
    ours.float(), peer.float()


@pytest.mark.parametrize("kind, name", CASES)
def test_from_and_back(kind, name, tmp_path):
    peer = theirs(kind, name, tmp_path / "given")
    ours = Autoencoder.from_diffusers(tmp_path / "given")
    assert not ours.training and ours.resolution == 16
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in peer.parameters())
    assert_same_outputs(ours, peer)
    assert_same_outputs(ours, peer, size=24)

    ours.save_pretrained(tmp_path / "ours")
    Autoencoder.from_pretrained(tmp_path / "ours").to_diffusers(tmp_path / "unscaled")
    ours.to_diffusers(tmp_path / "back")
    for folder in ("back", "unscaled"):
        given, back = load_file(tmp_path / "given" / WEIGHTS), load_file(tmp_path / folder / WEIGHTS)
        assert given.keys() == back.keys() and all(torch.equal(tensor, back[key]) for key, tensor in given.items())
    loaded = getattr(diffusers, kind).from_pretrained(tmp_path / "back")
    private = {key for key in peer.config if key.startswith("_")}
    as_lists = {key: list(value) if isinstance(value, tuple) else value for key, value in peer.config.items()}
    as_lists["act_fn"] = "silu"
    as_lists["vq_embed_dim"] = as_lists.get("vq_embed_dim") or as_lists["latent_channels"]
    assert all(loaded.config.get(key, value) == value for key, value in as_lists.items() if key not in private)
    assert_same_outputs(ours, loaded)


@pytest.mark.parametrize(
    "bottleneck, metric", [("kl", "l2"), ("vq", "l2"), ("vq", "cosine"), ("vq_gradient", "cosine"), ("simvq", "l2")]
)
def test_one_of_ours_in_diffusers(bottleneck, metric, tmp_path):
    """Also codes on the sphere: the nearest of unit length to z is the nearest to z / |z|; and those that a map makes."""
    torch.manual_seed(0)
    config = AutoencoderConfig(
        architecture="ldm", base_channels=8, channel_multipliers=[1, 3], attention_resolutions=[8], latent_channels=4,
        bottleneck=bottleneck, vq=VQConfig(codebook_size=16, metric=metric), ldm=LDMConfig(norm_num_groups=8),
        decoder=DecoderConfig("dropout"),
    )  # fmt: skip
    if bottleneck != "kl":
        config.ldm.z_channels = 6
    ours = Autoencoder(config, 3, 16).eval()
    ours.encoder.quant_conv.weight.data *= 5  # so that several codes are used
    ours.to_diffusers(tmp_path, scaling_factor=0.25)
    kind = "AutoencoderKL" if bottleneck == "kl" else "VQModel"
    peer = getattr(diffusers, kind).from_pretrained(tmp_path).eval()
    assert peer.config.scaling_factor == 0.25
    assert_same_outputs(ours, peer)


def test_the_latents_scale_is_kept_and_none_is_made_up(tmp_path):
    theirs("AutoencoderKL", "without 1 x 1 convolutions", tmp_path / "given")
    ours = Autoencoder.from_diffusers(tmp_path / "given")
    assert ours.diffusers_config == {"scaling_factor": 0.3, "shift_factor": 0.5, "force_upcast": True}

    def scale(folder):
        config = json.loads((tmp_path / folder / "config.json").read_text())
        return config.get("scaling_factor"), config.get("shift_factor")

    ours.to_diffusers(tmp_path / "kept")
    ours.to_diffusers(tmp_path / "told", scaling_factor=2.0)
    Autoencoder.from_config(ours.to_config()).to_diffusers(tmp_path / "new")
    assert (scale("kept"), scale("told"), scale("new")) == ((0.3, 0.5), (2.0, 0.5), (1.0, None))


def test_decoders_come_from_such_a_folder(tmp_path):
    """with_decoder of a better decoder, and of another latent; from_pretrained names the way."""
    for name, seed in (("given", 0), ("foreign", 1)):
        theirs("AutoencoderKL", "attention in some levels", tmp_path / name, seed)
    ours, better = (Autoencoder.from_diffusers(tmp_path / "given", resolution=16) for _ in range(2))
    better.decoder.requires_grad_(False)
    for parameter in better.decoder.parameters():
        parameter.add_(0.1)
    better.to_diffusers(tmp_path / "better")
    z = torch.randn(1, ours.config.latent_channels, 8, 8)
    assert torch.equal(ours.with_decoder(tmp_path / "better").decode(z).sample, better.decode(z).sample)
    assert torch.equal(better.with_decoder(tmp_path / "given").decode(z).sample, ours.decode(z).sample)
    with pytest.raises(ValueError, match=r"foreign reads the latent .*, this autoencoder's is "):
        ours.with_decoder(tmp_path / "foreign")
    with pytest.raises(ValueError, match=r"given is a folder of diffusers: load it by Autoencoder\.from_diffusers"):
        Autoencoder.from_pretrained(tmp_path / "given")


def test_training_starts_from_such_a_folder(tmp_path):
    """init_from= of a configuration that makes the same network, also for images of another size."""
    theirs("AutoencoderKL", "attention in some levels", tmp_path / "vae")
    given = Autoencoder.from_diffusers(tmp_path)
    config = dataclasses.replace(given.config, attention_resolutions=[16])
    for source in (tmp_path, tmp_path / "vae"):
        torch.manual_seed(1)
        new = Autoencoder(config, 3, 32)
        load_encoder(new, str(source))
        assert load_decoder(new, str(source))
        assert all(torch.equal(tensor, given.state_dict()[key]) for key, tensor in new.state_dict().items())
    with pytest.raises(
        ValueError, match=r"the encoder of .* another architecture .*; for its architecture set .*base_channels=32"
    ):
        load_encoder(Autoencoder(dataclasses.replace(config, base_channels=64), 3, 32), str(tmp_path))


def test_earlier_names_and_convolutions_in_attention(tmp_path):
    theirs("AutoencoderKL", "attention in some levels", tmp_path)
    expected = Autoencoder.from_diffusers(tmp_path).state_dict()
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    weights = {}
    for key, tensor in load_file(tmp_path / WEIGHTS).items():
        for today, earlier in names.items():
            if f".{today}." in key:
                key, tensor = key.replace(today, earlier), tensor[:, :, None, None] if tensor.ndim == 2 else tensor
        weights[key] = tensor.contiguous()
    save_file(weights, tmp_path / WEIGHTS)
    found = Autoencoder.from_diffusers(tmp_path).state_dict()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in found.items())


def test_pipelines_variants_resolutions_and_dtypes(tmp_path):
    theirs("AutoencoderKL", "attention in some levels", tmp_path / "vae")
    (tmp_path / "model_index.json").write_text("{}")
    whole = Autoencoder.from_diffusers(tmp_path)
    other = Autoencoder.from_diffusers(str(tmp_path), resolution=64, torch_dtype=torch.bfloat16)
    assert (whole.resolution, other.resolution, other.dtype) == (16, 64, torch.bfloat16)
    assert (whole.config.attention_resolutions, other.config.attention_resolutions) == ([8], [32])
    with pytest.raises(ValueError, match=r"the encoder divides the resolution by 4; data.resolution=30 is not divisible"):
        Autoencoder.from_diffusers(tmp_path, resolution=30)
    (tmp_path / "vae" / WEIGHTS).rename(tmp_path / "vae" / "diffusion_pytorch_model.fp16.safetensors")
    with pytest.raises(FileNotFoundError, match=r"vae holds no .* but diffusion_pytorch_model.fp16.safetensors: name one by its"):
        Autoencoder.from_diffusers(tmp_path)
    assert torch.equal(Autoencoder.from_diffusers(tmp_path, variant="fp16").encoder.conv_in.weight, whole.encoder.conv_in.weight)


def test_weights_in_shards(tmp_path):
    model = theirs("AutoencoderKL", "plain", tmp_path)
    for variant in (None, "fp16"):
        folder = tmp_path / str(variant)
        model.save_pretrained(folder, variant=variant, max_shard_size="50KB")
        assert len(list(folder.glob("*.safetensors"))) > 1
        found, whole = (
            Autoencoder.from_diffusers(place, variant=named) for place, named in ((folder, variant), (tmp_path, None))
        )
        assert all(map(torch.equal, found.state_dict().values(), whole.state_dict().values()))
    sorted((tmp_path / "None").glob("*.safetensors"))[0].unlink()
    with pytest.raises(FileNotFoundError, match=r"holds no .*-00001-of-.*safetensors, which .*index.json names: copy the whole"):
        Autoencoder.from_diffusers(tmp_path / "None")
    for damaged in (
        '{"weight_map": {"conv": "../other.safetensors"}}',
        '{"weight_map": [1]}',
        '{"weight_map": {"conv": 1}}',
        "{}",
    ):
        (tmp_path / "None" / f"{WEIGHTS}.index.json").write_text(damaged)
        with pytest.raises(ValueError, match=r"index.json is damaged: expected a weight_map from tensors to the names of files"):
            Autoencoder.from_diffusers(tmp_path / "None")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folders = {kind: tmp_path_factory.mktemp(kind) for kind in ("AutoencoderKL", "VQModel")}
    for kind, folder in folders.items():
        theirs(kind, "plain", folder)
    return folders


@pytest.mark.parametrize(
    "kind, changes, message",
    [
        (
            "AutoencoderKL",
            {"_class_name": "AutoencoderTiny"},
            "holds a 'AutoencoderTiny': of diffusers' autoencoders AutoencoderKL",
        ),
        ("AutoencoderKL", {"_class_name": "ConsistencyDecoderVAE"}, "holds a 'ConsistencyDecoderVAE'"),
        ("AutoencoderKL", {"_class_name": "AsymmetricAutoencoderKL"}, "holds a 'AsymmetricAutoencoderKL'"),
        ("AutoencoderKL", {"_class_name": "UNet2DModel"}, "holds a 'UNet2DModel'"),
        ("AutoencoderKL", {"_class_name": None}, "holds a None"),
        ("AutoencoderKL", {"down_block_types": ["DownEncoderBlock2D", "DownBlock2D"]}, "down_block_types=.*'DownBlock2D'"),
        ("AutoencoderKL", {"up_block_types": ["AttnUpDecoderBlock2D", "UpDecoderBlock2D"]}, "decoder that mirrors its encoder"),
        ("AutoencoderKL", {"act_fn": "mish"}, "act_fn='mish'; silu can be read"),
        ("AutoencoderKL", {"out_channels": 6}, "in_channels=3, out_channels=6; as many channels out as in"),
        ("AutoencoderKL", {"norm_num_groups": 5}, "norm_num_groups=5, .*; a number of groups that divides"),
        ("AutoencoderKL", {"block_out_channels": [32]}, "one block type for each number of channels"),
        ("AutoencoderKL", {"block_out_channels": [32, "64"]}, "a list of positive numbers can be read"),
        ("AutoencoderKL", {"layers_per_block": 0}, "layers_per_block=0; a positive number"),
        ("AutoencoderKL", {"sample_size": "big"}, "sample_size='big'; a positive number can be read"),
        ("AutoencoderKL", {"batch_norm_eps": 1e-4}, "batch_norm_eps=0.0001, an option that cannot be read"),
        ("AutoencoderKL", {"layers_per_block": 2}, r"does not fit its configuration \(\d+ missing: .*up_blocks.0.resnets.2"),
        ("AutoencoderKL", {"latent_channels": 5}, r"of another shape: \S*conv_\S+ is .*, expected"),
        ("AutoencoderKL", {"use_quant_conv": False}, r"2 unknown: quant_conv.bias, quant_conv.weight"),
        ("VQModel", {"norm_type": "spatial"}, "norm_type='spatial'; group can be read"),
        ("VQModel", {"num_vq_embeddings": 21}, r"quantize.embedding.weight is \[20, 3\], expected \[21, 3\]"),
    ],
)
def test_configurations_that_are_refused(saved, tmp_path, kind, changes, message):
    shutil.copytree(saved[kind], tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text()) | changes
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message) as caught:
        Autoencoder.from_diffusers(tmp_path)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["AutoencoderKL", "VQModel"])
def test_nonsense_in_a_configuration_is_a_message(kind):
    """Whatever stands where, it is read or refused in one line."""
    nonsense = (None, 0, -1, 1.5, "x", "", [], [1], [["a"]], [None], {}, {"a": 1}, True)
    for key in ("_class_name", "scaling_factor", "another", *OPTIONS[kind]):
        for value in nonsense:
            try:
                config_from_diffusers({"_class_name": kind, key: value}, "config.json")
            except ValueError as error:
                assert str(error).startswith("config.json") and "\n" not in str(error)


def test_folders_that_are_refused(saved, tmp_path):
    def refused(error, message, path=tmp_path):
        with pytest.raises(error, match=message) as caught:
            Autoencoder.from_diffusers(path)
        assert "\n" not in str(caught.value)

    refused(FileNotFoundError, "no folder .*nowhere: expected one with config.json", tmp_path / "nowhere")
    refused(FileNotFoundError, "no folder .*config.json", saved["VQModel"] / "config.json")
    refused(FileNotFoundError, "holds no config.json")
    (tmp_path / "config.json").write_text("[")
    refused(ValueError, "config.json is damaged")
    shutil.copy(saved["VQModel"] / "config.json", tmp_path)
    refused(FileNotFoundError, "holds no diffusion_pytorch_model.safetensors: expected")
    (tmp_path / "diffusion_pytorch_model.bin").write_bytes(b"a pickle that nobody opens")
    refused(ValueError, r"a pickle alone \(diffusion_pytorch_model.bin\), which could run code: .*safe_serialization=True")
    (tmp_path / WEIGHTS).write_bytes(b"short")
    refused(ValueError, "diffusion_pytorch_model.safetensors is damaged")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"architecture": "conv"}, r"autoencoder.architecture=conv has no counterpart in .*: expected ldm"),
        ({"decoder": DecoderConfig("narrow")}, "a decoder of the family narrow has no counterpart"),
        ({"bottleneck": "fsq", "latent_channels": 4}, "autoencoder.bottleneck=fsq has no counterpart"),
        ({"channel_multipliers": [1, 2]}, r"norm_num_groups=32, of which levels of \[8, 16\] channels have \[8, 16\], has no"),
        ({"ldm": LDMConfig(z_channels=6)}, "z_channels=6 has no counterpart .* expected autoencoder.latent_channels=4"),
        ({"bottleneck": "vq", "ldm": LDMConfig(quant_conv=False)}, "a codebook without 1 x 1 convolutions has no counterpart"),
    ],
)
def test_what_diffusers_lacks(changes, message, tmp_path):
    settings = {
        "architecture": "ldm",
        "base_channels": 8,
        "channel_multipliers": [1, 1],
        "latent_channels": 4,
        "bottleneck": "kl",
    }
    model = Autoencoder(AutoencoderConfig(**settings | changes), 1, 8)
    with pytest.raises(ValueError, match=message):
        model.to_diffusers(tmp_path / "out")
    assert not (tmp_path / "out").exists()
