"""Cases of linear_cross_entropy: 2 N V D flop forward, 4 backward; operands and gradients read or written once.

Chunks do all of it in their forward pass, so only `both` compares.
"""

from functools import partial
from importlib import import_module

import torch
import torch.nn.functional as F
from cases import Case
from dae_kernels.dispatch import triton_refusal
from dae_kernels.linear_cross_entropy import linear_cross_entropy

SHAPES = {
    "cuda": [{"N": 8192, "V": 16384, "D": 1024}, {"N": 8192, "V": 1024, "D": 512}],
    "cpu": [{"N": 2048, "V": 16384, "D": 128}, {"N": 4096, "V": 1024, "D": 128}, {"N": 1024, "V": 64, "D": 128}],
}
DTYPES = {"cuda": ["bfloat16"]}


def cases(device, dtype, N, V, D):
    hidden_ND = torch.randn(N, D, device=device).to(dtype).requires_grad_()
    weight_VD = (torch.randn(V, D, device=device) / D**0.5).to(dtype).requires_grad_()
    targets_N = torch.randint(V, (N,), device=device)
    flops, moved = 2 * N * V * D, hidden_ND.nbytes + weight_VD.nbytes
    work = {"flops": flops, "bytes": moved, "backward_flops": 2 * flops, "backward_bytes": 2 * moved}
    case = partial(Case, "linear_cross_entropy", leaves=[hidden_ND, weight_VD], product=dtype, **work)
    ours = partial(linear_cross_entropy, hidden_ND, weight_VD, targets_N)
    plain = lambda: F.cross_entropy(F.linear(hidden_ND, weight_VD), targets_N)  # noqa: E731

    def peer(module, function):
        """A function that takes hidden states, weight and targets and returns the mean; imported where it is called."""
        return lambda: getattr(import_module(module), function)(hidden_ND, weight_VD, targets_N)

    yield case("reference", partial(ours, impl="reference"))
    yield case("linear + cross_entropy", plain, note="in the dtype of the operands")
    yield case("compile, linear + cross_entropy", torch.compile(plain), note="in the dtype of the operands")
    yield case("chunked", partial(ours, impl="chunked"))
    yield case("triton", partial(ours, impl="triton"), refusal=triton_refusal(device))
    missing = None if hasattr(torch.nn, "LinearCrossEntropyOptions") else f"needs torch 2.13, this is {torch.__version__}"
    yield case("torch", partial(ours, impl="torch"), refusal=missing, note="F.linear_cross_entropy, its default chunks")
    refusal, liger = triton_refusal(device), peer("liger_kernel.transformers.functional", "liger_fused_linear_cross_entropy")
    yield case("Liger", liger, needs="liger_kernel", refusal=refusal, note="its default chunks")
    cut = peer("cut_cross_entropy", "linear_cross_entropy")
    yield case("cut-cross-entropy", cut, needs="cut_cross_entropy", refusal=refusal, note="with its default filter of gradients")
    quack = peer("quack.linear_cross_entropy", "chunked_linear_cross_entropy")
    yield case("quack", quack, needs="quack", refusal=refusal, note="its default chunks")
