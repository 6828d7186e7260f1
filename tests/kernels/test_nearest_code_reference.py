"""How the reference of `nearest_code` is quick on a CPU: float32 scores where they provably decide, float64 elsewhere."""

import os
import subprocess
import sys

import pytest
import torch
from dae_kernels import nearest_code
from dae_kernels.nearest_code import reference
from torch import Tensor

METRICS = ["l2", "cosine"]
EPS = torch.finfo(torch.float32).eps


def near_ties() -> dict[str, tuple[Tensor, Tensor]]:
    """Codes between which float32 scores cannot or can hardly decide."""
    torch.manual_seed(14)
    x, codes = torch.randn(300, 16), torch.randn(100, 16)
    codes[:, 0] += torch.arange(100) * 1e-7
    far = torch.randn(300, 16) + 3000
    return {
        "copies": (x, torch.cat([codes, codes, codes])),
        "one rounding apart": (x, torch.cat([codes, codes * (1 + EPS), codes * (1 - EPS)])),
        "all cancels": (far, far[:70] + 1e-3 * torch.randn(70, 16)),
        "huge": (x * 1e19, codes * 1e19),
        "denormal": (x * 1e-40, codes * 1e-40),
        "tiny codes": (x, codes * 1e-22),
        "one code": (x, codes[:1]),
        "a code far out": (x, torch.cat([codes, torch.full((1, 16), 1e15)])),
    }


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("case", near_ties())
def test_quick_search_equals_float64(case, metric):
    x, codebook = near_ties()[case]
    index, distance = nearest_code(x, codebook, metric=metric, impl="reference")
    expected = nearest_code(x.double(), codebook.double(), metric=metric, impl="reference")
    assert torch.equal(index, expected[0]) and torch.equal(distance, expected[1])


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("family", ["random", "small", "unit"])
def test_quick_search_is_mostly_sure(metric, family):
    """What the speed rests on; and every sure row is right."""
    torch.manual_seed(15)
    x, codebook = torch.randn(2000, 8), torch.randn(700, 8)
    if family == "small":
        codebook = (torch.rand(700, 8) * 2 - 1) / 700
    codes_KD = codebook.double()
    if family == "unit" or metric == "cosine":
        x, codes_KD = torch.nn.functional.normalize(x, dim=1), torch.nn.functional.normalize(codes_KD, dim=1)
    bias_K = codes_KD.square().sum(1) * (metric == "l2")
    index, sure = reference.quick_search(x, codes_KD, bias_K)
    assert sure.double().mean() > 0.98
    assert torch.equal(index[sure], reference.exact_search(x, codes_KD, bias_K)[sure])


def test_quick_search_only_where_float32_is_float32():
    x, codebook = torch.randn(3, 4), torch.randn(5, 4)
    assert reference.quick_search_applies(x, codebook) and reference.quick_search_applies(x.half(), codebook.bfloat16())
    assert not reference.quick_search_applies(x, codebook.double())
    assert not reference.quick_search_applies(x.to("meta"), codebook.to("meta"))
    before = torch.get_float32_matmul_precision()
    try:
        for precision in ("high", "medium"):
            torch.set_float32_matmul_precision(precision)
            assert not reference.quick_search_applies(x, codebook)
    finally:
        torch.set_float32_matmul_precision(before)
    assert reference.quick_search_applies(x, codebook)
    products = torch.backends.mkldnn.matmul  # the newer way to say it
    before = products.fp32_precision
    try:
        products.fp32_precision = "bf16"
        assert not reference.quick_search_applies(x, codebook)
    finally:
        products.fp32_precision = before


@pytest.mark.parametrize(
    "N, K, D, dtype, limit",
    [
        # 2^27 scores would take 1 GiB in float64; 2^23 take 64 MiB.
        (1 << 16, 1 << 11, 2, "float64", 300),
        # A fifth of two matrices [N, K] in float32, fewer than vector-quantize-pytorch holds: cdist clamps, roots and negates.
        (1 << 13, 1 << 12, 64, "float32", 51),
    ],
)
def test_memory_of_the_reference_is_bounded(N, K, D, dtype, limit):
    # The first call pays for what torch itself sets up.
    script = (
        "import torch; from dae_kernels import nearest_code\n"
        "peak = lambda: int(open('/proc/self/status').read().split('VmHWM:')[1].split()[0]) // 1024\n"
        f"x, codebook = (torch.randn(n, {D}, dtype=torch.{dtype}) for n in ({N}, {K}))\n"
        "nearest_code(x[:300], codebook[:300]); before = peak(); nearest_code(x, codebook); print(peak() - before)"
    )
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}  # or glibc's hoard of freed blocks counts as well
    grown = subprocess.run([sys.executable, "-c", script], env=environment, check=True, capture_output=True, text=True).stdout
    assert int(grown) < limit  # MiB
