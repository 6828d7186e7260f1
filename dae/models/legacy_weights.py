"""Autoencoders of taming-transformers, latent-diffusion and LlamaGen: which network a state dict is of, told by its tensors.

Facts of those projects: `taming/modules/diffusionmodules/model.py`, `ldm/models/autoencoder.py`,
`tokenizer/tokenizer_image/vq_model.py` and their training scripts. All normalise 32 groups of channels.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from dae.config import AutoencoderConfig, LDMConfig, VQConfig
from dae.models.weight_layouts import LDM, LLAMAGEN, Layout
from dae.quantizers import bottleneck_class

STATE_DICTS = ("ema", "model", "state_dict")  # where a checkpoint has its weights, the first that is there
WRAPPERS = ("module.", "_orig_mod.")  # of DistributedDataParallel and torch.compile
FIRST_STAGE = "first_stage_model."  # the autoencoder in a whole diffusion model
PARTS = ("encoder.", "decoder.", "quantize.", "quant_conv.", "post_quant_conv.")
UNUSED = ("quantize.codebook_used",)  # LlamaGen's record of recent codes
RESOLUTION = 256  # of the images that all three trained on, unless told otherwise


def autoencoder_tensors(checkpoint: Mapping[str, Any], source: str) -> dict[str, Tensor]:
    """The tensors of encoder, decoder and codebook in a checkpoint, without prefixes.

    Args:
        checkpoint: the state dict, or what a training script saved around it; a whole diffusion model may be in it.

    Raises:
        ValueError: there is no autoencoder.
    """
    inner = next((checkpoint[key] for key in STATE_DICTS if isinstance(checkpoint.get(key), Mapping)), checkpoint)
    found = {str(name): tensor for name, tensor in inner.items() if isinstance(tensor, Tensor)}
    for prefix in WRAPPERS:
        found = {name.removeprefix(prefix): tensor for name, tensor in found.items()}
    if any(name.startswith(FIRST_STAGE) for name in found):
        found = {name.removeprefix(FIRST_STAGE): w for name, w in found.items() if name.startswith(FIRST_STAGE)}
    parts = {name: tensor for name, tensor in found.items() if name.startswith(PARTS) and name not in UNUSED}
    if not parts:
        shown = ", ".join(sorted(map(str, inner))[:3]) or "nothing"
        raise ValueError(f"{source} holds no autoencoder: expected tensors named encoder. and decoder., found {shown}")
    return parts


def layout_of(weights: Mapping[str, Tensor], source: str) -> Layout:
    """Which project's names these are. ValueError: of none that can be read."""
    for layout in (LDM, LLAMAGEN):
        if f"{first_block(layout)}.conv1.weight" in weights:
            return layout
    if any(name.startswith("encoder.down_blocks.") for name in weights):
        raise ValueError(f"{source} has diffusers' names: load its folder with Autoencoder.from_diffusers")
    expected = " or ".join(f"{first_block(layout)} ({layout.title})" for layout in (LDM, LLAMAGEN))
    raise ValueError(f"{source} is of no network that can be read: expected {expected}, found {min(weights)}")


def first_block(layout: Layout, level: int = 0, index: int = 0) -> str:
    return layout.places["down block"].format(level=level, index=index)


def infer_config(
    weights: Mapping[str, Tensor], layout: Layout, source: str, resolution: int = RESOLUTION
) -> tuple[AutoencoderConfig, int]:
    """The configuration of the network with these tensors, and the images' channels.

    Args:
        weights: by `autoencoder_tensors`.
        resolution: of the images, which no tensor tells: it names the levels with attention.

    Raises:
        ValueError: a tensor is missing, or a quantizer that has no counterpart.
    """

    def shape(name: str) -> list[int]:
        if f"{name}.weight" not in weights:
            raise ValueError(f"{source} has no tensor {name}.weight, which an autoencoder of {layout.title} has")
        found = list(weights[f"{name}.weight"].shape)
        if len(found) < 2 or 0 in found:
            raise ValueError(f"{source}: {name}.weight is {found}, expected the weights of a layer")
        return found

    def has(role: str, **numbers: int) -> bool:
        return f"{layout.places[role].format(**numbers)}.norm.weight" in weights

    if "quantize.proj.weight" in weights:
        raise ValueError(
            f"{source} has a Gumbel quantizer, which has no counterpart: expected a codebook or a Gaussian posterior"
        )
    levels = count(lambda level: f"{first_block(layout, level)}.conv1.weight" in weights)
    blocks = count(lambda index: f"{first_block(layout, 0, index)}.conv1.weight" in weights)
    widths = [shape(f"{first_block(layout, level)}.conv2")[0] for level in range(levels)]
    base, image_channels = shape("encoder.conv_in")[:2]
    base = base if not any(width % base for width in widths) else math.gcd(*widths)
    z_channels = shape("decoder.conv_in")[1]
    latent_channels = shape("post_quant_conv")[1] if "post_quant_conv.weight" in weights else z_channels
    config = AutoencoderConfig(
        architecture="ldm",
        base_channels=base,
        channel_multipliers=[width // base for width in widths],
        num_blocks=blocks,
        attention_resolutions=[resolution >> level for level in range(levels) if has("down attention", level=level, index=0)],
        latent_channels=latent_channels,
        bottleneck="kl",
        ldm=LDMConfig(
            z_channels=None if z_channels == latent_channels else z_channels,
            quant_conv="quant_conv.weight" in weights,
            post_quant_conv="post_quant_conv.weight" in weights,
            mid_attention=has("encoder mid attention"),
        ),
    )
    if any(name.startswith("quantize.") for name in weights):
        config.bottleneck = "vq_gradient"
        codes = shape(layout.places["bottleneck.codebook"])[0]
        config.vq = VQConfig(codebook_size=codes, metric="cosine" if layout is LLAMAGEN else "l2")
    return config, image_channels


def count(holds: Any) -> int:
    """How many of 0, 1, 2, ... `holds` before it does not."""
    return next(n for n in itertools.count() if not holds(n))


def stated_resolution(theirs: Mapping[str, Any], source: str) -> int:
    """The images' resolution in a project's own configuration. ValueError: there is no description of an autoencoder."""
    resolution = described(theirs, source)["ddconfig"].get("resolution", RESOLUTION)
    if type(resolution) is not int or resolution < 1:
        raise ValueError(f"{source}: ddconfig.resolution={resolution!r}, expected a positive number")
    return resolution


def check_against(config: AutoencoderConfig, image_channels: int, theirs: Mapping[str, Any], source: str) -> float | None:
    """Compare what the tensors told with a project's own configuration; returns the latent's scale in it, if there is one.

    ValueError: they differ, or there is no description of an autoencoder.
    """
    params = described(theirs, source)
    stated, resolution = params["ddconfig"], stated_resolution(theirs, source)
    sizes = [resolution >> level for level in range(len(config.channel_multipliers))]
    pairs = [
        ("ddconfig.in_channels", stated.get("in_channels"), image_channels),
        ("ddconfig.ch", stated.get("ch"), config.base_channels),
        ("ddconfig.ch_mult", stated.get("ch_mult"), config.channel_multipliers),
        ("ddconfig.num_res_blocks", stated.get("num_res_blocks"), config.num_blocks),
        ("ddconfig.z_channels", stated.get("z_channels"), config.ldm.z_channels or config.latent_channels),
        ("embed_dim", params.get("embed_dim"), config.latent_channels),
        ("n_embed", params.get("n_embed"), config.vq.codebook_size if bottleneck_class(config).discrete else None),
    ]
    if stated.get("attn_resolutions") is not None:
        said = stated["attn_resolutions"]
        attends = [size for size in sizes if size in said] if isinstance(said, list) else said
        pairs.append(("ddconfig.attn_resolutions", attends, config.attention_resolutions))
    for name, said, found in pairs:
        if said is not None and said != found:
            raise ValueError(f"{source} is of another network: {name} is {said} there, {found} in the checkpoint")
    scale = section(theirs, "model", "params").get("scale_factor")
    return float(scale) if isinstance(scale, (int, float)) and not isinstance(scale, bool) else None


def described(theirs: Mapping[str, Any], source: str) -> Mapping[str, Any]:
    """The parameters of the autoencoder in a configuration of it, or of a whole diffusion model."""
    params, inner = section(theirs, "model", "params"), section(theirs, "model", "params", "first_stage_config", "params")
    found = next((each for each in (inner, params) if isinstance(each.get("ddconfig"), Mapping)), None)
    if found is None:
        raise ValueError(f"{source} describes no autoencoder: expected model.params.ddconfig, or first_stage_config in it")
    return found


def section(tree: Any, *path: str) -> Mapping[str, Any]:
    """The mapping at the end of a path of keys, empty where there is none."""
    for key in path:
        tree = tree.get(key) if isinstance(tree, Mapping) else None
    return tree if isinstance(tree, Mapping) else {}
