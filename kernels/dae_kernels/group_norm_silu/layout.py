"""Launch parameters of the group norm's kernels, made once per shape, strides, groups and GPU generation."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from dae_kernels.tiles import cdiv, generation, measured_tile, next_power_of_2

# So many programs keep 132 SMs busy, as an SM holds several. A tile has at most TILE elements.
PROGRAMS, TILES_PER_CHUNK, TILE, WARPS = 528, 16, 2048, 4
NAMES = ("TILE", "num_warps")  # of a measured tile
WHOLE_GROUP = 1 << 14  # elements of a group that one program takes: 32 per thread of at most 16 warps
WHOLE_CHANNELS = 32  # at most; with more of them factors and sums of the channels spill
HELD, HELD_TILE = 1 << 13, 1 << 11  # elements of a group that its gradient holds in registers; of a tile of a larger one


class Chunked(NamedTuple):
    """Launch of a kernel over chunks of positions; `parts` is the shape of its two sums per channel and chunk."""

    grid: tuple[int, int, int]
    options: dict[str, int]
    chunk: int
    chunks: int
    parts: tuple[int, int, int, int]


def channels_last_format(x: Tensor) -> torch.memory_format:
    """channels_last of as many dimensions as x has, if there is one."""
    return {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim(), torch.contiguous_format)


def is_dense(x: Tensor) -> bool:
    return x.is_contiguous() or x.is_contiguous(memory_format=channels_last_format(x))


def tile(C: int, P: int, channels_last: bool, kernel: str = "", gpu: str | None = None) -> dict[str, int]:
    """Blocks of at most TILE elements, long along the contiguous dimension, and the warps of one of the four large kernels.

    TILE and the warps are those measured on the GPU generation at the nearest shape, else the module's.
    """
    found = measured_tile("group_norm_silu", gpu, kernel, {"channels_last": channels_last}, {"C": C, "P": P}, NAMES)
    size, warps = (TILE, WARPS) if found is None else (found["TILE"], found["num_warps"])
    return blocks(C, P, channels_last, size) | {"num_warps": warps}


def blocks(C: int, P: int, channels_last: bool, size: int) -> dict[str, int]:
    """Blocks of at most `size` elements, long along the contiguous dimension."""
    if channels_last:
        block_c = min(next_power_of_2(C), 128)
        return {"BLOCK_P": min(next_power_of_2(P), max(1, size // block_c)), "BLOCK_C": block_c}
    block_p = min(next_power_of_2(P), size)
    return {"BLOCK_P": block_p, "BLOCK_C": min(next_power_of_2(C), size // block_p)}


def whole_group_tile(channels: int, P: int) -> dict[str, int] | None:
    """The tile of a group in one program, or None if it does not fit."""
    block_p, block_c = next_power_of_2(P), next_power_of_2(channels)
    size = block_p * block_c
    if size > WHOLE_GROUP or channels > WHOLE_CHANNELS:
        return None
    return {"BLOCK_P": block_p, "BLOCK_C": block_c, "num_warps": max(1, size // 1024)}


def whole_gradient_tile(channels: int, P: int) -> dict[str, int] | None:
    """The tile of the gradient of a group in one program, and whether it is HELD whole; None where `whole_group_tile` is."""
    whole = whole_group_tile(channels, P)
    if whole is None or whole["BLOCK_P"] * whole["BLOCK_C"] <= HELD:
        return whole and {"HELD": True} | whole
    block_c = whole["BLOCK_C"]
    return {"HELD": False, "BLOCK_P": HELD_TILE // block_c, "BLOCK_C": block_c, "num_warps": 8}


class MapLayout:
    """Launch parameters: sizes, strides as [B, C, P], tiles, grids and chunks of positions; of use where x is `dense`.

    Made once per shape, strides, groups and GPU generation (`map_layout`).
    """

    def __init__(self, shape: tuple[int, ...], stride: tuple[int, ...], num_groups: int, gpu: str | None):
        self.B, self.C, self.P = shape[0], shape[1], math.prod(shape[2:])
        self.channels = self.C // num_groups
        self.strides = (stride[0], stride[1], stride[-1] if len(stride) > 2 else 1)
        if len(shape) > 2 and shape[-1] == 1:  # the stride of one element says nothing: that of the last axis that is longer
            self.strides = (*self.strides[:2], next((s for n, s in zip(shape[:1:-1], stride[:1:-1], strict=True) if n > 1), 1))
        self.dense = is_dense(torch.empty_strided(shape, stride, device="meta"))
        self.groups = (shape[0], num_groups)
        self.gpu, self.channels_last = gpu, self.strides[1] == 1 and self.C > 1 and self.P > 1
        self.whole, self.whole_gradient = whole_group_tile(self.channels, self.P), whole_gradient_tile(self.channels, self.P)
        self.moments, self.normalise = self.chunked("moments"), self.tiled("normalise")
        self.sums, self.gradient = self.chunked("gradient_sums"), self.tiled("gradient")
        # Elements of the sums per channel, and unless a program takes a group the means per group and the sums per chunk.
        self.scratch = 2 * self.B * self.C
        if self.whole is None:
            self.scratch += 2 * self.B * num_groups + math.prod(self.sums.parts)

    def options(self, kernel: str) -> tuple[dict[str, int], int, int]:
        """Launch options of a kernel, the number of blocks of channels, and of tiles along the positions."""
        options = tile(self.C, self.P, self.channels_last, kernel, self.gpu)
        return options, cdiv(self.C, options["BLOCK_C"]), cdiv(self.P, options["BLOCK_P"])

    def chunked(self, kernel: str) -> Chunked:
        options, blocks, tiles = self.options(kernel)
        tiles_per_chunk = max(1, min(TILES_PER_CHUNK, tiles * blocks * self.B // PROGRAMS))
        chunk = tiles_per_chunk * options["BLOCK_P"]
        chunks = cdiv(self.P, chunk)
        return Chunked((chunks, blocks, self.B), options, chunk, chunks, (2, self.B, self.C, chunks))

    def tiled(self, kernel: str) -> tuple[tuple[int, int, int], dict[str, int]]:
        """Grid and options of a kernel with one tile per program."""
        options, blocks, tiles = self.options(kernel)
        return (tiles, blocks, self.B), options

    def reaches(self, stride_c: int, stride_p: int) -> bool:
        """Whether the offsets within a chunk and a block of channels are int32, as the kernels compute them.

        Those of what is dense are: a chunk is at most 2^16 positions, and along the other dimension a tile is short.
        """
        block_p = max(self.sums.chunk, self.gradient[1]["BLOCK_P"])
        block_c = max(self.sums.options["BLOCK_C"], self.gradient[1]["BLOCK_C"])
        if self.whole_gradient is not None:
            block_p, block_c = self.whole_gradient["BLOCK_P"], self.whole_gradient["BLOCK_C"]
        return block_p * stride_p + block_c * stride_c < 2**31


map_layout = functools.lru_cache(maxsize=4096)(MapLayout)


def densified(x: Tensor) -> Tensor:
    """`x` if it is contiguous or channels_last, else a copy that is."""
    if is_dense(x):
        return x
    return x.contiguous(memory_format=channels_last_format(x)) if x.stride(1) == 1 else x.contiguous()


def dense(x: Tensor, num_groups: int) -> tuple[Tensor, MapLayout]:
    """`densified(x)` and its launch parameters."""
    layout = map_layout(x.shape, x.stride(), num_groups, generation(x.device))
    if layout.dense:
        return x, layout
    x = densified(x)
    return x, map_layout(x.shape, x.stride(), num_groups, generation(x.device))


def positions(x: Tensor) -> Tensor:
    """[B, C, *positions] as [B, C, P]: a view of what is dense, maybe a copy of what is not."""
    return x.flatten(2) if x.dim() > 2 else x[..., None]


def pair_dtype(one: Tensor | None, two: Tensor | None) -> torch.dtype | None:
    """The dtype in which the gradients of two parameters are written: theirs, or float32 where they differ; None for neither."""
    if one is None or two is None:
        return two.dtype if two is not None else None if one is None else one.dtype
    return one.dtype if one.dtype == two.dtype else torch.float32


@functools.lru_cache(maxsize=64)
def flags(weight: bool, bias: bool, scale: bool, silu: bool) -> dict[str, bool]:
    """Which operands there are, and SILU, as the kernels' constants."""
    return {"WEIGHT": weight, "BIAS": bias, "ADAPTIVE": scale, "SILU": silu}


def contiguous(parameter: Tensor | None) -> Tensor | None:
    return None if parameter is None else parameter.contiguous()
