"""Cases of the layers without kernels, eager and compiled: operands are read once and results written once.

The backward reads the gradient and the operands and writes the gradients. A few operations per element: flops are negligible.
"""

from functools import partial
from importlib import import_module

import torch
from cases import Case
from dae_kernels import gated_residual, layer_norm_modulate, rms_norm, rotary_table, rotate, swiglu
from dae_kernels.dispatch import triton_refusal

LAYERS = ("layer_norm_modulate", "gated_residual", "rms_norm", "rotate", "swiglu")
SHAPES = {
    "cuda": [{"B": 32, "L": 1024, "C": 1024, layer: 1} for layer in LAYERS],
    "cpu": [{"B": 4, "L": 256, "C": 512, layer: 1} for layer in LAYERS],
}
DTYPES = {"cuda": ["bfloat16"]}


def cases(device, dtype, B, L, C, **wanted):
    x, h = (torch.randn(B, L, C, device=device).to(dtype).requires_grad_() for _ in range(2))
    scale, shift = (torch.randn(B, C, device=device).to(dtype).requires_grad_() for _ in range(2))
    weight = torch.randn(C, device=device).to(dtype).requires_grad_()
    heads = torch.randn(B, C // 64, L, 64, device=device).to(dtype).requires_grad_()
    table = rotary_table(L, 64).to(device)
    # Function, operands, and bytes moved forward and backward in units of x.
    layers = {
        "layer_norm_modulate": (lambda: layer_norm_modulate(x, scale, shift), [x, scale, shift], 2, 3),
        "gated_residual": (lambda: gated_residual(x, h, scale), [x, h, scale], 3, 4),
        "rms_norm": (lambda: rms_norm(x, weight), [x, weight], 2, 3),
        "rotate": (lambda: rotate(heads, table), [heads], 2, 2),
        "swiglu": (lambda: swiglu(x), [x], 1.5, 2.5),
    }
    liger = lambda: import_module("liger_kernel.transformers.functional").liger_rms_norm(x, weight, 1e-6, in_place=False)  # noqa: E731
    quack = lambda: import_module("quack").rmsnorm(x.view(-1, C), weight, eps=1e-6).view(x.shape)  # noqa: E731
    peers = {"Liger": ("liger_kernel", liger), "quack": ("quack", quack)}
    for name in LAYERS:
        if name in wanted:
            run, leaves, forward, backward = layers[name]
            case = partial(Case, name, leaves=leaves, bytes=forward * x.nbytes, backward_bytes=backward * x.nbytes)
            yield case("eager", run)
            yield case("compile", torch.compile(run))
            if name == "rms_norm":
                for peer, (module, run) in peers.items():
                    yield case(peer, run, needs=module, refusal=triton_refusal(device))
