"""The kernels compiled for GPUs that are not here: no spills, shared memory within the chip's, tensor-core instructions."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
SCRIPT = Path(__file__).with_name("aot_nearest_code.py")
# Bytes of shared memory a program may have. The compiler does not check it; a launch does, on the user's machine.
SHARED_LIMIT = {"sm_80": 166912, "sm_90": 232448, "sm_100": 232448, "gfx942": 65536}
PRODUCT = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCMMA", "gfx942": "MFMA"}


@pytest.fixture(scope="module")
def reports() -> list[dict]:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    result = subprocess.run([sys.executable, str(SCRIPT)], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("target", SHARED_LIMIT)
def test_kernels_fit_their_chip(reports, target):
    mine = [report for report in reports if report["target"] == target]
    assert {report["kernel"] for report in mine} == {"nearest_code_kernel", "code_norm_kernel"}
    for report in mine:
        assert report["spills"] == 0, report
        assert report["shared"] <= SHARED_LIMIT[target], report
        if report["kernel"] == "nearest_code_kernel":
            assert report["products"][PRODUCT[target]] > 0, report
