"""Gradients are the same bits whatever torch does with the tensors that a forward pass keeps: recompute, cache or move them."""

from __future__ import annotations

import functools

import dae_kernels
import pytest
import torch
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

pytestmark = pytest.mark.filterwarnings("ignore")  # of numpy in the interpreter


def with_gradients(operation, run, walks=1):
    """Outputs of `run(function, *operands)` and its gradients summed over `walks` through the graph, as in training."""
    operands = operation.operands()
    for i in operation.leaves:
        operands[i].requires_grad_()
    torch.manual_seed(0)
    results = [result for result in run(operation, *operands) if result.requires_grad]
    cotangents = [torch.linspace(-1, 2, r.numel() + 1, dtype=r.dtype)[1:].view(r.shape) for r in results]
    for walk in range(walks):
        torch.autograd.backward(results, cotangents, retain_graph=walk + 1 < walks)
    return [result.detach() for result in results], [operands[i].grad for i in operation.leaves]


def products_are_kept(context, operator, *arguments, **options):
    """As a user would choose: what is expensive is kept, here matrix products and the operators of this package."""
    name = str(operator)
    kept = name.startswith("dae_kernels") or name in ("aten.mm.default", "aten.addmm.default", "aten.bmm.default")
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


def plain(function, *operands):
    return function(*operands)


recomputed = functools.partial(checkpoint, use_reentrant=False)
WAYS = {
    "recomputed": recomputed,
    "recomputed, reentrant": functools.partial(checkpoint, use_reentrant=True),
    "recomputed but for what is expensive": functools.partial(
        recomputed, context_fn=functools.partial(create_selective_checkpoint_contexts, products_are_kept)
    ),
}


def same(got, expected):
    return len(got) == len(expected) and all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_gradients_do_not_depend_on_how_tensors_are_kept(differentiable):
    results, gradients = with_gradients(differentiable, plain)
    for way, run in WAYS.items():
        got, got_gradients = with_gradients(differentiable, run)
        assert same(got, results) and same(got_gradients, gradients), way
    with save_on_cpu():  # around the backward pass, too, and twice through one graph: twice a number is exact
        got, got_gradients = with_gradients(differentiable, plain, walks=2)
    assert same(got, results) and same(got_gradients, [2 * gradient for gradient in gradients])


def test_the_list_has_every_public_operation(operations):
    assert {operation.public for operation in operations} == set(dae_kernels.__all__) - {"Convention"}
