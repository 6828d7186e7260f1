"""Frozen pretrained networks of timm: found by name or in a folder, fed with our images, read at any of their layers."""

from __future__ import annotations

import difflib
import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from dae.hub import CONFIG, WEIGHTS
from dae.optional import optional
from dae.precision import WideBuffers, wide

log = logging.getLogger(__name__)
INPUT = ("input_size", "interpolation", "mean", "std")  # what a network expects of an image, as timm names it

_weights = True


@contextmanager
def without_weights() -> Iterator[None]:
    """Inside the block `PretrainedNetwork.load` makes networks of random weights: to plan what a training takes."""
    global _weights
    before, _weights = _weights, False
    try:
        yield
    finally:
        _weights = before


class PretrainedNetwork(WideBuffers, nn.Module):
    """A network of timm whose weights never change: no gradients of its own, evaluation mode whatever is asked for.

    Args:
        network: of timm, without classifier.
        description: JSON-able: `architecture` and `model_args`, from which `build` makes the network again; `INPUT`;
            `fixed_input_size`; for provenance `model` (what was asked for), `timm` (its version) and `weights_sha256`.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, description: dict[str, Any]):
        super().__init__()
        self.network, self.description = network.requires_grad_(False), description
        for name in ("mean", "std"):
            self.register_buffer(name, torch.tensor(description[name]).reshape(-1, 1, 1))
        self.train(False)

    @classmethod
    def load(cls, name: str, asked_by: str, remedy: str = "", grid: int | None = None) -> Self:
        """A network with its weights.

        Args:
            name: of timm, perhaps after `timm:`, as `resnet18.a1_in1k` or `hf-hub:<repository>`; or a folder in timm's format:
                config.json, which names the `architecture`, and model.safetensors.
            asked_by: the setting that asks for it, for messages.
            remedy: what else could be done without timm.
            grid: height and width that its last feature map should have: its input is as many times its stride, and position
                embeddings are interpolated where it was trained with another size; None keeps the size of its training.

        Raises:
            ImportError: timm is missing or broken.
            ValueError: no such network, a folder that is not in timm's format, or a network of fixed size that cannot be made for
                another.
            FileNotFoundError: the weights are not there, or cannot be reached.
        """
        name = name.removeprefix("timm:")
        folder = Path(name)
        if folder.is_dir():
            architecture, model_args = _described(folder, asked_by)
        with optional("timm", asked_by, remedy):
            import timm
        if not folder.is_dir():
            if not timm.is_model(name.split(".")[0]) and not name.startswith("hf-hub:"):
                near = difflib.get_close_matches(name, timm.list_models(pretrained=True) + timm.list_models(), 3)
                raise ValueError(
                    f"{asked_by}: expected a folder with {CONFIG} and {WEIGHTS}, or a model of timm"
                    + (f"; near names are {', '.join(near)}" if near else f", got {name!r}")
                )
            architecture, model_args = name.split(".")[0], {}
        try:
            if name.startswith("hf-hub:"):
                _, architecture, model_args = timm.models.load_model_config_from_hf(name.removeprefix("hf-hub:"))
            source, options = f"local-dir:{name}" if folder.is_dir() else name, dict(model_args or {})
            network = _create(timm, source)
            settings = timm.data.resolve_model_data_config(network)
            if grid is not None and hasattr(network, "feature_info"):
                side = grid * network.feature_info[-1]["reduction"]
                if network.pretrained_cfg.get("fixed_input_size") and tuple(settings["input_size"][1:]) != (side, side):
                    options["img_size"] = side
                    network = _create(timm, source, img_size=side)
                settings = settings | {"input_size": (settings["input_size"][0], side, side)}
        except (OSError, RuntimeError) as error:
            raise FileNotFoundError(
                f"{asked_by}: timm {timm.__version__} cannot load the weights ({str(error).splitlines()[0]}); "
                f"connect to the Hub once, or give a folder with {CONFIG} and {WEIGHTS}"
            ) from error
        except (AssertionError, TypeError, ValueError) as error:  # of a network whose size is fixed for good
            size = "" if grid is None else f" for a feature map of {grid} x {grid}"
            raise ValueError(f"{asked_by}: timm cannot make it{size} ({' '.join(str(error).split())})") from error
        fixed = bool(getattr(network, "pretrained_cfg", {}).get("fixed_input_size"))
        digest = weights_sha256(network) if _weights else "0" * 64
        description = {"model": name, "timm": timm.__version__, "weights_sha256": digest}
        made = {"architecture": architecture, "model_args": options, "fixed_input_size": fixed}
        return cls(network, description | {key: settings[key] for key in INPUT} | made)

    @classmethod
    def build(cls, description: dict[str, Any], asked_by: str) -> Self:
        """The network of a `description` with random weights, for the caller to load. ImportError: timm is missing or broken."""
        with optional("timm", asked_by):
            import timm
        network = timm.create_model(description["architecture"], pretrained=False, num_classes=0, **description["model_args"])
        return cls(network, description)

    def train(self, mode: bool = True) -> Self:
        return super().train(False)

    def prepare(self, images: Tensor, *, size: Sequence[int] | None = None, clip: bool = True) -> Tensor:
        """Images [B, C, H, W] in [-1, 1], resized without cropping and normalised as the network expects.

        Args:
            images: of 1 channel, which becomes as many as the network reads, or of as many; to a network of 1 their mean.
            size: height and width to resize to; None is the one that the network expects.
            clip: whether what bicubic interpolation adds outside of [-1, 1] is cut off, and with it the gradient there.

        ValueError: another number of channels.
        """
        channels, *expected = self.description["input_size"]
        if images.shape[1] == 1:
            images = images.expand(-1, channels, -1, -1)
        elif channels == 1:
            images = images.mean(1, keepdim=True)
        if images.shape[1] != channels:
            raise ValueError(f"this network reads {channels} channels, the images have {images.shape[1]}")
        mode = self.description["interpolation"]
        mode = mode if mode in ("bicubic", "bilinear") else "bicubic"
        images = F.interpolate(
            images.to(wide(images.dtype)), list(size or expected), mode=mode, antialias=True, align_corners=False
        )
        images = ((images.clamp(-1, 1) if clip else images) + 1) / 2
        normalised = (images - self.mean.to(images.dtype)) / self.std.to(images.dtype)
        own = next((p.dtype for p in self.network.parameters()), normalised.dtype)
        return normalised.to(own)

    def forward(self, images: Tensor) -> Tensor:
        """Pooled features [B, D] of images [B, C, H, W] in [-1, 1]."""
        return self.network(self.prepare(images)).flatten(1)

    @property
    def num_layers(self) -> int:
        """Layers whose feature maps can be read. ValueError: timm does not say of this network."""
        self._reads_maps()
        return len(self.network.feature_info)  # type: ignore[arg-type]

    @property
    def stride(self) -> int:
        """Pixels of its input along a side per place of the last feature map."""
        self._reads_maps()
        return int(self.network.feature_info[-1]["reduction"])  # type: ignore[index]

    def feature_maps(
        self,
        images: Tensor,
        layers: Sequence[int],
        *,
        normalised: bool = False,
        size: Sequence[int] | None = None,
        clip: bool = True,
    ) -> list[Tensor]:
        """Feature maps [B, D, h, w] of some layers, tokens of a Transformer on their grid and without class and register tokens.

        Args:
            layers: ascending numbers below `num_layers`; for networks of stages the ends of their stages.
            normalised: whether a Transformer's last normalisation is applied.
            size, clip: as in `prepare`.

        ValueError: timm does not give feature maps of this network.
        """
        read, prepared = self._reads_maps(), self.prepare(images, size=size, clip=clip)
        return read(prepared, indices=list(layers), norm=normalised, output_fmt="NCHW", intermediates_only=True)

    def _reads_maps(self) -> Callable[..., list[Tensor]]:
        if not hasattr(self.network, "forward_intermediates") or not hasattr(self.network, "feature_info"):
            raise ValueError(f"{self.description['model']}: timm gives no feature maps of this network; take another")
        return self.network.forward_intermediates  # type: ignore[return-value]


def _create(timm: Any, source: str, **options: Any) -> Any:
    """timm's network without classifier. `without_weights` it may be called where tensors have no values, which timm reads."""
    if _weights:
        return timm.create_model(source, pretrained=True, num_classes=0, **options)
    fake: Any  # the mode of tensors without values, or None
    with unset_fake_temporarily() as fake:
        network = timm.create_model(source, pretrained=False, num_classes=0, **options)
    return network if fake is None else network._apply(fake.from_tensor)


def weights_sha256(network: nn.Module) -> str:
    """SHA-256 over names and values of a network's weights and buffers."""
    digest = hashlib.sha256()
    for key, tensor in sorted(network.state_dict().items()):
        digest.update(key.encode() + tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _described(folder: Path, asked_by: str) -> tuple[str, dict[str, Any]]:
    """`architecture` and `model_args` of a folder in timm's format; ValueError, FileNotFoundError: it is none."""
    try:
        config = dict(json.loads((folder / CONFIG).read_text()))
        architecture = str(config["architecture"])
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{asked_by}: expected a folder with {WEIGHTS} and a {CONFIG} that names timm's `architecture`, got {folder}"
        ) from error
    if not (folder / WEIGHTS).is_file():
        raise FileNotFoundError(f"{asked_by}: {folder} holds no {WEIGHTS}: expected the weights of {architecture} in it")
    return architecture, dict(config.get("model_args") or {})
