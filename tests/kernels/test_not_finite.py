"""Codes and vectors with NaN or infinity: every implementation of the search gives the same, and the others are not touched."""

from __future__ import annotations

import math

import pytest
import torch
from dae_kernels import k_nearest_distances, nearest_code, precision_recall_density_coverage, vector_quantize
from dae_kernels.dispatch import triton_refusal

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
needs_triton = pytest.mark.skipif(triton_refusal(DEVICE) is not None, reason="no Triton here")
IMPLS = ["reference", pytest.param("triton", marks=needs_triton)]
BAD = [math.nan, math.inf, -math.inf]


def operands(K, D, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(n, D, generator=generator).to(dtype).to(DEVICE) for n in (20, K))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("metric", ["l2", "cosine"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
@pytest.mark.parametrize("K, D", [(1, 3), (90, 18)])
@pytest.mark.parametrize("value", BAD)
def test_such_codes_are_never_nearest(impl, metric, dtype, K, D, value):
    if dtype == torch.float64 and impl == "triton":
        impl = "auto"
    x, good = operands(K, D, dtype)
    x[3] = 0  # as near to all codes by its cosine
    codes = torch.cat([good, good[: K // 2]])
    where = torch.randperm(len(codes) + 4, generator=torch.Generator().manual_seed(1))[: len(codes)].sort().values.to(DEVICE)
    codebook = torch.zeros(len(codes) + 4, D, dtype=dtype, device=DEVICE)
    codebook[:, -1] = value  # in one coordinate,
    codebook[0] = value  # or all (unless a code comes there)
    codebook[where] = codes
    index, distance = nearest_code(x, codes, metric=metric, impl=impl)
    got_index, got_distance = nearest_code(x, codebook, metric=metric, impl=impl)
    assert torch.equal(got_index, where[index]) and torch.equal(got_distance, distance)
    if impl == "triton":
        fast, _ = nearest_code(x, codebook, metric=metric, precision="fast", impl=impl)
        assert torch.isin(fast, where).all()
    quantized = vector_quantize(x, codebook, metric=metric, impl=impl)
    assert torch.equal(quantized.indices, got_index) and quantized.quantized.isfinite().all() and quantized.loss.isfinite()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("metric", ["l2", "cosine"])
@pytest.mark.parametrize("value", BAD)
def test_such_vectors_get_code_0_and_a_distance_that_shows_it(impl, metric, value):
    x, codebook = operands(40, 6, torch.float32)
    index, distance = nearest_code(x, codebook, metric=metric, impl=impl)
    x[7], x[11, 2] = value, value
    got_index, got_distance = nearest_code(x, codebook, metric=metric, impl=impl)
    bad = torch.tensor([7, 11], device=DEVICE)
    assert (got_index[bad] == 0).all() and not got_distance[bad].isfinite().any()
    keep = torch.ones(len(x), dtype=torch.bool, device=DEVICE).index_fill(0, bad, False)
    assert torch.equal(got_index[keep], index[keep]) and torch.equal(got_distance[keep], distance[keep])
    assert not vector_quantize(x, codebook, metric=metric, impl=impl).loss.isfinite()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("metric", ["l2", "cosine"])
@pytest.mark.parametrize("value", BAD)
def test_no_finite_code(impl, metric, value):
    x, codebook = operands(40, 6, torch.float32)
    index, distance = nearest_code(x, codebook.fill_(value), metric=metric, impl=impl)
    assert (index == 0).all() and not distance.isfinite().any()


@pytest.mark.parametrize("value", BAD)
def test_neighbour_searches_refuse_them(value):
    x, y = operands(9, 4, torch.float32)
    y[3, 1] = value
    for call in (
        lambda: k_nearest_distances(x, y, 2),
        lambda: k_nearest_distances(y, x, 2),
        lambda: precision_recall_density_coverage(x, y, k=2),
        lambda: precision_recall_density_coverage(y, x, k=2),
    ):
        with pytest.raises(ValueError, match="needs finite points, got NaN or infinity in"):
            call()
