"""`attention`: values and gradients of every back-end against the definition in float64, and one causal convention for all.

Tolerances: an implementation may err as much as twice what torch's own arithmetic in that dtype does on the same operands, and
where that happens to be little, twice what the roundings of the definition come to (tests/tolerances.py).
Lengths are tested in test_attention_lengths.py, the packages that need a GPU in test_attention_packages.py.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from dae_kernels import attention
from dae_kernels.attention.options import AttentionOptions
from dae_kernels.attention.reference import position_mask
from tolerances import assert_errors
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
    mask = position_mask(q.shape[2], k.shape[2], AttentionOptions(causal, scale), q.device)
    scores = scale * (q @ k.transpose(-2, -1))
    if causal:
        scores = scores.masked_fill(~mask, -torch.inf)
    return scores.softmax(-1) @ v, F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)


def check(shape, causal, dtype, impl, scale=None) -> None:
    inputs = operands(shape, dtype)
    exact_inputs = [t.detach().double().requires_grad_() for t in inputs]
    cotangent = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype)
    got = with_gradients(attention(*inputs, causal=causal, scale=scale, impl=impl), inputs, cotangent)
    rule = (causal, scale if scale is not None else 1 / math.sqrt(shape[-1]))

    def definition():
        out = attention(*exact_inputs, causal=causal, scale=scale, impl="reference")
        return with_gradients(out, exact_inputs, cotangent)

    exact = definition()
    for out in torch_own(*exact_inputs, *rule):  # or else a mistake in the definition would widen its own tolerance
        for mine, truth in zip(with_gradients(out, exact_inputs, cotangent), exact, strict=True):
            torch.testing.assert_close(mine, truth, rtol=1e-9, atol=1e-9)
    for mine, truth in zip(got, exact, strict=True):
        assert mine.dtype == dtype and mine.shape == truth.shape
    assert_errors(got, exact, *(with_gradients(out, inputs, cotangent) for out in torch_own(*inputs, *rule)), results=definition)


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


@pytest.mark.parametrize("impl", ["reference", "flex", "sdpa"])
def test_a_query_that_is_nan(impl):
    """Its row is NaN and no other. torch's kernel on CPUs is documented as an exception over few keys without a mask."""
    for Lk, causal in ((7, False), (7, True), (64, False), (64, True)):
        q, k, v = (x.detach() for x in operands((1, 2, 2, 5, Lk, 16)))
        q[0, 1, 2] = torch.nan
        rows = attention(q, k, v, causal=causal, impl=impl).isnan()
        expected = torch.zeros_like(rows)
        expected[0, 1, 2] = True
        if impl == "sdpa" and Lk < 16 and not causal and DEVICE == "cpu":
            assert not (rows & ~expected).any()  # torch may mend this, so that it is lost is not asked for
        else:
            assert torch.equal(rows, expected)


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
    with pytest.raises(ValueError, match="'auto', 'sdpa', 'flash_attn', 'xformers', 'flex', 'reference', got 'flash'"):
        attention(*operands(SHAPES[0]), impl="flash")
