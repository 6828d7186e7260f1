"""Names of the tensors of `dae.models.ldm` in other projects' files: pure functions on dictionaries.

Three projects share the network and name its parts differently. A `Layout` says how; `key_map` says for each tensor of ours which
tensors of theirs it is: one, or the queries', keys' and values', which ours has in one matrix.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dae.config import AutoencoderConfig
from dae.hub import misfit

CODEBOOK = "bottleneck.codebook"


class Place(NamedTuple):
    """A module of ours."""

    ours: str  # "encoder.levels.0.1"
    role: str  # its key in `Layout.places`
    kind: str  # block, attention or plain
    numbers: dict[str, int]  # level: 0 is the finest; step: levels in the order of the network; index: within its level


@dataclass(frozen=True)
class Layout:
    """How a project names the modules (`places`, by role) and their parts (by ours)."""

    title: str
    places: Mapping[str, str]
    block: Mapping[str, str]
    attention: Mapping[str, str | tuple[str, str, str]]
    linear: bool = False  # matrices [C, C] in attention, instead of 1 x 1 convolutions [C, C, 1, 1]


BLOCK = {name: name for name in ("norm1", "conv1", "norm2", "conv2")}
ENDS = {
    **{f"{part}.conv_{end}": f"{part}.conv_{end}" for part in ("encoder", "decoder") for end in ("in", "out")},
    "encoder.quant_conv": "quant_conv",
    "decoder.post_quant_conv": "post_quant_conv",
    CODEBOOK: "quantize.embedding",
}
NORMS_OUT = {f"{part}.norm_out": f"{part}.norm_out" for part in ("encoder", "decoder")}
LDM_BLOCK = BLOCK | {"skip": "nin_shortcut"}
LDM_ATTENTION: dict[str, str | tuple[str, str, str]] = {"norm": "norm", "qkv": ("q", "k", "v"), "out": "proj_out"}

DIFFUSERS = Layout(
    "diffusers",
    ENDS
    | {
        "down block": "encoder.down_blocks.{level}.resnets.{index}",
        "down attention": "encoder.down_blocks.{level}.attentions.{index}",
        "downsample": "encoder.down_blocks.{level}.downsamplers.0.conv",
        "encoder mid block": "encoder.mid_block.resnets.{index}",
        "encoder mid attention": "encoder.mid_block.attentions.0",
        "encoder.norm_out": "encoder.conv_norm_out",
        "decoder mid block": "decoder.mid_block.resnets.{index}",
        "decoder mid attention": "decoder.mid_block.attentions.0",
        "up block": "decoder.up_blocks.{step}.resnets.{index}",
        "up attention": "decoder.up_blocks.{step}.attentions.{index}",
        "upsample": "decoder.up_blocks.{step}.upsamplers.0.conv",
        "decoder.norm_out": "decoder.conv_norm_out",
    },
    BLOCK | {"skip": "conv_shortcut"},
    {"norm": "group_norm", "qkv": ("to_q", "to_k", "to_v"), "out": "to_out.0"},
    linear=True,
)
EARLIER_DIFFUSERS = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}  # names before 0.17
LDM = Layout(
    "taming-transformers or latent-diffusion",
    ENDS
    | NORMS_OUT
    | {
        "down block": "encoder.down.{level}.block.{index}",
        "down attention": "encoder.down.{level}.attn.{index}",
        "downsample": "encoder.down.{level}.downsample.conv",
        "encoder mid block": "encoder.mid.block_{number}",
        "encoder mid attention": "encoder.mid.attn_1",
        "decoder mid block": "decoder.mid.block_{number}",
        "decoder mid attention": "decoder.mid.attn_1",
        "up block": "decoder.up.{level}.block.{index}",
        "up attention": "decoder.up.{level}.attn.{index}",
        "upsample": "decoder.up.{level}.upsample.conv",
    },
    LDM_BLOCK,
    LDM_ATTENTION,
)
LLAMAGEN = Layout(
    "LlamaGen",
    ENDS
    | NORMS_OUT
    | {
        "down block": "encoder.conv_blocks.{level}.res.{index}",
        "down attention": "encoder.conv_blocks.{level}.attn.{index}",
        "downsample": "encoder.conv_blocks.{level}.downsample.conv",
        "encoder mid block": "encoder.mid.{twice}",
        "encoder mid attention": "encoder.mid.1",
        "decoder mid block": "decoder.mid.{twice}",
        "decoder mid attention": "decoder.mid.1",
        "up block": "decoder.conv_blocks.{step}.res.{index}",
        "up attention": "decoder.conv_blocks.{step}.attn.{index}",
        "upsample": "decoder.conv_blocks.{step}.upsample.conv",
    },
    LDM_BLOCK,
    LDM_ATTENTION,
)


def places(config: AutoencoderConfig, resolution: int) -> Iterator[Place]:
    """The modules of an autoencoder of the architecture `ldm` with a full decoder, and its codebook."""
    levels = range(len(config.channel_multipliers))
    last, attends = levels[-1], [resolution >> level in config.attention_resolutions for level in levels]

    def sequence(step: int, level: int, part: str, blocks: int) -> Iterator[Place]:
        """The `nn.Sequential` of a level."""
        down, names = part == "encoder", []
        middle = [
            ("mid block", "block", 0),
            *[("mid attention", "attention", 0)] * config.ldm.mid_attention,
            ("mid block", "block", 1),
        ]
        middle = [(f"{part} {role}", kind, index) for role, kind, index in middle] if level == last else []
        for index in range(blocks):
            names.append(("down block" if down else "up block", "block", index))
            names += [("down attention" if down else "up attention", "attention", index)] * attends[level]
        names = [*names, *middle] if down else [*middle, *names]
        for position, (role, kind, index) in enumerate(names):
            yield place(f"{part}.levels.{step}.{position}", role, kind, level, step, index)
        if down and level != last:
            yield place(f"{part}.levels.{step}.{len(names)}", "downsample", "plain", level, step, 0)
        if not down and level != 0:
            yield place(f"{part}.levels.{step}.{len(names)}.conv", "upsample", "plain", level, step, 0)

    for name in (*ENDS, *NORMS_OUT):
        yield place(name, name, "plain", 0, 0, 0)
    for level in levels:
        yield from sequence(level, level, "encoder", config.num_blocks)
        yield from sequence(level, last - level, "decoder", config.num_blocks + 1)


def place(ours: str, role: str, kind: str, level: int, step: int, index: int) -> Place:
    numbers = {"level": level, "step": step, "index": index, "number": index + 1, "twice": 2 * index}
    return Place(ours, role, kind, numbers)


def key_map(layout: Layout, config: AutoencoderConfig, resolution: int) -> dict[str, tuple[str, ...]]:
    """Each tensor that an autoencoder can have, by its name, and those of the layout that it consists of."""
    found: dict[str, tuple[str, ...]] = {}
    for ours, role, kind, numbers in places(config, resolution):
        theirs = layout.places[role].format(**numbers)
        if ours == CODEBOOK:
            found[ours] = (f"{theirs}.weight",)
            continue
        parts: Mapping[str, str | tuple[str, ...]] = {"block": layout.block, "attention": layout.attention}.get(kind, {"": ""})
        for part, names in parts.items():
            for end in ("weight", "bias"):
                several = (names,) if isinstance(names, str) else names
                found[joined(ours, part, end)] = tuple(joined(theirs, name, end) for name in several)
    return found


def joined(*parts: str) -> str:
    return ".".join(part for part in parts if part)


def to_layout(weights: Mapping[str, Tensor], names: Mapping[str, tuple[str, ...]], layout: Layout) -> dict[str, Tensor]:
    """The tensors of ours under the names, and in the shapes, of a layout; what it has no name for is left out."""
    found = {}
    for ours, theirs in names.items():
        if ours in weights:
            for name, tensor in zip(theirs, weights[ours].chunk(len(theirs)), strict=True):
                found[name] = tensor.flatten(1) if layout.linear and is_attention(ours) and tensor.ndim == 4 else tensor
    return found


def from_layout(
    weights: Mapping[str, Tensor], own: Mapping[str, Tensor], names: Mapping[str, tuple[str, ...]], layout: Layout, source: str
) -> dict[str, Tensor]:
    """The state dict of ours, made of a layout's tensors.

    Args:
        weights: of the layout.
        own: the state dict of a new autoencoder of that configuration; what the layout has no name for stays as it is there.
        names: by `key_map`.
        source: for errors.

    Raises:
        ValueError: tensors are missing, left over, or of another shape.
    """
    expected = to_layout(own, names, layout)
    weights = {
        name: w.reshape(expected[name].shape) if same_but_ones(w, expected.get(name)) else w for name, w in weights.items()
    }
    if text := misfit(weights, expected):
        raise ValueError(f"{source} does not fit its configuration ({text})")
    found = {
        ours: torch.cat([weights[name] for name in theirs]).reshape(own[ours].shape).to(own[ours].dtype)
        for ours, theirs in names.items()
        if ours in own
    }
    if "bottleneck.average_sums" in own:  # of a codebook that follows averages: each code has the count 1
        found["bottleneck.average_sums"] = found[CODEBOOK].clone()
    return {**own, **found}


def is_attention(ours: str) -> bool:
    return ours.split(".")[-2] in ("qkv", "out")


def same_but_ones(given: Tensor, expected: Tensor | None) -> bool:
    """Whether two shapes differ by axes of length 1 alone: a 1 x 1 convolution is a matrix."""
    ends = (given.shape, ()) if expected is None else (given.shape, expected.shape)
    return expected is not None and len({tuple(n for n in shape if n != 1) for shape in ends}) == 1
