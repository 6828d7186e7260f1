"""flash-attn 2, 3 and 4 and xformers behind `attention` and `attention_varlen`.

They need a GPU, so stand-ins take their place (`attention_packages`). Where the real package imports it is used as well.
"""

from __future__ import annotations

import sys

import pytest
import torch
from attention_packages import HALF, STAND_INS, FlashAttn2, FlashAttn3, FlashAttn4, Xformers, install
from dae_kernels import attention
from dae_kernels.attention import attention_varlen, checks, flash
from torch import Tensor


@pytest.fixture(params=STAND_INS, ids=lambda kind: kind.__name__)
def stand_in(request, monkeypatch):
    stand_in = request.param()
    install(monkeypatch, stand_in)
    return stand_in


def impl_of(stand_in) -> str:
    return "xformers" if isinstance(stand_in, Xformers) else "flash_attn"


def operands(q_shape, k_shape, dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in (q_shape, k_shape, k_shape)]


def agree(run, inputs: list[Tensor]) -> None:
    """`run(inputs, impl)` of the stand-in against the definition in float64.

    The stand-ins round their results once and autograd rounds each gradient, so that is what is allowed, twice.
    """
    dtype = inputs[0].dtype
    out = run(*inputs)
    exact_inputs = [x.detach().double().requires_grad_() for x in inputs]
    exact = run(*exact_inputs)
    cotangent = torch.randn(exact.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    got = [out, *torch.autograd.grad(out, inputs, cotangent)]
    truth = [exact, *torch.autograd.grad(exact, exact_inputs, cotangent.double())]
    for mine, value in zip(got, truth, strict=True):
        assert mine.dtype == dtype and mine.shape == value.shape
        assert (mine - value).abs().max() <= 2 * torch.finfo(dtype).eps * value.abs().max()


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shape", [(2, 4, 4, 6, 6, 8), (1, 6, 2, 5, 12, 8), (2, 4, 1, 1, 7, 20), (1, 2, 2, 3, 3, 130)])
def test_dense(stand_in, shape, causal, dtype):
    B, H, Hkv, Lq, Lk, D = shape
    impl = impl_of(stand_in)

    def run(q, k, v):
        return attention(q, k, v, causal=causal, scale=0.3, impl="reference" if q.dtype == torch.float64 else impl)

    agree(run, operands((B, H, Lq, D), (B, Hkv, Lk, D), dtype))
    [(_, q_shape, k_shape)] = stand_in.calls
    size = 256 if isinstance(stand_in, FlashAttn4) and D == 130 else -(-D // 8) * 8
    assert q_shape == (B, Lq, H, size)
    assert k_shape == (B, Lk, Hkv if impl == "flash_attn" else H, size)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("D", [8, 20])
def test_key_lengths(stand_in, causal, D):
    impl, lengths = impl_of(stand_in), torch.tensor([3, 7, 5])

    def run(q, k, v):
        impl_ = "reference" if q.dtype == torch.float64 else impl
        return attention(q, k, v, causal=causal, key_lengths=lengths, impl=impl_)

    inputs = operands((3, 4, 3, D), (3, 2, 7, D), torch.float16)
    agree(run, inputs)
    with torch.no_grad():  # flash-attn 2 has a function of its own for this
        torch.testing.assert_close(run(*inputs), run(*(x.double() for x in inputs)).half(), rtol=2e-3, atol=2e-3)
    names = [name for name, *_ in stand_in.calls]
    if isinstance(stand_in, FlashAttn2):
        assert names == ["varlen", "kvcache"]
    elif impl == "flash_attn":
        assert names == ["varlen", "varlen"]
    else:
        assert names == ["BlockDiagonalCausalFromBottomRightMask" if causal else "BlockDiagonalMask"] * 2


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("D", [8, 20])
def test_varlen(stand_in, causal, D, dtype):
    impl = impl_of(stand_in)
    borders = (torch.tensor([0, 3, 3, 4, 8], dtype=dtype), torch.tensor([0, 5, 6, 7, 11], dtype=dtype))

    def run(q, k, v):
        impl_ = "reference" if q.dtype == torch.float64 else impl
        return attention_varlen(q, k, v, *borders, causal=causal, scale=0.4, impl=impl_)

    agree(run, operands((8, 4, D), (11, 2, D), torch.bfloat16))
    assert len(stand_in.calls) == 1


@pytest.mark.parametrize(
    "major, present, chosen",
    [
        (8, [FlashAttn4, FlashAttn3, FlashAttn2], FlashAttn2),
        (9, [FlashAttn4, FlashAttn3, FlashAttn2], FlashAttn4),
        (9, [FlashAttn3, FlashAttn2], FlashAttn3),
        (9, [FlashAttn2], FlashAttn2),
        (10, [FlashAttn3, FlashAttn2], FlashAttn2),
        (10, [FlashAttn2, FlashAttn4], FlashAttn4),
        (12, [FlashAttn2, FlashAttn4], FlashAttn2),
    ],
)
def test_the_newest_flash_attn_that_fits(monkeypatch, major, present, chosen):
    stand_ins = [kind() for kind in sorted(present, key=lambda kind: kind is not FlashAttn2)]
    install(monkeypatch, *stand_ins)
    monkeypatch.setattr(flash, "compute_capability", lambda device: major)
    attention(*operands((1, 2, 3, 8), (1, 2, 3, 8), torch.float16), impl="flash_attn")
    assert [type(s) for s in stand_ins if s.calls] == [chosen]


def test_the_early_generation_4_inside_flash_attn_2_is_left_alone(monkeypatch):
    two, four = FlashAttn2(), FlashAttn4()
    install(monkeypatch, two, four)
    monkeypatch.setattr(sys.modules["flash_attn.cute"], "flash_attn_varlen_func", lambda q, k, v, cu_seqlens_q=None: None)
    attention(*operands((1, 2, 3, 8), (1, 2, 3, 8), torch.float16), impl="flash_attn")
    assert two.calls and not four.calls


@pytest.mark.slow
@pytest.mark.parametrize("major", [8, 9])
def test_the_choice_is_made_inside_a_graph(monkeypatch, major):
    stand_ins = (FlashAttn2(), FlashAttn4())
    for stand_in in stand_ins:
        for name in ("flash_attn_func", "flash_attn_varlen_func", "flash_attn_with_kvcache"):  # of plain tensor operations
            monkeypatch.setattr(stand_in, name, lambda q, k, v, max_seqlen_k=0, **rule: q + k.sum(), raising=False)
    install(monkeypatch, *stand_ins)
    monkeypatch.setattr(flash, "compute_capability", lambda device: major)
    q = torch.ones(2, 2, 3, 8, dtype=torch.float16)
    for lengths in (None, torch.tensor([2, 3])):
        torch._dynamo.reset()
        run = torch.compile(attention, fullgraph=True, backend="eager")
        torch.testing.assert_close(run(q, q, q, key_lengths=lengths, impl="flash_attn"), q + q.sum())


def test_dtypes_are_refused(stand_in):
    impl = impl_of(stand_in)
    for dtype in [torch.float64] if impl == "xformers" else [torch.float64, torch.float32]:
        q, k, v = operands((1, 2, 3, 8), (1, 2, 3, 8), dtype)
        with pytest.raises(ValueError, match=f"impl='{impl}' takes .* got {dtype}"):
            attention(q, k, v, impl=impl)
        borders = torch.tensor([0, 2])
        with pytest.raises(ValueError, match=f"impl='{impl}' takes .* got {dtype}"):
            attention_varlen(q[0], k[0], v[0], borders, borders, impl=impl)
    assert not stand_in.calls


def test_flash_attn_refuses_large_heads(monkeypatch):
    monkeypatch.setattr(checks, "FUSED_DEVICES", ("cuda", "cpu"))
    q, k, v = operands((1, 1, 2, 257), (1, 1, 2, 257), torch.float16)
    with pytest.raises(ValueError, match="up to 256, got 257"):
        attention(q, k, v, impl="flash_attn")
    with pytest.raises(ValueError, match="up to 256, got 257"):
        attention_varlen(q[0], k[0], v[0], torch.tensor([0, 1]), torch.tensor([0, 1]), impl="flash_attn")


@pytest.mark.parametrize("impl", ["flash_attn", "xformers"])
def test_the_cpu_is_refused_before_a_package_is_asked_for(impl):
    with pytest.raises(ValueError, match=f"impl='{impl}' needs CUDA tensors, got cpu"):
        attention(*operands((1, 2, 3, 8), (1, 2, 3, 8), torch.float16), impl=impl)


@pytest.mark.parametrize(
    "impl, major, lines",
    [
        ("xformers", 8, [r'pip install "decoupled-autoencoder\[gpu\]"']),
        ("flash_attn", 8, ["of generation 2 ", r'pip install "decoupled-autoencoder\[gpu\]"']),
        ("flash_attn", 9, ["4 or 3 or 2", "pip install flash-attn-4", "hopper", r"decoupled-autoencoder\[gpu\]"]),
        ("flash_attn", 10, ["4 or 2", "pip install flash-attn-4"]),
    ],
)
def test_a_missing_package_names_its_install_line(impl, major, lines, monkeypatch):
    install(monkeypatch)
    monkeypatch.setattr(flash, "compute_capability", lambda device: major)
    for line in lines:
        with pytest.raises(ImportError, match=line):
            attention(*operands((1, 2, 3, 8), (1, 2, 3, 8), torch.float16), impl=impl)


def test_flash_attn_4_alone_is_no_generation_2(monkeypatch):
    install(monkeypatch, FlashAttn4())
    monkeypatch.setattr(flash, "compute_capability", lambda device: 8)
    with pytest.raises(ImportError, match="of generation 2 "):
        attention(*operands((1, 2, 3, 8), (1, 2, 3, 8), torch.float16), impl="flash_attn")


def test_xformers_without_its_fused_attention_is_missing(monkeypatch):
    install(monkeypatch, Xformers())
    del sys.modules["xformers.ops"].memory_efficient_attention  # there are wheels without it
    with pytest.raises(ImportError, match="fused attention"):
        attention(*operands((1, 2, 3, 8), (1, 2, 3, 8), torch.float16), impl="xformers")


@pytest.mark.parametrize("causal", [False, True])
def test_the_real_biases_of_xformers(monkeypatch, causal):
    """Its biases work without a GPU: the biases that the adapter asks for, written out as matrices."""
    attn_bias = pytest.importorskip("xformers.ops.fmha.attn_bias")
    stand_in = Xformers()
    modules = stand_in.modules()
    modules["xformers.ops.fmha"].attn_bias = attn_bias
    install(monkeypatch, stand_in)
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    q, k, v = (x.detach() for x in operands((2, 4, 3, 8), (2, 2, 7, 8), torch.float32))
    for lengths in (None, torch.tensor([3, 6])):
        got, expected = (attention(q, k, v, causal=causal, key_lengths=lengths, impl=impl) for impl in ("xformers", "reference"))
        torch.testing.assert_close(got, expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("impl", ["flash_attn", "xformers"])
def test_the_real_packages(impl, causal):
    inputs = [x.detach().cuda().requires_grad_() for x in operands((2, 4, 60, 20), (2, 2, 63, 20), torch.float16)]
    lengths = torch.tensor([60, 63], device="cuda")
    borders = (torch.tensor([0, 60, 120], device="cuda"), torch.tensor([0, 63, 126], device="cuda"))

    def packed(*tensors, **options):
        return attention_varlen(*(x.transpose(1, 2).flatten(0, 1) for x in tensors), *borders, **options)

    runs = (attention, lambda *tensors, **options: attention(*tensors, key_lengths=lengths, **options), packed)
    for run in runs:
        try:
            out = run(*inputs, causal=causal, impl=impl)
        except ImportError as error:
            pytest.skip(str(error))
        exact = run(*(x.double() for x in inputs), causal=causal, impl="reference")
        own = run(*inputs, causal=causal, impl="sdpa")
        allowed = 2 * max((own - exact).abs().max().item(), torch.finfo(torch.float16).eps * exact.abs().max().item())
        assert (out - exact).abs().max() <= allowed
        gradients = [torch.autograd.grad(result.sum(), inputs) for result in (out, own, exact)]
        for mine, torchs, truth in zip(*gradients, strict=True):  # twice torch's own error, as for the value
            allowed = 2 * max((torchs - truth).abs().max().item(), torch.finfo(torch.float16).eps * truth.abs().max().item())
            assert (mine - truth).abs().max() <= allowed
