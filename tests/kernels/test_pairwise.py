"""The kernel that `mmd` and `energy_distance` share, below their interfaces: bounds, registration, operators."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from dae_kernels.pairwise import fused
from dae_kernels.pairwise.reference import pair_rows_reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in the interpreter
CASES = [(bandwidths, same) for bandwidths in ((), (0.7, 2.0)) for same in (False, True)]


@pytest.mark.parametrize("bandwidths, same", CASES)
def test_kernel_stays_inside_its_buffers(bandwidths, same):
    """NaN lies around the operands and would show in every sum; what lies around the results must survive."""
    torch.manual_seed(0)
    N, M, D, guard = 33, 33 if same else 45, 20, 160

    def guarded(inner, around):
        whole = inner.new_full((len(inner) + 2 * guard, *inner.shape[1:]), around)
        whole[guard:-guard] = inner
        return whole, whole[guard:-guard]

    points_ND, points_MD, weights_M = torch.randn(N, D), torch.randn(M, D), torch.rand(M)
    if same:
        points_MD = points_ND
    (_, q), (_, s), (_, v) = (guarded(t.to(DEVICE), float("nan")) for t in (points_ND, points_MD, weights_M))
    sums, sum_N = guarded(torch.zeros(N, device=DEVICE), -7.0)
    gradients, gradient_ND = guarded(torch.zeros(N, D, device=DEVICE), -7.0)
    fused.launch(q, s, v, fused.rates(bandwidths, q.device), sum_N, gradient_ND, len(bandwidths), same, True)
    for whole in (sums, gradients):
        assert (whole[:guard] == -7).all() and (whole[-guard:] == -7).all()
    expected_sum, expected_gradient = pair_rows_reference(points_ND, points_MD, weights_M, bandwidths, same, True)
    # float32 sums of 33 to 45 terms of the order of 1, distances of centred points of radius 7: a few hundred eps at most
    torch.testing.assert_close(sum_N.cpu().double(), expected_sum, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient_ND.cpu().double(), expected_gradient, rtol=1e-5, atol=3e-5)


def test_without_gradient_the_sums_are_the_same():
    torch.manual_seed(1)
    q, s, v = torch.randn(5, 3, device=DEVICE), torch.randn(70, 3, device=DEVICE), torch.rand(70, device=DEVICE)
    rate = fused.rates((1.0,), q.device)
    sums, nothing = fused.pair_rows_triton(q, s, v, rate, 1, False, False)
    assert nothing.shape == (0, 3)
    torch.testing.assert_close(sums, fused.pair_rows_triton(q, s, v, rate, 1, False, True)[0], rtol=1e-6, atol=0)


@pytest.mark.parametrize("gradient", [False, True])
def test_operator_passes_torch_checks(gradient):
    q, s, v = torch.randn(4, 3, device=DEVICE), torch.randn(5, 3, device=DEVICE), torch.rand(5, device=DEVICE)
    torch.library.opcheck(fused.pair_rows_triton, (q, s, v, fused.rates((), q.device), 0, False, gradient))


def test_operator_is_registered_without_the_interpreter():
    """The `triton_op` of a GPU run, traced on fake CUDA tensors in a process without the interpreter."""
    script = (
        "import torch; from torch._subclasses.fake_tensor import FakeTensorMode\n"
        "from dae_kernels.pairwise.fused import pair_rows_triton\n"
        "with FakeTensorMode():\n"
        "    q, s, v = (torch.empty(*shape, device='cuda') for shape in ((7, 5), (9, 5), (9,)))\n"
        "    sums, gradient = pair_rows_triton(q, s, v, torch.empty(1, device='cuda'), 0, False, True)\n"
        "    print(list(sums.shape), list(gradient.shape), sums.dtype, sums.device.type)\n"
    )
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    result = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == ["[7] [7, 5] torch.float32 cuda"]
