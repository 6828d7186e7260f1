"""Cases of group_norm_silu. Floors: 3 passes forward (x read twice, y written) and 5 backward (x and dy read twice, dx written).

The shapes are those of a VQGAN for 256 x 256 images; L is channels_last or not.
"""

from functools import partial

import torch
import torch.nn.functional as F
from cases import Case, implementations
from dae_kernels.group_norm_silu import group_norm_silu

SIZES = {
    "cuda": [(8, 128, 256, 1), (8, 128, 256, 0), (8, 256, 64, 1), (16, 512, 16, 1), (1, 128, 256, 1)],
    "cpu": [(4, 64, 32, 0), (4, 64, 32, 1)],
}
SHAPES = {kind: [dict(zip("BCHL", sizes, strict=True)) for sizes in shapes] for kind, shapes in SIZES.items()}
DTYPES = {"cuda": ["bfloat16"]}


def cases(device, dtype, B, C, H, L):
    layout = torch.channels_last if L else torch.contiguous_format
    x = torch.randn(B, C, H, H, device=device).to(dtype).contiguous(memory_format=layout).requires_grad_()
    weight, bias = (torch.randn(C, device=device).requires_grad_() for _ in range(2))
    n, size = x.numel(), x.nbytes
    work = {"flops": 10 * n, "bytes": 3 * size, "backward_flops": 20 * n, "backward_bytes": 5 * size}
    case = partial(Case, "group_norm_silu", leaves=[x, weight, bias], **work)
    yield from implementations(case, partial(group_norm_silu, x, 32, weight, bias, 1e-6), device)
    eager = lambda: F.silu(F.group_norm(x, 32, weight.to(dtype), bias.to(dtype), 1e-6))  # noqa: E731
    yield case("torch", eager, note="F.group_norm, F.silu in the dtype of x")
