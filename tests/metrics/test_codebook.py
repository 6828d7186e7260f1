"""Usage and perplexity of a codebook."""

import math

import pytest
import torch

from dae.metrics import CodebookUsage


@pytest.mark.parametrize("K", [1, 2, 64, 1000])
def test_uniform_use_has_perplexity_K(K):
    usage = CodebookUsage(K).update(torch.arange(K).repeat(3))
    assert usage.perplexity == pytest.approx(K, rel=1e-12)  # K terms in float64
    assert usage.usage == 1.0
    assert usage.counts.tolist() == [3] * K
    assert usage.counts.dtype == torch.int64


def test_one_code():
    usage = CodebookUsage(8).update(torch.full((2, 3, 3), 5))
    assert usage.perplexity == 1.0
    assert usage.usage == 1 / 8


def test_known_frequencies():
    usage = CodebookUsage(5).update(torch.tensor([0, 0, 1, 2]))
    assert usage.perplexity == pytest.approx(math.exp(1.5 * math.log(2)), rel=1e-14)
    assert usage.usage == 3 / 5


def test_perplexity_is_of_the_summed_counts():
    usage = CodebookUsage(4)
    for code in range(4):
        usage.update(torch.full((10,), code))
    assert usage.perplexity == pytest.approx(4, rel=1e-14)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
def test_shapes_and_dtypes(dtype):
    indices = torch.tensor([[0, 1], [3, 1]], dtype=dtype)
    assert CodebookUsage(4).update(indices.T).update(indices[:0]).counts.tolist() == [1, 2, 0, 1]


@pytest.mark.parametrize("world", [1, 2, 5])
def test_all_reduce_counts_the_indices_of_all_processes(processes, world):
    indices = torch.randint(7, (world, 20), generator=torch.Generator().manual_seed(0))
    whole = CodebookUsage(7).update(indices)
    for part in processes(world, lambda rank: CodebookUsage(7).update(indices[rank]).all_reduce()):
        assert torch.equal(part.counts, whole.counts)
        assert part.perplexity == whole.perplexity


def test_errors():
    with pytest.raises(ValueError, match="codebook_size: expected at least 1 code, got 0"):
        CodebookUsage(0)
    usage = CodebookUsage(4)
    assert usage.usage == 0.0
    with pytest.raises(ValueError, match="expected indices"):
        _ = usage.perplexity
    for wrong in (-1, 4):
        with pytest.raises(ValueError, match=r"indices: expected 0 to 3, got"):
            usage.update(torch.tensor([0, wrong, 1]))
    for dtype in (torch.float32, torch.bool):
        with pytest.raises(TypeError, match="expected integers"):
            usage.update(torch.ones(3, dtype=dtype))
    assert usage.counts.sum() == 0, "a refused batch must not count"
