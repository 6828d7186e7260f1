"""Operands whose elements lie more than 2^31 elements apart: views of a sparse file, of which only the pages touched exist."""

from __future__ import annotations

import pytest
import torch
from dae_kernels import group_norm_silu, lpips
from dae_kernels.dispatch import TRITON_INSTALLED, interpreting

pytestmark = pytest.mark.skipif(not (TRITON_INSTALLED and interpreting()), reason="kernels in Triton's CPU interpreter")

P, STRIDE = 132, 2**24  # 2^31 elements are passed at position 128


@pytest.fixture
def sparse(tmp_path):
    """A function that makes [1, C, P] float16 with positions, or channels, STRIDE elements apart."""

    def make(value_CP, along):
        C, P = value_CP.shape
        strides = (1, STRIDE) if along == "positions" else (STRIDE, 1)
        length = (C - 1) * strides[0] + (P - 1) * strides[1] + 1
        store = torch.from_file(str(tmp_path / f"{along}{C}"), shared=True, size=length, dtype=torch.float16)
        view = store.as_strided((1, C, P), (length, *strides))
        view[0] = value_CP
        return view

    return make


@pytest.mark.parametrize(("C", "P", "along"), [(4, P, "positions"), (P, 4, "channels")])
def test_gradients_that_lie_far_apart(sparse, C, P, along):
    x = torch.randn(1, C, P, dtype=torch.float16)
    dy = torch.randn(C, P, dtype=torch.float16)
    far = sparse(dy, along)
    gradients = []
    for cotangent in (dy[None], far):
        leaf = x.clone().requires_grad_()
        group_norm_silu(leaf, 2, impl="triton").backward(cotangent)
        gradients.append(leaf.grad)
    assert torch.equal(*gradients)  # the same kernel on the same numbers


@pytest.mark.parametrize("along", ["positions", "channels"])
def test_maps_that_lie_far_apart(sparse, along):
    shape = (3, P) if along == "positions" else (P, 3)
    a, b = torch.randn(2, *shape, dtype=torch.float16)
    far, results = sparse(a, along), []
    for first in (a[None], far):
        first = first.detach().requires_grad_()
        distance = lpips(first, b[None], impl="triton")
        results.append((distance, torch.autograd.grad(distance.sum(), first)[0]))
    for near, there in zip(*results, strict=True):
        assert torch.equal(near, there)


def test_inputs_that_lie_far_apart(sparse):
    x = torch.randn(4, P, dtype=torch.float16)
    assert torch.equal(group_norm_silu(sparse(x, "positions"), 2, impl="triton"), group_norm_silu(x[None], 2, impl="triton"))


def test_sizes_beyond_a_grid_are_refused():
    x = torch.empty(1, 1, 1).expand(70000, 2, 1)
    with pytest.raises(ValueError, match=r"at most 65535 images and channels .* got x \[70000, 2, 1\]"):
        group_norm_silu(x, 2, impl="triton")
    assert group_norm_silu(x, 2).shape == x.shape
    positions = torch.empty(1, 1, 1).expand(1, 1, 2**31)
    for refused in (
        lambda: group_norm_silu(positions, 1, impl="triton"),
        lambda: lpips(positions, positions, impl="triton"),
    ):
        with pytest.raises(ValueError, match=r"at most .* positions"):
            refused()
