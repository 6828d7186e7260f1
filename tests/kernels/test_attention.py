"""`attention`: values and gradients of every back-end against the definition in float64, and one causal convention for all.

Tolerances: an implementation may err as much as twice what torch's own arithmetic in that dtype does on the same operands.
The packages that need a GPU are replaced by stand-ins that check how they are called and compute what they document.
"""

from __future__ import annotations

import math
import sys
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from dae_kernels import attention
from dae_kernels.attention import backends
from dae_kernels.attention.reference import causal_mask
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
#          B, H, Hkv, Lq, Lk, D
SHAPES = [
    (2, 4, 4, 9, 9, 16),
    (1, 6, 2, 5, 12, 8),
    (2, 2, 1, 1, 7, 63),
    (1, 3, 3, 63, 60, 1),
    (1, 1, 1, 1, 1, 1),
    (2, 4, 2, 60, 63, 20),
]


def operands(shape, dtype=torch.float32, seed=0) -> list[Tensor]:
    B, H, Hkv, Lq, Lk, D = shape
    generator = torch.Generator().manual_seed(seed)
    sizes = ((B, H, Lq, D), (B, Hkv, Lk, D), (B, Hkv, Lk, D))
    return [torch.randn(size, generator=generator).to(DEVICE, dtype).requires_grad_() for size in sizes]


def with_gradients(out: Tensor, inputs: list[Tensor], cotangent: Tensor) -> list[Tensor]:
    return [out.detach(), *torch.autograd.grad(out, inputs, cotangent.to(out.dtype))]


def torch_own(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """Two ways torch has in that dtype: its matmul and softmax, and its kernel with every head and the whole mask given."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    mask = causal_mask(q.shape[2], k.shape[2], q.device) if causal else None
    scores = scale * (q @ k.transpose(-2, -1))
    if causal:
        scores = scores.masked_fill(~mask, -torch.inf)
    return scores.softmax(-1) @ v, F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)


def check(shape, causal, dtype, impl, scale=None) -> None:
    inputs = operands(shape, dtype)
    exact_inputs = [t.detach().double().requires_grad_() for t in inputs]
    cotangent = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype)
    got = with_gradients(attention(*inputs, causal=causal, scale=scale, impl=impl), inputs, cotangent)
    exact = with_gradients(attention(*exact_inputs, causal=causal, scale=scale, impl="reference"), exact_inputs, cotangent)
    rule = (causal, scale if scale is not None else 1 / math.sqrt(shape[-1]))
    for out in torch_own(*exact_inputs, *rule):  # or else a mistake in the definition would widen its own tolerance
        for mine, truth in zip(with_gradients(out, exact_inputs, cotangent), exact, strict=True):
            torch.testing.assert_close(mine, truth, rtol=1e-9, atol=1e-9)
    formula, kernel = (with_gradients(out, inputs, cotangent) for out in torch_own(*inputs, *rule))
    for mine, truth, one, other in zip(got, exact, formula, kernel, strict=True):
        assert mine.dtype == dtype and mine.shape == truth.shape
        one_rounding = torch.finfo(dtype).eps * truth.abs().max()
        allowed = 2 * max((one - truth).abs().max(), (other - truth).abs().max(), one_rounding)
        assert (mine - truth).abs().max() <= allowed


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("impl", ["reference", "sdpa", "auto"])
def test_values_and_gradients(impl, dtype, causal):
    for shape in SHAPES:
        if not causal or shape[3] <= shape[4]:
            check(shape, causal, dtype, impl)
    check(SHAPES[1], causal, dtype, impl, scale=0.3)


def test_the_reference_rounds_once():
    q, k, v = (t.detach() for t in operands(SHAPES[1], torch.bfloat16))
    in_float32 = attention(q.float(), k.float(), v.float(), causal=True, impl="reference")
    assert torch.equal(attention(q, k, v, causal=True, impl="reference"), in_float32.bfloat16())


@pytest.mark.parametrize("impl", ["reference", "sdpa"])
@pytest.mark.parametrize("Lq", [1, 3, 8])
def test_a_query_sees_the_keys_up_to_its_own(impl, Lq):
    """The causal mask against its meaning: attention without a mask over the keys that query i may see."""
    q, k, v = operands((2, 4, 2, Lq, 8, 5))
    out = attention(q, k, v, causal=True, impl=impl)
    for i in range(Lq):
        seen = i + 8 - Lq + 1
        alone = attention(q[:, :, i : i + 1], k[:, :, :seen], v[:, :, :seen], impl=impl)
        torch.testing.assert_close(out[:, :, i : i + 1], alone)


@pytest.mark.parametrize("impl", ["reference", "sdpa"])
def test_a_cache_continues_the_sequence(impl):
    q, k, v = operands((1, 2, 2, 10, 10, 4))
    whole = attention(q, k, v, causal=True, impl=impl)
    first = attention(q[:, :, :4], k[:, :, :4], v[:, :, :4], causal=True, impl=impl)
    middle = attention(q[:, :, 4:9], k[:, :, :9], v[:, :, :9], causal=True, impl=impl)
    last = attention(q[:, :, 9:], k, v, causal=True, impl=impl)
    torch.testing.assert_close(torch.cat([first, middle, last], dim=2), whole)


@pytest.mark.parametrize("impl", ["reference", "sdpa"])
def test_closed_forms(impl):
    q, k, v = operands((2, 4, 2, 3, 6, 5))
    v_BHLD = v.repeat_interleave(2, dim=1)
    # Equal scores average the values that are seen; one key gives its value; groups are neighbouring heads.
    mean = attention(torch.zeros_like(q), k, v, impl=impl)
    torch.testing.assert_close(mean, v_BHLD.mean(2, keepdim=True).expand_as(mean))
    causal_mean = attention(torch.zeros_like(q), k, v, causal=True, impl=impl)
    torch.testing.assert_close(causal_mean[:, :, 1], v_BHLD[:, :, :5].mean(2))
    single = attention(q, k[:, :, :1], v[:, :, :1], impl=impl)
    torch.testing.assert_close(single, v_BHLD[:, :, :1].expand_as(single))


@pytest.mark.parametrize("impl", ["reference", "sdpa"])
def test_strides_and_empty_operands(impl):
    q_BLHD, k_BLHD = torch.randn(2, 5, 4, 8, device=DEVICE), torch.randn(2, 7, 1, 8, device=DEVICE)
    views = (q_BLHD.transpose(1, 2), k_BLHD.expand(2, 7, 4, 8).transpose(1, 2), torch.randn(2, 4, 8, 7, device=DEVICE).mT)
    dense = attention(*(t.contiguous() for t in views), causal=True, impl=impl)
    torch.testing.assert_close(attention(*views, causal=True, impl=impl), dense)
    assert attention(*operands((0, 2, 2, 3, 3, 4)), causal=True, impl=impl).shape == (0, 2, 3, 4)
    assert attention(*operands((1, 2, 2, 0, 3, 4)), impl=impl).shape == (1, 2, 0, 4)


@pytest.mark.parametrize("impl", ["reference", "sdpa"])
def test_autocast_gives_one_dtype(impl):
    q, k, v = operands((1, 2, 2, 4, 4, 8))
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        out = attention(q, k.bfloat16(), v, impl=impl)  # as after a query norm in float32
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), impl=impl))


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_sdpa_compiles_into_one_graph(backend):
    torch._dynamo.reset()
    compiled = torch.compile(attention, fullgraph=True, backend=backend)
    for shape in ((1, 4, 2, 5, 12, 8), (1, 4, 4, 6, 6, 8), (1, 4, 4, 1, 6, 8))[: 3 if backend == "aot_eager" else 1]:
        inputs = operands(shape)
        cotangent = torch.randn_like(inputs[0])
        got = with_gradients(compiled(*inputs, causal=True), inputs, cotangent)
        expected = with_gradients(attention(*inputs, causal=True, impl="reference"), inputs, cotangent)
        for mine, truth in zip(got, expected, strict=True):
            torch.testing.assert_close(mine, truth)


def lower_triangle(num_queries: int, num_keys: int, shift: int) -> Tensor:
    return torch.tensor([[j <= i + shift for j in range(num_keys)] for i in range(num_queries)])


def masked_softmax(q_BLHD: Tensor, k_BLHD: Tensor, v_BLHD: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    scores = torch.einsum("bihd,bjhd->bhij", q_BLHD.double(), k_BLHD.double()) * scale
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v_BLHD.double()).to(q_BLHD.dtype)


def fake_flash_attn(calls: list) -> ModuleType:
    """flash_attn 2: [B, L, H, D], grouped heads as they are, causal aligned bottom-right."""

    def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False):
        assert q.dtype in (torch.float16, torch.bfloat16) and dropout_p == 0.0
        assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
        calls.append((tuple(q.shape), tuple(k.shape)))
        groups = q.shape[2] // k.shape[2]
        mask = lower_triangle(q.shape[1], k.shape[1], k.shape[1] - q.shape[1]) if causal else None
        return masked_softmax(q, k.repeat_interleave(groups, 2), v.repeat_interleave(groups, 2), mask, softmax_scale)

    module = ModuleType("flash_attn")
    module.flash_attn_func = flash_attn_func
    return module


def fake_xformers(calls: list) -> dict[str, ModuleType]:
    """xformers: [B, L, H, D] with equal head counts; one mask class aligned top-left, one bottom-right."""

    class LowerTriangularMask:
        pass

    class LowerTriangularFromBottomRightMask:
        pass

    def memory_efficient_attention(query, key, value, attn_bias=None, p=0.0, scale=None):
        assert query.shape[2] == key.shape[2] == value.shape[2] and p == 0.0
        calls.append((tuple(query.shape), tuple(key.shape)))
        Lq, Lk = query.shape[1], key.shape[1]
        shifts = {type(None): None, LowerTriangularMask: 0, LowerTriangularFromBottomRightMask: Lk - Lq}
        shift = shifts[type(attn_bias)]
        mask = None if shift is None else lower_triangle(Lq, Lk, shift)
        return masked_softmax(query, key, value, mask, scale)

    names = ("xformers", "xformers.ops", "xformers.ops.fmha", "xformers.ops.fmha.attn_bias")
    modules = {name: ModuleType(name) for name in names}
    modules["xformers.ops"].memory_efficient_attention = memory_efficient_attention
    modules["xformers.ops.fmha.attn_bias"].LowerTriangularMask = LowerTriangularMask
    modules["xformers.ops.fmha.attn_bias"].LowerTriangularFromBottomRightMask = LowerTriangularFromBottomRightMask
    return modules


@pytest.fixture(params=["flash_attn", "xformers"])
def stand_in(request, monkeypatch) -> tuple[str, list]:
    calls: list = []
    modules = {"flash_attn": fake_flash_attn(calls)} if request.param == "flash_attn" else fake_xformers(calls)
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(backends, "FUSED_DEVICES", ("cuda", "cpu"))
    return request.param, calls


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shape", [(2, 4, 4, 6, 6, 8), (1, 6, 2, 5, 12, 8), (2, 4, 1, 1, 7, 16)])
def test_adapters(stand_in, shape, causal):
    impl, calls = stand_in
    check(shape, causal, torch.float16, impl)
    check(shape, causal, torch.bfloat16, impl, scale=0.2)
    B, H, Hkv, Lq, Lk, D = shape
    assert calls == [((B, Lq, H, D), (B, Lk, Hkv if impl == "flash_attn" else H, D))] * 2


def test_adapters_refuse_dtypes(stand_in):
    impl, calls = stand_in
    refused = [torch.float64] if impl == "xformers" else [torch.float64, torch.float32]
    for dtype in refused:
        with pytest.raises(ValueError, match=f"impl='{impl}' takes .* got {dtype}"):
            attention(*operands(SHAPES[0], dtype), impl=impl)
    assert not calls


def test_flash_attn_refuses_large_heads(monkeypatch):
    monkeypatch.setattr(backends, "FUSED_DEVICES", ("cuda", "cpu"))
    with pytest.raises(ValueError, match="up to 256, got 257"):
        attention(*operands((1, 1, 1, 2, 2, 257), torch.float16), impl="flash_attn")


@pytest.mark.parametrize("impl", ["flash_attn", "xformers"])
def test_adapters_refuse_the_cpu_before_asking_for_a_package(impl):
    inputs = [t.cpu() for t in operands(SHAPES[0], torch.float16)]
    with pytest.raises(ValueError, match=f"impl='{impl}' needs CUDA tensors, got cpu"):
        attention(*inputs, impl=impl)


@pytest.mark.parametrize("impl", ["flash_attn", "xformers"])
def test_a_missing_package_names_its_install_line(impl, monkeypatch):
    monkeypatch.setattr(backends, "FUSED_DEVICES", ("cuda", "cpu"))
    monkeypatch.setitem(sys.modules, impl, None)
    with pytest.raises(ImportError, match=r'pip install "decoupled-autoencoder\[gpu\]"'):
        attention(*operands(SHAPES[0], torch.float16), impl=impl)


def test_xformers_without_its_fused_attention_is_missing(stand_in):
    impl, _ = stand_in
    if impl == "flash_attn":
        pytest.skip("xformers ships wheels without it")
    del sys.modules["xformers.ops"].memory_efficient_attention
    with pytest.raises(ImportError, match="fused attention"):
        attention(*operands(SHAPES[0], torch.float16), impl=impl)


BAD_SHAPES = {
    "three dimensions": ((2, 3, 4), (2, 3, 4), (2, 3, 4), "B, H, Lq, D"),
    "k is not v": ((1, 2, 3, 4), (1, 2, 3, 4), (1, 2, 5, 4), "k and v must have one shape"),
    "batch": ((2, 2, 3, 4), (1, 2, 3, 4), (1, 2, 3, 4), "one batch size"),
    "head dimension": ((1, 2, 3, 4), (1, 2, 3, 8), (1, 2, 3, 8), "one head dimension"),
    "no head dimension": ((1, 2, 3, 0), (1, 2, 3, 0), (1, 2, 3, 0), "at least 1"),
    "heads": ((1, 3, 3, 4), (1, 2, 3, 4), (1, 2, 3, 4), "must divide"),
    "no heads": ((1, 2, 3, 4), (1, 0, 3, 4), (1, 0, 3, 4), "must divide"),
    "no keys": ((1, 2, 3, 4), (1, 2, 0, 4), (1, 2, 0, 4), "no keys"),
}


@pytest.mark.parametrize("impl", ["reference", "sdpa", "flash_attn"])
@pytest.mark.parametrize("case", BAD_SHAPES)
def test_shapes_are_checked(case, impl):
    *shapes, message = BAD_SHAPES[case]
    with pytest.raises(ValueError, match=message) as raised:
        attention(*(torch.zeros(shape) for shape in shapes), impl=impl)
    assert f"got q {list(shapes[0])}" in str(raised.value)


def test_causal_needs_a_key_for_every_query():
    with pytest.raises(ValueError, match=r"Lq <= Lk .* got 5 > 3"):
        attention(*operands((1, 2, 2, 5, 3, 4)), causal=True)


def test_dtypes_and_devices_are_checked():
    q, k, v = (t.detach().cpu() for t in operands((1, 2, 2, 3, 3, 4)))
    with pytest.raises(ValueError, match="one dtype"):
        attention(q, k.bfloat16(), v)
    with pytest.raises(TypeError, match="int64"):
        attention(q.long(), k.long(), v.long())
    with pytest.raises(ValueError, match="one device, got cpu, meta, cpu"):
        attention(q, k.to("meta"), v)


@pytest.mark.parametrize("impl", ["reference", "sdpa"])
def test_meta_tensors_have_a_shape(impl):
    q, k, v = (t.detach().to("meta") for t in operands((1, 4, 2, 3, 6, 4)))
    assert attention(q, k, v, causal=True, impl=impl).shape == (1, 4, 3, 4)


def test_an_unknown_implementation_names_those_there_are():
    with pytest.raises(ValueError, match="'auto', 'sdpa', 'flash_attn', 'xformers', 'reference', got 'flash'"):
        attention(*operands(SHAPES[0]), impl="flash")
