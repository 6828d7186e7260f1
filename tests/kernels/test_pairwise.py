"""The kernel that `mmd` and `energy_distance` share, below their interfaces: bounds, registration, operators."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from dae_kernels.energy_distance import energy_distance
from dae_kernels.mmd import mmd
from dae_kernels.pairwise import fused
from dae_kernels.pairwise.reference import pair_rows_reference
from torch._subclasses.fake_tensor import FakeTensorMode

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in the interpreter
IMPLS = ["reference", "triton"]
EPS = torch.finfo(torch.float32).eps
DISTANCES = {"energy": energy_distance, "mmd": lambda x, y, **options: mmd(x, y, bandwidths=(1.0, 3.0), **options)}
both = pytest.mark.parametrize("kind", DISTANCES)
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


def test_columns_of_a_tile_by_what_spilled():
    """The compilation itself is a test of the gate, test_aot.py, which fails with triton 3.8 where 16 columns are 32."""
    columns = {
        (bandwidths, same, gradient, amd): fused.tile(100, bandwidths, same, gradient, amd)["BLOCK_M"]
        for bandwidths in (0, 3) for same in (False, True) for gradient in (False, True) for amd in (False, True)
    }  # fmt: skip
    assert columns == {case: (16 if case == (0, True, True, True) else 32) if case[2] else 64 for case in columns}


@pytest.mark.parametrize("same", [False, True])
def test_tile_of_amd(same, monkeypatch):
    """Its sums and gradients are those of the other tile, over more blocks than one."""
    torch.manual_seed(0)
    q_ND = torch.randn(33, 20, device=DEVICE)
    s_MD = q_ND if same else torch.randn(45, 20, device=DEVICE)
    v_M, rate_B = torch.rand(len(s_MD), device=DEVICE), torch.zeros(1, device=DEVICE)
    own, whole = fused.tile, []
    for amd in (False, True):
        monkeypatch.setattr(
            fused, "tile", lambda D, bandwidths, same, gradient, _, amd=amd: own(D, bandwidths, same, gradient, amd)
        )
        whole.append(fused.pair_rows_launcher(q_ND, s_MD, v_M, rate_B, 0, same, True))
    for found, expected in zip(whole[1], whole[0], strict=True):
        torch.testing.assert_close(found, expected, rtol=20 * EPS, atol=45 * 20 * EPS)  # a sum of 45 terms, in another order


def test_without_gradient_the_sums_are_the_same():
    torch.manual_seed(1)
    q, s, v = torch.randn(5, 3, device=DEVICE), torch.randn(70, 3, device=DEVICE), torch.rand(70, device=DEVICE)
    rate = fused.rates((1.0,), q.device)
    sums, nothing = fused.pair_rows_triton(q, s, v, rate, 1, False, False)
    assert nothing.shape == (0, 3)
    torch.testing.assert_close(sums, fused.pair_rows_triton(q, s, v, rate, 1, False, True)[0], rtol=1e-6, atol=0)


@pytest.mark.parametrize("bandwidths", [(), (0.7, 2.0)])
@pytest.mark.parametrize("need_x, need_y", [(False, False), (True, False), (False, True), (True, True)])
def test_equal_weights_are_weights(bandwidths, need_x, need_y):
    """The path without weights, for each side that asks, beside the same weights given; strided clouds of 16 bits, an outlier."""
    torch.manual_seed(0)
    x, y = torch.randn(9, 70, device=DEVICE).half().T, torch.randn(45, 18, device=DEVICE).half()[:, ::2]
    x[3] *= 50
    found = []
    for weights in ({}, {"weights_x": torch.ones(70, device=DEVICE), "weights_y": torch.full((45,), 3.0, device=DEVICE)}):
        leaves = x.clone().requires_grad_(need_x), y.clone().requires_grad_(need_y)
        options = {"bandwidths": bandwidths, "unbiased": False} if bandwidths else {}
        value = (mmd if bandwidths else energy_distance)(*leaves, impl="triton", **options, **weights)
        if need_x or need_y:
            value.backward(torch.tensor(1.7, device=DEVICE))
        found.append((value.detach(), *(leaf.grad for leaf in leaves if leaf.requires_grad)))
    # sums of at most 10^4 terms of the order of 1 (with the outlier, of 1) over their number, in float32; gradients of 16 bits
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-5, atol=1e-5)
    for one, other in zip(found[0][1:], found[1][1:], strict=True):
        torch.testing.assert_close(one, other, rtol=2e-3, atol=1e-5)


@pytest.mark.parametrize("unbiased", [False, True])
def test_operator_of_a_distance_passes_torch_checks(unbiased):
    x, y = torch.randn(6, 3, device=DEVICE), torch.randn(5, 3, device=DEVICE)
    torch.library.opcheck(fused.pair_distance_triton.op, (x, y, (1.0,), unbiased, True, True))


def test_rates_of_a_captured_graph_are_its_own(monkeypatch):
    """What is kept would be released under a graph that lives on, or have no values before its first replay."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    before = fused.known_rates.cache_info().currsize
    with FakeTensorMode():
        made = fused.kept_rates((1.0, 3.5), torch.device("cuda"))
    assert made.shape == (2,) and made.device.type == "cuda" and fused.known_rates.cache_info().currsize == before


@pytest.mark.parametrize("gradient", [False, True])
def test_operator_passes_torch_checks(gradient):
    q, s, v = torch.randn(4, 3, device=DEVICE), torch.randn(5, 3, device=DEVICE), torch.rand(5, device=DEVICE)
    torch.library.opcheck(fused.pair_rows_triton.op, (q, s, v, fused.rates((), q.device), 0, False, gradient))


def test_operator_is_registered_without_the_interpreter():
    """The operator of a GPU run, traced on fake CUDA tensors in a process without the interpreter."""
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


def points(N: int, seed: int) -> torch.Tensor:
    return torch.randn(N, 8, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def value_and_gradient(kind: str, impl: str, x: torch.Tensor, y: torch.Tensor, weights_x: torch.Tensor | None = None):
    x = x.clone().requires_grad_()
    value = DISTANCES[kind](x, y, weights_x=weights_x, impl=impl)
    value.backward()
    return value.item(), x.grad


@both
@pytest.mark.parametrize("weight", [0.0, 1.0])
@pytest.mark.parametrize("far", [1e3, 1e6])
def test_outliers_do_not_disturb_the_kernel(kind, weight, far):
    """16 eps R as for clouds without an outlier (test_energy_distance), R = 10 for most points; the outlier has its share in R.

    Four sums of the size of that share cancel to the result.
    """
    x, y, weights_x = points(63, 0), 1.3 * points(60, 1) + 0.5, torch.ones(63, device=DEVICE)
    x[0], weights_x[0] = far, weight
    (value, gradient), (exact, exact_gradient) = (value_and_gradient(kind, i, x, y, weights_x) for i in ("triton", "reference"))
    assert abs(value - exact) <= 16 * EPS * (10 + weight * far * 8**0.5 / 63)
    assert (gradient - exact_gradient).abs().max() <= 200 * EPS / 60  # a unit vector a pair, as in test_energy_distance


@both
def test_clouds_far_from_each_other(kind):
    """Each cloud has a centre of its own: what is far apart does not blur what is within."""
    x, y = points(63, 0), points(60, 1) + 3e3
    (value, gradient), (exact, exact_gradient) = (value_and_gradient(kind, impl, x, y) for impl in ("triton", "reference"))
    assert abs(value - exact) <= 16 * EPS * (10 + exact)
    assert (gradient - exact_gradient).abs().max() <= 200 * EPS / 60


@both
def test_second_cluster_within_a_cloud(kind):
    """The limit that both docstrings state: three digits of the pairs of a cluster at R = 100 of their distances."""
    x, y = points(63, 0), points(60, 1)
    x[:20] += 100 / 8**0.5
    (value, _), (exact, _) = (value_and_gradient(kind, impl, x, y) for impl in ("triton", "reference"))
    assert abs(value - exact) <= 1e-3 * exact


@both
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("D", [1, 8])
def test_points_that_are_not_finite_make_nan(kind, impl, bad, D):
    """Also for mmd, where a point at infinity would have kernel value 0 with all others, and also where its weight is 0."""
    x, y, weights_x = points(63, 0)[:, :D], points(60, 1)[:, :D], torch.ones(63, device=DEVICE)
    x[3, D // 2], weights_x[3] = bad, 0.0
    assert DISTANCES[kind](x, y, impl=impl).isnan()
    assert DISTANCES[kind](x, y, weights_x=weights_x, impl=impl).isnan()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("unit", [1e-17, 1e17])
def test_units_within_the_range_of_the_kernel(impl, unit):
    x, y = points(63, 0), points(60, 1) + 0.5
    torch.testing.assert_close(energy_distance(x * unit, y * unit, impl=impl) / unit, energy_distance(x, y), rtol=1e-5, atol=0)
    torch.testing.assert_close(
        mmd(x * unit, y * unit, bandwidths=(unit,), impl=impl), mmd(x, y, bandwidths=(1,)), rtol=1e-4, atol=0
    )
