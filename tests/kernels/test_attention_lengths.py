"""Key lengths and packed sequences, and flex_attention: against `attention` of each sequence alone, in float64.

Tolerances as in test_attention.py: at most twice the error that torch's own kernel has in that dtype on the same operands, or
that the roundings of the definition come to.
"""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from dae_kernels import attention
from dae_kernels.attention import attention_varlen, flash
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import assert_errors
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FLEX_TRAINS = DEVICE == "cuda"  # torch has no backward on CPUs
BACKENDS = ["reference", "sdpa", "auto", "flex"]
CASES = [(impl, dtype) for impl in BACKENDS[:2] for dtype in (torch.float32, torch.bfloat16, torch.float16)]
CASES += [("auto", torch.float32), ("flex", torch.float32), ("flex", torch.bfloat16)]


def draw(*shapes, dtype=torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(DEVICE, dtype) for shape in shapes]


def borders_of(lengths) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], device=DEVICE)


def alone(q_HLD, k_HLD, v_HLD, causal, scale, own=False) -> Tensor:
    """One sequence by the definition, or by torch's kernel under a whole mask with every head given."""
    if not own:
        return attention(q_HLD[None], k_HLD[None], v_HLD[None], causal=causal, scale=scale, impl="reference")[0]
    groups, Lq, Lk = len(q_HLD) // len(k_HLD), q_HLD.shape[1], k_HLD.shape[1]
    mask = torch.ones(Lq, Lk, dtype=torch.bool, device=q_HLD.device).tril(Lk - Lq) if causal else None
    k, v = k_HLD.repeat_interleave(groups, 0), v_HLD.repeat_interleave(groups, 0)
    return F.scaled_dot_product_attention(q_HLD[None], k[None], v[None], attn_mask=mask, scale=scale)[0]


def check(run, each, inputs: list[Tensor], trains: bool) -> None:
    """`run(q, k, v)` against `each(q, k, v, own)`, which takes the sequences one by one; values, and gradients if it trains."""
    dtype = inputs[0].dtype
    inputs = [x.requires_grad_(trains) for x in inputs]
    exact_inputs = [x.detach().double().requires_grad_(trains) for x in inputs]
    out = run(*inputs)
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype)

    def results(out, inputs):
        gradients = torch.autograd.grad(out, inputs, cotangent.to(out.dtype)) if trains else ()
        return [out, *gradients]

    def definition():
        return results(each(*exact_inputs, False), exact_inputs)

    got, own, exact = results(out, inputs), results(each(*inputs, True), inputs), definition()
    for mine, truth in zip(got, exact, strict=True):
        assert mine.dtype == dtype and mine.shape == truth.shape
    assert_errors(got, exact, own, results=definition)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("impl, dtype", CASES)
@pytest.mark.parametrize("H, Hkv, Lq, Lk, D", [(4, 4, 9, 9, 16), (6, 2, 5, 12, 24), (2, 1, 1, 63, 63), (3, 3, 17, 60, 20)])
def test_key_lengths(impl, dtype, causal, H, Hkv, Lq, Lk, D):
    lengths = [Lk, max(Lq, Lk // 2), max(Lq, 1)]

    def run(q, k, v):
        return attention(q, k, v, causal=causal, scale=0.3, key_lengths=torch.tensor(lengths, device=DEVICE), impl=impl)

    def each(q, k, v, own):
        return torch.stack([alone(q[b], k[b, :, :n], v[b, :, :n], causal, 0.3, own) for b, n in enumerate(lengths)])

    inputs = draw((3, H, Lq, D), (3, Hkv, Lk, D), (3, Hkv, Lk, D), dtype=dtype)
    check(run, each, inputs, trains=impl != "flex" or FLEX_TRAINS)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("impl, dtype", CASES)
@pytest.mark.parametrize(
    "H, Hkv, D, lengths_q, lengths_k",
    [
        (4, 4, 16, [5, 9, 1], [5, 9, 1]),
        (6, 2, 24, [3, 0, 3, 1, 3, 7], [4, 6, 4, 1, 9, 7]),  # equal lengths apart, a sequence without queries
        (2, 1, 63, [1, 0, 4], [63, 0, 60]),
        (2, 2, 20, [33], [60]),
    ],
)
def test_packed_sequences(impl, dtype, causal, H, Hkv, D, lengths_q, lengths_k):
    borders_q, borders_k = borders_of(lengths_q), borders_of(lengths_k)

    def run(q, k, v):
        return attention_varlen(q, k, v, borders_q, borders_k.to(torch.int32), causal=causal, scale=0.3, impl=impl)

    def each(q, k, v, own):
        pieces = zip(*(x.split(n) for x, n in ((q, lengths_q), (k, lengths_k), (v, lengths_k))), strict=True)
        outs = [alone(a.transpose(0, 1), b.transpose(0, 1), c.transpose(0, 1), causal, 0.3, own) for a, b, c in pieces if len(a)]
        return torch.cat(outs, dim=1).transpose(0, 1)

    total_q, total_k = sum(lengths_q), sum(lengths_k)
    inputs = draw((total_q, H, D), (total_k, Hkv, D), (total_k, Hkv, D), dtype=dtype)
    check(run, each, inputs, trains=impl != "flex" or FLEX_TRAINS)


@pytest.mark.parametrize("impl", BACKENDS)
def test_what_is_hidden_does_not_count(impl):
    q, k, v = draw((2, 2, 3, 16), (2, 2, 8, 16), (2, 2, 8, 16))
    lengths = torch.tensor([3, 6], device=DEVICE)
    for causal in (False, True):
        out = attention(q, k, v, causal=causal, key_lengths=lengths, impl=impl)
        other_k, other_v = k.clone(), v.clone()
        for b, n in enumerate([3, 6]):
            other_k[b, :, n:], other_v[b, :, n:] = 1e4, -1e4
        assert torch.equal(out, attention(q, other_k, other_v, causal=causal, key_lengths=lengths, impl=impl))
    whole = torch.tensor([8, 8], device=DEVICE)
    torch.testing.assert_close(attention(q, k, v, key_lengths=whole, impl=impl), attention(q, k, v, impl=impl))


@pytest.mark.parametrize("impl", ["reference", "sdpa"])
def test_hidden_keys_have_no_gradient(impl):
    q, k, v = (x.requires_grad_() for x in draw((2, 2, 3, 8), (2, 2, 8, 8), (2, 2, 8, 8)))
    out = attention(q, k, v, causal=True, key_lengths=torch.tensor([3, 6], device=DEVICE), impl=impl)
    for gradient in torch.autograd.grad(out.square().sum(), (k, v)):
        for b, n in enumerate([3, 6]):
            assert (gradient[b, :, n:] == 0).all() and (gradient[b, :, :n] != 0).any()


@pytest.mark.parametrize("impl", BACKENDS)
def test_a_static_cache_continues_the_sequence(impl):
    """Steps over a cache of fixed shape, whose tail is not yet written, against the whole sequence."""
    q, k, v = draw((1, 4, 10, 16), (1, 2, 10, 16), (1, 2, 10, 16))
    whole = attention(q, k, v, causal=True, impl="reference")
    cache_k, cache_v, start = torch.zeros_like(k), torch.zeros_like(v), 0
    for size in (4, 1, 3, 1, 1):
        new = slice(start, start + size)
        cache_k[:, :, new], cache_v[:, :, new] = k[:, :, new], v[:, :, new]
        start += size
        lengths = torch.full((1,), start, device=DEVICE)
        out = attention(q[:, :, new], cache_k, cache_v, causal=True, key_lengths=lengths, impl=impl)
        torch.testing.assert_close(out, whole[:, :, new])


@pytest.mark.parametrize("impl", ["reference", "sdpa"])
def test_gradcheck(impl):
    q, k, v = (x.double().requires_grad_() for x in draw((2, 2, 2, 3), (2, 1, 4, 3), (2, 1, 4, 3)))
    lengths = torch.tensor([2, 3], device=DEVICE)
    assert torch.autograd.gradcheck(
        lambda *x: attention(*x, causal=True, key_lengths=lengths, impl=impl), (q, k, v), fast_mode=True
    )
    packed = tuple(x.detach().transpose(1, 2).flatten(0, 1).requires_grad_() for x in (q, k, v))
    borders = borders_of([1, 3]), borders_of([2, 6])
    assert torch.autograd.gradcheck(lambda *x: attention_varlen(*x, *borders, causal=True, impl=impl), packed, fast_mode=True)


@pytest.mark.parametrize("impl", ["reference", "sdpa"])
def test_vmap(impl):
    q, k, v = draw((3, 2, 4, 5, 8), (3, 2, 2, 7, 8), (3, 2, 2, 7, 8))
    lengths = torch.tensor([5, 6], device=DEVICE)
    for options in ({}, {"causal": True}, {"causal": True, "key_lengths": lengths}):
        run = lambda *x, options=options: attention(*x, impl=impl, **options)  # noqa: E731
        torch.testing.assert_close(torch.vmap(run)(q, k, v), torch.stack([run(*x) for x in zip(q, k, v, strict=True)]))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("impl", ["auto", "reference", "sdpa"])
def test_vmap_of_lengths(impl, causal):
    """Lengths that vmap batches are not read, and give what a loop gives: values and gradients."""
    lengths = torch.tensor([[5, 6], [7, 5], [6, 6]], device=DEVICE)
    inputs = draw((3, 2, 4, 5, 8), (3, 2, 2, 7, 8), (3, 2, 2, 7, 8))
    run = lambda *x: attention(*x[:3], causal=causal, key_lengths=x[3], impl=impl)  # noqa: E731
    loss = lambda *x: run(*x).square().sum()  # noqa: E731
    for dims, arguments in (((0, 0, 0, 0), inputs), ((None, None, None, 0), [x[0] for x in inputs])):
        calls = [[x if d is None else x[i] for x, d in zip([*arguments, lengths], dims, strict=True)] for i in range(3)]
        out = torch.vmap(run, dims)(*arguments, lengths)
        torch.testing.assert_close(out, torch.stack([run(*call) for call in calls]))
        gradients = torch.vmap(torch.func.grad(loss, (0, 1, 2)), dims)(*arguments, lengths)
        expected = zip(*(torch.func.grad(loss, (0, 1, 2))(*call) for call in calls), strict=True)
        torch.testing.assert_close(gradients, tuple(torch.stack(x) for x in expected))

    q, k, v = draw((3, 6, 4, 8), (3, 11, 2, 8), (3, 11, 2, 8))
    borders_q, borders_k = torch.tensor([[0, 2, 6], [0, 3, 6], [0, 5, 6]]), torch.tensor([[0, 5, 11], [0, 6, 11], [0, 5, 11]])
    borders_q, borders_k = borders_q.to(DEVICE), borders_k.to(DEVICE)
    run = lambda *x: attention_varlen(*x, causal=causal, impl=impl)  # noqa: E731
    for dims, borders in (
        ((0, 0, 0, 0, 0), (borders_q, borders_k)),
        ((0, 0, 0, 0, None), (borders_q, borders_k[0])),
        ((0, 0, 0, None, 0), (borders_q[0], borders_k)),
    ):
        calls = [[x if d is None else x[i] for x, d in zip((q, k, v, *borders), dims, strict=True)] for i in range(3)]
        out = torch.vmap(run, dims)(q, k, v, *borders)
        torch.testing.assert_close(out, torch.stack([run(*call) for call in calls]))


@pytest.mark.parametrize("impl, what", [("flex", "tensors"), ("flash_attn", "key_lengths"), ("xformers", "key_lengths")])
def test_vmap_that_is_refused(impl, what):
    q, k, v = draw((2, 2, 3, 16), (2, 2, 8, 16), (2, 2, 8, 16), dtype=torch.float16)
    lengths = torch.tensor([[3, 6], [4, 8]], device=DEVICE)
    with pytest.raises(ValueError, match=f"impl='{impl}' does not take {what} that torch.vmap batches"):
        torch.vmap(lambda n: attention(q, k, v, key_lengths=n, impl=impl))(lengths)
    borders = torch.tensor([[0, 3, 6], [0, 2, 6]], device=DEVICE)
    q, k, v = draw((6, 2, 16), (6, 2, 16), (6, 2, 16), dtype=torch.float16)
    with pytest.raises(ValueError, match=f"impl='{impl}' does not take .* that torch.vmap batches"):
        torch.vmap(lambda b: attention_varlen(q, k, v, borders[0], b, impl=impl))(borders)
    if impl == "flex":
        with pytest.raises(ValueError, match=r"impl='flex' does not take tensors that torch\.vmap batches"):
            torch.vmap(lambda x: attention(x, x, x, impl=impl))(torch.zeros(2, 1, 2, 3, 16, device=DEVICE))


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(0, 6), st.integers(0, 5)), min_size=0, max_size=7),
    heads=st.sampled_from([(1, 1), (4, 2)]),
    causal=st.booleans(),
    impl=st.sampled_from(["reference", "sdpa"]),
)
def test_packing_is_a_batch_without_its_padding(lengths, heads, causal, impl):
    """attention_varlen of packed sequences is attention with key_lengths of the padded ones."""
    pairs = [(num_queries, num_queries + extra) for num_queries, extra in lengths]
    total_q, total_k = (sum(pair[side] for pair in pairs) for side in (0, 1))
    q, k, v = draw((total_q, heads[0], 4), (total_k, heads[1], 4), (total_k, heads[1], 4))
    borders = [borders_of(pair[side] for pair in pairs) for side in (0, 1)]
    out = attention_varlen(q, k, v, *borders, causal=causal, impl=impl)
    assert out.shape == q.shape
    start_q = start_k = 0
    for num_queries, num_keys in pairs:
        if num_queries:
            q_1HLD = q[None, start_q : start_q + num_queries].transpose(1, 2)
            k_1HLD, v_1HLD = (F.pad(x[start_k : start_k + num_keys], (0, 0, 0, 0, 0, 3))[None].transpose(1, 2) for x in (k, v))
            length = torch.tensor([num_keys], device=DEVICE)
            padded = attention(q_1HLD, k_1HLD, v_1HLD, causal=causal, key_lengths=length, impl=impl)
            torch.testing.assert_close(out[start_q : start_q + num_queries], padded[0].transpose(0, 1))
        start_q, start_k = start_q + num_queries, start_k + num_keys


def test_meta_tensors_have_a_shape():
    q, k, v = (x.to("meta") for x in draw((6, 4, 8), (9, 2, 8), (9, 2, 8)))
    borders = torch.zeros(3, dtype=torch.int32, device="meta")
    for impl in ("reference", "sdpa"):
        assert attention_varlen(q, k, v, borders, borders, causal=True, impl=impl).shape == (6, 4, 8)


@pytest.mark.slow
@pytest.mark.parametrize("impl", BACKENDS if FLEX_TRAINS else BACKENDS[:2])
def test_one_graph_for_all_lengths(impl):
    """No break, no look at the lengths, and no compilation for others of the same number."""
    torch._dynamo.reset()
    q, k, v = draw((2, 4, 3, 16), (2, 2, 8, 16), (2, 2, 8, 16))
    dense = torch.compile(attention, fullgraph=True, backend="aot_eager")
    packed = torch.compile(attention_varlen, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for lengths in ([3, 8], [5, 4]):
            options = {"causal": True, "key_lengths": torch.tensor(lengths, device=DEVICE)}
            torch.testing.assert_close(dense(q, k, v, impl=impl, **options), attention(q, k, v, impl="reference", **options))
    rows = [x.transpose(1, 2).flatten(0, 1) for x in (q, k, v)]
    with torch._dynamo.config.patch(error_on_recompile=True):
        for lengths_q, lengths_k in (([4, 2], [8, 8]), ([1, 5], [1, 15])):
            borders = borders_of(lengths_q), borders_of(lengths_k)
            expected = attention_varlen(*rows, *borders, causal=True, impl="reference")
            torch.testing.assert_close(packed(*rows, *borders, causal=True, impl=impl), expected)


def test_flex_on_the_cpu_breaks_a_graph():
    torch._dynamo.reset()
    q, k, v = (x.cpu() for x in draw((2, 4, 5, 16), (2, 2, 8, 16), (2, 2, 8, 16)))
    options = {"causal": True, "key_lengths": torch.tensor([5, 7])}
    expected = attention(q, k, v, impl="reference", **options)
    torch.testing.assert_close(torch.compile(attention, backend="eager")(q, k, v, impl="flex", **options), expected)
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(attention, backend="eager", fullgraph=True)(q, k, v, impl="flex", **options)
    without_mask = torch.compile(attention, backend="eager", fullgraph=True)(q, k, v, impl="flex")
    torch.testing.assert_close(without_mask, attention(q, k, v, impl="reference"))


def test_flex_refuses_what_torch_lacks():
    q, k, v = (x.cpu().requires_grad_() for x in draw((1, 2, 3, 8), (1, 2, 3, 8), (1, 2, 3, 8)))
    with pytest.raises(ValueError, match="impl='flex' has no backward pass on CPUs"):
        attention(q, k, v, impl="flex")
    with torch.no_grad():
        torch.testing.assert_close(attention(q, k, v, impl="flex"), attention(q, k, v, impl="reference"))
    q, k, v = (x.detach() for x in (q, k, v))
    with pytest.raises(ValueError, match="impl='flex' has no backward pass on CPUs"):  # or grad would give zeros
        torch.func.grad(lambda x: attention(x, k, v, impl="flex").sum())(q)
    with pytest.raises(ValueError, match=r"impl='flex' does not take tensors that torch\.vmap batches"):
        torch.func.grad(lambda x: torch.vmap(lambda y: attention(y, k, v, impl="flex"))(x).sum())(q[None])
    with pytest.raises(ValueError, match=r"impl='flex' takes .* got torch.float64"):
        attention(q.double(), k.double(), v.double(), impl="flex")


@pytest.mark.parametrize("generation", [2, 3])
@pytest.mark.parametrize("transforms", ["grad", "grad of vmap", "vmap of grad"])
def test_flash_attn_sees_gradients_of_transforms(monkeypatch, transforms, generation):
    """In grad(vmap(f)) no operand says requires_grad. Generation 2 would then run what has no backward, and give zeros; in the
    others hidden keys would have the gradients that the kernel leaves there: here 1."""

    def varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, seqused_k=None, softmax_scale=None, causal=False, **most):
        if seqused_k is None:
            return attention_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, causal=causal, scale=softmax_scale)
        q_BHLD, k_BHLD, v_BHLD = (x.unflatten(0, (len(seqused_k), -1)).transpose(1, 2) for x in (q, k, v))
        out = attention(q_BHLD, k_BHLD, v_BHLD, causal=causal, scale=softmax_scale, key_lengths=seqused_k, impl="reference")
        hidden = torch.arange(k_BHLD.shape[2], device=DEVICE) >= seqused_k[:, None]
        return out.transpose(1, 2).flatten(0, 1) + ((k_BHLD + v_BHLD) * hidden[:, None, :, None]).sum()

    module = SimpleNamespace(flash_attn_varlen_func=varlen)  # generation 2's function without a backward is missing
    monkeypatch.setattr(flash, "prepare", lambda q: (flash.Generation(generation, module), q.shape[-1]))
    lengths = torch.tensor([3, 7], device=DEVICE)
    inputs = draw((3, 2, 4, 3, 8), (3, 2, 2, 7, 8), (3, 2, 2, 7, 8))

    def gradients(impl):
        loss = lambda *x: attention(*x, causal=True, key_lengths=lengths, impl=impl).square().sum()  # noqa: E731
        if transforms == "grad":
            return torch.func.grad(loss, (0, 1, 2))(*(x[0] for x in inputs))
        if transforms == "vmap of grad":
            return torch.vmap(torch.func.grad(loss, (0, 1, 2)))(*inputs)
        return torch.func.grad(lambda *x: torch.vmap(loss)(*x).sum(), (0, 1, 2))(*inputs)

    torch.testing.assert_close(gradients("flash_attn"), gradients("reference"))


ALL = ["auto", "reference", "sdpa", "flex", "flash_attn", "xformers"]


@pytest.mark.parametrize("impl", ALL)
@pytest.mark.parametrize(
    "lengths, causal, error, message",
    [
        ([0, 4], False, ValueError, r"must lie in 1\.\.Lk = 1\.\.4, got 0\.\.4"),
        ([1, 5], False, ValueError, r"must lie in 1\.\.Lk = 1\.\.4, got 1\.\.5"),
        ([2, 4], True, ValueError, r"Lq <= key_lengths .*got 3 > 2"),
        ([4], False, ValueError, r"key_lengths must have shape \[2\], got \[1\]"),
        ([[4, 4]], False, ValueError, r"key_lengths must have shape \[2\], got \[1, 2\]"),
        ([4.0, 4.0], False, TypeError, "key_lengths must be an int32 or int64 tensor, got torch.float32"),
    ],
)
def test_key_lengths_that_are_refused(impl, lengths, causal, error, message):
    q, k, v = draw((2, 2, 3, 16), (2, 2, 4, 16), (2, 2, 4, 16), dtype=torch.float16)
    with pytest.raises(error, match=message):
        attention(q, k, v, causal=causal, key_lengths=torch.tensor(lengths, device=DEVICE), impl=impl)


def test_key_lengths_are_a_tensor_where_the_queries_are():
    q, k, v = draw((2, 2, 3, 16), (2, 2, 4, 16), (2, 2, 4, 16))
    with pytest.raises(TypeError, match="key_lengths must be an int32 or int64 tensor, got <class 'list'>"):
        attention(q, k, v, key_lengths=[4, 4])
    with pytest.raises(ValueError, match=r"key_lengths must be on .*, where q is, got meta"):
        attention(q, k, v, key_lengths=torch.zeros(2, dtype=torch.int64, device="meta"))


@pytest.mark.parametrize("impl", ALL)
@pytest.mark.parametrize(
    "borders_q, borders_k, causal, message",
    [
        ([0, 3, 5], [0, 3, 6], False, r"cu_seqlens_q must rise from 0 to the number of rows, 6, got \[0, 3, 5\]"),
        ([1, 6], [0, 6], False, "cu_seqlens_q must rise from 0"),
        ([0, 4, 3, 6], [0, 2, 4, 6], False, "cu_seqlens_q must rise from 0"),
        ([0, 6], [0, 7], False, "cu_seqlens_k must rise from 0"),
        ([0, 6], [0, 3, 6], False, r"cu_seqlens_k must have shape \[2\], got \[3\]"),
        ([], [], False, r"cu_seqlens_q must have shape \[N \+ 1\], got \[0\]"),
        ([0, 3, 6], [0, 6, 6], False, "attention over no keys is undefined: sequence 1 has 3 queries and no key"),
        ([0, 2, 6], [0, 3, 6], True, "causal attention needs Lq <= Lk .*got 4 > 3 in sequence 1"),
    ],
)
def test_borders_that_are_refused(impl, borders_q, borders_k, causal, message):
    q, k, v = draw((6, 2, 16), (6, 2, 16), (6, 2, 16), dtype=torch.float16)
    borders = (torch.tensor(b, dtype=torch.int32, device=DEVICE) for b in (borders_q, borders_k))
    with pytest.raises(ValueError, match=message):
        attention_varlen(q, k, v, *borders, causal=causal, impl=impl)


@pytest.mark.parametrize("impl", ALL)
def test_packed_operands_that_are_refused(impl):
    q, k, v = draw((6, 2, 16), (6, 2, 16), (6, 2, 16))
    borders = borders_of([6]), borders_of([6])
    with pytest.raises(ValueError, match=r"attention_varlen needs q \[Tq, H, D\] and k, v \[Tk, Hkv, D\], got q \[1, 6, 2, 16\]"):
        attention_varlen(q[None], k[None], v[None], *borders, impl=impl)
    with pytest.raises(ValueError, match="must divide the heads of q"):
        attention_varlen(q[:, :1], k, v, *borders, impl=impl)
    with pytest.raises(ValueError, match="one head dimension"):
        attention_varlen(q[..., :8], k, v, *borders, impl=impl)
    with pytest.raises(ValueError, match="one dtype"):
        attention_varlen(q, k.half(), v, *borders, impl=impl)
    with pytest.raises(TypeError, match="floating point"):
        attention_varlen(q.long(), k.long(), v.long(), *borders, impl=impl)
    with pytest.raises(TypeError, match=r"cu_seqlens_q must be an int32 or int64 tensor, got torch\.float32"):
        attention_varlen(q, k, v, borders[0].float(), borders[1], impl=impl)


def no_tensors_message(**kinds):
    return "needs tensors q, k and v, got " + ", ".join(f"{name} {kinds.get(name, 'Tensor')}" for name in "qkv")


@pytest.mark.parametrize("impl", ALL)
@pytest.mark.parametrize(
    "change, message",
    [
        ({"q": [[1.0]]}, no_tensors_message(q="list")),
        ({"k": None}, no_tensors_message(k="NoneType")),
        ({"v": 1.0}, no_tensors_message(v="float")),
        ({"scale": "x"}, "needs scale as a number, got str 'x'"),
        ({"scale": True}, "needs scale as a number, got bool True"),
        ({"scale": torch.ones(2)}, r"needs scale as a number, got Tensor \[2\]"),
        ({"causal": "no"}, "needs causal as a bool, got str 'no'"),
        ({"causal": None}, "needs causal as a bool, got NoneType"),
    ],
)
def test_arguments_of_another_kind(impl, change, message):
    q, k, v = draw((6, 2, 16), (6, 2, 16), (6, 2, 16), dtype=torch.float16)
    options = {"q": q, "k": k, "v": v, "impl": impl} | change
    borders = borders_of([6])
    with pytest.raises(TypeError, match=f"attention_varlen {message}"):
        attention_varlen(**options, cu_seqlens_q=borders, cu_seqlens_k=borders)
    options |= {name: x[None] for name, x in options.items() if name in ("q", "k", "v") and isinstance(x, Tensor)}
    with pytest.raises(TypeError, match=f"attention {message}"):
        attention(**options)
