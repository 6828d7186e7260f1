"""Tile space of nearest_code's search, for 16-bit and float32 vectors, fast and exact."""

import itertools

import torch
from dae_kernels import nearest_code
from dae_kernels.nearest_code import fused, layout
from variants import Variant

MODULE = layout  # which looks tiles up
SHAPES = [
    {"N": N, "K": K, "D": D, "bits": bits, "exact": exact}
    for bits, exact, (N, K, D) in itertools.product(
        (16, 32), (False, True), ((32768, 8192, 512), (32768, 16384, 256), (65536, 1024, 64), (262144, 16384, 8))
    )
]
KERNELS = ("search",)


def when(shape):
    return {"bits": shape["bits"], "exact": shape["exact"]}


def sizes(shape):
    return {"D": layout.padded(shape["D"])}


def candidates(kernel, shape):
    most = layout.padded(shape["D"])
    blocks_d = sorted({min(most, block) for block in ((16, 32) if shape["bits"] == 32 else (64, 128, 256))})
    space = itertools.product((64, 128), (32, 64, 128, 256), blocks_d, (4, 8), (1, 2, 3, 4))
    names = ("BLOCK_N", "BLOCK_K", "BLOCK_D", "num_warps", "num_stages")
    return [dict(zip(names, tile, strict=True)) for tile in space]


def dtype_of(shape):
    return torch.bfloat16 if shape["bits"] == 16 else torch.float32


def variant(kernel, shape, tile, target):
    element = "*bf16" if shape["bits"] == 16 else "*fp32"
    types = {"x_ptr": element, "codebook_ptr": element, "candidate_ptr": "*i32"}
    precision = ("ieee" if target.startswith("gfx") else "tf32x3") if shape["exact"] else "tf32"
    constants = {"H": 1, "D": shape["D"], "COSINE": False, "EXACT": shape["exact"], "UPCAST": False, "INPUT_PRECISION": precision}
    constants |= {"BY_LANE": layout.by_lane(tile, shape["exact"]), "RAGGED": shape["K"] % tile["BLOCK_K"] != 0}
    return Variant(str(tile), fused.search_kernel, types, constants, tile, product=True)


def operation(shape, device):
    """A call that launches the kernel once."""
    x, codes = (torch.randn(shape[n], shape["D"], device=device).to(dtype_of(shape)) for n in ("N", "K"))

    def call():
        layout.search_tile.cache_clear()
        layout.search_layout.cache_clear()
        nearest_code(x, codes, precision="exact" if shape["exact"] else "fast", impl="triton")

    return call
