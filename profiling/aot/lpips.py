"""Variants of lpips: VGG16's widths in both layouts, all gradients and one, and the largest number of channels."""

from dae_kernels.lpips import fused
from variants import Variant

# element type, channels_last, C, P, weight, gradients to a, b and weight
VARIANTS = {
    "bf16 channels_last C=64": ("*bf16", True, 64, 65536, True, (True, False, False)),
    "bf16 contiguous C=64": ("*bf16", False, 64, 65536, False, (True, False, False)),
    "bf16 channels_last C=512, all": ("*bf16", True, 512, 1024, True, (True, True, True)),
    "bf16 contiguous C=512, all": ("*bf16", False, 512, 1024, True, (True, True, True)),
    "fp32 contiguous C=100, all": ("*fp32", False, 100, 4096, True, (True, True, True)),
    "fp16 channels_last C=2048, all": ("*fp16", True, 2048, 64, True, (True, True, True)),
    "fp32 [B, C=63]": ("*fp32", True, 63, 1, False, (True, True, False)),  # sizes of 1 are specialised by the launcher
    "fp32 contiguous C=2048, all": ("*fp32", False, 2048, 64, True, (True, True, True)),
}


def variants(backend):
    for name, (element, channels_last, C, P, weight, wants) in VARIANTS.items():
        constants = {"WEIGHT": weight} | dict(zip(("WANTS_A", "WANTS_B", "WANTS_WEIGHT"), wants, strict=True))
        constants |= {f"{t}_stride_{'c' if channels_last else 'p'}": 1 for t in ("a", "b", "da", "db")}
        constants |= {"P": 1, "chunk": 1, "chunks": 1} if P == 1 else {}
        types = dict.fromkeys(("a_ptr", "b_ptr", "da_ptr", "db_ptr"), element) | {"eps": "fp32"}
        for kernel, part in ((fused.distance_kernel, True), (fused.gradient_kernel, wants[2])):
            present = {"weight_ptr": weight, "da_ptr": wants[0], "db_ptr": wants[1], "part_ptr": part}
            absent = {key: None for key, here in present.items() if not here}
            divisible = ("stride",) if C % 16 == 0 else ()
            yield Variant(name, kernel, types, constants | absent, fused.tile(C, P), divisible=divisible)
