"""Cases of group_norm_silu. Floors: 3 passes forward (x read twice, y written) and 5 backward (x and dy read twice, dx written).

The shapes are those of a VQGAN for 256 x 256 images; L is channels_last or not.
"""

from __future__ import annotations

import torch
from dae_kernels.dispatch import triton_refusal
from dae_kernels.group_norm_silu import group_norm_silu

SHAPES = {
    "cuda": [
        {"B": 8, "C": 128, "H": 256, "L": 1},
        {"B": 8, "C": 128, "H": 256, "L": 0},
        {"B": 8, "C": 256, "H": 64, "L": 1},
        {"B": 8, "C": 512, "H": 16, "L": 1},
        {"B": 1, "C": 128, "H": 256, "L": 1},
    ],
    "cpu": [{"B": 4, "C": 64, "H": 32, "L": 0}, {"B": 4, "C": 64, "H": 32, "L": 1}],
}
DTYPES = {"cuda": ["bfloat16"], "cpu": ["float32"]}


def cases(Case, shape, dtype, device):
    B, C, H = shape["B"], shape["C"], shape["H"]
    layout = torch.channels_last if shape["L"] else torch.contiguous_format
    x = torch.randn(B, C, H, H, device=device).to(dtype).contiguous(memory_format=layout).requires_grad_()
    weight, bias = (torch.randn(C, device=device).requires_grad_() for _ in range(2))
    size = x.numel() * x.element_size()
    least = {"flops": 10 * x.numel(), "bytes": 3 * size, "backward_flops": 20 * x.numel(), "backward_bytes": 5 * size}

    def run(impl):
        return lambda: group_norm_silu(x, 32, weight, bias, 1e-6, impl=impl)

    leaves = [x, weight, bias]
    yield Case("group_norm_silu", "reference", lambda: (run("reference"), leaves), **least)
    compiled = torch.compile(run("reference"))
    yield Case("group_norm_silu", "compile", lambda: (compiled, leaves), note="of the reference", **least)
    refusal = triton_refusal(device) if device.type == "cuda" else "the interpreter is no measure"
    yield Case("group_norm_silu", "triton", lambda: (run("triton"), leaves), refusal=refusal, **least)
    eager = lambda: torch.nn.functional.silu(torch.nn.functional.group_norm(x, 32, weight.to(dtype), bias.to(dtype), 1e-6))  # noqa: E731
    yield Case("group_norm_silu", "torch", lambda: (eager, leaves), note="F.group_norm, F.silu in the dtype of x", **least)
