"""Compile every Triton kernel for GPUs that need not be present: registers, shared memory, spills, tensor cores.

    python profiling/inspect_kernels.py                       # all operations and targets, as a table
    python profiling/inspect_kernels.py --op nearest_code --target sm_90 --json
    python profiling/inspect_kernels.py --gate                # exit 1 if a kernel breaks a rule

The gate: nothing spilled, shared memory within what a block may have, the tensor-core instruction of the target's generation in
each kernel with a product (HMMA on sm_80, HGMMA on sm_90, UTC*MMA on sm_100, MFMA on gfx942), and every kernel also compiles with
each of its integer arguments as 1, which Triton then makes a constant. Variants of an operation stand
in profiling/aot/<operation>.py.
"""

import argparse
import inspect
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from measuring import load_module
from variants import Variant

VARIANTS = Path(__file__).with_name("aot")
# Triton's name of the target; its limit of shared memory per block, which the compiler does not check; its tensor-core
# instruction (an older one still runs, at a fraction of the rate).
TARGETS = {
    "sm_80": (("cuda", 80, 32), 166912, r"\bHMMA"),
    "sm_90": (("cuda", 90, 32), 232448, r"\bHGMMA"),
    "sm_100": (("cuda", 100, 32), 232448, r"\bUTC[A-Z]*MMA"),
    "gfx942": (("hip", "gfx942", 64), 65536, r"\bv_mfma"),
}

FRONT_ENDS = ("sm_90", "gfx942")  # targets for which Triton's front end, the same for a vendor's GPUs, is asked about constants


def compiled(variant: Variant, target_name: str) -> Any:
    """The variant compiled by Triton for the target."""
    import triton

    return triton.compile(source_of(variant), target=gpu(target_name), options=variant.options)


def variants_of(operation: str, target_name: str) -> Iterator[Variant]:
    """The variants in profiling/aot/, with the tiles that the operation's table has for the target."""
    listed = load_module(VARIANTS / f"{operation}.py").variants
    measured = {"gpu": target_name} if "gpu" in inspect.signature(listed).parameters else {}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*tiles go by rule")  # of targets that nobody has measured
        yield from listed(backend=TARGETS[target_name][0][0], **measured)


def gpu(target_name: str) -> Any:
    from triton.backends.compiler import GPUTarget

    return GPUTarget(*TARGETS[target_name][0])


def source_of(variant: Variant) -> Any:
    from triton.compiler import ASTSource

    places = {name: place for place, name in enumerate(variant.signature)}
    attrs = {(places[name],): [["tt.divisibility", 16]] for name in variant.aligned}
    return ASTSource(fn=variant.kernel, signature=variant.signature, constexprs=variant.constants, attrs=attrs)


def refusal(variant: Variant, target_name: str) -> str | None:
    """Why Triton's front end, which alone knows of constants, does not take the variant, or None; a fraction of a compilation."""
    from triton._C.libtriton import ir
    from triton.compiler import make_backend

    target = gpu(target_name)
    backend, context = make_backend(target), ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    options = backend.parse_options(dict(variant.options))
    try:
        source_of(variant).make_ir(
            target, options, backend.get_codegen_implementation(options), backend.get_module_map(), context
        )
    except Exception as error:  # of any kind: the kernel's own Python runs there
        return " ".join(str(error).split())[-200:]
    return None


def refused_ones(variant: Variant, target_name: str) -> list[str]:
    """Faults of the variant with each of its integer arguments as 1 in turn, and with all of them."""
    names = variant.specialised
    ones = [variant.with_ones(name) for name in names] + ([variant.with_ones(*names)] if len(names) > 1 else [])
    found = [(one.name.removeprefix(variant.name + ", "), refusal(one, target_name)) for one in ones]
    return [f"does not compile with {name}: {reason}" for name, reason in found if reason]


def resources(binary: Any, target_name: str, product: bool) -> dict[str, Any]:
    """Registers per thread, bytes of shared memory per block and of spills, and a product's tensor-core instructions."""
    if target_name.startswith("gfx"):
        code = binary.asm["amdgcn"]
        numbers = {key: int(value) for key, value in re.findall(r"\.(\w+_count|private_segment_fixed_size):\s+(\d+)", code)}
        registers = numbers["vgpr_count"]
        spills = numbers["vgpr_spill_count"] + numbers["sgpr_spill_count"] + numbers["private_segment_fixed_size"]
    else:
        usage = disassembled(binary, "-res-usage")
        code = disassembled(binary, "-sass") if product else ""  # slower than compiling
        numbers = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
        registers, spills = numbers["REG"], numbers["STACK"] + numbers["LOCAL"]  # without such memory there is no LDL or STL
    products = len(re.findall(TARGETS[target_name][2], code))
    return {"registers": registers, "shared": binary.metadata.shared, "spills": spills, "tensor_core": products}


def disassembled(binary: Any, option: str) -> str:
    """Output of cuobjdump for the binary."""
    import triton

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, option, file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def faults(report: dict[str, Any]) -> list[str]:
    """The gate's rules that a kernel breaks."""
    found, most = [], TARGETS[report["target"]][1]
    if report["spills"]:
        found.append(f"{report['spills']} spills")
    if report["shared"] > most:
        found.append(f"{report['shared']} bytes of shared memory, {most} are to be had")
    if report["product"] and not report["tensor_core"]:
        found.append("no tensor-core instruction of this generation in a kernel with a product")
    return found


def main() -> None:
    operations = sorted(path.stem for path in VARIANTS.glob("*.py"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", choices=operations, action="append", help="only this operation (may be repeated)")
    parser.add_argument("--target", choices=list(TARGETS), action="append", help="only this target (may be repeated)")
    parser.add_argument("--json", action="store_true", help="one JSON object per line instead of the table")
    parser.add_argument("--gate", action="store_true", help="exit with 1 if a kernel breaks a rule")
    arguments = parser.parse_args()
    if os.environ.pop("TRITON_INTERPRET", "0") == "1":
        print("TRITON_INTERPRET is set: ignored, nothing compiles under the interpreter", file=sys.stderr)
    if not arguments.json:
        print(f"{'kernel':<34}{'variant':<40}{'target':<8}{'registers':>10}{'shared':>8}{'spills':>7}{'tensor core':>13}")
    broken, wanted = 0, [name for name in TARGETS if name in (arguments.target or TARGETS)]
    for operation, target_name in itertools.product(arguments.op or operations, wanted):
        for variant in variants_of(operation, target_name):
            binary = compiled(variant, target_name)
            report = {"operation": operation, "kernel": binary.metadata.name, "variant": variant.name, "target": target_name}
            report |= resources(binary, target_name, variant.product) | {"product": variant.product}
            report["faults"] = faults(report) + (refused_ones(variant, target_name) if target_name in FRONT_ENDS else [])
            broken += bool(report["faults"])
            if arguments.json:
                print(json.dumps(report), flush=True)
                continue
            remark = f"   <- {'; '.join(report['faults'])}" if report["faults"] else ""
            print(
                f"{report['kernel']:<34}{variant.name:<40}{target_name:<8}{report['registers']:>10}{report['shared']:>8}"
                f"{report['spills']:>7}{report['tensor_core']:>13}{remark}",
                flush=True,
            )
    if arguments.gate and broken:
        sys.exit(f"{broken} kernels break the gate")


if __name__ == "__main__":
    main()
