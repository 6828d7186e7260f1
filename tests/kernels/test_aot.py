"""The gate of profiling/inspect_kernels.py for each operation and GPU, in its own process: the interpreter cannot compile."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
OPERATIONS = sorted(path.stem for path in (ROOT / "profiling" / "aot").glob("*.py"))
TARGETS = ["sm_80", "sm_90", "sm_100", "gfx942"]


def test_every_operation_with_a_kernel_is_compiled():
    assert sorted(path.parent.name for path in (ROOT / "kernels" / "dae_kernels").glob("*/fused.py")) == OPERATIONS


BAD_KERNEL = """
import triton
import triton.language as tl
from variants import Variant


@triton.jit
def kernel(out_ptr, channels, P, apart, BLOCK: tl.constexpr):
    n = (channels * P).to(tl.float32)  # Python's int has no `.to`
    tl.store(out_ptr + tl.arange(0, BLOCK), n + apart)


def variants(backend):
    yield Variant("bad", kernel, {}, {"BLOCK": 16}, {"num_warps": 1})
"""


def test_integers_that_are_one_are_compiled(tmp_path):
    """Triton makes them constants, of which the interpreter and an ordinary compilation know nothing."""
    (tmp_path / "bad.py").write_text(BAD_KERNEL)
    script = (
        "import sys, pathlib; sys.path.insert(0, sys.argv[1])\n"
        "import inspect_kernels as gate\n"
        "(bad,) = gate.load_module(pathlib.Path(sys.argv[2])).variants('cuda')\n"
        "assert gate.refusal(bad, 'sm_90') is None\n"
        "print(*gate.refused_ones(bad, 'sm_90'), sep='\\n')"
    )
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", script, str(ROOT / "profiling"), str(tmp_path / "bad.py")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    (fault,) = done.stdout.splitlines()
    assert "channels = P = apart = 1" in fault and "to" in fault


@pytest.mark.slow
@pytest.mark.parametrize("op", OPERATIONS)
def test_kernels_compile_without_spills(op):
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    targets = [option for target in TARGETS for option in ("--target", target)]
    command = [sys.executable, str(ROOT / "profiling" / "inspect_kernels.py"), "--op", op, *targets, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    reports = [json.loads(line) for line in done.stdout.splitlines()]
    assert {report["target"] for report in reports} == set(TARGETS)
    assert not [report for report in reports if report["faults"]]
    assert all(report["registers"] > 0 for report in reports)
