"""Read an autoencoder of taming-transformers, latent-diffusion or LlamaGen, and write it as ours and as diffusers'.

    python recipes/import_legacy.py last.ckpt imported/vqgan
    python recipes/import_legacy.py sd-v1.ckpt imported/sd --config v1-inference.yaml --diffusers imported/sd-diffusers

The checkpoint is a .ckpt or .pt file that torch wrote, or .safetensors with the same names: a state dict, what a training script
saved around it (`state_dict`, `model`, `ema`), or a whole diffusion model with a `first_stage_model`. A pickle is read as tensors
and plain containers alone; one that asks for anything else is refused, and nothing in it is run. The architecture is told by the
tensors; --config, a YAML file of that project, tells the images' resolution and is compared with them.

Writes OUTPUT (config.json, model.safetensors), which `Autoencoder.from_pretrained` and `init_from=` load.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from dae.cli import one_line
from dae.config import nearest_sibling
from dae.hub import holds_model, read_tensors
from dae.models import Autoencoder
from dae.models.legacy_weights import (
    RESOLUTION,
    autoencoder_tensors,
    check_against,
    infer_config,
    layout_of,
    stated_resolution,
)

BESIDE_WEIGHTS = ("pytorch_lightning.", "lightning.", "argparse.Namespace")  # classes of callbacks and options in checkpoints


class Inert:
    """Stands for a class of `BESIDE_WEIGHTS`: takes any arguments and state, and does nothing."""

    def __init__(self, *arguments: Any, **options: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def import_legacy(
    checkpoint: Path, output: Path, config: Path | None = None, diffusers: Path | None = None, resolution: int | None = None
) -> Autoencoder:
    """Convert `checkpoint`; returns the autoencoder that is saved in `output`.

    Args:
        config: a YAML file of the project.
        diffusers: where to write diffusers' folder, too.
        resolution: of the images, if it is not that of `config`, or else 256.

    Raises:
        FileNotFoundError: no such file.
        FileExistsError: there is a model in `output`.
        ValueError: a pickle of more than tensors, no autoencoder of these projects, or one that `config` does not describe.
    """
    if holds_model(output):
        raise FileExistsError(f"{output} holds a model: choose another folder, or remove it")
    weights = autoencoder_tensors(read_checkpoint(checkpoint), str(checkpoint))
    layout, theirs = layout_of(weights, str(checkpoint)), read_yaml(config) if config else None
    if resolution is None:
        resolution = RESOLUTION if theirs is None else stated_resolution(theirs, str(config))
    found, channels = infer_config(weights, layout, str(checkpoint), resolution)
    scale = check_against(found, channels, theirs, str(config)) if theirs is not None else None
    autoencoder = Autoencoder.from_layout(layout, weights, found, channels, resolution, str(checkpoint))
    if scale is not None:  # of the latent, which its identity and diffusers' configuration hold
        autoencoder.diffusers_config["scaling_factor"] = scale
    if diffusers is not None:  # which may lack such a network: before ours is written
        autoencoder.to_diffusers(diffusers)
    autoencoder.save_pretrained(output)
    return autoencoder


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The contents of a .safetensors file, or of one of torch's without running anything in it."""
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint {path}{nearest_sibling(path)}")
    if path.suffix == ".safetensors":
        return read_tensors(path)
    try:
        asked = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # a file of torch before 1.6, or none of torch's: torch.load says which
        asked = []
    if refused := [name for name in asked if not name.startswith(BESIDE_WEIGHTS)]:
        raise ValueError(f"{path} is a pickle that asks for {refused[0]}, which could run code: {REMEDY}")
    try:
        with torch.serialization.safe_globals([(Inert, name) for name in asked]):
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of pickle, zip files and torch, without a base class of their own
        lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        words = (
            next((line for line in lines if "GLOBAL" in line), lines[0]).strip().partition(". ")[0]
        )  # within advice of torch's
        raise ValueError(f"{path} cannot be read as tensors and plain containers ({words}): {REMEDY}") from error
    if not isinstance(loaded, dict):
        raise ValueError(f"{path} holds a {type(loaded).__name__}, expected a dictionary with tensors")
    return loaded


REMEDY = "if you trust it, load it in its own project and save its state dict as .safetensors"


def read_yaml(path: Path) -> Any:
    from omegaconf import OmegaConf

    if not path.is_file():
        raise FileNotFoundError(f"no configuration file {path}{nearest_sibling(path)}")
    try:
        return OmegaConf.to_container(OmegaConf.load(path))
    except Exception as error:  # errors of PyYAML and OmegaConf share no public base class
        raise ValueError(f"{path} is not valid YAML: {error}") from error


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help=".ckpt, .pt or .safetensors")
    parser.add_argument("output", type=Path, help="folder to write")
    parser.add_argument("--config", type=Path, help="YAML file of the project that trained it")
    parser.add_argument("--diffusers", type=Path, help="folder to write for diffusers, too")
    parser.add_argument("--resolution", type=int, help="of the images (default: that of --config, or else 256)")
    arguments = parser.parse_args()
    try:
        autoencoder = import_legacy(**vars(arguments))
    except (ValueError, OSError) as error:
        parser.exit(2, f"{parser.prog}: error: {one_line(error)}\n")
    sizes = f"{sum(p.numel() for p in autoencoder.parameters()):,} parameters, a factor of {autoencoder.factor}"
    print(f"saved {arguments.output}: {sizes}, bottleneck {autoencoder.config.bottleneck}")
