"""Tile space of group_norm_silu: elements of a tile and warps, for each of its four large kernels and both layouts."""

import itertools

import torch
from dae_kernels import group_norm_silu
from dae_kernels.group_norm_silu import fused, layout
from variants import Variant

MODULE = layout  # which looks tiles up
SHAPES = [
    {"B": B, "C": C, "P": P, "channels_last": last}
    for last, (B, C, P) in itertools.product((True, False), ((8, 128, 256**2), (16, 256, 64**2), (16, 512, 16**2)))
]
KERNELS = ("moments", "normalise", "gradient_sums", "gradient")


def when(shape):
    return {"channels_last": shape["channels_last"]}


def sizes(shape):
    return {"C": shape["C"], "P": shape["P"]}


def candidates(kernel, shape):
    return [{"TILE": size, "num_warps": warps} for size in (1024, 2048, 4096, 8192) for warps in (2, 4, 8)]


def variant(kernel, shape, tile, target):
    last = shape["channels_last"]
    constants = {"WEIGHT": True, "BIAS": True, "ADAPTIVE": False, "SILU": True, "scale_ptr": None, "shift_ptr": None}
    constants |= {f"{tensor}stride_{'c' if last else 'p'}": 1 for tensor in ("x_", "", "dy_")}
    blocks = layout.blocks(shape["C"], shape["P"], last, tile["TILE"]) | {"num_warps": tile["num_warps"]}
    types = {f"{tensor}_ptr": "*bf16" for tensor in ("x", "y", "dy", "dx")}
    return Variant(str(tile), getattr(fused, f"{kernel}_kernel"), types, constants, blocks, divisible=("stride",))


def operation(shape, device):
    """A call, forward and backward, that launches every kernel once."""
    side = round(shape["P"] ** 0.5)
    x = torch.randn(shape["B"], shape["C"], side, side, device=device, dtype=torch.bfloat16)
    x = x.contiguous(memory_format=torch.channels_last if shape["channels_last"] else torch.contiguous_format).requires_grad_()
    weight, bias = (torch.randn(shape["C"], device=device) for _ in range(2))
    cotangent = torch.randn_like(x)

    def call():
        layout.map_layout.cache_clear()
        torch.autograd.grad(group_norm_silu(x, 32, weight, bias, impl="triton"), x, cotangent)

    return call
