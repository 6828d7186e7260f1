"""Variants of nearest_code. It loops over D above 16 (exact float32), 32 (fast float32) or 64; D = 100 leaves a remainder."""

import torch
from dae_kernels.nearest_code import fused

POINTERS = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}
# x dtype, codebook dtype, exact, D, metric, heads
VARIANTS = {
    "fp32 fast D=128": (torch.float32, torch.float32, False, 128, "cosine", 1),
    "bf16 D=64, fast": (torch.bfloat16, torch.bfloat16, False, 64, "l2", 1),
    "bf16 D=64, 3 heads, fast": (torch.bfloat16, torch.bfloat16, False, 64, "l2", 3),
    "bf16 D=256, fast": (torch.bfloat16, torch.bfloat16, False, 256, "l2", 1),
    "bf16 D=256, exact": (torch.bfloat16, torch.bfloat16, True, 256, "l2", 1),
    "bf16 D=64, cosine, exact": (torch.bfloat16, torch.bfloat16, True, 64, "cosine", 1),
    "fp32 D=8, exact": (torch.float32, torch.float32, True, 8, "l2", 1),
    "fp32 D=64, 3 heads, exact": (torch.float32, torch.float32, True, 64, "l2", 3),
    "fp32 D=256, cosine, exact": (torch.float32, torch.float32, True, 256, "cosine", 1),
    "bf16 x, fp32 codes, exact D=100": (torch.bfloat16, torch.float32, True, 100, "cosine", 1),
    "bf16 x, fp32 codes, exact, l2": (torch.bfloat16, torch.float32, True, 64, "l2", 1),
    "fp32 x, bf16 codes, exact, l2": (torch.float32, torch.bfloat16, True, 64, "l2", 1),
}


def split(tile):
    """Tile sizes, which are constants of the kernel, and options of the launch."""
    blocks = {key: value for key, value in tile.items() if key.startswith("BLOCK")}
    return blocks, {key: value for key, value in tile.items() if not key.startswith("BLOCK")}


def variants(Variant, backend):
    for name, (x_dtype, code_dtype, exact, D, metric, heads) in VARIANTS.items():
        dtype = fused.dot_dtype(x_dtype, code_dtype, exact)
        pointers = {"codebook_ptr": POINTERS[code_dtype]}
        norm, found = {"norm_ptr": "*fp32"}, {"score_ptr": "*fp32", "candidate_ptr": "*i32"}
        rows = pointers | {"x_ptr": POINTERS[x_dtype]} | found
        results = {"reach_ptr": "*fp32", "index_ptr": "*i64", "distance_ptr": "*fp32"}
        codes = {"D": D, "COSINE": metric == "cosine"}
        constants = codes | {"H": heads, "EXACT": exact}
        precision = ("ieee" if backend == "hip" else "tf32x3") if exact else "tf32"

        blocks, options = split(fused.search_tile(D, dtype, exact))
        sizes = {"N": "i32", "K": "i32", "codes_a_split": "i32", "d_end": "i32"}
        products = constants | blocks | {"UPCAST": dtype != x_dtype, "INPUT_PRECISION": precision}
        yield Variant(name, fused.search_kernel, rows | norm, sizes, products, options, product=True)

        blocks, options = split(fused.settle_tile(metric == "cosine"))
        sizes = {"N": "i32", "K": "i32", "S": "i32", "D": "i32"}
        walks = {"H": heads, "COSINE": metric == "cosine", "EXACT": exact}
        yield Variant(name, fused.settle_kernel, rows | results, sizes, walks | blocks, options)

        if D in (64, 100):
            blocks, options = split(fused.norm_tile(D))
            yield Variant(name, fused.code_norm_kernel, pointers | norm, {"K": "i32"}, codes | blocks, options)
