"""Cases of attention: 4 B H L^2 D flop forward, two products; five backward. Each operand read once, each result written once."""

from __future__ import annotations

import torch
from dae_kernels.attention import attention

SHAPES = {"cuda": [{"B": 8, "H": 16, "L": 4096, "D": 64}], "cpu": [{"B": 1, "H": 4, "L": 512, "D": 64}]}
DTYPES = {"cuda": ["bfloat16"], "cpu": ["float32"]}


def cases(Case, shape, dtype, device):
    B, H, L, D = shape["B"], shape["H"], shape["L"], shape["D"]
    q, k, v = (torch.randn(B, H, L, D, device=device).to(dtype).requires_grad_() for _ in range(3))
    product = str(dtype).removeprefix("torch.")
    flops, tensor = 4 * B * H * L * L * D, q.numel() * q.element_size()
    least = {"flops": flops, "bytes": 4 * tensor, "backward_flops": 2.5 * flops, "backward_bytes": 8 * tensor}
    on_gpu = None if device.type == "cuda" else "works on CUDA devices"
    for impl, needs, refusal in (
        ("reference", "", None),
        ("sdpa", "", None),
        ("flash_attn", "flash_attn", on_gpu),
        ("xformers", "xformers", on_gpu),
        ("flex", "", None if device.type == "cuda" else "torch has no backward of it on CPUs"),
    ):
        run = lambda impl=impl: attention(q, k, v, impl=impl)  # noqa: E731
        yield Case("attention", impl, lambda run=run: (run, [q, k, v]), product=product, needs=needs, refusal=refusal, **least)
    compiled = torch.compile(lambda: attention(q, k, v, impl="reference"))
    yield Case("attention", "compile", lambda: (compiled, [q, k, v]), product=product, note="of the reference", **least)
