"""Bias, window, soft cap, dropout and values of another head dimension: each back-end that has them against the formula.

Tolerances as in test_attention.py.
"""

from __future__ import annotations

import math
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from dae_kernels import attention
from dae_kernels.attention import attention_varlen, checks, flash
from tolerances import assert_errors
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CASES = {  # B, H, Hkv, Lq, Lk, D, Dv; options
    "bias": ((2, 4, 2, 5, 7, 8, 8), {"bias": (2, 4, 5, 7)}),
    "bias of heads": ((2, 4, 2, 5, 7, 8, 8), {"bias": (4, 1, 7)}),
    "bias and causal": ((1, 2, 2, 6, 6, 4, 4), {"bias": (1, 1, 6, 6), "causal": True}),
    "bias and lengths": ((2, 2, 1, 3, 7, 4, 4), {"bias": (1, 2, 3, 7), "key_lengths": (4, 7), "causal": True}),
    "window": ((2, 4, 2, 6, 9, 8, 8), {"window": (2, 1)}),
    "window before": ((1, 2, 2, 7, 7, 4, 4), {"window": (3, -1)}),
    "window after": ((1, 2, 2, 3, 8, 4, 4), {"window": (-1, 2)}),
    "window and causal": ((2, 4, 1, 6, 9, 8, 8), {"window": (2, 5), "causal": True}),
    "window of one": ((1, 2, 2, 5, 5, 4, 4), {"window": (0, 0)}),
    "window of one query": ((2, 2, 2, 1, 9, 4, 4), {"window": (3, 0), "causal": True}),
    "window and lengths": ((2, 4, 2, 3, 9, 8, 8), {"window": (2, 1), "key_lengths": (5, 8)}),
    "values": ((2, 4, 2, 5, 7, 8, 12), {}),
    "values and causal": ((1, 3, 3, 6, 6, 5, 2), {"causal": True}),
    "softcap": ((2, 4, 2, 5, 7, 8, 8), {"softcap": 1.5}),
    "all": (
        (2, 4, 2, 5, 7, 8, 6),
        {"softcap": 2.0, "bias": (2, 4, 5, 7), "window": (3, 1), "key_lengths": (6, 7), "causal": True},
    ),
}


def operands(shape, bias=None, dtype=torch.float32) -> list[Tensor]:
    B, H, Hkv, Lq, Lk, D, Dv = shape
    generator = torch.Generator().manual_seed(0)
    sizes = [(B, H, Lq, D), (B, Hkv, Lk, D), (B, Hkv, Lk, Dv)] + ([bias] if bias else [])
    return [torch.randn(size, generator=generator).to(DEVICE, dtype).requires_grad_() for size in sizes]


def formula(q, k, v, bias=None, *, causal=False, window=(-1, -1), softcap=0.0, key_lengths=None) -> Tensor:
    """What the docstring says, a query and a key at a time."""
    B, H, Lq, D = q.shape
    Lk, groups = k.shape[2], H // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = q @ k.mT / math.sqrt(D)
    if softcap:
        scores = softcap * (scores / softcap).tanh()
    if bias is not None:
        scores = scores + bias
    hidden = torch.zeros(B, 1, Lq, Lk, dtype=torch.bool, device=q.device)
    for b in range(B):
        length = Lk if key_lengths is None else int(key_lengths[b])
        for i in range(Lq):
            own = i + length - Lq
            for j in range(Lk):
                before, after = window
                hidden[b, 0, i, j] = (
                    j >= length or (causal and j > own) or (0 <= before < own - j) or (0 <= after < j - own)
                )  # fmt: skip
    return scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("impl", ["reference", "sdpa", "flex", "auto"])
@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients(case, impl, dtype):
    shape, options = CASES[case]
    options = dict(options)
    shape_of_bias = options.pop("bias", None)
    if "key_lengths" in options:
        options["key_lengths"] = torch.tensor(options["key_lengths"], device=DEVICE)
    if impl == "sdpa" and "softcap" in options:
        with pytest.raises(ValueError, match="impl='sdpa' has no soft cap; use impl='flex'"):
            attention(*operands(shape)[:3], **options, impl=impl)
        return
    inputs = operands(shape, shape_of_bias, dtype)
    exact_inputs = [x.detach().double().requires_grad_() for x in inputs]
    cotangent = torch.randn(*shape[:2], shape[3], shape[6], generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype)

    def with_gradients(out: Tensor, leaves: list[Tensor]) -> list[Tensor]:
        return [out.detach(), *torch.autograd.grad(out, leaves, cotangent.to(out.dtype))]

    def definition():
        return with_gradients(formula(*exact_inputs, **options), exact_inputs)

    exact, own = definition(), with_gradients(formula(*inputs, **options), inputs)
    q, k, v, *bias = inputs
    bias = bias[0] if bias else None
    if impl == "flex" and DEVICE == "cpu":  # no backward pass there
        with torch.no_grad():
            got = [attention(q, k, v, bias=bias, **options, impl=impl)]
        assert_errors(got, exact[:1], own[:1], results=lambda: definition()[:1])
        return
    got = with_gradients(attention(q, k, v, bias=bias, **options, impl=impl), inputs)
    assert all(mine.dtype == dtype and mine.shape == truth.shape for mine, truth in zip(got, exact, strict=True))
    assert_errors(got, exact, own, results=definition)


@pytest.mark.parametrize("impl", ["reference", "sdpa", "auto"])
def test_dropout_zeroes_weights_and_scales_the_others(impl):
    """With the unit matrix as values the output is the weights themselves."""
    q, k, _ = (x.detach() for x in operands((4, 8, 8, 32, 32, 8, 8)))
    eye = torch.eye(32, device=DEVICE).expand(4, 8, 32, 32)
    whole = attention(q, k, eye, impl=impl)
    torch.manual_seed(0)
    dropped = attention(q, k, eye, dropout=0.25, impl=impl)
    kept = dropped != 0
    torch.testing.assert_close(dropped[kept], whole[kept] / 0.75)
    share, n = (~kept).double().mean().item(), kept.numel()
    assert abs(share - 0.25) < 6 * math.sqrt(0.25 * 0.75 / n)
    assert torch.equal(attention(q, k, eye, dropout=0.0, impl=impl), whole)
    assert not torch.equal(attention(q, k, eye, dropout=0.25, impl=impl), dropped)


@pytest.mark.parametrize("impl", ["reference", "sdpa", "flex"])
def test_sequences_behind_one_another(impl):
    borders_q, borders_k = (torch.tensor(x, device=DEVICE) for x in ((0, 3, 3, 4, 8), (0, 5, 6, 7, 13)))
    q, k, v = (torch.randn(n, h, d, device=DEVICE) for n, h, d in ((8, 4, 8), (13, 2, 8), (13, 2, 6)))
    for options in ({"window": (1, 1)}, {"window": (2, -1), "causal": True}, {"softcap": 1.0, "causal": True}, {}):
        if impl == "sdpa" and "softcap" in options:
            continue
        got = attention_varlen(q, k, v, borders_q, borders_k, **options, impl=impl)
        assert got.shape == (8, 4, 6)
        for (i, m), (j, n) in (((0, 3), (0, 5)), ((3, 4), (6, 7)), ((4, 8), (7, 13))):
            parts = (x[a:b].transpose(0, 1)[None] for x, a, b in ((q, i, m), (k, j, n), (v, j, n)))
            torch.testing.assert_close(got[i:m], formula(*parts, **options)[0].transpose(0, 1))


@pytest.mark.slow
def test_options_compile_into_one_graph():
    torch._dynamo.reset()
    inputs = operands((1, 4, 2, 5, 12, 8, 6), bias=(1, 4, 5, 12))
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    q, k, v, bias = inputs
    for options in ({"bias": bias, "causal": True}, {"window": (2, 1)}, {"window": (4, -1), "causal": True}):
        torch.testing.assert_close(compiled(q, k, v, **options), attention(q, k, v, **options, impl="reference"))
    torch.testing.assert_close(
        compiled(q, k, v, softcap=2.0, impl="reference"), attention(q, k, v, softcap=2.0, impl="reference")
    )


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"window": 3}, TypeError, "window to be two integers"),
        ({"window": (1, 2, 3)}, TypeError, "window to be two integers"),
        ({"window": (1.5, 0)}, TypeError, r"window\[0\] as an int, got float 1.5"),
        ({"window": (-2, 0)}, ValueError, "at least 0, or -1"),
        ({"softcap": -1.0}, ValueError, "finite softcap of at least 0"),
        ({"softcap": math.inf}, ValueError, "finite softcap"),
        ({"softcap": "1"}, TypeError, "softcap"),
        ({"dropout": 1.0}, ValueError, r"dropout in \[0, 1\)"),
        ({"dropout": -0.1}, ValueError, r"dropout in \[0, 1\)"),
        ({"dropout": None}, TypeError, "dropout"),
        ({"bias": torch.zeros(3, 4, dtype=torch.bool)}, TypeError, "hide keys by -inf"),
        ({"bias": 1.0}, TypeError, "bias must be a floating point tensor"),
        ({"bias": torch.zeros(4, 3)}, ValueError, r"broadcast to the scores \[B, H, Lq, Lk\] = \[1, 2, 3, 4\], got \[4, 3\]"),
        ({"bias": torch.zeros(1, 1, 1, 3, 4)}, ValueError, "broadcast"),
        ({"bias": torch.zeros(3, 4, dtype=torch.float64)}, ValueError, "dtype and device of q"),
        ({"bias": torch.zeros(3, 4, device="meta")}, ValueError, "dtype and device of q"),
    ],
)
def test_options_are_checked(options, error, message):
    q, k = torch.zeros(1, 2, 3, 8), torch.zeros(1, 2, 4, 8)
    for impl in ("auto", "reference", "flash_attn"):
        with pytest.raises(error, match=message):
            attention(q, k, k, **options, impl=impl)


def test_a_window_needs_a_key_for_every_query():
    q, k = torch.zeros(1, 2, 5, 8), torch.zeros(1, 2, 3, 8)
    with pytest.raises(ValueError, match=r"windowed attention needs Lq <= Lk .* got 5 > 3"):
        attention(q, k, k, window=(1, 1))
    with pytest.raises(ValueError, match=r"windowed attention needs Lq <= key_lengths .* got 3 > 2"):
        attention(k, k, k, window=(1, 1), key_lengths=torch.tensor([2]))
    with pytest.raises(ValueError, match=r"windowed attention needs Lq <= Lk .* in sequence 0"):
        attention_varlen(
            q[0].transpose(0, 1), *[k[0].transpose(0, 1)] * 2, torch.tensor([0, 5]), torch.tensor([0, 3]), window=(1, 1)
        )


# ---- packages that need a GPU, by stand-ins that keep their arguments ----


@pytest.fixture
def calls(monkeypatch):
    """Arguments that the packages are called with, on a device of compute capability `calls.major`.x."""
    seen = SimpleNamespace(arguments=[], major=8)

    def function(q, k, v, *_, **rule):
        seen.arguments.append(rule)
        return torch.zeros_like(q)

    two, three, four = ModuleType("flash_attn"), ModuleType("flash_attn_interface"), ModuleType("flash_attn.cute")
    for module in (two, three, four):
        module.flash_attn_func = function
        module.flash_attn_varlen_func = lambda q, k, v, max_seqlen_k=0, **rule: function(q, k, v, **rule)
    two.flash_attn_with_kvcache, two.cute = function, four
    xformers = {
        name: ModuleType(name) for name in ("xformers", "xformers.ops", "xformers.ops.fmha", "xformers.ops.fmha.attn_bias")
    }
    xformers["xformers.ops"].memory_efficient_attention = function
    biases = xformers["xformers.ops.fmha"].attn_bias = xformers["xformers.ops.fmha.attn_bias"]
    biases.LocalAttentionFromBottomRightMask = lambda window_left, window_right: ("local", window_left, window_right)
    for name, module in {"flash_attn": two, "flash_attn_interface": three, "flash_attn.cute": four, **xformers}.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(checks, "FUSED_DEVICES", ("cuda", "cpu"))
    monkeypatch.setattr(flash, "compute_capability", lambda device: seen.major)
    return seen


HALVES = (torch.zeros(2, 2, 3, 8, dtype=torch.float16), torch.zeros(2, 2, 4, 8, dtype=torch.float16))


@pytest.mark.parametrize(("major", "missing", "unbounded"), [(8, (), -1), (9, ("flash_attn.cute",), -1), (9, (), None)])
def test_flash_attn_gets_its_own_arguments(calls, monkeypatch, major, missing, unbounded):
    calls.major = major
    for name in missing:
        monkeypatch.setitem(sys.modules, name, None)
    q, k = HALVES
    attention(q, k, k, window=(2, -1), softcap=3.0, impl="flash_attn")
    attention(q, k, k, window=(-1, 2), causal=True, impl="flash_attn")
    attention(q, k, k, window=(1, 0), key_lengths=torch.tensor([3, 4]), impl="flash_attn")
    packed = (x[0].transpose(0, 1) for x in (q, k, k))
    attention_varlen(*packed, torch.tensor([0, 3]), torch.tensor([0, 4]), window=(1, 1), softcap=2.0, impl="flash_attn")
    windows = [rule.get("window_size") for rule in calls.arguments]
    assert windows == [(2, unbounded), (unbounded, 0), (1, 0), (1, 1)]
    assert [rule.get("softcap") for rule in calls.arguments] == [3.0, None, None, 2.0]
    if major == 8:
        attention(q, k, k, dropout=0.1, impl="flash_attn")
        attention(q, k, k, dropout=0.1, key_lengths=torch.tensor([3, 4]), impl="flash_attn")  # the cache's function has none
        assert [rule["dropout_p"] for rule in calls.arguments[-2:]] == [0.1, 0.1] and "cu_seqlens_q" in calls.arguments[-1]
    else:
        with pytest.raises(ValueError, match=r"generation . has no dropout; use impl='sdpa'"):
            attention(q, k, k, dropout=0.1, impl="flash_attn")


def test_xformers_gets_its_own_arguments(calls):
    q, k = HALVES
    attention(q, k, k, window=(2, -1), dropout=0.1, impl="xformers")
    attention(q, k, k, window=(2, 3), causal=True, impl="xformers")
    assert [rule["attn_bias"] for rule in calls.arguments] == [("local", 2, 4), ("local", 2, 0)]
    assert [rule["p"] for rule in calls.arguments] == [0.1, 0.0]
    attention(q, k, k, bias=torch.ones(3, 4, dtype=torch.float16), causal=True, impl="xformers")
    bias = calls.arguments[-1]["attn_bias"]
    expected = torch.ones(3, 4, dtype=torch.float16).masked_fill(torch.ones(3, 4, dtype=torch.bool).triu(2), -torch.inf)
    assert torch.equal(bias, expected.expand(2, 2, 3, 4)) and bias.stride(-2) % 8 == 0


@pytest.mark.parametrize(
    ("impl", "options", "message"),
    [
        ("flash_attn", {"bias": torch.zeros(3, 4, dtype=torch.float16)}, "has no bias"),
        ("xformers", {"softcap": 1.0}, "has no soft cap"),
        ("xformers", {"window": (1, 1), "key_lengths": torch.tensor([3, 4])}, "has no window over key lengths"),
        ("flex", {"dropout": 0.1}, "impl='flex' has no dropout; use impl='sdpa'"),
    ],
)
def test_what_a_package_has_not_is_refused(calls, impl, options, message):
    q, k = HALVES
    with pytest.raises(ValueError, match=message):
        attention(q, k, k, **options, impl=impl)
    if impl != "flex":
        with pytest.raises(ValueError, match=rf"impl='{impl}' needs v with the head dimension of k, 8, got 4"):
            attention(q, k, k[..., :4], impl=impl)
    assert not calls.arguments
