"""Variants of nearest_code, with and without a last tile of fewer codes.

It loops over D above 16 (exact float32), 32 (fast float32) or 64; D = 100 leaves a remainder.
"""

import torch
from dae_kernels.nearest_code import fused, layout
from variants import Variant

POINTERS = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}
# x dtype, codebook dtype, exact, D, metric, heads
VARIANTS = {
    "fp32 fast D=128": (torch.float32, torch.float32, False, 128, "cosine", 1),
    "bf16 D=64, fast": (torch.bfloat16, torch.bfloat16, False, 64, "l2", 1),
    "bf16 D=64, 3 heads, fast": (torch.bfloat16, torch.bfloat16, False, 64, "l2", 3),
    "bf16 D=256, fast": (torch.bfloat16, torch.bfloat16, False, 256, "l2", 1),
    "bf16 D=8, fast": (torch.bfloat16, torch.bfloat16, False, 8, "l2", 1),
    "bf16 D=8, exact": (torch.bfloat16, torch.bfloat16, True, 8, "l2", 1),
    "bf16 D=32, exact": (torch.bfloat16, torch.bfloat16, True, 32, "l2", 1),
    "bf16 D=64, exact": (torch.bfloat16, torch.bfloat16, True, 64, "l2", 1),
    "fp16 D=512, fast": (torch.float16, torch.float16, False, 512, "l2", 1),
    "bf16 D=512, cosine, exact": (torch.bfloat16, torch.bfloat16, True, 512, "cosine", 1),
    "bf16 D=256, exact": (torch.bfloat16, torch.bfloat16, True, 256, "l2", 1),
    "bf16 D=64, cosine, exact": (torch.bfloat16, torch.bfloat16, True, 64, "cosine", 1),
    "fp32 D=8, exact": (torch.float32, torch.float32, True, 8, "l2", 1),
    "fp32 D=64, 3 heads, exact": (torch.float32, torch.float32, True, 64, "l2", 3),
    "fp32 D=256, cosine, exact": (torch.float32, torch.float32, True, 256, "cosine", 1),
    "bf16 x, fp32 codes, exact D=100": (torch.bfloat16, torch.float32, True, 100, "cosine", 1),
    "bf16 x, fp32 codes, exact, l2": (torch.bfloat16, torch.float32, True, 64, "l2", 1),
    "fp32 x, bf16 codes, exact, l2": (torch.float32, torch.bfloat16, True, 64, "l2", 1),
}


def variants(backend, gpu=None):
    for name, (x_dtype, code_dtype, exact, D, metric, heads) in VARIANTS.items():
        dtype = layout.dot_dtype(x_dtype, code_dtype, exact)
        types = {"x_ptr": POINTERS[x_dtype], "codebook_ptr": POINTERS[code_dtype], "candidate_ptr": "*i32", "index_ptr": "*i64"}
        types |= {"count_ptr": "*i32", "list_ptr": "*i32", "part_distance_ptr": "*fp64", "part_code_ptr": "*i32"}
        constants = {"COSINE": metric == "cosine", "H": heads, "EXACT": exact}
        precision = ("ieee" if backend == "hip" else "tf32x3") if exact else "tf32"
        search = constants | {"D": D, "UPCAST": dtype != x_dtype, "INPUT_PRECISION": precision}
        tile = layout.search_tile(D, dtype, exact, gpu)
        for label, ragged in ((name, False), (f"{name}, ragged", True)):
            flags = {"BY_LANE": layout.by_lane(tile, exact), "RAGGED": ragged}
            yield Variant(label, fused.search_kernel, types, search | flags, tile, product=True)
        yield Variant(name, fused.settle_kernel, types, constants, layout.settle_tile(metric == "cosine"))
        if exact:
            walk = layout.walk_tile(metric == "cosine")
            yield Variant(name, fused.walk_kernel, types, constants, walk)
            yield Variant(name, fused.join_kernel, types, constants | {"BLOCK_S": 2048}, walk)
        if D in (64, 100):
            yield Variant(name, fused.code_norm_kernel, types, constants | {"D": D}, layout.norm_tile(D))
