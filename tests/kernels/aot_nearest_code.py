"""Compile the kernels of nearest_code for GPUs that are not here; print one JSON object per kernel variant and target.

Run by test_nearest_code_aot.py in a process of its own: where TRITON_INTERPRET is set nothing compiles.
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile

import torch
import triton
from dae_kernels.nearest_code import fused
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
POINTERS = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}
# (x dtype, codebook dtype, exact, D, metric). The kernel loops over D above 16 (exact float32), 32 (fast float32) or 64; D = 100
# leaves a remainder. A wider sweep (D = 3 ... 256, both metrics, all pairs of dtypes) is clean on sm_90 and gfx942; ptxas spills
# two or three registers of some float32 variants on sm_80 and sm_100, because it stops at 128 or 168 registers for the sake of
# occupancy. The option maxnreg=168 left none in 210 compilations, but torch's wrapper of Triton kernels does not know it.
VARIANTS = {
    "fp32 fast D=128": (torch.float32, torch.float32, False, 128, "cosine"),
    "bf16 D=64": (torch.bfloat16, torch.bfloat16, False, 64, "l2"),
    "bf16 D=256": (torch.bfloat16, torch.bfloat16, True, 256, "l2"),
    "bf16 x, fp32 codes, exact D=100": (torch.bfloat16, torch.float32, True, 100, "cosine"),
}


def compiled(kernel, target: GPUTarget, pointers: dict[str, str], scalars: dict[str, str], constants: dict, tile: dict):
    """As the launcher would compile it: pointers are 16-byte aligned, N and K are plain integers."""
    blocks = {key: value for key, value in tile.items() if key.startswith("BLOCK")}
    options = {key: value for key, value in tile.items() if not key.startswith("BLOCK")}
    names = kernel.arg_names
    signature = {name: (pointers | scalars).get(name, "constexpr") for name in names}
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in pointers}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants | blocks, attrs=aligned)
    return triton.compile(source, target=target, options=options)


def resources(binary, target: GPUTarget) -> dict:
    if target.backend == "hip":
        text = binary.asm["amdgcn"]
        one = lambda key: int(re.search(rf"\.{key}:\s+(\d+)", text).group(1))  # noqa: E731
        return {
            "shared": binary.metadata.shared,
            "registers": one("vgpr_count"),
            "spills": one("vgpr_spill_count") + one("sgpr_spill_count") + one("private_segment_fixed_size"),
            "products": {"MFMA": len(re.findall(r"\bv_mfma", text))},
        }
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        tool = triton.knobs.nvidia.cuobjdump.path
        usage = subprocess.run([tool, "-res-usage", file.name], check=True, capture_output=True, text=True).stdout
        sass = subprocess.run([tool, "-sass", file.name], check=True, capture_output=True, text=True).stdout
    numbers = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    count = lambda word: len(re.findall(rf"\b{word}", sass))  # noqa: E731
    return {
        "shared": binary.metadata.shared,
        "registers": numbers["REG"],
        "spills": numbers["STACK"] + numbers["LOCAL"] + count("LDL") + count("STL"),
        "products": {"HMMA": count("HMMA"), "HGMMA": count("HGMMA"), "UTCMMA": count("UTC[A-Z]*MMA")},
    }


def main() -> None:
    for name, (x_dtype, code_dtype, exact, D, metric) in VARIANTS.items():
        dtype = fused.dot_dtype(x_dtype, code_dtype, exact)
        pointers = {"norm_ptr": "*fp32", "codebook_ptr": POINTERS[code_dtype]}
        outputs = {"x_ptr": POINTERS[x_dtype], "index_ptr": "*i64", "distance_ptr": "*fp32"}
        constants = {"D": D, "COSINE": metric == "cosine"}
        for target_name, target in TARGETS.items():
            precision = ("ieee" if target.backend == "hip" else "tf32x3") if exact else "tf32"
            products = constants | {"UPCAST": dtype != x_dtype, "INPUT_PRECISION": precision}
            tile = fused.tile(D, dtype, exact)
            sizes = {"N": "i32", "K": "i32", "d_end": "i32"}
            rows = [compiled(fused.nearest_code_kernel, target, pointers | outputs, sizes, products, tile)]
            if D == 100:
                rows.append(compiled(fused.code_norm_kernel, target, pointers, {"K": "i32"}, constants, fused.norm_tile(D)))
            for binary in rows:
                report = {"kernel": binary.metadata.name, "variant": name, "target": target_name, **resources(binary, target)}
                print(json.dumps(report), flush=True)


if __name__ == "__main__":
    main()
