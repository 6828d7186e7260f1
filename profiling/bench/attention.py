"""Cases of attention: 4 B H L^2 D flop forward, two products; five backward. Operands read once, results written once."""

from functools import partial

import torch
from cases import Case
from dae_kernels.attention import attention

SHAPES = {"cuda": [{"B": 8, "H": 16, "L": 4096, "D": 64}], "cpu": [{"B": 1, "H": 4, "L": 512, "D": 64}]}
DTYPES = {"cuda": ["bfloat16"]}


def cases(device, dtype, B, H, L, D):
    q, k, v = operands = [torch.randn(B, H, L, D, device=device).to(dtype).requires_grad_() for _ in range(3)]
    flops = 4 * B * H * L * L * D
    work = {"flops": flops, "bytes": 4 * q.nbytes, "backward_flops": 2.5 * flops, "backward_bytes": 8 * q.nbytes}
    case, run = partial(Case, "attention", leaves=operands, product=dtype, **work), partial(attention, q, k, v)
    on_gpu, flex = ("works on CUDA devices", "torch has no backward of it on CPUs") if device.type != "cuda" else (None, None)
    yield case("reference", partial(run, impl="reference"))
    yield case("sdpa", partial(run, impl="sdpa"))
    yield case("flash_attn", partial(run, impl="flash_attn"), needs="flash_attn", refusal=on_gpu)
    yield case("xformers", partial(run, impl="xformers"), needs="xformers", refusal=on_gpu)
    yield case("flex", partial(run, impl="flex"), refusal=flex)
    yield case("compile", torch.compile(lambda: run(impl="reference")), note="of the reference")
