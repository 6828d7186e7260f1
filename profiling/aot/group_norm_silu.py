"""Variants of group_norm_silu: both layouts, with SiLU and the adaptive operands, and the simplest case. One stride is 1."""

from dae_kernels.group_norm_silu import fused
from dae_kernels.group_norm_silu.layout import tile, whole_group_tile
from variants import Variant

# element type, channels_last, C, P, adaptive, SiLU
VARIANTS = {
    "bf16 channels_last C=128": ("*bf16", True, 128, 65536, False, True),
    "bf16 contiguous": ("*bf16", False, 128, 65536, False, True),
    "fp32 channels_last C=100, adaptive": ("*fp32", True, 100, 4096, True, True),
    "fp16 contiguous 8x8, no SiLU": ("*fp16", False, 512, 64, False, False),
}
# element type, channels_last, channels of a group, P
WHOLE = {
    "bf16 channels_last 16x16, 16 a group": ("*bf16", True, 16, 256),
    "bf16 contiguous 32x32, 16 a group": ("*bf16", False, 16, 1024),
    "bf16 channels_last 32x32, 16 a group": ("*bf16", True, 16, 1024),
    "fp32 contiguous 16384, 1 a group": ("*fp32", False, 1, 16384),
    "fp32 channels_last 20x20, 12 a group": ("*fp32", True, 12, 400),
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


def variants(backend, gpu=None):
    for name, (element, channels_last, C, P, adaptive, silu) in VARIANTS.items():
        constants = {"WEIGHT": True, "BIAS": True, "ADAPTIVE": adaptive, "SILU": silu} | fused.MERGE
        # In the third dy comes in another layout than x: nothing may depend on their agreement.
        prefixes = ("x_", "", "dy_")
        constants |= {f"{t}stride_{'c' if channels_last != (t == 'dy_' and adaptive) else 'p'}": 1 for t in prefixes}
        constants |= {} if adaptive else {"scale_ptr": None, "shift_ptr": None}
        types = {f"{t}_ptr": element for t in TENSORS} | {"eps": "fp32"}
        for kernel in KERNELS:
            own = constants | (fused.MERGE_GRADIENTS if kernel is fused.merge_gradient_sums_kernel else {})
            divisible = ("stride",) if C % 16 == 0 else ()
            sizes = tile(C, P, channels_last, kernel.__name__.removesuffix("_kernel"), gpu)
            yield Variant(name, kernel, types, own, sizes, divisible=divisible)
    for name, (element, channels_last, channels, P) in WHOLE.items():
        constants = {"WEIGHT": True, "BIAS": True, "ADAPTIVE": element == "*fp32", "SILU": True}
        constants |= {f"stride_{'c' if channels_last else 'p'}": 1} | (
            {} if element == "*fp32" else {"scale_ptr": None, "shift_ptr": None}
        )
        types = {"x_ptr": element, "y_ptr": element, "eps": "fp32"}
        yield Variant(name, fused.whole_group_kernel, types, constants, whole_group_tile(channels, P), divisible=("stride",))
