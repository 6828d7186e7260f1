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
