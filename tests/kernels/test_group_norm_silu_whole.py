"""group_norm_silu, backward: one launch for a group that fits into a program, and one for the gradients of all parameters."""

import pytest
import torch
from dae_kernels import group_norm_silu
from dae_kernels.group_norm_silu import fused
from dae_kernels.group_norm_silu import layout as layouts
from group_norm import GRADIENT_LAYOUTS, LAYOUTS, Counted, call, check, needs_triton, operands, run

pytestmark = needs_triton
LARGE = ("gradient_sums_kernel", "merge_gradient_sums_kernel", "gradient_kernel")


@pytest.fixture(params=["held", "tiles"])
def kept(request, monkeypatch):
    """Whether a group stays in registers, or goes through in tiles as the large ones do; by the smallest tiles."""
    if request.param == "tiles":
        monkeypatch.setattr(layouts, "HELD", 0)
        monkeypatch.setattr(layouts, "HELD_TILE", 64)
    monkeypatch.setattr(layouts, "map_layout", layouts.MapLayout)  # not the ones that were kept


def launched(monkeypatch, *names):
    grids = {name: [] for name in names}
    for name, counts in grids.items():
        monkeypatch.setattr(fused, name, Counted(getattr(fused, name), counts))
    return grids


@pytest.mark.parametrize("shape, groups, whole", [((2, 32, 16, 16), 2, 1), ((1, 16, 32, 32), 1, 1), ((1, 17, 32, 32), 1, 0)])
def test_the_choice_is_that_of_the_forward_pass(shape, groups, whole, monkeypatch):
    grids = launched(monkeypatch, "whole_group_kernel", "whole_group_gradient_kernel", *LARGE)
    check(operands(shape), groups, "triton")
    assert len(grids["whole_group_gradient_kernel"]) == len(grids["whole_group_kernel"]) == whole
    assert all(len(grids[name]) == 1 - whole for name in LARGE)


@pytest.mark.parametrize("adaptive", [False, True])
def test_two_launches(adaptive, monkeypatch):
    values = operands((2, 8, 4, 4), adaptive=adaptive)
    y, mean, rstd = fused.forward_launcher(*values, 2, 1e-6, True)
    grids = launched(monkeypatch, "whole_group_gradient_kernel", "parameter_gradients_kernel", *LARGE)
    fused.backward_launcher(torch.ones_like(y), *values, mean, rstd, 2, True)
    assert [len(counts) for counts in grids.values()] == [1, 1, 0, 0, 0]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("activation", ["silu", None])
@pytest.mark.parametrize("affine, adaptive", [(True, False), (True, True), (False, True), (False, False)])
def test_parameters(layout, activation, affine, adaptive, kept):
    check(operands((2, 12, 5, 6), layout, affine=affine, adaptive=adaptive), 3, "triton", activation)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape, groups", [((1, 6, 33, 31), 2), ((3, 13, 1, 1), 13), ((2, 3, 1, 1), 1), ((2, 5, 17, 3), 5)])
def test_shapes(shape, groups, dtype, layout, kept):
    """Groups that fill no block, one channel a group, one position, and both."""
    check(operands(shape, layout, dtype, adaptive=True), groups, "triton")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("gradient", GRADIENT_LAYOUTS)
def test_gradients_of_any_layout(layout, gradient, kept):
    values = operands((2, 8, 5, 6), layout)
    check(values, 4, "triton", cotangent=GRADIENT_LAYOUTS[gradient](torch.randn_like(values[0])))


def test_more_images_and_channels_than_a_program_takes_at_once(kept, monkeypatch):
    monkeypatch.setattr(fused, "PARAMETERS", {"BLOCK_B": 2, "BLOCK_C": 4})
    check(operands((5, 6, 3, 2), adaptive=True), 2, "triton")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_of_parameters_are_deterministic(layout, kept):
    values = operands((5, 16, 9, 7), layout, adaptive=True)
    cotangent = torch.randn_like(values[0])
    first, second = (run(call("triton", 4), values, cotangent) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("one, two", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.bfloat16), (None, torch.float16)])
def test_dtypes_of_parameters_are_kept(one, two):
    """Also where weight and bias, or scale and shift, are of two dtypes, or one is not there."""
    x, *parameters = operands((2, 4, 3, 3), adaptive=True)
    weight, bias = (None if d is None else p.to(d).requires_grad_() for p, d in zip(parameters[:2], (one, two), strict=True))
    scale, shift = (p.to(d or two).requires_grad_() for p, d in zip(parameters[2:], (one, two), strict=True))
    leaves = [p for p in (weight, bias, scale, shift) if p is not None]
    got, expected = (
        torch.autograd.grad(group_norm_silu(x, 2, weight, bias, scale=scale, shift=shift, impl=impl).sum(), leaves)
        for impl in ("triton", "reference")
    )
    assert [d.dtype for d in got] == [p.dtype for p in leaves]
    torch.testing.assert_close(got, expected)


def test_a_group_that_overflows_stays_alone(kept):
    """A NaN, and a mean at which n is infinite outside of the map, reach no other group."""
    x, weight, bias, *_ = operands((2, 6, 3, 3))
    x[0, 0, 1, 1] = float("nan")
    x[1, 2] = 1e38
    x.requires_grad_()
    group_norm_silu(x, 3, weight, bias, impl="triton").sum().backward()
    finite = x.grad.isfinite().flatten(2).all(2)
    assert not finite[0, :2].any() and finite[0, 2:].all() and finite[1, :2].all() and finite[1, 4:].all()
