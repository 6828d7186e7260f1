"""The perceptual loss against LPIPS written out by hand, and its weights: where they come from and what is refused."""

import json
import os
import subprocess
import sys

import huggingface_hub
import pytest
import torch
import torch.nn.functional as F
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file, save_file

from dae.config import KernelsConfig
from dae.losses import PerceptualLoss
from dae.models import choose_kernels

WIDTHS = (4, 6, 8, 8, 8)
TORCHVISION = [0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28]  # the convolutions in torchvision's vgg16().features
POOLINGS = {5, 10, 17, 24}  # before which of them a pooling stands


@pytest.fixture(autouse=True)
def narrow(monkeypatch):
    monkeypatch.setattr(PerceptualLoss, "widths", WIDTHS)


@pytest.fixture
def weights():
    """VGG16's tensors by torchvision's names, and one of its classifier; large enough that no feature dies out."""
    generator = torch.Generator().manual_seed(0)
    tensors, channels = {"classifier.0.weight": torch.zeros(2, 2)}, 3
    for index, width in zip(
        TORCHVISION, [w for w, n in zip(WIDTHS, (2, 2, 3, 3, 3), strict=True) for _ in range(n)], strict=True
    ):
        size = (width, channels, 3, 3)
        tensors[f"features.{index}.weight"] = torch.randn(size, generator=generator) * (2 / (9 * channels)) ** 0.5
        tensors[f"features.{index}.bias"] = torch.rand(width, generator=generator) * 0.2
        channels = width
    return tensors


@pytest.fixture
def lin():
    generator = torch.Generator().manual_seed(1)
    return [torch.rand(1, width, 1, 1, generator=generator) for width in WIDTHS]


def images(size=16, channels=3, seed=2):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(2, 3, channels, size, size + 5, generator=generator) * 2 - 1


def by_hand(weights, lin, x, y):
    """In float64. The scaling layer: ImageNet's mean and deviation for images in [0, 1], moved to [-1, 1] and rounded."""
    shift = 2 * torch.tensor([0.485, 0.456, 0.406], dtype=torch.float64).view(3, 1, 1) - 1
    scale = 2 * torch.tensor([0.229, 0.224, 0.225], dtype=torch.float64).view(3, 1, 1)
    torch.testing.assert_close(shift.flatten().tolist(), [-0.030, -0.088, -0.188])

    def taps(x):
        x, found = ((x - shift) / scale), []
        for index in TORCHVISION:
            if index in POOLINGS:
                found.append(x)
                x = F.max_pool2d(x, 2, 2)
            x = F.relu(
                F.conv2d(x, weights[f"features.{index}.weight"].double(), weights[f"features.{index}.bias"].double(), padding=1)
            )
        return [*found, x]

    total = 0
    for a, b, w in zip(taps(x.double()), taps(y.double()), lin, strict=True):
        a, b = (f / (f.square().sum(1, keepdim=True).sqrt() + 1e-10) for f in (a, b))
        total = total + F.conv2d((a - b) ** 2, w.double()).mean(dim=(1, 2, 3))
    return total


@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_value_and_gradient(tmp_path, weights, lin, impl, layout):
    save_file(weights | {f"lin{i}.weight": w for i, w in enumerate(lin)}, tmp_path / "model.safetensors")
    loss = PerceptualLoss.from_pretrained(tmp_path).to(memory_format=layout)
    choose_kernels(loss, KernelsConfig(lpips=impl))
    assert loss.impl == impl
    x, y = (image.contiguous(memory_format=layout) for image in images())
    got, expected = loss(x.requires_grad_(), y), by_hand(weights, lin, wide := x.detach().double().requires_grad_(), y)
    # Thirteen float32 convolutions before it: a few 1e-7 each, and less than 1e-4 where a ReLU is at its kink.
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-7)
    cotangent = torch.tensor([1.0, -2.0, 0.5])
    (gradient,), (true,) = torch.autograd.grad(got, x, cotangent), torch.autograd.grad(expected, wide, cotangent.double())
    assert (gradient - true).norm() <= 1e-4 * true.norm() and gradient.stride() == x.stride()


def test_the_names_of_lpips_and_ones(tmp_path, weights, lin):
    x, y = images()
    for names, own, expected in (
        ("lin{}.weight", lin, lin),
        ("lin{}.model.1.weight", lin, lin),
        ("", [], [torch.ones_like(w) for w in lin]),
    ):
        save_file(weights | {names.format(i): w for i, w in enumerate(own)}, tmp_path / "vgg.safetensors")
        loss = PerceptualLoss.from_pretrained(str(tmp_path / "vgg.safetensors"))
        torch.testing.assert_close(loss(x, y).double(), by_hand(weights, expected, x, y), rtol=1e-5, atol=1e-7)


def test_equal_images_and_grey_ones(tmp_path, weights):
    save_file(weights, tmp_path / "model.safetensors")
    loss = PerceptualLoss.from_pretrained(tmp_path)
    x, _ = images()
    out = loss(x.requires_grad_(), x.detach().clone())
    assert (out == 0).all() and (torch.autograd.grad(out.sum(), x)[0] == 0).all()
    grey, other = images(channels=1)
    torch.testing.assert_close(loss(grey, other), loss(grey.repeat(1, 3, 1, 1), other.repeat(1, 3, 1, 1)))


def test_frozen_and_whole(tmp_path, weights):
    save_file(weights, tmp_path / "model.safetensors")
    loss = PerceptualLoss.from_pretrained(tmp_path)
    assert not any(parameter.requires_grad for parameter in loss.parameters())
    x, y = images()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: pytest.fail("the target's features are kept"), lambda t: t):
        loss.taps(y)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    (expected,) = torch.autograd.grad(loss(x.requires_grad_(), y).sum(), x)
    (got,) = torch.autograd.grad(compiled(x, y).sum(), x)
    torch.testing.assert_close(got, expected)
    with torch.autocast("cpu", torch.bfloat16):
        half = loss(x, y)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, loss(x, y), rtol=0.05, atol=0)  # bfloat16 features: 8 bits, thirteen layers


def test_names_are_those_of_the_published_files():
    names = set(PerceptualLoss().state_dict())
    assert names == {f"features.{i}.{p}" for i in TORCHVISION for p in ("weight", "bias")} | {f"lin{i}.weight" for i in range(5)}


def test_the_real_widths(monkeypatch):
    monkeypatch.undo()
    with torch.device("meta"):
        shapes = {name: list(tensor.shape) for name, tensor in PerceptualLoss().state_dict().items()}
    assert shapes["features.0.weight"] == [64, 3, 3, 3] and shapes["features.28.weight"] == [512, 512, 3, 3]
    assert shapes["features.10.weight"] == [256, 128, 3, 3] and shapes["lin2.weight"] == [1, 256, 1, 1]
    features = [torch.Size(shape).numel() for name, shape in shapes.items() if name.startswith("features")]
    assert sum(features) == 14_714_688  # torchvision's vgg16().features


def test_from_the_hub(tmp_path, weights, monkeypatch):
    save_file(weights, tmp_path / "model.safetensors")
    asked = []

    def download(repo_id, **options):
        asked.append(repo_id)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    loss = PerceptualLoss.from_pretrained("timm/vgg16.tv_in1k")
    assert asked == ["timm/vgg16.tv_in1k"]
    for name, tensor in load_file(tmp_path / "model.safetensors").items():
        assert name.startswith("classifier") or torch.equal(loss.state_dict()[name], tensor)


def test_no_weights(tmp_path, monkeypatch):
    def unreachable(*_, **__):
        raise LocalEntryNotFoundError("offline")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(
        FileNotFoundError, match=r"'some/where' is neither a folder nor a repository.*offline.*perceptual_weights"
    ):
        PerceptualLoss.from_pretrained("some/where")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("asked the Hub"))
    with pytest.raises(FileNotFoundError, match=r"no file nowhere/vgg\.safetensors.*torchvision's names"):
        PerceptualLoss.from_pretrained("nowhere/vgg.safetensors")
    with pytest.raises(FileNotFoundError, match=r"no file .*missing"):
        PerceptualLoss.from_pretrained(tmp_path / "missing")
    with pytest.raises(FileNotFoundError, match=r"holds no model\.safetensors"):
        PerceptualLoss.from_pretrained(tmp_path)


def test_other_files(tmp_path, weights, lin):
    path = tmp_path / "vgg.safetensors"
    path.write_bytes(b"no tensors at all")
    with pytest.raises(ValueError, match=r"vgg\.safetensors is damaged, or not a safetensors file"):
        PerceptualLoss.from_pretrained(path)
    for change, message in (
        ({"features.7.weight": None, "features.28.bias": None}, r"2 missing: features\.28\.bias, features\.7\.weight"),
        ({"features.10.bias": torch.zeros(5)}, r"features\.10\.bias is \[5\], expected \[8\]"),
        ({"features.30.weight": torch.zeros(5)}, r"1 unknown: features\.30\.weight"),
        ({"lin0.weight": lin[0], "lin2.weight": lin[2]}, r"3 missing: lin1\.weight, lin3\.weight, lin4\.weight"),
        ({f"lin{i}.weight": w.flatten() for i, w in enumerate(lin)}, r"lin0\.weight is \[4\], expected \[1, 4, 1, 1\]"),
    ):
        save_file({name: tensor for name, tensor in (weights | change).items() if tensor is not None}, path)
        with pytest.raises(ValueError, match=message):
            PerceptualLoss.from_pretrained(path)


def test_other_images():
    loss = PerceptualLoss()
    for x, y, message in (
        (images()[0], images()[0][:2], r"of one shape, got \[3, 3, 16, 21\] and \[2, 3, 16, 21\]"),
        (images(channels=2)[0], images(channels=2)[1], r"\[B, 1 or 3, H, W\]"),
        (images()[0][0], images()[1][0], r"\[B, 1 or 3, H, W\]"),
        (*images(size=15), r"at least 16 pixels, got \[15, 20\]"),
    ):
        with pytest.raises(ValueError, match=message):
            loss(x, y)


TRACE = """
import importlib, json, sys
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from dae.losses import PerceptualLoss

kernels, layout = sys.argv[1], getattr(torch, sys.argv[2])
importlib.import_module("dae_kernels.lpips.api").choose = lambda *_: kernels  # as on a GPU
copies = []

class Copies(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if str(function).startswith(("aten.clone", "aten.copy_", "aten.contiguous", "aten._to_copy")) and out.numel() >= 1000:
            copies.append([str(function), list(out.shape)])
        return out

def saved(function):
    kept = {}
    def keep(t):
        if not isinstance(t, torch.nn.Parameter):
            kept[t.untyped_storage()._cdata] = t.untyped_storage().nbytes()
        return t
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        out = function()
    return sum(kept.values()), out

loss = PerceptualLoss().to(torch.bfloat16, memory_format=layout)
with FakeTensorMode(allow_non_fake_inputs=True), Copies():
    sample, images = (torch.empty(2, 3, 32, 32, dtype=torch.bfloat16).contiguous(memory_format=layout) for _ in range(2))
    sample.requires_grad_()
    copies.clear()
    network, _ = saved(lambda: loss.taps(sample))
    targets = sum(2 * tap.numel() for tap in loss.taps(images))
    total, out = saved(lambda: loss(sample, images))
    out.mean().backward()
    assert sample.grad.stride() == sample.stride()
print(json.dumps({"copies": copies, "network": network, "targets": targets, "taps": total - network}))
"""


def trace(kernels, layout):
    """A step on fake tensors, in a process without the interpreter: the operators are those of a GPU run."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", "-c", TRACE, kernels, layout]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_no_layout_is_converted_and_only_the_taps_are_kept():
    fused = trace("triton", "channels_last")
    assert fused["copies"] == []
    weights = 2 * (64 + 128 + 256 + 512 + 512)
    assert fused["taps"] == fused["targets"] + weights  # the sample's taps are kept by the network already
    plain = trace("reference", "channels_last")  # keeps the sample's taps and the difference of the unit vectors, both in float32
    assert plain["network"] == fused["network"] and plain["taps"] > 4 * fused["taps"]
