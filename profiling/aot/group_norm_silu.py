"""Variants of group_norm_silu: both layouts, with SiLU and the adaptive operands, and the least of them. One stride is 1."""

from dae_kernels.group_norm_silu import fused

# element type, channels_last, C, P, adaptive, SiLU
VARIANTS = {
    "bf16 channels_last C=128": ("*bf16", True, 128, 65536, False, True),
    "bf16 contiguous": ("*bf16", False, 128, 65536, False, True),
    "fp32 channels_last C=100, adaptive": ("*fp32", True, 100, 4096, True, True),
    "fp16 contiguous 8x8, no SiLU": ("*fp16", False, 512, 64, False, False),
}
TENSORS = ("x", "y", "dy", "dx")


def variants(Variant, backend):
    for name, (element, channels_last, C, P, adaptive, silu) in VARIANTS.items():
        tile = fused.tile(C, P, channels_last)
        blocks = {key: tile[key] for key in ("BLOCK_P", "BLOCK_C")}
        constants = (
            blocks
            | {
                "WEIGHT": True,
                "BIAS": True,
                "ADAPTIVE": adaptive,
                "SILU": silu,
            }
            | fused.MERGE
        )
        # In the third dy comes in another layout than x: nothing may depend on their agreement.
        constants |= {f"{t}_stride_{'c' if channels_last != (t == 'dy' and adaptive) else 'p'}": 1 for t in TENSORS}
        for kernel in (
            fused.moments_kernel,
            fused.merge_moments_kernel,
            fused.normalise_kernel,
            fused.gradient_sums_kernel,
            fused.merge_gradient_sums_kernel,
            fused.gradient_kernel,
        ):
            own = constants | (fused.MERGE_GRADIENTS if kernel is fused.merge_gradient_sums_kernel else {})
            known = {key: value for key, value in own.items() if key in kernel.arg_names}
            pointers = {key: "*fp32" for key in kernel.arg_names if key.endswith("_ptr")}
            pointers |= {key: element for key in pointers if key.removesuffix("_ptr") in TENSORS}
            if not adaptive:
                known |= {key: pointers.pop(key) and None for key in ("scale_ptr", "shift_ptr") if key in pointers}
            sizes = {key: "i32" for key in kernel.arg_names if key not in pointers and key not in known}
            if "eps" in sizes:
                sizes["eps"] = "fp32"
            aligned = tuple(key for key in sizes if "stride" in key and C % 16 == 0)
            yield Variant(name, kernel, pointers, sizes, known, {"num_warps": tile["num_warps"]}, divisible=aligned)
