"""Variants of linear_cross_entropy's step: a long vocabulary in 16 bits, a short one, and a loss without gradient.

z_loss is on where labels are smoothed; bias, class weights and a soft cap are each on alone and all together.
"""

import torch
from dae_kernels.linear_cross_entropy import fused
from variants import Variant

FLAGS = ("SMOOTH", "Z_LOSS", "BIAS", "WEIGHT", "SOFTCAP")
# element type of the gradient, V, gradient, enabled options
VARIANTS = {
    "bf16 V=16384": ("*bf16", 16384, True, ()),
    "bf16 V=16384, smoothed": ("*bf16", 16384, True, ("SMOOTH", "Z_LOSS")),
    "bf16 V=16384, bias": ("*bf16", 16384, True, ("BIAS",)),
    "bf16 V=16384, classes, smoothed": ("*bf16", 16384, True, ("WEIGHT", "SMOOTH", "Z_LOSS")),
    "bf16 V=16384, soft cap": ("*bf16", 16384, True, ("SOFTCAP",)),
    "bf16 V=16384, all": ("*bf16", 16384, True, FLAGS),
    "fp32 V=16384": ("*fp32", 16384, True, ()),
    "fp32 V=16384, all": ("*fp32", 16384, True, FLAGS),
    "fp16 V=16384, all": ("*fp16", 16384, True, FLAGS),
    "fp16 V=1000, all": ("*fp16", 1000, True, FLAGS),
    "bf16 V=64": ("*bf16", 64, True, ()),
    "bf16 V=16384, loss alone": ("*bf16", 16384, False, ()),
    "bf16 V=16384, loss alone, all": ("*bf16", 16384, False, FLAGS),
}


def variants(backend):
    for name, (element, V, gradient, on) in VARIANTS.items():
        logits = torch.bfloat16 if element == "*bf16" else torch.float32
        types = {"logits_ptr": "*bf16" if element == "*bf16" else "*fp32", "gradient_ptr": element, "target_ptr": "*i64"}
        types |= {"label_smoothing": "fp32", "softcap": "fp32"}
        constants = dict.fromkeys(FLAGS, False) | dict.fromkeys(on, True) | {"GRADIENT": gradient}
        divisible = ("stride_n", "V") if V % 16 == 0 else ()
        tile = fused.tile(V, logits, "SOFTCAP" in on)
        yield Variant(name, fused.softmax_step_kernel, types, constants, tile, divisible=divisible)
