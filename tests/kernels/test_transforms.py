"""Every operation under torch.func.grad, torch.vmap, torch.compile and their combinations, against a plain loop in eager mode."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from dae_kernels import (
    codebook_statistics,
    energy_distance,
    frechet_distance,
    gaussian_w2,
    k_nearest_distances,
    max_sliced_wasserstein,
    mmd,
    nearest_code,
    precision_recall_density_coverage,
    sliced_wasserstein,
    vector_quantize,
)
from torch.func import grad, jacrev, vmap

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.filterwarnings("ignore")  # of numpy in the interpreter, and of Dynamo on what it imports
B, N, M, D = 2, 7, 9, 4
DIRECTIONS = torch.nn.functional.normalize(torch.randn(D, 5, generator=torch.Generator().manual_seed(9)), dim=0).to(DEVICE)


def moments(x):
    centred = x - x.mean(dim=0)
    return x.mean(dim=0), centred.T @ centred / (len(x) - 1)


def indices(x, K):
    """Codes that follow the values of x, as in training."""
    return (x.detach()[:, 0] * 10).long() % K


class Case(NamedTuple):
    """function(x [N, D], y [M, D], weights [N]) is a tensor; a differentiable one is a scalar."""

    function: object
    differentiable: bool = True
    second: str = "refused"  # "refused" by a RuntimeError, or "true"


CASES = {
    "energy": Case(lambda x, y, w: energy_distance(x, y)),
    "energy weights": Case(lambda x, y, w: energy_distance(x, y, weights_x=w)),
    "energy triton": Case(lambda x, y, w: energy_distance(x, y, weights_x=w, impl="triton")),
    "mmd": Case(lambda x, y, w: mmd(x, y, bandwidths=(0.5, 2.0))),
    "mmd weights": Case(lambda x, y, w: mmd(x, y, bandwidths=(1.0,), weights_x=w, unbiased=False)),
    "mmd triton": Case(lambda x, y, w: mmd(x, y, bandwidths=(1.0, 3.0), weights_x=w, impl="triton")),
    "sliced": Case(lambda x, y, w: sliced_wasserstein(x, y, projections=DIRECTIONS), second="true"),
    "sliced weights": Case(lambda x, y, w: sliced_wasserstein(x, y, p=3, weights_x=w, projections=DIRECTIONS), second="true"),
    "max sliced": Case(lambda x, y, w: max_sliced_wasserstein(x, y, projections=DIRECTIONS), second="true"),
    "max sliced weights": Case(lambda x, y, w: max_sliced_wasserstein(x, y, weights_x=w, projections=DIRECTIONS), second="true"),
    "frechet": Case(lambda x, y, w: frechet_distance(x, y)),
    "gaussian": Case(lambda x, y, w: gaussian_w2(*moments(x), *moments(y))),
    "ste": Case(lambda x, y, w: quantized(x, y, "ste"), second="true"),
    "rotation": Case(lambda x, y, w: quantized(x, y, "rotation"), second="surrogate"),
    "ste triton": Case(lambda x, y, w: quantized(x, y, "ste", impl="triton"), second="true"),
    "rotation cosine triton": Case(
        lambda x, y, w: quantized(x, y, "rotation", metric="cosine", impl="triton"), second="surrogate"
    ),
    "codes": Case(lambda x, y, w: vector_quantize(x, y).indices, differentiable=False),
    "nearest triton": Case(lambda x, y, w: nearest_code(x, y, impl="triton")[1], differentiable=False),
    "counts": Case(lambda x, y, w: codebook_statistics(x, indices(x, 5), 5)[0], differentiable=False),
    "sums": Case(lambda x, y, w: codebook_statistics(x, indices(x, 5), 5)[1], differentiable=False),
    "prdc": Case(lambda x, y, w: torch.stack(precision_recall_density_coverage(x, y, k=2)), differentiable=False),
    "neighbours": Case(lambda x, y, w: k_nearest_distances(x, y, 3), differentiable=False),
}
DIFFERENTIABLE = [name for name, case in CASES.items() if case.differentiable]


def quantized(x, y, gradient, **options):
    q, _, loss = vector_quantize(x, y, gradient=gradient, **options)
    return (q * torch.linspace(-1, 2, q.numel(), device=q.device).view(q.shape)).sum() + q.square().mean() + loss


def operands(seed=0):
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(B, N, D, generator=generator), torch.randn(B, M, D, generator=generator) + 0.3
    return x.to(DEVICE), y.to(DEVICE), (torch.rand(B, N, generator=generator) + 0.2).to(DEVICE)


def loop(function, *batches):
    return torch.stack([function(*one) for one in zip(*batches, strict=True)])


def eager_gradient(function, x, y, w):
    """By autograd alone: of x [N, D], y [M, D] and w [N]; zeros where nothing depends on one."""
    leaves = [t.clone().requires_grad_() for t in (x, y, w)]
    gradients = torch.autograd.grad(function(*leaves), leaves, allow_unused=True)
    return [torch.zeros_like(t) if g is None else g for g, t in zip(gradients, leaves, strict=True)]


def close(got, expected):
    # The same arithmetic in another order, if any: a few eps of float32 of numbers of the order of 1 (products of 7 x 9 terms).
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_vmap_is_a_loop(name):
    f = CASES[name].function
    x, y, w = operands()
    close(vmap(f)(x, y, w), loop(f, x, y, w))
    # One cloud for all, batches along other axes, and a batch of batches.
    close(vmap(f, in_dims=(0, None, None))(x, y[0], w[0]), loop(f, x, y[:1].expand_as(y), w[:1].expand_as(w)))
    close(vmap(f, in_dims=(2, 1, 1))(x.permute(1, 2, 0), y.transpose(0, 1), w.T), loop(f, x, y, w))
    nested = vmap(vmap(f, in_dims=(None, 0, None)), in_dims=(0, None, 0))(x, y, w)
    close(nested[1], loop(f, x[1:2].expand_as(x), y, w[1:2].expand_as(w)))


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_func_gradients_are_autograds(name):
    f = CASES[name].function
    x, y, w = operands(1)
    expected = [torch.stack(t) for t in zip(*(eager_gradient(f, *one) for one in zip(x, y, w, strict=True)), strict=True)]
    for got, one in zip(grad(f, argnums=(0, 1, 2))(x[0], y[0], w[0]), expected, strict=True):
        close(got, one[0])
    for got, one in zip(vmap(grad(f, argnums=(0, 1, 2)))(x, y, w), expected, strict=True):
        close(got, one)
    for got, one in zip(grad(lambda *t: vmap(f)(*t).sum(), argnums=(0, 1, 2))(x, y, w), expected, strict=True):
        close(got, one)
    close(jacrev(f)(x[0], y[0], w[0]), expected[0][0])
    per_sample = jacrev(vmap(f))(x, y, w)  # [B, B, N, D], sample by sample
    close(per_sample.diagonal(dim1=0, dim2=1).movedim(-1, 0), expected[0])
    assert per_sample[0, 1].count_nonzero() == 0
    # autograd outside of vmap
    leaf = x.clone().requires_grad_()
    close(torch.autograd.grad(vmap(f)(leaf, y, w).sum(), leaf)[0], expected[0])
    close(vmap(grad(f), in_dims=(0, None, 0))(x, y[0], w)[0], expected[0][0])


@pytest.mark.parametrize("name", CASES)
def test_compile_of_transforms(name):
    """aot_eager traces forward and backward as Inductor's input, without its minutes of code generation."""
    f = CASES[name].function
    x, y, w = operands(2)
    functions = {"plain": lambda x, y, w: f(x[0], y[0], w[0]), "vmap": vmap(f)}
    if CASES[name].differentiable:
        functions["grad"] = lambda x, y, w: grad(f, argnums=(0, 1, 2))(x[0], y[0], w[0])
        functions["vmap of grad"] = vmap(grad(f, argnums=(0, 1, 2)))
        functions["grad of vmap"] = grad(lambda *t: vmap(f)(*t).sum(), argnums=(0, 1, 2))
    for function in functions.values():
        torch._dynamo.reset()
        close(torch.compile(function, fullgraph=True, backend="aot_eager")(x, y, w), function(x, y, w))
    if CASES[name].differentiable:
        torch._dynamo.reset()
        compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
        for got, expected in zip(eager_gradient(compiled, x[0], y[0], w[0]), eager_gradient(f, x[0], y[0], w[0]), strict=True):
            close(got, expected)
