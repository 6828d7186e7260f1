"""How the reference of `nearest_code` is quick on a CPU: float32 scores where they provably decide, float64 elsewhere."""

import math
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
    if family == "unit":
        x, codebook = torch.nn.functional.normalize(x, dim=1), torch.nn.functional.normalize(codebook, dim=1)
    if metric == "cosine":
        view = reference.unit_rows
    else:
        centre, scale = reference.frame(codebook)
        view = lambda rows: (rows.double() - centre) * scale  # noqa: E731
    index, sure, limit = reference.search(x, codebook, metric, view, torch.float32)
    exact, _, _ = reference.search(x, codebook, metric, view, torch.float64)
    assert sure.double().mean() > 0.98
    assert torch.equal(index[sure], exact[sure])
    # The bound that `settle` chooses candidates by: here of a search that is sure of hardly anything.
    assert torch.equal(reference.settle(x, codebook, limit, metric, view, 1.0), exact)


def test_quick_search_only_where_float32_is_float32():
    x, codebook = torch.randn(3, 4), torch.randn(5, 4)
    assert reference.float32_products(x, codebook) and reference.float32_products(x.half(), codebook.bfloat16())
    assert not reference.float32_products(x, codebook.double())
    assert not reference.float32_products(x.to("meta"), codebook.to("meta"))
    before = torch.get_float32_matmul_precision()
    try:
        for precision in ("high", "medium"):
            torch.set_float32_matmul_precision(precision)
            assert not reference.float32_products(x, codebook)
    finally:
        torch.set_float32_matmul_precision(before)
    assert reference.float32_products(x, codebook)
    products = torch.backends.mkldnn.matmul  # the newer way to say it
    before = products.fp32_precision
    try:
        products.fp32_precision = "bf16"
        assert not reference.float32_products(x, codebook)
    finally:
        products.fp32_precision = before


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("shift, size", [(1e8, 1.0), (-1e12, 1e3), (0.0, 1e160), (0.0, 1e-200), (1e150, 1e140), (0.0, 5e307)])
def test_float64_far_off_and_at_any_scale(shift, size, metric):
    torch.manual_seed(20)
    x, codes = (torch.randn(n, 3, dtype=torch.float64).clamp(-3, 3) * size + shift for n in (100, 60))
    index, _ = nearest_code(x, codes.repeat(2, 1), metric=metric, impl="reference")
    if metric == "l2":
        power = 2.0 ** -math.frexp(size)[1]  # exact, but for what is too small to matter
        distance_NK = torch.stack([((row - codes) * power).square().sum(dim=1) for row in x])
        assert torch.equal(index, distance_NK.argmin(dim=1))
    else:  # far off, float64 cannot tell cosines apart
        distance_NK = 1 - reference.unit_rows(x) @ reference.unit_rows(codes).T
        assert (distance_NK.gather(1, index[:, None])[:, 0] - distance_NK.amin(dim=1)).max() <= 7 * 2**-51


def test_one_code_far_out_and_one_row_far_out():
    torch.manual_seed(21)
    x, codes = torch.randn(50, 4, dtype=torch.float64), torch.randn(30, 4, dtype=torch.float64)
    expected = nearest_code(x, codes)[0]
    x[0], expected[0] = 1e200, 0  # from there all are equally far
    assert torch.equal(nearest_code(x, torch.cat([codes, torch.full((2, 4), 1e180, dtype=torch.float64)]))[0], expected)


@pytest.mark.parametrize("K, D", [(64, 5), (200, 33), (300, 1)])
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_blocks_of_codes_do_not_show(monkeypatch, K, D, metric, dtype):
    """Ties across blocks, inside one, and codes that repeat the one before."""
    torch.manual_seed(K)
    x, codes = torch.randn(60, D, dtype=dtype), torch.randn(K, D, dtype=dtype)
    for codebook, step in ((codes, 1), (torch.cat([codes.repeat_interleave(2, dim=0), codes]), 2)):
        whole = nearest_code(x, codebook, metric=metric, impl="reference")
        assert not (whole[0] % step).any()
        with monkeypatch.context() as patch:
            patch.setattr(reference, "MAX_CODES", 64 * D)
            patch.setattr(reference, "MAX_SCORES", {"cpu": 64 * 7})
            parts = nearest_code(x, codebook, metric=metric, impl="reference")
        assert torch.equal(whole[0], parts[0]) and torch.equal(whole[1], parts[1])


def test_float64_multiples_of_a_code_tie_by_their_cosine():
    torch.manual_seed(22)
    x, codes = torch.randn(500, 8, dtype=torch.float64), torch.randn(40, 8, dtype=torch.float64)
    index, _ = nearest_code(x, torch.cat([codes, 3 * codes, 0.1 * codes]), metric="cosine")
    assert torch.equal(index, nearest_code(x, codes, metric="cosine")[0])


def test_permuted_codes_tie_at_the_same_distance():
    """The same squares in another order, which float64 sums to other last bits."""
    torch.manual_seed(23)
    code = torch.rand(33, dtype=torch.float64)
    codebook = torch.stack([code[torch.randperm(33)] for _ in range(50)])
    assert len(codebook.square().sum(dim=1).unique()) > 1
    assert nearest_code(torch.zeros(1, 33, dtype=torch.float64), codebook)[0].item() == 0


def test_vmap_of_grad_and_compile_see_an_operator():
    torch.manual_seed(24)
    x, codebook = torch.randn(3, 20, 4), torch.randn(3, 9, 4).repeat(1, 2, 1)
    loss = lambda x, codes: (x - codes[nearest_code(x, codes)[0]]).square().sum()  # noqa: E731
    for transformed in (torch.vmap(torch.func.grad(loss)), torch.compile(torch.vmap(torch.func.grad(loss)), backend="aot_eager")):
        gradient = transformed(x, codebook)
        for h in range(3):
            torch.testing.assert_close(gradient[h], 2 * (x[h] - codebook[h][nearest_code(x[h], codebook[h])[0]]))
    torch.library.opcheck(reference.nearest_code_reference.op, (x[0], codebook[0], "l2"))
    torch.library.opcheck(reference.nearest_code_reference.op, (x.transpose(0, 1), codebook, "cosine"))


@pytest.mark.parametrize(
    "N, K, D, dtype, limit",
    [
        # 2^27 scores would take 1 GiB in float64.
        (1 << 16, 1 << 11, 2, "float64", 60),
        # The codebook is 64 MiB, a copy in float64 128.
        (64, 1 << 18, 64, "float32", 48),
        # As many scores, nearly all of which float32 cannot decide.
        (1 << 11, 1 << 13, 1, "float32", 60),
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
