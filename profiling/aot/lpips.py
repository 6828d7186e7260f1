"""Variants of lpips: VGG16's widths in both layouts, all gradients and one, and as many channels as the kernel takes."""

from dae_kernels.lpips import fused

# element type, channels_last, C, P, weight, gradients to a, b and weight
VARIANTS = {
    "bf16 channels_last C=64": ("*bf16", True, 64, 65536, True, (True, False, False)),
    "bf16 contiguous C=64": ("*bf16", False, 64, 65536, False, (True, False, False)),
    "bf16 channels_last C=512, all": ("*bf16", True, 512, 1024, True, (True, True, True)),
    "bf16 contiguous C=512, all": ("*bf16", False, 512, 1024, True, (True, True, True)),
    "fp32 contiguous C=100, all": ("*fp32", False, 100, 4096, True, (True, True, True)),
    "fp16 channels_last C=2048, all": ("*fp16", True, 2048, 64, True, (True, True, True)),
    "fp32 [B, C=63]": ("*fp32", True, 63, 1, False, (True, True, False)),  # the launcher knows these sizes to be 1
    "fp32 contiguous C=2048, all": ("*fp32", False, 2048, 64, True, (True, True, True)),
}


def variants(Variant, backend):
    for name, (element, channels_last, C, P, weight, wants) in VARIANTS.items():
        tile = fused.tile(C, P)
        constants = {"BLOCK_P": tile["BLOCK_P"], "BLOCK_C": tile["BLOCK_C"], "WEIGHT": weight}
        constants |= dict(zip(("WANTS_A", "WANTS_B", "WANTS_WEIGHT"), wants, strict=True))
        constants |= {f"{t}_stride_{'c' if channels_last else 'p'}": 1 for t in ("a", "b", "da", "db")}
        constants |= {"P": 1, "chunk": 1, "chunks": 1} if P == 1 else {}
        absent = {"weight_ptr": weight, "da_ptr": wants[0], "db_ptr": wants[1], "part_ptr": wants[2]}
        for kernel in (fused.distance_kernel, fused.gradient_kernel):
            known = {key: value for key, value in constants.items() if key in kernel.arg_names}
            pointers = {key: "*fp32" for key in kernel.arg_names if key.endswith("_ptr")}
            pointers |= {key: element for key in ("a_ptr", "b_ptr", "da_ptr", "db_ptr") if key in pointers}
            if kernel is fused.gradient_kernel:
                known |= {key: pointers.pop(key) and None for key, present in absent.items() if not present}
            elif not weight:
                known |= {"weight_ptr": pointers.pop("weight_ptr") and None}
            sizes = {key: "i32" for key in kernel.arg_names if key not in pointers and key not in known} | {"eps": "fp32"}
            aligned = tuple(key for key in sizes if "stride" in key and C % 16 == 0)
            yield Variant(name, kernel, pointers, sizes, known, {"num_warps": tile["num_warps"]}, divisible=aligned)
