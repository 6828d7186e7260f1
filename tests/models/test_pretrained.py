"""Frozen pretrained networks: found, fed as they expect, read at their layers, and never changed."""

import pytest
import torch
from timm_stand_in import Tokens, write_folder

from dae.models.pretrained import PretrainedNetwork, weights_sha256

IMAGES = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_frozen_whatever_is_asked(timm):
    network = PretrainedNetwork.load("timm:stages", "x")
    network.train()
    assert not any(module.training for module in network.modules())
    assert not any(parameter.requires_grad for parameter in network.parameters())
    before = weights_sha256(network.network)
    images = IMAGES.clone().requires_grad_()
    sum(each.sum() for each in network.feature_maps(images, [0, 2])).backward()
    assert images.grad.abs().sum() > 0 and all(p.grad is None for p in network.parameters())
    assert weights_sha256(network.network) == before == network.description["weights_sha256"]


def test_maps_of_stages_and_of_tokens(timm, tmp_path):
    stages = PretrainedNetwork.load("stages", "x")
    assert stages.num_layers == 3
    assert [list(each.shape) for each in stages.feature_maps(IMAGES, [0, 2])] == [[2, 4, 8, 8], [2, 8, 2, 2]]
    tokens = PretrainedNetwork.load(str(write_folder(tmp_path / "tokens", "tokens")), "x")
    [plain], [normalised] = (tokens.feature_maps(IMAGES, [2], normalised=on) for on in (False, True))
    assert plain.shape == (2, 8, 4, 4), "without the class token, on the grid of the patches"
    torch.testing.assert_close(normalised, tokens.network.norm(plain.movedim(1, -1)).movedim(-1, 1))


def test_another_input_size(timm):
    """Asked of a network of fixed size when it is made, of others when images are prepared."""
    for name, shape in {"tokens": (2, 8, 8, 8), "stages": (2, 8, 4, 4)}.items():
        network = PretrainedNetwork.load(name, "x", grid=shape[2])
        assert network.feature_maps(IMAGES, [network.num_layers - 1])[0].shape == shape


def test_built_again_without_weights(timm):
    network = PretrainedNetwork.load("tokens", "x", grid=8)
    again = PretrainedNetwork.build(network.description, "x")
    again.load_state_dict(network.state_dict())
    for a, b in zip(network.feature_maps(IMAGES, [0, 2]), again.feature_maps(IMAGES, [0, 2]), strict=True):
        assert torch.equal(a, b)
    assert timm.asked[-1] == ("tokens", False, 0), "no weights are asked for"


def test_gradient_outside_of_the_range_of_images(timm):
    network, images = PretrainedNetwork.load("stages", "x"), (3 * IMAGES).requires_grad_()
    for clip in (True, False):
        (gradient,) = torch.autograd.grad(network.prepare(images, clip=clip).sum(), images)
        assert (gradient != 0).all() == (not clip)


def test_refusals(timm, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"^loss\.x: expected a folder with config\.json and .* or a model of timm"):
        PretrainedNetwork.load("nothing-like-it", "loss.x")
    folder = write_folder(tmp_path / "a", "stages")
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"^loss.x: .* holds no model.safetensors: expected the weights of stages"):
        PretrainedNetwork.load(str(folder), "loss.x")
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"^loss.x: expected a folder with model.safetensors and a config.json"):
        PretrainedNetwork.load(str(folder), "loss.x")
    with pytest.raises(ValueError, match="small: timm gives no feature maps of this network; take another"):
        _ = PretrainedNetwork.load("small", "loss.x").num_layers
    with pytest.raises(ValueError, match="reads 3 channels, the images have 2"):
        PretrainedNetwork.load("stages", "x").prepare(IMAGES[:, :2])
    monkeypatch.setitem(__import__("sys").modules, "timm", None)
    for call in (lambda: PretrainedNetwork.load("stages", "loss.x"), lambda: PretrainedNetwork.build({}, "loss.x")):
        with pytest.raises(ImportError, match=r"loss\.x needs the package timm"):
            call()


def test_bf16_weights_read_images_of_float32(timm):
    network = PretrainedNetwork.load("tokens", "x").to(torch.bfloat16)
    assert isinstance(network.network, Tokens) and network.feature_maps(IMAGES, [2])[0].dtype == torch.bfloat16
