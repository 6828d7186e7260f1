"""`codebook_statistics` against sums in float64, in any order, with any layout."""

import pytest
import torch
from dae_kernels.codebook_statistics import codebook_statistics, reference
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS = torch.finfo(torch.float32).eps


def one_by_one(x: Tensor, indices: Tensor, K: int) -> tuple[Tensor, Tensor]:
    """Counts and sums by a scatter in float64."""
    x_ND, indices_N = x.reshape(-1, x.shape[-1]).double(), indices.flatten().long()
    ones_N = torch.ones_like(indices_N)
    counts_K = torch.zeros(K, dtype=torch.int64, device=x.device).index_add(0, indices_N, ones_N)
    return counts_K, x_ND.new_zeros(K, x.shape[-1]).index_add(0, indices_N, x_ND)


def draw(N: int, D: int, K: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(N, D, generator=generator).to(DEVICE), torch.randint(K, (N,), generator=generator).to(DEVICE)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("N, D, K", [(63, 60, 7), (1, 1, 1), (3, 5, 60), (0, 4, 3), (500, 3, 2)])
def test_counts_and_sums(dtype, N, D, K):
    x, indices = draw(N, D, K)
    x = x.to(dtype)
    expected_counts, expected_sums = one_by_one(x, indices, K)
    # CPUs add in order, GPUs in sorted segments; the segments are tested here too.
    for counts, sums in (codebook_statistics(x, indices, K), reference.segment_statistics(x, indices, K)):
        assert counts.dtype == torch.int64 and torch.equal(counts, expected_counts)
        assert sums.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        # Both sum in float64; a float32 result is rounded once, by half an EPS.
        tolerance = 1e-14 if dtype == torch.float64 else EPS / 2
        torch.testing.assert_close(sums.double(), expected_sums, rtol=tolerance, atol=1e-13)


def test_long_sums_do_not_drift():
    # A running float32 sum of 2^18 tenths is off by more than 1e-4 of it; ours is rounded once.
    x = torch.full((2**18, 1), 0.1, device=DEVICE)
    _, sums = codebook_statistics(x, torch.zeros(2**18, dtype=torch.int64, device=DEVICE), 2)
    assert abs(sums[0].item() / (2**18 * x[0].item()) - 1) <= EPS and sums[1] == 0


def test_the_same_bits_each_time_and_in_any_blocks(monkeypatch):
    x, indices = draw(300, 11, 5)
    counts, sums = codebook_statistics(x, indices, 5)
    for elements in (1, 300 * 4, 300 * 10, 1 << 20):
        monkeypatch.setattr(reference, "MAX_SORTED", elements)
        for again in (codebook_statistics(x, indices, 5), reference.segment_statistics(x, indices, 5)):
            assert torch.equal(again[0], counts) and torch.equal(again[1], sums)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.int8, torch.uint8])
def test_any_integer_dtype(dtype):
    x, indices = draw(40, 3, 6)
    for got, expected in zip(codebook_statistics(x, indices.to(dtype), 6), codebook_statistics(x, indices, 6), strict=True):
        assert torch.equal(got, expected)


def test_layouts_do_not_matter():
    image = torch.randn(2, 6, 3, 5, device=DEVICE)
    ids = torch.randint(9, (5, 3, 2), device=DEVICE)
    cases = [
        (image.movedim(1, -1), ids.permute(2, 1, 0)),
        (image[0, :, 0, 0].expand(4, 3, 6), ids[0, 0, :1].expand(4, 3)),
        (image[:, ::2, ::2, 1], ids[0, :2, 1, None].expand(2, 3)),
        (image[0, :, 0, 0], ids[1, 1, 1]),  # one vector
    ]
    for x, indices in cases:
        counts, sums = codebook_statistics(x, indices, 9)
        expected_counts, expected_sums = one_by_one(x, indices, 9)
        assert torch.equal(counts, expected_counts)
        torch.testing.assert_close(sums.double(), expected_sums, rtol=EPS / 2, atol=1e-13)


def test_autograd_and_autocast_leave_it_alone():
    x, indices = draw(30, 4, 5)
    _, expected = codebook_statistics(x, indices, 5)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        _, sums = codebook_statistics(x.requires_grad_(), indices, 5)
    assert torch.equal(sums, expected) and not sums.requires_grad


@settings(max_examples=25, deadline=None)
@given(N=st.integers(0, 50), D=st.integers(1, 5), K=st.integers(1, 30), seed=st.integers(0, 1000))
def test_properties(N, D, K, seed):
    x, indices = draw(N, D, K, seed)
    x = x.double()
    counts, sums = codebook_statistics(x, indices, K)
    assert counts.sum() == N
    # Float64 sums in another order, here and below: their roundings are some 2^-53 of sums that are far below 1e3.
    torch.testing.assert_close(sums.sum(0), x.sum(0), rtol=1e-12, atol=1e-12)
    shuffled = torch.randperm(N, generator=torch.Generator().manual_seed(seed)).to(DEVICE)
    again_counts, again_sums = codebook_statistics(x[shuffled], indices[shuffled], K)
    assert torch.equal(again_counts, counts)
    torch.testing.assert_close(again_sums, sums, rtol=1e-12, atol=1e-12)
    halves = [codebook_statistics(a, b, K) for a, b in zip(x.tensor_split(2), indices.tensor_split(2), strict=True)]
    assert torch.equal(halves[0][0] + halves[1][0], counts)
    torch.testing.assert_close(halves[0][1] + halves[1][1], sums, rtol=1e-12, atol=1e-12)


def test_compiles_into_one_graph():
    torch._dynamo.reset()
    compiled = torch.compile(codebook_statistics, fullgraph=True, backend="aot_eager")
    for N in (4, 30, 31):
        x, indices = draw(N, 4, 5, seed=N)
        for got, expected in zip(compiled(x, indices, 5), codebook_statistics(x, indices, 5), strict=True):
            assert torch.equal(got, expected)
    indices[:2] = torch.tensor([-1, 5])
    if DEVICE == "cpu":
        with pytest.raises(ValueError, match=r"indices in \[0, 5\), got -1"):
            compiled(x, indices, 5)
    else:  # Nothing is read there, so nothing is refused; rows of no code count nowhere.
        for got, expected in zip(compiled(x, indices, 5), codebook_statistics(x[2:], indices[2:], 5), strict=True):
            assert torch.equal(got, expected)


def test_the_sorted_sums_leave_out_rows_of_no_code():
    x, indices = draw(30, 4, 5)
    indices[:2] = torch.tensor([-1, 5])
    for got, expected in zip(
        reference.segment_statistics(x, indices, 5), reference.segment_statistics(x[2:], indices[2:], 5), strict=True
    ):
        assert torch.equal(got, expected)


ERRORS = {
    "above": (torch.zeros(3, 2), torch.tensor([0, 1, 4]), 4, ValueError, r"indices in \[0, 4\), got 4"),
    "below": (torch.zeros(3, 2), torch.tensor([0, -2, 9]), 4, ValueError, r"indices in \[0, 4\), got -2"),
    "count": (torch.zeros(3, 2), torch.zeros(2, dtype=torch.int64), 4, ValueError, r"got x \[3, 2\], indices \[2\]"),
    "no rows": (torch.tensor(1.0), torch.tensor(0), 4, ValueError, r"x \[..., D\] and indices \[...\]"),
    "no codes": (torch.zeros(0, 2), torch.zeros(0, dtype=torch.int64), 0, ValueError, "got K = 0"),
    "K": (torch.zeros(1, 2), torch.zeros(1, dtype=torch.int64), 4.0, TypeError, "K as an int, got float"),
    "x": (torch.zeros(1, 2, dtype=torch.int64), torch.zeros(1, dtype=torch.int64), 4, TypeError, "x, got torch.int64"),
    "indices": (torch.zeros(1, 2), torch.zeros(1), 4, TypeError, "integer indices, got torch.float32"),
    "device": (torch.zeros(1, 2), torch.zeros(1, dtype=torch.int64, device="meta"), 4, ValueError, "got cpu and meta"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_user_errors(case):
    x, indices, K, error, message = ERRORS[case]
    with pytest.raises(error, match=message):
        codebook_statistics(x, indices, K)


def test_there_is_no_kernel():
    with pytest.raises(ValueError, match="codebook_statistics has no Triton kernel"):
        codebook_statistics(torch.zeros(1, 2), torch.zeros(1, dtype=torch.int64), 4, impl="triton")
