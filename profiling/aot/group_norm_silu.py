"""Variants of group_norm_silu: both layouts, with SiLU and the adaptive operands, and the simplest case. One stride is 1."""

from dae_kernels.group_norm_silu import fused
from dae_kernels.group_norm_silu.layout import tile, whole_gradient_tile, whole_group_tile
from variants import Variant

# element type, channels_last, C, P, adaptive, SiLU
VARIANTS = {
    "bf16 channels_last C=128": ("*bf16", True, 128, 65536, False, True),
    "bf16 contiguous": ("*bf16", False, 128, 65536, False, True),
    "fp32 channels_last C=100, adaptive": ("*fp32", True, 100, 4096, True, True),
    "fp16 contiguous 8x8, no SiLU": ("*fp16", False, 512, 64, False, False),
}
# element type, channels_last, channels of a group, P, whether the gradient comes in the other layout
WHOLE = {
    "bf16 channels_last 16x16, 16 a group": ("*bf16", True, 16, 256, False),
    "bf16 contiguous 16x16, 16 a group": ("*bf16", False, 16, 256, False),
    "bf16 contiguous 32x32, 8 a group": ("*bf16", False, 8, 1024, False),
    "bf16 channels_last 32x32, 8 a group": ("*bf16", True, 8, 1024, True),
    "bf16 contiguous 32x32, 16 a group": ("*bf16", False, 16, 1024, False),
    "bf16 channels_last 32x32, 16 a group": ("*bf16", True, 16, 1024, False),
    "fp32 contiguous 16384, 1 a group": ("*fp32", False, 1, 16384, False),
    "fp32 contiguous 32x32, 16 a group": ("*fp32", False, 16, 1024, True),
    "fp32 channels_last 32x32, 16 a group": ("*fp32", True, 16, 1024, True),
    "fp32 channels_last 32x32, 8 a group": ("*fp32", True, 8, 1024, True),
    "fp32 contiguous 8192, 1 a group": ("*fp32", False, 1, 8192, False),
    "fp32 contiguous 1x1, 32 a group": ("*fp32", False, 32, 1, False),
    "fp32 contiguous 16x16, 32 a group": ("*fp32", False, 32, 256, True),
    "fp32 contiguous 32x16, 32 a group": ("*fp32", False, 32, 512, True),
    "fp32 channels_last 32x16, 32 a group": ("*fp32", True, 32, 512, True),
    "fp32 channels_last 20x20, 12 a group": ("*fp32", True, 12, 400, False),
}
# weight and bias, scale and shift, element type of the gradients
PARAMETERS = {
    "fp32 affine": (True, False, "*fp32"),
    "bf16 affine and adaptive": (True, True, "*bf16"),
    "fp32 adaptive": (False, True, "*fp32"),
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
    for name, (element, channels_last, channels, P, other) in WHOLE.items():
        constants = {"WEIGHT": True, "BIAS": True, "ADAPTIVE": element == "*fp32", "SILU": True}
        constants |= {f"stride_{'c' if channels_last else 'p'}": 1, f"dy_stride_{'c' if channels_last != other else 'p'}": 1}
        constants |= {} if element == "*fp32" else {"scale_ptr": None, "shift_ptr": None}
        types = {f"{t}_ptr": element for t in TENSORS} | {"eps": "fp32"}
        for kernel, find in (
            (fused.whole_group_kernel, whole_group_tile),
            (fused.whole_group_gradient_kernel, whole_gradient_tile),
        ):
            sizes = find(channels, P)
            held = {"HELD": sizes.pop("HELD", True)}
            yield Variant(name, kernel, types, constants | held, sizes, divisible=("stride",))
    for name, (WEIGHT, ADAPTIVE, gradient) in PARAMETERS.items():
        constants = {"WEIGHT": WEIGHT, "BIAS": WEIGHT, "ADAPTIVE": ADAPTIVE}
        constants |= {} if ADAPTIVE else {"scale_ptr": None}
        constants |= {} if WEIGHT else {"weight_ptr": None, "bias_ptr": None}
        types = {f"{t}_ptr": gradient for t in ("d_affine", "d_adaptive", "scale")}
        yield Variant(name, fused.parameter_gradients_kernel, types, constants, fused.PARAMETERS)
