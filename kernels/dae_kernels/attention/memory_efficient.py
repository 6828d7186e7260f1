"""`xformers.ops.memory_efficient_attention` (its arguments as in the wheel of xformers 0.0.35).

Grouped keys and values are repeated, because not all kernels have a backward for the grouped layout. Key lengths become a
block-diagonal bias over packed keys, because biases for padded keys have no backward. Head dimensions are padded to a multiple
of 8, as the kernels require. Block-diagonal biases are built from lengths on the host.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dae_kernels.attention.checks import broken_package, check_device_and_dtype, check_unbatched
from dae_kernels.attention.options import AttentionOptions, refuse, refuse_other_values
from dae_kernels.attention.packing import Packing, pack_keys, padded_heads
from dae_kernels.attention.reference import position_mask


def dense(q: Tensor, k: Tensor, v: Tensor, key_lengths: Tensor | None, bias: Tensor | None, options: AttentionOptions) -> Tensor:
    refuse("xformers", "flex", soft_cap=options.softcap)
    refuse_other_values("xformers", k, v)
    check_unbatched("xformers", "key_lengths", key_lengths)
    if key_lengths is not None:
        refuse("xformers", "sdpa", bias_over_key_lengths=bias, window_over_key_lengths=options.window)
    attend, biases = load(q)
    q_BLHD, k_BLHD, v_BLHD = operands(*(x.transpose(1, 2) for x in (q, k, v)))
    rule = {"scale": options.scale, "p": options.dropout}
    if key_lengths is not None:
        *tensors, packing = pack_keys(q_BLHD, k_BLHD, v_BLHD, key_lengths)
        mask = block_diagonal(biases, packing, options.causal, q.device)
        out_BLHD = attend(*(x[None] for x in tensors), attn_bias=mask, **rule).view(q_BLHD.shape)
    else:
        mask = tensor_bias(bias, q, k, options) if bias is not None else position_bias(biases, q, k, options)
        out_BLHD = attend(q_BLHD, k_BLHD, v_BLHD, attn_bias=mask, **rule)
    return out_BLHD[..., : q.shape[3]].transpose(1, 2)


def packed(q: Tensor, k: Tensor, v: Tensor, packing: Packing, options: AttentionOptions) -> Tensor:
    refuse("xformers", "flex", soft_cap=options.softcap, window_over_sequences=options.window)
    refuse_other_values("xformers", k, v)
    check_unbatched("xformers", "borders", packing.cu_seqlens_q, packing.cu_seqlens_k)
    attend, biases = load(q)
    bias = block_diagonal(biases, packing, options.causal, q.device)
    rule = {"scale": options.scale, "p": options.dropout}
    out_1THD = attend(*operands(q[None], k[None], v[None]), attn_bias=bias, **rule)
    return out_1THD[0, ..., : q.shape[2]]


def position_bias(biases, q: Tensor, k: Tensor, options: AttentionOptions):
    """xformers' class for the positional mask, or None."""
    if options.window is not None:
        everything = k.shape[2]
        before, after = (everything if side is None else side for side in (options.before, options.after))
        return biases.LocalAttentionFromBottomRightMask(window_left=before, window_right=after)
    if not options.causal:
        return None
    return biases.LowerTriangularMask() if q.shape[2] == k.shape[2] else biases.LowerTriangularFromBottomRightMask()


def tensor_bias(bias: Tensor, q: Tensor, k: Tensor, options: AttentionOptions) -> Tensor:
    """[B, H, Lq, Lk] with the mask included, with rows padded to multiples of 8 in memory, as the kernels require."""
    mask = position_mask(q.shape[2], k.shape[2], options, q.device)
    if mask is not None:
        bias = bias.masked_fill(~mask, -torch.inf)
    bias = bias.expand(*q.shape[:3], k.shape[2])
    return F.pad(bias, (0, -k.shape[2] % 8))[..., : k.shape[2]]


def load(q: Tensor):
    """`memory_efficient_attention` and the module of its biases, after checking its operands."""
    check_device_and_dtype("xformers", q, (torch.float16, torch.bfloat16, torch.float32))
    try:
        from xformers.ops import memory_efficient_attention
        from xformers.ops.fmha import attn_bias
    except ImportError as error:
        raise ImportError(
            "impl='xformers' needs xformers with its fused attention: "
            f"pip install \"decoupled-autoencoder[gpu]\", or use impl='auto' ({error})"
        ) from error
    except Exception as error:
        raise ImportError(f"impl='xformers': {broken_package('xformers', error)}; or use impl='auto'") from error
    return memory_efficient_attention, attn_bias


def operands(q_BLHD: Tensor, k_BLHD: Tensor, v_BLHD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    groups, size = q_BLHD.shape[2] // k_BLHD.shape[2], -(-q_BLHD.shape[3] // 8) * 8
    q_BLHD, k_BLHD, v_BLHD = (padded_heads(x, size) for x in (q_BLHD, k_BLHD, v_BLHD))
    return q_BLHD, k_BLHD.repeat_interleave(groups, dim=2), v_BLHD.repeat_interleave(groups, dim=2)


def block_diagonal(biases, packing: Packing, causal: bool, device: torch.device):
    if packing.lengths is None:
        raise ValueError("impl='xformers' reads the lengths on the host, which a compiled graph cannot; use impl='auto'")
    queries, keys = ([pair[side] for pair in packing.lengths] for side in (0, 1))
    kind = biases.BlockDiagonalCausalFromBottomRightMask if causal else biases.BlockDiagonalMask
    return kind.from_seqlens(queries, keys, device=device)
