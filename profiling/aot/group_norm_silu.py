"""Variants of group_norm_silu: both layouts, with SiLU and the adaptive operands, and the simplest case. One stride is 1."""

from dae_kernels.group_norm_silu import fused
from variants import Variant

# element type, channels_last, C, P, adaptive, SiLU
VARIANTS = {
    "bf16 channels_last C=128": ("*bf16", True, 128, 65536, False, True),
    "bf16 contiguous": ("*bf16", False, 128, 65536, False, True),
    "fp32 channels_last C=100, adaptive": ("*fp32", True, 100, 4096, True, True),
    "fp16 contiguous 8x8, no SiLU": ("*fp16", False, 512, 64, False, False),
}
TENSORS = ("x", "y", "dy", "dx")
KERNELS = (
    fused.moments_kernel,
    fused.merge_moments_kernel,
    fused.normalise_kernel,
    fused.gradient_sums_kernel,
    fused.merge_gradient_sums_kernel,
    fused.gradient_kernel,
)


def variants(backend):
    for name, (element, channels_last, C, P, adaptive, silu) in VARIANTS.items():
        constants = {"WEIGHT": True, "BIAS": True, "ADAPTIVE": adaptive, "SILU": silu} | fused.MERGE
        # In the third, dy and x have different layouts, on which nothing may depend.
        constants |= {f"{t}_stride_{'c' if channels_last != (t == 'dy' and adaptive) else 'p'}": 1 for t in TENSORS}
        constants |= {} if adaptive else {"scale_ptr": None, "shift_ptr": None}
        types = {f"{t}_ptr": element for t in TENSORS} | {"eps": "fp32"}
        for kernel in KERNELS:
            own = constants | (fused.MERGE_GRADIENTS if kernel is fused.merge_gradient_sums_kernel else {})
            divisible = ("stride",) if C % 16 == 0 else ()
            yield Variant(name, kernel, types, own, fused.tile(C, P, channels_last), divisible=divisible)
