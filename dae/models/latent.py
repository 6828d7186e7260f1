"""The identity of a latent: `latent.json` beside an autoencoder says which latent its decoder reads, and how it is scaled.

Two autoencoders of one id have the same encoder and bottleneck and read images prepared in the same way: their decoders can be
swapped, and what was trained on the latent of one is right for the other.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

from dae.config import AutoencoderConfig, config_differences, from_dict
from dae.files import write_file
from dae.hub import CONFIG, LATENT, WEIGHTS, fingerprint
from dae.quantizers import bottleneck_class

if TYPE_CHECKING:
    from dae.models.autoencoder import Autoencoder

PARTS = ("encoder", "bottleneck")
ROUNDED = (torch.float16, torch.bfloat16)
VALUE_RANGE = (-1.0, 1.0)  # of the images
# Knobs of `autoencoder` that change no latent: of decoder and training, and the name of a network whose weights are digested.
NO_LATENT = (
    "preset", "encoder", "decoder", "vq.ema_decay", "vq.commitment_weight", "vq.kmeans_iterations", "vq.revive_threshold",
    "vq.gradient", "lfq.entropy_weight", "lfq.diversity", "lfq.inverse_temperature", "lfq.commitment_weight",
    "bsq.entropy_weight", "bsq.diversity", "bsq.inverse_temperature", "kl", "ldm.post_quant_conv",
)  # fmt: skip


@dataclass(frozen=True)
class Latent:
    """What `latent.json` holds.

    Attributes:
        id: SHA-256 of `weights`, `architecture` and `transform`, which the decoder has no part in.
        kind: discrete or continuous.
        channels, num_codes, downsampling_factor: of the latent; a continuous one has no codes.
        transform: what was done to an image: resolution, channels, center_crop (None: not known), value_range.
        architecture: knobs of encoder and bottleneck that are not at their defaults.
        weights: SHA-256 of the tensors of encoder and bottleneck in float32.
        rounded: the same after `.to(dtype)`, by which a model that was saved in 16 bits is recognised.
        images: how many training images the following were measured on; 0 for none.
        mean, std: of each channel, for a continuous latent of samples of the posteriors.
        range: least and greatest value (continuous: of the posteriors' means).
        scale, shift: a model of the latent z should see (z - shift) * scale: 1 / standard deviation and mean of all values, or
            those that came with an imported model. diffusers' `scaling_factor` and `shift_factor`.
        diffusers: of an imported model, what its configuration has beside the network, `Autoencoder.diffusers_config`.
    """

    id: str
    kind: str
    channels: int
    num_codes: int | None
    downsampling_factor: int
    transform: dict[str, Any]
    architecture: dict[str, Any]
    weights: str
    rounded: dict[str, str]
    images: int = 0
    mean: list[float] | None = None
    std: list[float] | None = None
    range: list[float] | None = None
    scale: float | None = None
    shift: float | None = None
    diffusers: dict[str, Any] = field(default_factory=dict)

    def is_of(self, weights: str) -> bool:
        """Whether a model whose tensors have this digest has this latent, up to the rounding of saving in 16 bits."""
        return weights in (self.weights, *self.rounded.values())

    def save(self, folder: Path) -> None:
        write_file(folder / LATENT, json.dumps(dataclasses.asdict(self), indent=1).encode())

    @classmethod
    def load(cls, folder: Path) -> Self | None:
        """That of a folder; None if it was saved by an earlier version. ValueError: the file is damaged."""
        if not (folder / LATENT).is_file():
            return None
        try:
            values = json.loads((folder / LATENT).read_text())
            known = {f.name for f in dataclasses.fields(cls)}
            latent = cls(**{key: value for key, value in values.items() if key in known})  # a later version may add some
            if not (isinstance(latent.id, str) and isinstance(latent.weights, str) and isinstance(latent.rounded, dict)):
                raise TypeError("id, weights and rounded are expected to be text, text and a table")
            return latent
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{folder / LATENT} is damaged ({error}): restore it, or delete it, which makes it a folder of earlier versions"
            ) from error


def identify(autoencoder: Autoencoder, weights: Mapping[str, Tensor] | None = None, center_crop: bool | None = None) -> Latent:
    """The latent of an autoencoder: the one that it was loaded or trained with, unless its weights have changed since.

    Args:
        weights: a state dict that takes the place of its own.
        center_crop: how the images were cropped, where a new identity is made.
    """
    state = autoencoder.state_dict() if weights is None else weights
    config, known, bottleneck = autoencoder.config, autoencoder.latent, autoencoder.bottleneck
    digest = weights_digest(state, config)
    if known is not None and known.is_of(digest):
        return known
    if known is not None and center_crop is None:
        center_crop = known.transform["center_crop"]
    imported = autoencoder.diffusers_config
    size = {"resolution": autoencoder.resolution, "channels": autoencoder.image_channels}
    transform = size | {"center_crop": center_crop, "value_range": list(VALUE_RANGE)}
    architecture = described(config)
    parts = {"weights": digest, "architecture": architecture, "transform": transform}
    return Latent(
        id=hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest(),
        kind="discrete" if bottleneck.discrete else "continuous",
        channels=config.latent_channels,
        num_codes=bottleneck.num_codes(config) if bottleneck.discrete else None,
        downsampling_factor=autoencoder.factor,
        transform=transform,
        architecture=architecture,
        weights=digest,
        rounded={str(dtype).removeprefix("torch."): _rounded(autoencoder, state, dtype) for dtype in ROUNDED},
        scale=imported.get("scaling_factor"),
        shift=imported.get("shift_factor"),
        diffusers=dict(imported),
    )


def described(config: AutoencoderConfig) -> dict[str, Any]:
    """The knobs of encoder and bottleneck that are not at their defaults, so that a later version's new knob changes no id."""
    changed = config_differences(AutoencoderConfig(), config)
    return {each.key: each.second for each in changed if not f"{each.key}.".startswith(tuple(f"{name}." for name in NO_LATENT))}


def weights_digest(state: Mapping[str, Tensor], config: AutoencoderConfig) -> str:
    """SHA-256 of the tensors of a state dict that make the latent, in float32 and in the order of their names."""
    left_out, digest = bottleneck_class(config).statistics, hashlib.sha256()
    for name in sorted(state):
        if name.split(".")[0] in PARTS and name.rpartition(".")[2] not in left_out:
            tensor = state[name].detach().cpu()
            tensor = tensor.float() if tensor.is_floating_point() else tensor.long()
            digest.update(f"{name} {list(tensor.shape)}\n".encode() + tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def _rounded(autoencoder: Autoencoder, state: Mapping[str, Tensor], dtype: torch.dtype) -> str:
    """Digest of the tensors after `.to(dtype)`, which keeps some buffers in float32."""
    latent = nn.ModuleDict({name: copy.deepcopy(getattr(autoencoder, name)) for name in PARTS}).float()
    latent.load_state_dict({name: value for name, value in state.items() if name.split(".")[0] in PARTS})
    return weights_digest(latent.to(dtype).state_dict(), autoencoder.config)


def saved_latent(folder: Path) -> Latent | None:
    """The identity of the autoencoder in a folder, compared with its weights; None if an earlier version saved it.

    ValueError: a file is damaged, or latent.json belongs to other weights.
    """
    from safetensors import SafetensorError, safe_open

    if (latent := Latent.load(folder)) is None:
        return None
    try:
        config = from_dict(AutoencoderConfig, json.loads((folder / CONFIG).read_text())["autoencoder"])
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            names = [name for name in file.keys() if name.split(".")[0] in PARTS]  # noqa: SIM118
            digest = weights_digest({name: file.get_tensor(name) for name in names}, config)
    except (OSError, ValueError, TypeError, KeyError, SafetensorError) as error:
        raise ValueError(f"the autoencoder in {folder} is damaged ({error}): make it again, or restore its files") from error
    refuse_other_weights(latent, digest, folder)
    return latent


def refuse_other_weights(latent: Latent, digest: str, folder: Path) -> None:
    """ValueError unless `latent` is that of tensors with this digest."""
    if not latent.is_of(digest):
        raise ValueError(
            f"{folder / LATENT} is of the encoder {brief(latent.weights)}, {folder / WEIGHTS} holds {brief(digest)}: restore the "
            f"one that was replaced, or delete {LATENT}, which makes it a folder of earlier versions"
        )


def identities(folder: Path) -> tuple[str, ...]:
    """What a cache or a prior may call the latent of the autoencoder in `folder`, the name to be given from now on first.

    That is the latent's id. Earlier versions named the whole autoencoder by `dae.hub.fingerprint`, and so does an autoencoder
    without latent.json.

    ValueError: as `saved_latent`.
    """
    latent = saved_latent(folder)
    return ((latent.id,) if latent else ()) + (fingerprint(folder),)


def brief(identity: str) -> str:
    """The beginning of an identity, for messages and pages."""
    return identity[:12] or "none"
