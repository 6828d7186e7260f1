"""Any subset of the operands may require a gradient, in any memory layout: kernels of torch end the process for some."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from dae_kernels import group_norm_silu

# In a process of its own, which tells how far it came. The masks that the kernels of this package skip are in their own tests.
SCRIPT = """
import importlib.util, itertools, sys
import torch

spec = importlib.util.spec_from_file_location("kernel_operations", sys.argv[1])
module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)

LAYOUTS = {
    "contiguous": lambda x: x,
    "channels last": lambda x: x.movedim(1, -1).contiguous().movedim(-1, 1) if x.dim() > 1 else x,
    "gaps": lambda x: torch.stack([x, x], dim=-1)[..., 0],
    "one row for all": lambda x: x[:1].expand(x.shape),
}


def gradients(operation, operands, leaves):
    operands = [operand.detach().requires_grad_(i in leaves) for i, operand in enumerate(operands)]
    torch.manual_seed(0)
    results = [result for result in operation(*operands) if result.requires_grad]
    return dict(zip(leaves, torch.autograd.grad(sum(r.square().sum() for r in results), [operands[i] for i in leaves])))


for operation in module.OPERATIONS.values():
    if "triton" in operation.name:
        continue
    for layout, view in LAYOUTS.items():
        operands = operation.operands()
        operands = [view(operand) if i in operation.leaves else operand for i, operand in enumerate(operands)]
        expected = None
        for size in range(len(operation.leaves), 0, -1):
            for leaves in itertools.combinations(operation.leaves, size):
                print(operation.name, layout, leaves, flush=True)
                got = gradients(operation, operands, leaves)
                expected = expected or got
                for i, gradient in got.items():
                    # By the same formulas; a sum that only the other cloud needs may be taken over rows instead of columns.
                    torch.testing.assert_close(gradient, expected[i], rtol=1e-5, atol=1e-5 * float(expected[i].abs().max()))
print("done")
"""


@pytest.mark.filterwarnings("ignore")
def test_every_mask_in_every_layout():
    command = [sys.executable, "-W", "ignore", "-c", SCRIPT, str(Path(__file__).with_name("operations.py"))]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout.endswith("done\n"), (done.returncode, done.stdout.splitlines()[-1:], done.stderr[-2000:])


@pytest.mark.parametrize("given", [("weight", "bias"), ("weight",), ("bias",), ()])
def test_group_norm_of_no_images(given):
    """Torch's own backward raises for a bias without weight, where x holds no images."""
    operands = {"x": torch.randn(0, 8, 4, 4)} | {name: torch.rand(8) for name in given}
    for size in range(1, len(operands) + 1):
        for names in itertools.combinations(operands, size):
            leaves = {name: operand.clone().requires_grad_(name in names) for name, operand in operands.items()}
            out = group_norm_silu(leaves["x"], 2, leaves.get("weight"), leaves.get("bias"), impl="reference")
            for gradient, name in zip(torch.autograd.grad(out.sum(), [leaves[name] for name in names]), names, strict=True):
                torch.testing.assert_close(gradient, torch.zeros_like(operands[name]))
