"""Cases of lpips: both maps read forward; read again backward, with one gradient written, as in training."""

from functools import partial

import torch
from cases import Case, implementations
from dae_kernels.lpips import lpips

SHAPES = {
    "cuda": [{"B": 8, "C": 64, "H": 256}, {"B": 8, "C": 512, "H": 32}, {"B": 8, "C": 64, "H": 256, "nchw": 1}],
    "cpu": [{"B": 2, "C": 64, "H": 64}, {"B": 2, "C": 512, "H": 16, "nchw": 1}],
}
DTYPES = {"cuda": ["bfloat16"]}


def cases(device, dtype, B, C, H, nchw=0):
    layout = torch.contiguous_format if nchw else torch.channels_last
    a, b = (torch.randn(B, C, H, H, device=device).relu().to(dtype).contiguous(memory_format=layout) for _ in range(2))
    weight = torch.rand(C, device=device)
    n, size = a.numel(), a.nbytes
    work = {"flops": 8 * n, "bytes": 2 * size, "backward_flops": 12 * n, "backward_bytes": 3 * size}
    case = partial(Case, "lpips", leaves=[a.requires_grad_()], **work)

    def formula():
        """LPIPS as in the lpips package, with its 1x1 convolution."""
        u, v = (x / (x.square().sum(dim=1, keepdim=True).sqrt() + 1e-10) for x in (a, b))
        return torch.nn.functional.conv2d((u - v) ** 2, weight.to(u.dtype).view(1, -1, 1, 1)).mean(dim=(2, 3)).flatten()

    yield from implementations(case, partial(lpips, a, b, weight), device)
    yield case("lpips's formula", formula, note="in the dtype of the maps")
