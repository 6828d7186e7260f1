"""What the compiler makes of every Triton kernel, for GPUs that need not be here: registers, shared memory, spills, tensor cores.

    python profiling/inspect_kernels.py                       # all operations and targets, as a table
    python profiling/inspect_kernels.py --op nearest_code --target sm_90 --json
    python profiling/inspect_kernels.py --gate                # exit 1 if a kernel breaks a rule

The gate: nothing spilled, shared memory within what a block may have, and the tensor-core instruction of the target's generation
in each kernel with a product (HMMA on sm_80, HGMMA on sm_90, UTC*MMA on sm_100, MFMA on gfx942). Variants of an operation stand
in profiling/aot/<operation>.py.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
VARIANTS = Path(__file__).with_name("aot")
# What a block may have at most: the compiler does not check it.
SHARED_MEMORY = {"sm_80": 166912, "sm_90": 232448, "sm_100": 232448, "gfx942": 65536}
# The tensor-core instruction of each generation; an older one still runs there, at a fraction of the rate.
INSTRUCTION = {"sm_80": r"\bHMMA", "sm_90": r"\bHGMMA", "sm_100": r"\bUTC[A-Z]*MMA", "gfx942": r"\bv_mfma"}


@dataclass
class Variant:
    """One kernel as its launcher compiles it.

    Args:
        name: tells it from the operation's other variants.
        kernel: the `triton.jit` function.
        pointers: argument -> type ("*fp32"); taken as aligned to 16 bytes.
        scalars: argument -> type ("i32").
        constants: the constexpr arguments, tile sizes among them.
        options: num_warps, num_stages.
        product: whether the kernel multiplies matrices, so tensor-core instructions must be in it.
        divisible: scalars that are multiples of 16, which the launcher would find out.
    """

    name: str
    kernel: Any
    pointers: dict[str, str]
    scalars: dict[str, str]
    constants: dict[str, Any]
    options: dict[str, int] = field(default_factory=dict)
    product: bool = False
    divisible: tuple[str, ...] = ()


def targets() -> dict[str, Any]:
    from triton.backends.compiler import GPUTarget

    return {
        "sm_80": GPUTarget("cuda", 80, 32),
        "sm_90": GPUTarget("cuda", 90, 32),
        "sm_100": GPUTarget("cuda", 100, 32),
        "gfx942": GPUTarget("hip", "gfx942", 64),
    }


def variants_of(operation: str, backend: str) -> list[Variant]:
    """`variants(Variant, backend)` of profiling/aot/<operation>.py; backend is "cuda" or "hip"."""
    spec = importlib.util.spec_from_file_location(f"aot_{operation}", VARIANTS / f"{operation}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return list(module.variants(Variant, backend))


def compiled(variant: Variant, target: Any) -> Any:
    import triton
    from triton.compiler import ASTSource

    names = variant.kernel.arg_names
    known = variant.pointers | variant.scalars
    missing = set(names) - set(known) - set(variant.constants)
    if missing:
        raise ValueError(f"{variant.name}: the variant says nothing about {sorted(missing)}")
    source = ASTSource(
        fn=variant.kernel,
        signature={name: known.get(name, "constexpr") for name in names},
        constexprs=variant.constants,
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in (*variant.pointers, *variant.divisible)},
    )
    return triton.compile(source, target=target, options=variant.options)


def resources(binary: Any, target_name: str, product: bool) -> dict[str, Any]:
    """Registers a thread, shared memory a block and spills in bytes, and of a product its tensor-core instructions."""
    import triton

    if target_name.startswith("gfx"):
        code = binary.asm["amdgcn"]
        one = lambda key: int(re.search(rf"\.{key}:\s+(\d+)", code).group(1))  # noqa: E731
        registers = one("vgpr_count")
        spills = one("vgpr_spill_count") + one("sgpr_spill_count") + one("private_segment_fixed_size")
    else:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(binary.asm["cubin"])
            file.flush()
            tool = triton.knobs.nvidia.cuobjdump.path
            show = lambda option: subprocess.run([tool, option, file.name], check=True, capture_output=True, text=True).stdout  # noqa: E731
            usage, code = show("-res-usage"), show("-sass") if product else ""  # to disassemble takes longer than to compile
        numbers = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
        registers, spills = numbers["REG"], numbers["STACK"] + numbers["LOCAL"]  # no LDL or STL without such memory
    products = len(re.findall(INSTRUCTION[target_name], code))
    return {"registers": registers, "shared": binary.metadata.shared, "spills": spills, "tensor_core": products}


def faults(report: dict[str, Any]) -> list[str]:
    """The rules of the gate that a kernel breaks."""
    found = []
    if report["spills"]:
        found.append(f"{report['spills']} spills")
    if report["shared"] > SHARED_MEMORY[report["target"]]:
        found.append(f"{report['shared']} bytes of shared memory, {SHARED_MEMORY[report['target']]} are to be had")
    if report["product"] and not report["tensor_core"]:
        found.append("no tensor-core instruction of this generation in a kernel with a product")
    return found


def main() -> None:
    operations = sorted(path.stem for path in VARIANTS.glob("*.py"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", choices=operations, action="append", help="only this operation (may be repeated)")
    parser.add_argument("--target", choices=list(SHARED_MEMORY), action="append", help="only this target (may be repeated)")
    parser.add_argument("--json", action="store_true", help="one JSON object a line instead of the table")
    parser.add_argument("--gate", action="store_true", help="exit with 1 if a kernel breaks a rule")
    arguments = parser.parse_args()
    if os.environ.pop("TRITON_INTERPRET", "0") == "1":
        print("TRITON_INTERPRET is set: ignored, nothing compiles under the interpreter", file=sys.stderr)
    if not arguments.json:
        print(f"{'kernel':<34}{'variant':<34}{'target':<8}{'registers':>10}{'shared':>8}{'spills':>7}{'tensor core':>13}")
    broken = 0
    for operation in arguments.op or operations:
        for target_name, target in targets().items():
            if arguments.target and target_name not in arguments.target:
                continue
            for variant in variants_of(operation, target.backend):
                binary = compiled(variant, target)
                report = {"operation": operation, "kernel": binary.metadata.name, "variant": variant.name, "target": target_name}
                report |= resources(binary, target_name, variant.product) | {"product": variant.product}
                report["faults"] = faults(report)
                broken += bool(report["faults"])
                if arguments.json:
                    print(json.dumps(report), flush=True)
                    continue
                remark = f"   <- {'; '.join(report['faults'])}" if report["faults"] else ""
                print(
                    f"{report['kernel']:<34}{variant.name:<34}{target_name:<8}{report['registers']:>10}{report['shared']:>8}"
                    f"{report['spills']:>7}{report['tensor_core']:>13}{remark}",
                    flush=True,
                )
    if arguments.gate and broken:
        sys.exit(f"{broken} kernels break the gate")


if __name__ == "__main__":
    main()
