"""Cases of group_norm_silu. Floors: 3 passes forward (x read twice, y written) and 5 backward (x and dy read twice, dx written).

The shapes are those of a VQGAN for 256 x 256 images; L is channels_last or not.
"""

from functools import partial

import torch
import torch.nn.functional as F
from cases import Case, implementations
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
DTYPES = {"cuda": ["bfloat16"]}


def cases(device, dtype, B, C, H, L):
    layout = torch.channels_last if L else torch.contiguous_format
    x = torch.randn(B, C, H, H, device=device).to(dtype).contiguous(memory_format=layout).requires_grad_()
    weight, bias = (torch.randn(C, device=device).requires_grad_() for _ in range(2))
    n, size = x.numel(), x.nbytes
    least = {"flops": 10 * n, "bytes": 3 * size, "backward_flops": 20 * n, "backward_bytes": 5 * size}
    case = partial(Case, "group_norm_silu", leaves=[x, weight, bias], **least)

    def eager():
        return F.silu(F.group_norm(x, 32, weight.to(dtype), bias.to(dtype), 1e-6))

    yield from implementations(case, partial(group_norm_silu, x, 32, weight, bias, 1e-6), device)
    yield case("torch", eager, note="F.group_norm, F.silu in the dtype of x")
