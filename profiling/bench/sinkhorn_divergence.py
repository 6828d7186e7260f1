"""Cases of sinkhorn_divergence, p = 2, debiased, forward and backward.

Flops: of the products alone, 2 N M D for each of the updates that epsilon scaling prescribes (four problems per step, a start
and a last step) and as much again for the four derivatives; bytes: both clouds, weights and potentials once. The gradient is
known after our forward pass, so the backward needs no product, and only `both` compares.
"""

from functools import partial
from importlib import import_module

import torch
from cases import Case, geomloss, implementations
from dae_kernels.dispatch import triton_refusal
from dae_kernels.sinkhorn_divergence import sinkhorn_divergence
from dae_kernels.sinkhorn_divergence.solver import boxes, epsilon_schedule

SHAPES = {"cuda": [{"N": 16384, "M": 16384, "D": 64}], "cpu": [{"N": 2000, "M": 2000, "D": 2}]}
BLUR, SCALING = 0.05, 0.5


def cases(device, dtype, N, M, D):
    # Clouds of equal scale at every D, shifted by half of it.
    x_ND = (torch.randn(N, D, device=device) / D**0.5).to(dtype).requires_grad_()
    y_MD = ((torch.randn(M, D, device=device) + 0.5) / D**0.5).to(dtype).requires_grad_()
    schedule = epsilon_schedule(boxes((x_ND.detach(), y_MD.detach()))[0][1], BLUR, SCALING, 2)
    steps = len(schedule) + 2
    moved, flops = x_ND.nbytes + y_MD.nbytes + 8 * (N + M), 2 * (2 * N * M + N * N + M * M) * D * (steps + 1)
    work = {"flops": flops, "bytes": moved, "backward_flops": (N + M) * D, "backward_bytes": 2 * moved}
    case = partial(Case, "sinkhorn_divergence", leaves=[x_ND, y_MD], product=dtype, **work)
    settings = {"p": 2, "blur": BLUR, "scaling": SCALING}
    note = "of the reference, whose updates are one opaque operator"
    yield from implementations(case, partial(sinkhorn_divergence, x_ND, y_MD, **settings), device, note)
    yield from geomloss(case, lambda loss: loss("sinkhorn", **settings)(x_ND, y_MD))

    def flash(tf32):
        """flash-sinkhorn with our cost |x - y|^2 / 2 and our schedule, so as many updates, each at the same epsilon."""
        options = {"debias": True, "half_cost": True, "eps_list": schedule, "allow_tf32": tf32, "truncate_tf32": tf32}
        return import_module("flash_sinkhorn").SamplesLoss("sinkhorn", blur=BLUR, scaling=SCALING, **options)(x_ND, y_MD)

    peer = partial(case, needs="flash_sinkhorn", refusal=triton_refusal(device))
    yield peer("flash-sinkhorn", partial(flash, False), note="products in float32, as ours")
    yield peer("flash-sinkhorn, tf32", partial(flash, True), note="its default precision: coordinates rounded to tf32")
