"""Variants of linear_cross_entropy's step: a long vocabulary in 16 bits, a short one, and a loss without gradient.

z_loss is on where labels are smoothed; bias, class weights and a soft cap are each on alone and all together.
"""

from dae_kernels.linear_cross_entropy import fused

# element type of the gradient, V, gradient, and what is on
VARIANTS = {
    "bf16 V=16384": ("*bf16", 16384, True, ()),
    "bf16 V=16384, smoothed": ("*bf16", 16384, True, ("SMOOTH", "Z_LOSS")),
    "bf16 V=16384, bias": ("*bf16", 16384, True, ("BIAS",)),
    "bf16 V=16384, classes, smoothed": ("*bf16", 16384, True, ("WEIGHT", "SMOOTH", "Z_LOSS")),
    "bf16 V=16384, soft cap": ("*bf16", 16384, True, ("SOFTCAP",)),
    "bf16 V=16384, all": ("*bf16", 16384, True, ("SMOOTH", "Z_LOSS", "BIAS", "WEIGHT", "SOFTCAP")),
    "fp32 V=16384": ("*fp32", 16384, True, ()),
    "fp16 V=1000, all": ("*fp16", 1000, True, ("SMOOTH", "Z_LOSS", "BIAS", "WEIGHT", "SOFTCAP")),
    "bf16 V=64": ("*bf16", 64, True, ()),
    "bf16 V=16384, loss alone": ("*bf16", 16384, False, ()),
    "bf16 V=16384, loss alone, all": ("*bf16", 16384, False, ("SMOOTH", "Z_LOSS", "BIAS", "WEIGHT", "SOFTCAP")),
}


def variants(Variant, backend):
    for name, (element, V, gradient, on) in VARIANTS.items():
        tile = fused.tile(V)
        pointers = dict.fromkeys(("logits_ptr", "bias_ptr", "weight_ptr", "loss_ptr", "z_loss_ptr"), "*fp32")
        pointers |= {"gradient_ptr": element, "target_ptr": "*i64"}
        scalars = {"stride_n": "i32", "gradient_stride_n": "i32", "V": "i32", "label_smoothing": "fp32", "softcap": "fp32"}
        constants = dict.fromkeys(("SMOOTH", "Z_LOSS", "BIAS", "WEIGHT", "SOFTCAP"), False) | dict.fromkeys(on, True)
        constants |= {"GRADIENT": gradient, "BLOCK_V": tile["BLOCK_V"]}
        aligned = ("stride_n", "gradient_stride_n", "V") if V % 16 == 0 else ()
        options = {"num_warps": tile["num_warps"]}
        yield Variant(name, fused.softmax_step_kernel, pointers, scalars, constants, options, divisible=aligned)
