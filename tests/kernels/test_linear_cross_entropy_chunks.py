"""How many rows a chunk of `linear_cross_entropy` has, and what a chunk launches on a GPU, seen with fake tensors."""

from __future__ import annotations

import collections

import pytest
import torch
from dae_kernels import linear_cross_entropy
from dae_kernels.dispatch import TRITON_INSTALLED
from dae_kernels.linear_cross_entropy import chunked
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

GPU, CPU = torch.device("cuda"), torch.device("cpu")
MIB = 1 << 20


def test_rows_of_a_chunk():
    rows = chunked.chunk_rows
    # GPU: an eighth of the rows, at least 2048, in chunks of nearly one size.
    assert rows(65536, 16384, GPU, 2, None) == 8192
    assert rows(8192, 16384, GPU, 2, None) == 2048 == rows(8192, 1 << 20, GPU, 4, None)
    assert rows(2100, 64, GPU, 2, None) == 1152 and rows(100, 64, GPU, 2, None) == 100 and rows(0, 64, GPU, 2, None) == 1
    # CPU: 4 MiB of float32, at least 64 rows: what trained priors on CPUs were made with.
    assert rows(8192, 1024, CPU, 4, None) == 1024 and rows(8192, 1 << 20, CPU, 4, None) == 64 and rows(9, 7, CPU, 4, None) == 9
    for device in (GPU, CPU):
        assert rows(8192, 16384, device, 2, 32 * MIB) == 1024 and rows(8192, 16384, device, 2, 1) == 1
        assert rows(8192, 16384, device, 2, 1 << 40) == 8192
    for N in (1, 2047, 2049, 5000, 40000):
        for budget in (None, MIB, 100 * MIB):
            n = rows(N, 16384, GPU, 2, budget)
            assert 1 <= n <= N and (budget is None or n * 16384 * 2 <= budget)


class Counted(TorchDispatchMode):
    """Counts the operations that launch something, allocations, views and the filling of empty tensors left out."""

    def __init__(self):
        super().__init__()
        self.names: collections.Counter[str] = collections.Counter()

    def __torch_dispatch__(self, function, types, arguments=(), kwargs=None):
        result = function(*arguments, **kwargs or {})
        name = function.overloadpacket.__name__
        if function.namespace == "aten" and not function.is_view and name not in ("new_empty", "promote_types", "zero_"):
            self.names[name] += 1
        return result


@pytest.mark.skipif(not TRITON_INSTALLED, reason="needs triton")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_what_a_chunk_launches(dtype, monkeypatch):
    """Three products and the kernel: the products add to the gradients themselves, in float32, and nothing is read back."""
    from dae_kernels.linear_cross_entropy import fused

    steps = []
    monkeypatch.setattr(fused, "launch", lambda logits, gradient, *_: steps.append((logits, gradient)))
    sums = []  # torch has no working rule for it on fake tensors (2.11 takes the dtype for beta)
    monkeypatch.setattr(torch, "addmm", lambda total, a, b, out, **_: sums.append((total.dtype, total is out)) or total)
    with FakeTensorMode(), torch.no_grad():
        hidden, weight = (torch.empty(n, 64, device="cuda", dtype=dtype) for n in (10_000, 512))
        targets = torch.zeros(10_000, dtype=torch.int64, device="cuda")
        tensors = hidden, weight, None, None, targets, None, None
        with Counted() as counted:
            results = chunked.chunked_launcher(*tensors, 0.0, None, dtype, True, True, False, True, None)
    assert [len(logits) for logits, _ in steps] == [2048] * 4 + [1808]
    assert results[2].dtype == torch.float32
    logits, gradient = steps[0]
    assert gradient.dtype == dtype and logits.dtype == (torch.float32 if dtype == torch.float16 else dtype)
    if dtype != torch.float16:
        assert logits.untyped_storage()._cdata == gradient.untyped_storage()._cdata
    # without ignored rows: a comparison and a selection; the weight's gradient is written by the first chunk
    once = {"eq": 1, "masked_fill": 1}
    assert counted.names == once | {"mm": 11}
    assert sums == [(torch.float32, True)] * 4


@pytest.mark.parametrize("impl", ["chunked", *(["triton"] if TRITON_INSTALLED else [])])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in the interpreter
def test_a_budget_is_kept_and_does_not_show(impl, reduction, monkeypatch):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 8, generator=generator).to(device).requires_grad_() for n in (60, 20))
    targets = torch.randint(20, (60,), generator=generator).to(device)
    lengths, found = [], []
    multiply = chunked.multiply
    monkeypatch.setattr(chunked, "multiply", lambda a, b, out, **k: lengths.append(len(a)) or multiply(a, b, out, **k))
    for budget in (None, 20 * 4 * 30, 20 * 4 * 7):
        lengths.clear()
        loss = linear_cross_entropy(hidden, weight, targets, reduction=reduction, chunk_bytes=budget, impl=impl)
        found.append([loss, *torch.autograd.grad(loss.sum(), (hidden, weight))])
        assert lengths[0] == {None: 60, 2400: 30, 560: 7}[budget]
    for other in found[1:]:  # sums of 60 float32 terms of at most 10 in other orders
        torch.testing.assert_close(other, found[0], rtol=1e-5, atol=1e-5)
