"""flash-attn 2, 3 and 4 and xformers behind `attention` and `attention_varlen`.

They need a GPU, so stand-ins take their place: with the signatures of the real functions (the adapters' docstrings say of
which versions), the demands that these make on layouts and dtypes, and their documented results, computed in float64 and
rounded once. Where the real package imports it is used as well.
"""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch
from dae_kernels import attention
from dae_kernels.attention import attention_varlen, checks, flash
from torch import Tensor

HALF = (torch.float16, torch.bfloat16)


def softmax_attention(q_LHD, k_LHD, v_LHD, scale, shift=None) -> Tensor:
    """One sequence: query i sees the keys j <= i + shift, or all; grouped heads as they are; zero where nothing is seen."""
    groups = q_LHD.shape[1] // k_LHD.shape[1]
    k, v = (x.double().repeat_interleave(groups, 1) for x in (k_LHD, v_LHD))
    scores = torch.einsum("ihd,jhd->hij", q_LHD.double(), k) * scale
    if shift is not None:
        hidden = [[j > i + shift for j in range(len(k))] for i in range(len(q_LHD))]
        scores = scores.masked_fill(torch.tensor(hidden, dtype=torch.bool).view(scores.shape[1:]), -torch.inf)
    return torch.einsum("hij,jhd->ihd", scores.softmax(-1).nan_to_num(), v).to(q_LHD.dtype)


class FlashAttn:
    """What the generations share: [B, L, H, D] or packed [T, H, D], half precision, the mask aligned bottom-right."""

    def __init__(self):
        self.calls = []

    def check(self, multiple_of, q, k, v):
        assert q.dtype in HALF and q.dtype == k.dtype == v.dtype
        assert q.shape[-1] % multiple_of == 0 and q.shape[-1] <= 256
        assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
        assert q.shape[-2] % k.shape[-2] == 0 and k.shape == v.shape

    def batch(self, q, k, v, scale, causal, lengths=None):
        lengths = [k.shape[1]] * len(q) if lengths is None else lengths.tolist()
        rows = zip(q, k, v, lengths, strict=True)
        return torch.stack([softmax_attention(a, b[:n], c[:n], scale, n - len(a) if causal else None) for a, b, c, n in rows])

    def varlen(self, q, k, v, cu_q, cu_k, max_q, max_k, scale, causal, used=None):
        assert cu_q.dtype == cu_k.dtype == torch.int32 and cu_q.shape == cu_k.shape
        assert type(max_q) is int and type(max_k) is int
        assert max_q >= cu_q.diff().max() and max_k >= cu_k.diff().max()
        lengths = cu_k.diff()
        if used is not None:
            assert used.dtype == torch.int32 and used.shape == lengths.shape and (used <= lengths).all()
            lengths = used
            hidden = torch.ones(len(k), 1, 1, dtype=torch.bool)
            for start, n in zip(cu_k.tolist(), used.tolist(), strict=False):
                hidden[start : start + n] = False
            k, v = HiddenRows.apply(k, hidden), HiddenRows.apply(v, hidden)
        pieces = []
        for i, (start_q, end_q) in enumerate(zip(cu_q[:-1].tolist(), cu_q[1:].tolist(), strict=True)):
            start, n = cu_k[i].item(), lengths[i].item()
            a, b, c = q[start_q:end_q], k[start : start + n], v[start : start + n]
            pieces.append(softmax_attention(a, b, c, scale, n - len(a) if causal else None))
        return torch.cat(pieces)


class HiddenRows(torch.autograd.Function):
    """The kernels leave the gradients of unused rows as they find the memory."""

    @staticmethod
    def forward(ctx, x, hidden):
        ctx.hidden = hidden
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient.masked_fill(ctx.hidden, torch.nan), None


class FlashAttn2(FlashAttn):
    name, major = "flash_attn", 8

    def flash_attn_func(
        self, q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
        deterministic=False, return_attn_probs=False,
    ):  # fmt: skip
        self.check(1, q, k, v)
        assert dropout_p == 0.0 and q.dim() == 4
        self.calls.append(("func", tuple(q.shape), tuple(k.shape)))
        return self.batch(q, k, v, softmax_scale, causal)

    def flash_attn_varlen_func(
        self, q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False,
        window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False, return_attn_probs=False, block_table=None,
    ):  # fmt: skip
        self.check(1, q, k, v)
        assert dropout_p == 0.0 and q.dim() == 3
        self.calls.append(("varlen", tuple(q.shape), tuple(k.shape)))
        return self.varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal)

    def flash_attn_with_kvcache(
        self, q, k_cache, v_cache, k=None, v=None, rotary_cos=None, rotary_sin=None, cache_seqlens=None, cache_batch_idx=None,
        cache_leftpad=None, block_table=None, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
        rotary_interleaved=True, alibi_slopes=None, num_splits=0, return_softmax_lse=False,
    ):  # fmt: skip
        self.check(1, q, k_cache, v_cache)
        assert cache_seqlens.dtype == torch.int32 and k is None and v is None
        self.calls.append(("kvcache", tuple(q.shape), tuple(k_cache.shape)))
        return self.batch(q, k_cache, v_cache, softmax_scale, causal, cache_seqlens).detach()  # "does not support backward"


class FlashAttn3(FlashAttn):
    name, major, returns_lse = "flash_attn_interface", 9, False

    def result(self, out):
        return (out, out.new_zeros(1)) if self.returns_lse else out

    def flash_attn_func(
        self, q, k, v, softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None,
        window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False, sm_margin=0,
    ):  # fmt: skip
        self.check(8, q, k, v)
        self.calls.append(("func", tuple(q.shape), tuple(k.shape)))
        return self.result(self.batch(q, k, v, softmax_scale, causal))

    def flash_attn_varlen_func(
        self, q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None, seqused_k=None,
        softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None, window_size=(-1, -1),
        attention_chunk=0, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False, sm_margin=0,
    ):  # fmt: skip
        self.check(8, q, k, v)
        self.calls.append(("varlen", tuple(q.shape), tuple(k.shape)))
        borders = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        return self.result(self.varlen(q, k, v, *borders, softmax_scale, causal, seqused_k))


class FlashAttn3WithLse(FlashAttn3):
    returns_lse = True


class FlashAttn4(FlashAttn):
    name, major = "flash_attn.cute", 10

    def check(self, multiple_of, q, k, v):
        super().check(multiple_of, q, k, v)
        assert 8 <= q.shape[-1] <= 128 or q.shape[-1] == 256

    def flash_attn_func(
        self, q, k, v, qv=None, gather_kv_indices=None, softmax_scale=None, causal=False, window_size=(None, None),
        learnable_sink=None, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False, score_mod=None, score_mod_bwd=None,
        mask_mod=None, aux_tensors=None, aux_scalars=None, block_sparse_tensors=None, block_sparse_tensors_bwd=None,
        return_lse=False, gather_bwd_recompute_p=False, gather_bwd_token_chunk=None,
    ):  # fmt: skip
        self.check(8, q, k, v)
        self.calls.append(("func", tuple(q.shape), tuple(k.shape)))
        return self.batch(q, k, v, softmax_scale, causal), None

    def flash_attn_varlen_func(
        self, q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None, min_seqlen_k=None,
        seqused_q=None, seqused_k=None, gather_kv_indices=None, page_table=None, softmax_scale=None, causal=False,
        window_size=(None, None), learnable_sink=None, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False,
        score_mod=None, score_mod_bwd=None, mask_mod=None, block_sparse_tensors=None, aux_tensors=None, aux_scalars=None,
        return_lse=False, scheduler_metadata=None, seqlen_k_per_split=None, disable_scheduler_metadata=False,
        gather_bwd_recompute_p=False, gather_bwd_token_chunk=None,
    ):  # fmt: skip
        self.check(8, q, k, v)
        self.calls.append(("varlen", tuple(q.shape), tuple(k.shape)))
        borders = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        return self.varlen(q, k, v, *borders, softmax_scale, causal, seqused_k), None


class Xformers:
    """[B, L, H, D] with equal head counts, multiples of 8; masks are classes, block-diagonal ones made from lists."""

    major = 9

    def __init__(self):
        self.calls = []

    def modules(self) -> dict[str, ModuleType]:
        names = ("xformers", "xformers.ops", "xformers.ops.fmha", "xformers.ops.fmha.attn_bias")
        modules = {name: ModuleType(name) for name in names}
        modules["xformers.ops"].memory_efficient_attention = self.memory_efficient_attention
        biases = modules["xformers.ops.fmha"].attn_bias = modules["xformers.ops.fmha.attn_bias"]
        for bias in (LowerTriangularMask, LowerTriangularFromBottomRightMask, BlockDiagonalMask):
            setattr(biases, bias.__name__, bias)
        biases.BlockDiagonalCausalFromBottomRightMask = BlockDiagonalCausalFromBottomRightMask
        return modules

    def memory_efficient_attention(self, query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None, output_dtype=None):
        assert query.shape[2] == key.shape[2] == value.shape[2] and p == 0.0 and query.shape[3] % 8 == 0
        assert query.stride(-1) == key.stride(-1) == value.stride(-1) == 1
        self.calls.append((type(attn_bias).__name__, tuple(query.shape), tuple(key.shape)))
        scores = torch.einsum("bihd,bjhd->bhij", query.double(), key.double()) * scale
        if attn_bias is not None:
            scores = scores + attn_bias.materialize(scores.shape, dtype=torch.float64)
        return torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), value.double()).to(query.dtype)


class LowerTriangularMask:
    def materialize(self, shape, dtype, device="cpu"):
        return torch.full(shape, -torch.inf, dtype=dtype, device=device).triu(1)


class LowerTriangularFromBottomRightMask:
    def materialize(self, shape, dtype, device="cpu"):
        return torch.full(shape, -torch.inf, dtype=dtype, device=device).triu(1 + shape[-1] - shape[-2])


class BlockDiagonalMask:
    block = None

    def __init__(self, q_seqlen, kv_seqlen):
        self.lengths = list(zip(q_seqlen, kv_seqlen, strict=True))

    @classmethod
    def from_seqlens(cls, q_seqlen, kv_seqlen=None, *, device=None):
        assert all(type(n) is int for n in (*q_seqlen, *kv_seqlen)) and device is not None
        return cls(q_seqlen, kv_seqlen)

    def materialize(self, shape, dtype, device="cpu"):
        bias, i, j = torch.full(shape, -torch.inf, dtype=dtype, device=device), 0, 0
        for num_queries, num_keys in self.lengths:
            block = (num_queries, num_keys)
            bias[..., i : i + num_queries, j : j + num_keys] = self.block().materialize(block, dtype) if self.block else 0
            i, j = i + num_queries, j + num_keys
        assert (i, j) == tuple(shape[-2:])
        return bias


class BlockDiagonalCausalFromBottomRightMask(BlockDiagonalMask):
    block = LowerTriangularFromBottomRightMask


STAND_INS = [FlashAttn2, FlashAttn3, FlashAttn3WithLse, FlashAttn4, Xformers]
NAMES = ("flash_attn", "flash_attn.cute", "flash_attn_interface", "xformers", "xformers.ops", "xformers.ops.fmha.attn_bias")


def install(monkeypatch, *stand_ins) -> None:
    """The stand-ins are all that is installed, on a device that the last of them is made for."""
    monkeypatch.setattr(checks, "FUSED_DEVICES", ("cuda", "cpu"))
    for name in NAMES:
        monkeypatch.setitem(sys.modules, name, None)
    for stand_in in stand_ins:
        modules = stand_in.modules() if isinstance(stand_in, Xformers) else flash_modules(stand_in)
        for name, module in modules.items():
            monkeypatch.setitem(sys.modules, name, module)
        monkeypatch.setattr(flash, "compute_capability", lambda device, major=stand_in.major: major)


def flash_modules(stand_in: FlashAttn) -> dict[str, ModuleType]:
    module = ModuleType(stand_in.name)
    for name in ("flash_attn_func", "flash_attn_varlen_func", "flash_attn_with_kvcache"):
        if hasattr(stand_in, name):
            setattr(module, name, getattr(stand_in, name))
    if stand_in.name != "flash_attn.cute":
        return {stand_in.name: module}
    parent = sys.modules.get("flash_attn") or ModuleType("flash_attn")  # without generation 2 a folder of namespaces
    parent.cute = module
    return {"flash_attn": parent, "flash_attn.cute": module}


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
