"""The bounds of tests/tolerances.py against what arithmetic in float32 does, and against mistakes that they must not let pass."""

import pytest
import torch
from tolerances import assert_errors, largest, rounding_bound, rounding_error


def normed_softmax(a, b, c, dtype, order=None):
    """A value and its gradients, with the terms of each product in another order."""
    a, b, c = (x.to(dtype) for x in (a, b, c))
    if order is not None:
        a, b = a[:, order], b[order]
    a, b = a.requires_grad_(), b.requires_grad_()
    weights = (a @ b).softmax(-1)
    out = (weights - weights.mean(-1, keepdim=True)) / weights.var(-1, keepdim=True).sqrt()
    gradient_a, gradient_b = torch.autograd.grad(out, (a, b), c)
    if order is not None:
        back = order.argsort()
        gradient_a, gradient_b = gradient_a[:, back], gradient_b[back]
    return [out.detach(), gradient_a, gradient_b]


@pytest.fixture(scope="module")
def operands():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(size, generator=generator, dtype=torch.float64).float() for size in ((20, 33), (33, 15), (20, 15))]


def test_roundings_come_to_what_float32_does_in_any_order(operands):
    exact = normed_softmax(*operands, torch.float64)
    floors = rounding_error(lambda: normed_softmax(*operands, torch.float64), torch.float32)
    generator, ratios = torch.Generator().manual_seed(1), []
    for _ in range(10):
        got = normed_softmax(*operands, torch.float32, torch.randperm(33, generator=generator))
        ratios.append([largest(g.double() - e) / floor for g, e, floor in zip(got, exact, floors, strict=True)])
    ratios = torch.tensor(ratios)
    assert ratios.max() < 1 and ratios.max(dim=0).values.min() > 0.03  # neither too small nor idle


def test_what_is_no_rounding_fails(operands):
    run = lambda dtype: normed_softmax(*operands, dtype)  # noqa: E731
    truth, options = run(torch.float64), {"results": lambda: run(torch.float64)}
    assert_errors(run(torch.float32), truth, truth, **options)  # torch without any error
    for i in range(3):
        got = run(torch.float32)
        got[i] = got[i] * (1 + 2**-11)  # tf32 rounds so
        with pytest.raises(AssertionError, match=f"result {i} errs by"):
            assert_errors(got, truth, truth, **options)
        got[i] = got[i] * torch.nan
        with pytest.raises(AssertionError, match=f"result {i} errs by nan"):
            assert_errors(got, truth, truth, **options)
    half = [x.bfloat16() for x in truth]
    assert_errors(half, truth, truth, **options)
    half[0] = half[0] * 1.5
    with pytest.raises(AssertionError, match="result 0 errs by"):
        assert_errors(half, truth, truth, **options)


def test_an_operation_of_unknown_roundings_is_refused():
    x = torch.eye(3, dtype=torch.float64)
    with pytest.raises(AssertionError, match=r"how does aten\.linalg_inv_ex\.default round"):
        rounding_error(lambda: [torch.linalg.inv(x)], torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_bound_of_a_sum_holds_in_every_order(dtype):
    terms = torch.randn(100, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    exact, bound = terms.double().sum(), rounding_bound(99, terms.double().abs().sum(), dtype)
    for seed in range(5):
        total = torch.zeros((), dtype=dtype)
        for term in terms[torch.randperm(100, generator=torch.Generator().manual_seed(seed))]:
            total = total + term
        assert 0 < abs(total.double() - exact) <= bound
    assert rounding_bound(1, 3.0, torch.float32) == pytest.approx(3 * 2.0**-24, rel=1e-6)
