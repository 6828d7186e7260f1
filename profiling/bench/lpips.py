"""Cases of lpips: both maps read forward; read again backward, with one gradient written, as in training."""

from __future__ import annotations

import torch
from dae_kernels.dispatch import triton_refusal
from dae_kernels.lpips import lpips
from torch import Tensor

SHAPES = {
    "cuda": [{"B": 8, "C": 64, "H": 256}, {"B": 8, "C": 512, "H": 32}, {"B": 8, "C": 64, "H": 256, "nchw": 1}],
    "cpu": [{"B": 2, "C": 64, "H": 64}, {"B": 2, "C": 512, "H": 16, "nchw": 1}],
}
DTYPES = {"cuda": ["bfloat16"], "cpu": ["float32"]}


def cases(Case, shape, dtype, device):
    B, C, H = shape["B"], shape["C"], shape["H"]
    layout = torch.contiguous_format if shape.get("nchw") else torch.channels_last
    a, b = (torch.randn(B, C, H, H, device=device).relu().to(dtype).contiguous(memory_format=layout) for _ in range(2))
    a.requires_grad_()
    weight = torch.rand(C, device=device)

    def formula() -> Tensor:
        """As the lpips package computes it, with its 1x1 convolution."""
        u, v = (x / (x.square().sum(dim=1, keepdim=True).sqrt() + 1e-10) for x in (a, b))
        return torch.nn.functional.conv2d((u - v) ** 2, weight.to(u.dtype).view(1, -1, 1, 1)).mean(dim=(2, 3)).flatten()

    moved = a.numel() * a.element_size()
    least = {"flops": 8 * a.numel(), "bytes": 2 * moved, "backward_flops": 12 * a.numel(), "backward_bytes": 3 * moved}

    def case(impl, run, **options):
        return Case("lpips", impl, lambda: (run, [a]), **least, **options)

    yield case("reference", lambda: lpips(a, b, weight, impl="reference"))
    compiled = torch.compile(lambda: lpips(a, b, weight, impl="reference"))
    yield case("compile", lambda: compiled(), note="of the reference")
    yield case("triton", lambda: lpips(a, b, weight, impl="triton"), refusal=triton_refusal(device))
    yield case("lpips's formula", formula, note="in the dtype of the maps")
