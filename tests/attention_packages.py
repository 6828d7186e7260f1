"""Stand-ins for flash-attn 2, 3 and 4 and for xformers, which need a GPU.

They have the signatures of the real functions (the adapters' docstrings say of which versions), their demands on layouts and
dtypes, and their documented results, computed in float64 and rounded once.
"""

from __future__ import annotations

import sys
from types import ModuleType

import torch
from dae_kernels.attention import checks, flash
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
