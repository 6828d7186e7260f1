"""Variants of nearest_code. It loops over D above 16 (exact float32), 32 (fast float32) or 64; D = 100 leaves a remainder.

ptxas spills two or three registers of some exact float32 variants on sm_80 and sm_100, because it stops at 128 or 168 for the
sake of occupancy. The option maxnreg=168 left none in 210 compilations, but torch's wrapper of Triton kernels does not know it.
"""

import torch
from dae_kernels.nearest_code import fused

POINTERS = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}
# x dtype, codebook dtype, exact, D, metric, heads
VARIANTS = {
    "fp32 fast D=128": (torch.float32, torch.float32, False, 128, "cosine", 1),
    "bf16 D=64": (torch.bfloat16, torch.bfloat16, False, 64, "l2", 1),
    "bf16 D=64, 3 heads": (torch.bfloat16, torch.bfloat16, False, 64, "l2", 3),
    "bf16 D=256": (torch.bfloat16, torch.bfloat16, True, 256, "l2", 1),
    "bf16 x, fp32 codes, exact D=100": (torch.bfloat16, torch.float32, True, 100, "cosine", 1),
}


def split(tile):
    """Tile sizes, which are constants of the kernel, and options of the launch."""
    blocks = {key: value for key, value in tile.items() if key.startswith("BLOCK")}
    return blocks, {key: value for key, value in tile.items() if not key.startswith("BLOCK")}


def variants(Variant, backend):
    for name, (x_dtype, code_dtype, exact, D, metric, heads) in VARIANTS.items():
        dtype = fused.dot_dtype(x_dtype, code_dtype, exact)
        pointers = {"norm_ptr": "*fp32", "codebook_ptr": POINTERS[code_dtype]}
        outputs = {"x_ptr": POINTERS[x_dtype], "index_ptr": "*i64", "distance_ptr": "*fp32"}
        constants = {"D": D, "COSINE": metric == "cosine"}
        precision = ("ieee" if backend == "hip" else "tf32x3") if exact else "tf32"
        blocks, options = split(fused.tile(D, dtype, exact))
        sizes = {"N": "i32", "K": "i32", "d_end": "i32"}
        products = constants | blocks | {"H": heads, "UPCAST": dtype != x_dtype, "INPUT_PRECISION": precision}
        yield Variant(name, fused.nearest_code_kernel, pointers | outputs, sizes, products, options, product=True)
        if D == 100:
            blocks, options = split(fused.norm_tile(D))
            yield Variant(name, fused.code_norm_kernel, pointers, {"K": "i32"}, constants | blocks, options)
