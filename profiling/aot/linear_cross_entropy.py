"""Variants of linear_cross_entropy's step: a long vocabulary in 16 bits, a short one, and a loss without gradient.

z_loss is on where labels are smoothed.
"""

from dae_kernels.linear_cross_entropy import fused

# element type, V, gradient, label smoothing
VARIANTS = {
    "bf16 V=16384": ("*bf16", 16384, True, False),
    "bf16 V=16384, smoothed": ("*bf16", 16384, True, True),
    "fp32 V=16384": ("*fp32", 16384, True, False),
    "fp16 V=1000": ("*fp16", 1000, True, True),
    "bf16 V=64": ("*bf16", 64, True, False),
    "bf16 V=16384, loss alone": ("*bf16", 16384, False, False),
}


def variants(Variant, backend):
    for name, (element, V, gradient, smooth) in VARIANTS.items():
        tile = fused.tile(V)
        pointers = {"logits_ptr": element, "target_ptr": "*i64", "loss_ptr": "*fp32"}
        scalars = {"stride_n": "i32", "V": "i32", "label_smoothing": "fp32", "z_loss": "fp32"}
        constants = {"GRADIENT": gradient, "SMOOTH": smooth, "Z_LOSS": smooth, "BLOCK_V": tile["BLOCK_V"]}
        aligned = ("stride_n", "V") if V % 16 == 0 else ()
        options = {"num_warps": tile["num_warps"]}
        yield Variant(name, fused.softmax_step_kernel, pointers, scalars, constants, options, divisible=aligned)
