"""The patch of tests/kernels/conftest.py against torch, bit by bit: bfloat16 arithmetic and maxima in Triton's interpreter."""

import pytest
import torch
from dae_kernels.dispatch import TRITON_INSTALLED, interpreting

if not (TRITON_INSTALLED and interpreting()):
    pytest.skip("about Triton's CPU interpreter", allow_module_level=True)

import triton
import triton.language as tl

SPECIAL = torch.tensor(
    [0.0, -0.0, 1.0, -1.0, torch.inf, -torch.inf, torch.nan, 1e-40, -1e-40, 3.4e38, -3.4e38, 1 + 2**-8, 1 + 3 * 2**-8]
)


@triton.jit
def cast_kernel(source_ptr, target_ptr, N, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(source_ptr + i, mask=i < N, other=0.0)
    tl.store(target_ptr + i, x.to(target_ptr.dtype.element_ty), mask=i < N)


@triton.jit
def elementwise_kernel(a_ptr, b_ptr, out_ptr, N, OPERATION: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    a = tl.load(a_ptr + i, mask=i < N, other=0.0)
    b = tl.load(b_ptr + i, mask=i < N, other=0.0)
    if OPERATION == "add":
        out = a + b
    elif OPERATION == "sub":
        out = a - b
    elif OPERATION == "mul":
        out = a * b
    elif OPERATION == "div":
        out = (a / b).to(a.dtype)
    elif OPERATION == "neg":
        out = -a
    elif OPERATION == "abs":
        out = tl.abs(a)
    elif OPERATION == "less":
        out = tl.where(a < b, a, b)
    elif OPERATION == "max":
        out = tl.maximum(a, b)
    elif OPERATION == "exp":
        out = tl.exp(a.to(tl.float32)).to(a.dtype)
    tl.store(out_ptr + i, out, mask=i < N)


@triton.jit
def sum_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, BLOCK))
    tl.store(out_ptr, tl.sum(x.to(tl.float32), axis=0))
    tl.store(out_ptr + 1, tl.sum(x, axis=0).to(tl.float32))
    tl.store(out_ptr + 2, tl.max(x, axis=0).to(tl.float32))


@triton.jit
def dot_kernel(a_ptr, b_ptr, out_ptr, SIZE: tl.constexpr):
    i, j = tl.arange(0, SIZE)[:, None], tl.arange(0, SIZE)[None, :]
    product = tl.dot(tl.load(a_ptr + i * SIZE + j), tl.trans(tl.load(b_ptr + i * SIZE + j)))
    tl.store(out_ptr + i * SIZE + j, product)


def launch(kernel, N, *arguments, **options):
    kernel[(triton.cdiv(N, 1024),)](*arguments, N, BLOCK=1024, **options)


def same_bits(a, b):
    nan = a.isnan()
    return torch.equal(nan, b.isnan()) and torch.equal(a.view(torch.int16)[~nan], b.view(torch.int16)[~nan])


def test_every_bfloat16_widens_exactly():
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    out = torch.empty(len(x), dtype=torch.float32)
    launch(cast_kernel, len(x), x, out)
    assert torch.equal(out.nan_to_num(nan=7.0), x.float().nan_to_num(nan=7.0)) and torch.equal(out.isnan(), x.isnan())


def test_float32_is_rounded_to_nearest_even():
    generator = torch.Generator().manual_seed(0)
    anything = torch.randint(-(2**31), 2**31, (20000,), generator=generator).to(torch.int32)
    halfway = (anything & -65536) | 0x8000  # between two neighbours: the even one is right
    x = torch.cat([anything.view(torch.float32), halfway.view(torch.float32), SPECIAL])
    out = torch.empty(len(x), dtype=torch.bfloat16)
    launch(cast_kernel, len(x), x, out)
    assert same_bits(out, x.bfloat16())


@pytest.mark.parametrize("elementwise", ["add", "sub", "mul", "div", "neg", "abs", "less", "max", "exp"])
def test_elementwise(elementwise):
    torch.manual_seed(0)
    a = torch.cat([torch.randn(2000) * 3, SPECIAL.repeat_interleave(len(SPECIAL))]).bfloat16()
    b = torch.cat([torch.randn(2000), SPECIAL.repeat(len(SPECIAL))]).bfloat16()
    out = torch.empty_like(a)
    launch(elementwise_kernel, len(a), a, b, out, OPERATION=elementwise)
    expected = {
        "add": lambda: a + b,
        "sub": lambda: a - b,
        "mul": lambda: a * b,
        "div": lambda: a / b,
        "neg": lambda: -a,
        "abs": lambda: a.abs(),
        "less": lambda: torch.where(a < b, a, b),
        "max": lambda: torch.fmax(a, b),
        "exp": lambda: a.exp(),
    }[elementwise]()
    if elementwise in ("neg", "max", "exp"):  # signs of zero in 0 - x and max(0, -0), and the last bit of two libraries' exp
        assert torch.equal(out.isnan(), expected.isnan())
        torch.testing.assert_close(out, expected, rtol=2**-7 if elementwise == "exp" else 0, atol=0, equal_nan=True)
    else:
        assert same_bits(out, expected)


def test_reductions_and_products_accumulate_in_float32():
    torch.manual_seed(0)
    x, out = torch.randn(1024).bfloat16(), torch.empty(3, dtype=torch.float32)
    sum_kernel[(1,)](x, out, BLOCK=1024)
    assert (out[0].double() - x.double().sum()).abs() <= 1024 * 2**-24 * x.double().abs().sum()
    assert out[1] == out[0].bfloat16() and out[2] == x.max()
    a, b, product = torch.randn(16, 16).bfloat16(), torch.randn(16, 16).bfloat16(), torch.empty(16, 16)
    dot_kernel[(1,)](a, b, product, SIZE=16)
    truth = a.double() @ b.double().T
    assert ((product.double() - truth).abs() <= 16 * 2**-24 * (a.double().abs() @ b.double().abs().T)).all()
