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
    lpips,
    max_sliced_wasserstein,
    mmd,
    nearest_code,
    precision_recall_density_coverage,
    sliced_wasserstein,
    vector_quantize,
)
from dae_kernels.sliced_wasserstein import autograd as sliced
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
    second: str = "refused"  # derivative: by a RuntimeError; or "true"; or of a "surrogate"


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
    "perceptual": Case(lambda x, y, w: lpips(x[None], y[None, :N], w)[0], second="true"),
    "perceptual triton": Case(lambda x, y, w: lpips(x[None], y[None, :N], w, impl="triton")[0]),
    "frechet": Case(lambda x, y, w: frechet_distance(x, y)),
    "gaussian": Case(lambda x, y, w: gaussian_w2(*moments(x), *moments(y))),
    "ste": Case(lambda x, y, w: quantized(x, y, "ste"), second="surrogate"),
    "rotation": Case(lambda x, y, w: quantized(x, y, "rotation"), second="surrogate"),
    "ste triton": Case(lambda x, y, w: quantized(x, y, "ste", impl="triton"), second="surrogate"),
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


def combined(name):
    """The function of a case, alone and in transforms, as one function of the batches that returns a flat tuple."""
    f = CASES[name].function

    def plain(x, y, w):
        return f(x[0], y[0], w[0]), vmap(f)(x, y, w)

    def with_gradients(x, y, w):
        one = grad(f, argnums=(0, 1, 2))(x[0], y[0], w[0])
        each = vmap(grad(f, argnums=(0, 1, 2)), in_dims=(0, None, 0))(x, y[1], w)
        total = grad(lambda *t: vmap(f)(*t).sum(), argnums=(0, 1, 2))(x, y, w)
        return *plain(x, y, w), *one, *each, *total

    return with_gradients if CASES[name].differentiable else plain


def check_compiled(name, backend):
    x, y, w = operands(2)
    f, everything = CASES[name].function, combined(name)
    torch._dynamo.reset()
    compiled = torch.compile(everything, fullgraph=True, backend=backend)(x, y, w)
    for got, expected in zip(compiled, everything(x, y, w), strict=True):
        close(got, expected)
    if CASES[name].differentiable:
        torch._dynamo.reset()
        one = x[0], y[0], w[0]
        compiled = torch.compile(f, fullgraph=True, backend=backend)
        for got, expected in zip(eager_gradient(compiled, *one), eager_gradient(f, *one), strict=True):
            close(got, expected)


COMPILED = [
    "energy weights",
    "mmd triton",
    "sliced weights",
    "max sliced",
    "frechet",
    "perceptual triton",
    "ste",
    "rotation cosine triton",
]
COMPILED += [name for name in CASES if name not in DIFFERENTIABLE]


@pytest.mark.parametrize("name", COMPILED)  # each operation and kernel once: the others take the same path
def test_compile_of_transforms(name):
    """aot_eager traces forward and backward as for Inductor, without its time of code generation."""
    check_compiled(name, "aot_eager")


@pytest.mark.parametrize("name", ["sums"])
def test_inductor(name):
    check_compiled(name, "inductor")


def second(f):
    """The gradient of a product of the gradient of f and a constant."""
    return lambda x, y, w: grad(lambda x: (grad(f)(x, y, w) * torch.linspace(-1, 1, D, device=DEVICE)).sum())(x)


@pytest.mark.parametrize("name", [name for name in DIFFERENTIABLE if CASES[name].second == "refused"])
def test_second_derivatives_are_refused(name):
    f = CASES[name].function
    x, y, w = (t[0] for t in operands(3))
    with pytest.raises(RuntimeError, match="no second derivatives"):
        second(f)(x, y, w)
    with pytest.raises(RuntimeError, match="no second derivatives"):
        vmap(second(f))(x[None], y[None], w[None])
    torch._dynamo.reset()
    with pytest.raises(Exception, match="no second derivatives"):
        torch.compile(second(f), backend="aot_eager")(x, y, w)
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(f(leaf, y, w), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivatives"):
        gradient.sum().backward()


@pytest.mark.parametrize("name", [name for name in DIFFERENTIABLE if CASES[name].second == "true"])
def test_second_derivatives_are_true(name):
    """Against differences of gradients in float64. None of these changes its sorting or its codes within the step."""
    f = CASES[name].function
    x, y, w = (t[0].double() for t in operands(3))
    direction = torch.linspace(-1, 1, D, device=DEVICE).double().expand(N, D)
    step = 1e-6
    expected = (eager_gradient(f, x + step * direction, y, w)[0] - eager_gradient(f, x - step * direction, y, w)[0]) / (2 * step)
    # Differences of float64 gradients of the order of 1: 1e-16 / 1e-6 from rounding, 1e-12 from the step.
    torch.testing.assert_close(second(f)(x, y, w), expected, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("gradient", ["ste", "rotation"])
def test_second_derivatives_of_vector_quantize_are_those_of_its_surrogate(gradient):
    """`quantized` is J x with J held constant; the mean of its squares and the loss have 2 J^T J / (N D) and 0.25 * 2 / (N D)."""
    x, y, _ = (t[0].double() for t in operands(3))
    direction = torch.linspace(-1, 1, D, device=DEVICE).double().expand(N, D)
    J = jacrev(lambda x: vector_quantize(x, y, gradient=gradient).quantized)(x).reshape(N * D, N * D)
    expected = (2 * J.T @ J @ direction.reshape(-1) / (N * D)).view(N, D) + 0.5 * direction / (N * D)
    torch.testing.assert_close(second(lambda x, y, w: quantized(x, y, gradient))(x, y, None), expected)


def test_sliced_in_many_blocks(monkeypatch):
    """Blocks are computed again in the backward pass: in eager mode under every transform, compiled by plain autograd."""
    expected = {name: combined(name)(*operands(4)) for name in ("sliced", "sliced weights")}
    seconds = {name: second(CASES[name].function)(*(t[0] for t in operands(4))) for name in expected}
    monkeypatch.setattr(sliced, "MAX_PROJECTED", 2 * (N + M))  # two directions of five
    for name in expected:
        for got, want in zip(combined(name)(*operands(4)), expected[name], strict=True):
            close(got, want)
        close(second(CASES[name].function)(*(t[0] for t in operands(4))), seconds[name])


def test_drawn_directions_under_vmap_follow_its_randomness():
    x, y, _ = operands(5)
    x = x[:1].expand_as(x)
    with pytest.raises(RuntimeError, match="randomness"):
        vmap(lambda x: sliced_wasserstein(x, y[0]))(x)
    same, different = (vmap(lambda x: sliced_wasserstein(x, y[0]), randomness=kind)(x) for kind in ("same", "different"))
    assert same[0] == same[1] and different[0] != different[1]


def test_values_are_checked_where_they_can_be_read():
    x, y, w = operands(6)
    with pytest.raises(ValueError, match="not negative"):
        grad(lambda x: energy_distance(x, y[0], weights_x=-w[0]))(x[0])  # by grad of the points they are as readable as ever
    with pytest.raises(ValueError, match="not negative"):
        grad(lambda w: sliced_wasserstein(x[0], y[0], weights_x=-w))(w[0])
    with pytest.raises(ValueError, match="two points of positive weight"):
        grad(lambda w: mmd(x[0], y[0], bandwidths=(1.0,), weights_x=w * (torch.arange(N, device=DEVICE) < 1)))(w[0])
    with pytest.raises(ValueError, match="not negative"):
        vmap(lambda x: energy_distance(x, y[0], weights_x=-w[0]))(x)  # the weights are not batched
    vmap(lambda w: energy_distance(x[0], y[0], weights_x=-w))(w)  # these cannot be read
    vmap(grad(lambda w: energy_distance(x[0], y[0], weights_x=-w)))(w)
    grad(lambda w: vmap(lambda w: energy_distance(x[0], y[0], weights_x=-w))(w).sum())(w)
    if DEVICE == "cpu":  # an operator there reads what it is given
        with pytest.raises(ValueError, match=r"indices in \[0, 5\), got 7"):
            vmap(lambda x: codebook_statistics(x, torch.full((N,), 7), 5))(x)
