"""A stand-in for timm, which the suite does not need: three small networks by name, and what was asked of it.

`small` pools colours, `stages` is convolutional with stages that halve the image, `tokens` has a class token and layers of one
size, as a Vision Transformer. A folder in timm's format is one of them with its own weights.
"""

import itertools
import json
import types
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

SETTINGS = {"input_size": (3, 16, 20), "interpolation": "bilinear", "mean": (0.5, 0.4, 0.3), "std": (0.5, 0.2, 0.1)}
SQUARE = {"input_size": (3, 16, 16), "interpolation": "bilinear", "mean": (0.5, 0.4, 0.3), "std": (0.5, 0.2, 0.1)}


class Small(nn.Module):
    pretrained_cfg = SETTINGS

    def forward(self, x):
        return torch.cat([x.mean((2, 3)), x.amax((2, 3))], 1)


class Stages(nn.Module):
    """Three stages of 4, 6 and 8 channels, each halving the size."""

    pretrained_cfg = SQUARE | {"fixed_input_size": False}

    def __init__(self):
        super().__init__()
        widths = [3, 4, 6, 8]
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in itertools.pairwise(widths))
        self.norm = nn.BatchNorm2d(4)
        self.feature_info = [{"num_chs": width, "reduction": 2 ** (i + 1)} for i, width in enumerate(widths[1:])]

    def forward_intermediates(self, x, indices, norm, output_fmt, intermediates_only):
        assert output_fmt == "NCHW" and intermediates_only
        maps = []
        for number, conv in enumerate(self.convs):
            x = torch.tanh(self.norm(conv(x)) if number == 0 else conv(x))
            maps.append(x)
        return [maps[index] for index in indices]


class Tokens(nn.Module):
    """Patches of 4 pixels, a class token, three residual layers of attention, and a last normalisation."""

    pretrained_cfg = SQUARE | {"fixed_input_size": True}

    def __init__(self, img_size=16):
        super().__init__()
        self.side = img_size // 4
        self.patch = nn.Conv2d(3, 8, 4, stride=4)
        self.cls, self.position = nn.Parameter(torch.randn(1, 1, 8)), nn.Parameter(torch.randn(1, self.side**2, 8))
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.norm = nn.LayerNorm(8)
        self.feature_info = [{"num_chs": 8, "reduction": 4}] * 3

    def forward_intermediates(self, x, indices, norm, output_fmt, intermediates_only):
        assert output_fmt == "NCHW" and intermediates_only and x.shape[2:] == (4 * self.side, 4 * self.side)
        h = torch.cat([self.cls.expand(len(x), -1, -1), self.patch(x).flatten(2).mT + self.position], 1)
        maps = []
        for layer in self.layers:
            q = layer(h)
            h = h + nn.functional.scaled_dot_product_attention(q[:, None], q[:, None], q[:, None])[:, 0]
            tokens = self.norm(h) if norm else h
            maps.append(tokens[:, 1:].mT.unflatten(2, (self.side, self.side)))
        return [maps[index] for index in indices]


NETWORKS = {"small": Small, "stages": Stages, "tokens": Tokens}


def make_timm():
    """A module to put into `sys.modules`; its `asked` lists the arguments of `create_model`."""
    fake = types.ModuleType("timm")
    fake.__version__, fake.asked = "1.0", []
    fake.is_model = lambda name: name in NETWORKS
    fake.list_models = lambda pretrained=False: ["small", "large"]
    fake.data = types.SimpleNamespace(
        resolve_model_data_config=lambda model: {key: model.pretrained_cfg[key] for key in SETTINGS} | {"crop_pct": 0.9}
    )

    def create_model(name, pretrained, num_classes, **options):
        fake.asked.append((name, pretrained, num_classes))
        if name.endswith("offline"):
            raise RuntimeError("cannot reach the Hub\nand more")
        folder = Path(name.removeprefix("local-dir:"))
        local = name.startswith("local-dir:")
        architecture = json.loads((folder / "config.json").read_text())["architecture"] if local else name
        with torch.random.fork_rng():
            torch.manual_seed(len(architecture) if pretrained else 0)  # pretrained weights are the same ones each time
            network = NETWORKS[architecture](**options).eval()
        if local and pretrained and (folder / "model.safetensors").stat().st_size:
            weights = load_file(folder / "model.safetensors")
            if "position" in weights:  # as timm does for another size
                grid = weights["position"].mT.unflatten(2, (4, 4))
                weights["position"] = nn.functional.interpolate(grid, (network.side, network.side)).flatten(2).mT
            network.load_state_dict(weights)
        return network

    fake.create_model = create_model
    return fake


def write_folder(folder, architecture, seed=0):
    """A folder in timm's format with weights of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        save_file(NETWORKS[architecture]().state_dict(), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"architecture": architecture}))
    return folder


def real_weights():
    """The folder of a real pretrained network beside the checkout. Skips where it is not, or timm cannot be imported."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "weights" / "mobilenetv2_100"
    try:
        import timm  # noqa: F401
    except Exception as error:  # RuntimeError, where torchvision was built for another torch
        pytest.skip(f"timm cannot be imported: {type(error).__name__}")
    if not folder.is_dir():
        pytest.skip("no pretrained weights beside the checkout")
    return folder
