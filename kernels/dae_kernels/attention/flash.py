"""flash-attn, in the newest generation installed and built for the device.

Read for this: flash-attn 2.8.3.post2 (sdist; `flash_attn`, and `hopper/flash_attn_interface.py`, which is generation 3 and not
on PyPI), the same file at commit 01afd16 of its repository, and flash-attn-4 4.0.0b36 (wheel; `flash_attn.cute`). They share
[B, L, H, D], grouped heads and the causal mask aligned bottom-right, and differ in this:

    generation                 devices           returns             keys of several lengths in one padded tensor
    2  flash_attn              8.0 and later     out                 flash_attn_with_kvcache(cache_seqlens=), forward only
    3  flash_attn_interface    9.x               out or (out, lse)   flash_attn_varlen_func(seqused_k=)
    4  flash_attn.cute         9.x, 10.x, 11.x   (out, lse)          flash_attn_varlen_func(seqused_k=)

All arguments but q, k and v are passed by name. Generation 2 pads head dimensions to a multiple of 8, the others require one, so
it is done here for all; generation 4 on 10.x and 11.x takes up to 128, or 256.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from dae_kernels.attention.checks import broken_package, check_device_and_dtype, check_head_dimension, check_unbatched, recorded
from dae_kernels.attention.options import AttentionOptions, refuse, refuse_other_values
from dae_kernels.attention.packing import Packing, pack_keys, padded_heads, whole_lengths


@dataclass(frozen=True)
class Generation:
    number: int
    module: ModuleType

    def head_size(self, D: int, major: int) -> int:
        """The smallest supported head dimension of at least `D`."""
        size = -(-D // 8) * 8
        return 256 if self.number == 4 and major in (10, 11) and size > 128 else size

    def rule(self, options: AttentionOptions) -> dict:
        """Keyword arguments for `options`. Defaults are left out, as the generations differ in their arguments."""
        rule: dict = {"softmax_scale": options.scale, "causal": options.causal}
        if options.window is not None:
            unbounded = None if self.number == 4 else -1
            rule["window_size"] = tuple(unbounded if side is None else side for side in (options.before, options.after))
        if options.softcap:
            rule["softcap"] = options.softcap
        if options.dropout:
            if self.number != 2:
                raise ValueError(f"flash-attn of generation {self.number} has no dropout; use impl='sdpa'")
            rule["dropout_p"] = options.dropout
        return rule


def dense(q: Tensor, k: Tensor, v: Tensor, key_lengths: Tensor | None, bias: Tensor | None, options: AttentionOptions) -> Tensor:
    refuse("flash_attn", "sdpa", bias=bias)
    refuse_other_values("flash_attn", k, v)
    check_unbatched("flash_attn", "key_lengths", key_lengths)
    generation, size = prepare(q)
    q_BLHD, k_BLHD, v_BLHD = (padded_heads(x.transpose(1, 2), size) for x in (q, k, v))
    rule = generation.rule(options)
    if key_lengths is None:
        out = generation.module.flash_attn_func(q_BLHD, k_BLHD, v_BLHD, **rule)
    elif generation.number == 2:
        out = lengths_in_2(generation.module, q_BLHD, k_BLHD, v_BLHD, key_lengths, rule)
    else:
        out = lengths_in_3_and_4(generation.module, q_BLHD, k_BLHD, v_BLHD, key_lengths, rule)
    return without_lse(out)[..., : q.shape[-1]].transpose(1, 2)


def packed(q: Tensor, k: Tensor, v: Tensor, packing: Packing, options: AttentionOptions) -> Tensor:
    refuse_other_values("flash_attn", k, v)
    check_unbatched("flash_attn", "borders", packing.cu_seqlens_q, packing.cu_seqlens_k)
    generation, size = prepare(q)
    q_THD, k_THD, v_THD = (padded_heads(x, size) for x in (q, k, v))
    out = generation.module.flash_attn_varlen_func(q_THD, k_THD, v_THD, **borders(packing), **generation.rule(options))
    return without_lse(out)[..., : q.shape[-1]]


def prepare(q: Tensor) -> tuple[Generation, int]:
    check_device_and_dtype("flash_attn", q, (torch.float16, torch.bfloat16))
    check_head_dimension("flash_attn", q.shape[-1], maximum=256)
    major = compute_capability(q.device)
    generation = newest(major)
    return generation, generation.head_size(q.shape[-1], major)


def compute_capability(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).major


def newest(major: int) -> Generation:
    """The newest installed generation for compute capability `major`.x (ROCm has generation 2)."""
    fits: tuple[int, ...] = (2,)
    if torch.version.hip is None and major in (9, 10, 11):
        fits = (4, 3, 2) if major == 9 else (4, 2)
    broken = []
    for number in fits:
        try:
            module = installed(number)
        except ImportError as error:
            broken.append(f"; {error}")
            continue
        if module is not None:
            return Generation(number, module)
    lines = {
        4: "pip install flash-attn-4",
        3: "its hopper folder, built from source",
        2: 'pip install "decoupled-autoencoder[gpu]"',
    }
    raise ImportError(
        f"impl='flash_attn' needs flash-attn of generation {' or '.join(map(str, fits))} on this device: "
        f"{'; or '.join(lines[number] for number in fits)}; or use impl='auto'{''.join(broken)}"
    )


def installed(number: int) -> ModuleType | None:
    """The package of a generation, or None if it is not installed. ImportError: it is installed and broken."""
    try:
        if number == 2:
            import flash_attn as module
        elif number == 3:
            import flash_attn_interface as module
        else:
            import flash_attn.cute as module
    except ModuleNotFoundError:
        return None
    except Exception as error:
        raise broken_package(f"flash-attn of generation {number}", error) from error
    if number == 2:
        # flash-attn-4 alone leaves a folder flash_attn without the functions of generation 2.
        return module if hasattr(module, "flash_attn_func") else None
    if number == 4 and "max_seqlen_k" not in inspect.signature(module.flash_attn_varlen_func).parameters:
        return None  # the early copy inside flash-attn 2
    return module


def lengths_in_2(module: ModuleType, q_BLHD: Tensor, k_BLHD: Tensor, v_BLHD: Tensor, key_lengths: Tensor, rule: dict) -> Tensor:
    if not recorded(q_BLHD, k_BLHD, v_BLHD) and "dropout_p" not in rule:
        lengths = key_lengths.to(torch.int32)
        return module.flash_attn_with_kvcache(q_BLHD, k_BLHD, v_BLHD, cache_seqlens=lengths, **rule)
    *tensors, packing = pack_keys(q_BLHD, k_BLHD, v_BLHD, key_lengths)
    return module.flash_attn_varlen_func(*tensors, **borders(packing), **rule).view(q_BLHD.shape)


def lengths_in_3_and_4(module: ModuleType, q_BLHD: Tensor, k_BLHD: Tensor, v_BLHD: Tensor, key_lengths: Tensor, rule: dict):
    B, Lq, Lk = *q_BLHD.shape[:2], k_BLHD.shape[1]
    if recorded(k_BLHD, v_BLHD):
        # The kernels do not write the gradients of masked keys; `where` makes them 0.
        seen = (torch.arange(Lk, device=k_BLHD.device) < key_lengths[:, None])[..., None, None]
        k_BLHD, v_BLHD = k_BLHD.where(seen, 0), v_BLHD.where(seen, 0)
    padding = Packing(whole_lengths(B, Lq, q_BLHD.device), whole_lengths(B, Lk, q_BLHD.device), None, Lq, Lk)
    tensors = (x.flatten(0, 1) for x in (q_BLHD, k_BLHD, v_BLHD))
    out = module.flash_attn_varlen_func(*tensors, **borders(padding), seqused_k=key_lengths.to(torch.int32), **rule)
    return without_lse(out).view(q_BLHD.shape)


def borders(packing: Packing) -> dict:
    names = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
    return {name: getattr(packing, name) for name in names}


def without_lse(out: Tensor | tuple[Tensor, ...]) -> Tensor:
    return out[0] if isinstance(out, tuple) else out
