"""Folders of diffusers' AutoencoderKL and VQModel: their configuration as ours and back, and reading and writing them.

Facts of diffusers 0.35 to 0.42: `models/autoencoders/{vae,autoencoder_kl,vq_model}.py`. diffusers itself is not imported.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from dae.config import AutoencoderConfig, KLConfig, LDMConfig, VQConfig
from dae.hub import read_json, read_tensors
from dae.models.weight_layouts import EARLIER_DIFFUSERS

CONFIG, WEIGHTS = "config.json", "diffusion_pytorch_model.safetensors"
PIPELINE_PARTS = ("vae", "vqvae")  # where a pipeline's folder has its autoencoder

COMMON: dict[str, Any] = {  # what both classes have, with its default
    "in_channels": 3, "out_channels": 3, "down_block_types": ["DownEncoderBlock2D"], "up_block_types": ["UpDecoderBlock2D"],
    "block_out_channels": [64], "layers_per_block": 1, "act_fn": "silu", "norm_num_groups": 32, "sample_size": 32,
    "mid_block_add_attention": True,
}  # fmt: skip
OPTIONS: dict[str, dict[str, Any]] = {
    "AutoencoderKL": COMMON | {"latent_channels": 4, "use_quant_conv": True, "use_post_quant_conv": True},
    "VQModel": COMMON | {"latent_channels": 3, "num_vq_embeddings": 256, "vq_embed_dim": None, "norm_type": "group"},
}
# No value of these changes what encoder and decoder compute; they are kept for `to_diffusers`.
BESIDE = ("scaling_factor", "shift_factor", "latents_mean", "latents_std", "force_upcast", "lookup_from_codebook")
SCALING_FACTOR = 0.18215  # Stable Diffusion's, which both classes assume where the configuration has none
BLOCKS = {"down_block_types": ("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
          "up_block_types": ("UpDecoderBlock2D", "AttnUpDecoderBlock2D")}  # fmt: skip


def config_from_diffusers(
    config: Mapping[str, Any], source: str, resolution: int | None = None
) -> tuple[AutoencoderConfig, int, int, dict[str, Any]]:
    """Our configuration, the images' channels and resolution, and what of theirs is neither (`BESIDE`).

    Args:
        config: the contents of their config.json.
        source: for errors.
        resolution: of the images; None takes their sample_size, rounded up to what the factor divides.

    Raises:
        ValueError: another class, or an option that this architecture does not have.
    """
    name = config.get("_class_name")
    if not isinstance(name, str) or name not in OPTIONS:
        raise ValueError(f"{source} holds a {name!r}: of diffusers' autoencoders AutoencoderKL and VQModel can be read")
    given = {key: value for key, value in config.items() if not key.startswith("_")}
    beside = {"scaling_factor": SCALING_FACTOR} | {key: given.pop(key) for key in BESIDE if given.get(key) is not None}
    for key in ("scaling_factor", "shift_factor"):
        if type(beside.get(key, 1.0)) not in (int, float):
            raise ValueError(f"{source}: {key}={beside[key]!r}, expected a number")
    if unknown := sorted(
        key for key in given if key not in OPTIONS[name] and given[key] not in (None, False) and key not in BESIDE
    ):
        raise ValueError(f"{source}: {name} with {unknown[0]}={given[unknown[0]]!r}, an option that cannot be read")
    options = OPTIONS[name] | {key: value for key, value in given.items() if key in OPTIONS[name] and value is not None}
    widths, attends = check_options(options, name, source)

    factor = 1 << (len(widths) - 1)
    sizes = options["sample_size"] if isinstance(options["sample_size"], list) else [options["sample_size"]]
    resolution = resolution or -(-max(sizes) // factor) * factor
    base = math.gcd(*widths)
    made = AutoencoderConfig(
        architecture="ldm",
        base_channels=base,
        channel_multipliers=[width // base for width in widths],
        num_blocks=options["layers_per_block"],
        attention_resolutions=[resolution >> level for level, attend in enumerate(attends) if attend],
        latent_channels=options["latent_channels"],
        ldm=LDMConfig(mid_attention=options["mid_block_add_attention"], norm_num_groups=options["norm_num_groups"]),
    )
    if name == "AutoencoderKL":
        made.bottleneck, made.kl = "kl", KLConfig()
        made.ldm.quant_conv, made.ldm.post_quant_conv = options["use_quant_conv"], options["use_post_quant_conv"]
    else:
        made.bottleneck, made.vq = "vq_gradient", VQConfig(codebook_size=options["num_vq_embeddings"])
        made.ldm.z_channels = options["latent_channels"]
        made.latent_channels = options["vq_embed_dim"] or options["latent_channels"]
    return made, options["in_channels"], resolution, beside


def check_options(options: Mapping[str, Any], name: str, source: str) -> tuple[list[int], list[bool]]:
    """Channels of each level, and whether it has attention. ValueError: an option that this architecture does not have."""

    def refuse(expected: str, *keys: str) -> None:
        raise ValueError(f"{source}: {name} with {', '.join(f'{key}={options[key]!r}' for key in keys)}; {expected} can be read")

    for key, names in BLOCKS.items():
        if not isinstance(options[key], list) or any(block not in names for block in options[key]):
            refuse(f"blocks of the types {' and '.join(names)}", key)
    numbers = (
        "in_channels",
        "latent_channels",
        "layers_per_block",
        "norm_num_groups",
        *["num_vq_embeddings"] * (name == "VQModel"),
    )
    for key in numbers:
        if type(options[key]) is not int or options[key] < 1:
            refuse("a positive number", key)
    sizes = options["sample_size"] if isinstance(options["sample_size"], list) else [options["sample_size"]]
    if not sizes or any(type(size) is not int or size < 1 for size in sizes):
        refuse("a positive number", "sample_size")
    for key in ("mid_block_add_attention", "use_quant_conv", "use_post_quant_conv"):
        if type(options.get(key, True)) is not bool:
            refuse("true and false", key)
    if name == "VQModel" and (type(width := options["vq_embed_dim"] or 1) is not int or width < 1):
        refuse("a positive number or null", "vq_embed_dim")
    widths, attends = options["block_out_channels"], [block.startswith("Attn") for block in options["down_block_types"]]
    if not isinstance(widths, list) or not widths or any(type(width) is not int or width < 1 for width in widths):
        refuse("a list of positive numbers", "block_out_channels")
    if not len(widths) == len(options["down_block_types"]) == len(options["up_block_types"]):
        refuse("one block type for each number of channels", "block_out_channels", "down_block_types", "up_block_types")
    if attends != [block.startswith("Attn") for block in options["up_block_types"]][::-1]:
        refuse("a decoder that mirrors its encoder", "down_block_types", "up_block_types")
    if options["in_channels"] != options["out_channels"]:
        refuse("as many channels out as in", "in_channels", "out_channels")
    if options["act_fn"] not in ("silu", "swish"):
        refuse("silu", "act_fn")
    if options.get("norm_type", "group") != "group":
        refuse("group", "norm_type")
    if any(width % options["norm_num_groups"] for width in widths):
        refuse("a number of groups that divides all channels", "norm_num_groups", "block_out_channels")
    return widths, attends


def config_to_diffusers(
    config: AutoencoderConfig, image_channels: int, resolution: int, beside: Mapping[str, Any]
) -> dict[str, Any]:
    """The contents of config.json for diffusers' AutoencoderKL (of the bottleneck kl) or VQModel (of a codebook).

    Args:
        beside: values of `BESIDE`; without a scaling_factor it is 1, as diffusers would assume that of Stable Diffusion.

    Raises:
        ValueError: diffusers has no such network.
    """

    def refuse(got: str, expected: str) -> None:
        raise ValueError(f"{got} has no counterpart in diffusers' AutoencoderKL and VQModel: expected {expected}")

    widths = [config.base_channels * m for m in config.channel_multipliers]
    groups = {math.gcd(config.ldm.norm_num_groups, width) for width in widths}
    name = {"kl": "AutoencoderKL", "vq": "VQModel", "vq_gradient": "VQModel", "simvq": "VQModel"}.get(config.bottleneck, "")
    if config.architecture != "ldm":
        refuse(f"autoencoder.architecture={config.architecture}", "ldm")
    if config.decoder.family not in ("full", "dropout"):
        refuse(f"a decoder of the family {config.decoder.family}", "full, or dropout")
    if not name:
        refuse(f"autoencoder.bottleneck={config.bottleneck}", "kl, or of one codebook: vq, vq_gradient, simvq")
    if len(groups) > 1:
        refuse(f"autoencoder.ldm.norm_num_groups={config.ldm.norm_num_groups}, of which levels of {widths} channels have "
               f"{sorted(groups)},", "a number that divides all of them")  # fmt: skip
    z_channels = config.ldm.z_channels or config.latent_channels
    attends = [resolution >> level in config.attention_resolutions for level in range(len(widths))]
    made: dict[str, Any] = {
        "_class_name": name,
        "act_fn": "silu",
        "block_out_channels": widths,
        "down_block_types": [BLOCKS["down_block_types"][attend] for attend in attends],
        "in_channels": image_channels,
        "latent_channels": z_channels,
        "layers_per_block": config.num_blocks,
        "mid_block_add_attention": config.ldm.mid_attention,
        "norm_num_groups": groups.pop(),
        "out_channels": image_channels,
        "sample_size": resolution,
        "up_block_types": [BLOCKS["up_block_types"][attend] for attend in attends[::-1]],
        "scaling_factor": 1.0,
    }
    if name == "AutoencoderKL":
        if z_channels != config.latent_channels:
            refuse(f"autoencoder.ldm.z_channels={z_channels}", f"autoencoder.latent_channels={config.latent_channels}")
        made |= {"use_quant_conv": config.ldm.quant_conv, "use_post_quant_conv": config.ldm.post_quant_conv}
    else:
        if not (config.ldm.quant_conv and config.ldm.post_quant_conv):
            refuse("a codebook without 1 x 1 convolutions", "autoencoder.ldm.quant_conv and post_quant_conv true")
        made |= {"num_vq_embeddings": config.vq.codebook_size, "vq_embed_dim": config.latent_channels, "norm_type": "group"}
    return dict(sorted((made | dict(beside)).items()))


def rename_earlier(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under today's names of attention: query, key, value, proj_attn were to_q, to_k, to_v, to_out.0 until 0.17."""
    found = {}
    for name, tensor in weights.items():
        module, _, end = name.rpartition(".")
        parent, _, leaf = module.rpartition(".")
        inside = ".attentions." in name and leaf in EARLIER_DIFFUSERS
        found[f"{parent}.{EARLIER_DIFFUSERS[leaf]}.{end}" if inside else name] = tensor
    return found


def is_diffusers_folder(path: str | Path) -> bool:
    """Whether diffusers saved an autoencoder, or a pipeline with one, into `path`; with whatever weights."""
    folders = [Path(path) / part for part in (".", *PIPELINE_PARTS)]
    return any((folder / CONFIG).is_file() and any(folder.glob("diffusion_pytorch_model*")) for folder in folders)


def read_folder(path: str | Path, variant: str | None = None) -> tuple[dict[str, Any], dict[str, Tensor], Path]:
    """Configuration, weights, and the folder they were in: `path`, or the `vae` or `vqvae` of a pipeline.

    Args:
        variant: of the weights, such as fp16, in `diffusion_pytorch_model.<variant>.safetensors`, or in the shards of its index.

    Raises:
        FileNotFoundError: no such folder, or one without configuration or weights, or with a part of them.
        ValueError: weights as a pickle alone, or damaged files.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}: expected one with {CONFIG} and {WEIGHTS}, or of a pipeline with vae/")
    inside = [folder / part for part in PIPELINE_PARTS if (folder / part / CONFIG).is_file()]
    if inside and not (folder / CONFIG).is_file():
        folder = inside[0]
    if not (folder / CONFIG).is_file():
        raise FileNotFoundError(f"{folder} holds no {CONFIG}: expected a folder that diffusers' save_pretrained wrote")
    weights = folder / (f"diffusion_pytorch_model.{variant}.safetensors" if variant else WEIGHTS)
    index = folder / (f"{WEIGHTS}.index.{variant}.json" if variant else f"{WEIGHTS}.index.json")
    config = read_json(folder / CONFIG)
    if not weights.is_file():
        if index.is_file():
            return config, rename_earlier(read_shards(index)), folder
        others = sorted(each.name for each in folder.glob("diffusion_pytorch_model*.safetensors"))
        pickles = sorted(each.name for each in folder.glob("*.bin")) + sorted(each.name for each in folder.glob("*.ckpt"))
        if others:
            raise FileNotFoundError(f"{folder} holds no {weights.name} but {', '.join(others)}: name one by its variant=")
        if pickles:
            raise ValueError(
                f"{folder} holds its weights as a pickle alone ({pickles[0]}), which could run code: save them again with "
                "diffusers' save_pretrained(safe_serialization=True)"
            )
        raise FileNotFoundError(f"{folder} holds no {weights.name}: expected a folder that diffusers' save_pretrained wrote")
    return config, rename_earlier(read_tensors(weights)), folder


def read_shards(index: Path) -> dict[str, Tensor]:
    """The tensors of all files that diffusers' `index` of large weights names.

    Raises:
        FileNotFoundError: a file that is not beside the index.
        ValueError: an index that is damaged, or names files elsewhere; a damaged file.
    """
    places = read_json(index).get("weight_map")
    names = set(places.values()) if isinstance(places, dict) and all(type(name) is str for name in places.values()) else set()
    if not names or any(Path(name).name != name for name in names):
        raise ValueError(f"{index} is damaged: expected a weight_map from tensors to the names of files beside it")
    if lost := sorted(name for name in names if not (index.parent / name).is_file()):
        raise FileNotFoundError(
            f"{index.parent} holds no {', '.join(lost)}, which {index.name} names: copy the whole folder again"
        )
    return {name: tensor for shard in sorted(names) for name, tensor in read_tensors(index.parent / shard).items()}


def write_folder(folder: str | Path, config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> None:
    """Write both files, each atomically. OSError: the disk is full or the folder cannot be written."""
    from safetensors.torch import save

    from dae.files import write_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    write_file(folder / WEIGHTS, save(tensors, metadata={"format": "pt"}))
    write_file(folder / CONFIG, json.dumps(config, indent=2).encode())
