"""Checks of operands, for all back-ends and for single ones."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from dae_kernels.checks import FLOAT_DTYPES, check_dense
from dae_kernels.tracing import batched, differentiated, has_autocast, values_readable

FUSED_DEVICES = ("cuda",)  # devices of flash-attn and xformers; their adapters' tests add "cpu"


def autocast(x: Tensor) -> Tensor:
    """`x` in autocast's dtype for operands of its low-precision list."""
    device = x.device.type
    if has_autocast(device) and torch.is_autocast_enabled(device) and x.is_floating_point() and x.dtype != torch.float64:
        return x.to(torch.get_autocast_dtype(device))
    return x


def check_types(operation: str, q: Tensor, k: Tensor, v: Tensor) -> None:
    """TypeError unless q, k and v are dense tensors."""
    if not all(isinstance(x, Tensor) for x in (q, k, v)):
        kinds = ", ".join(f"{name} {type(x).__name__}" for name, x in (("q", q), ("k", k), ("v", v)))
        raise TypeError(f"{operation} needs tensors q, k and v, got {kinds}")
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_dense(operation, name, x)


def check_shapes(operation: str, layout_q: str, layout_k: str, q: Tensor, k: Tensor, v: Tensor) -> None:
    """Check shapes, dtypes and devices of q, k and v, laid out as "B, H, Lq, D" and "B, Hkv, Lk, D", or as "Tq, H, D"."""
    shapes = f"got q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}"
    dims, head = layout_q.count(",") + 1, layout_q.split(", ").index("H")
    if not q.dim() == k.dim() == v.dim() == dims:
        raise ValueError(f"{operation} needs q [{layout_q}] and k, v [{layout_k}], {shapes}")
    if k.shape[:-1] != v.shape[:-1]:
        raise ValueError(f"k and v must have one shape [{layout_k}] but for the last dimension, {shapes}")
    if dims == 4 and q.shape[0] != k.shape[0]:
        raise ValueError(f"q and k must have one batch size, {shapes}")
    if q.shape[-1] != k.shape[-1] or q.shape[-1] == 0 or v.shape[-1] == 0:
        raise ValueError(f"q and k must have one head dimension, at least 1, and v one of at least 1, {shapes}")
    if k.shape[head] == 0 or q.shape[head] % k.shape[head]:
        raise ValueError(f"the heads of k and v (Hkv) must divide the heads of q (H), {shapes}")
    if dims == 4 and k.shape[2] == 0:
        raise ValueError(f"attention over no keys is undefined: Lk must be at least 1, {shapes}")
    if q.dtype not in FLOAT_DTYPES:
        raise TypeError(f"attention needs floating point tensors, got {q.dtype}")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k and v must have one dtype, got {q.dtype}, {k.dtype}, {v.dtype}; cast them to one")
    if not q.device == k.device == v.device:
        raise ValueError(f"q, k and v must be on one device, got {q.device}, {k.device}, {v.device}")


def broken_package(name: str, error: Exception) -> ImportError:
    """The ImportError of an installed package that fails to import; built for another torch it may raise anything."""
    return ImportError(f"{name} is installed but cannot be imported ({type(error).__name__}: {' '.join(str(error).split())})")


def check_integers(name: str, x: Tensor, length: int | None, device: torch.device) -> None:
    """TypeError or ValueError unless `x` is a vector of int32 or int64 on `device`, of `length` entries if given."""
    if not isinstance(x, Tensor) or x.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} must be an int32 or int64 tensor, got {x.dtype if isinstance(x, Tensor) else type(x)}")
    check_dense("attention", name, x)
    if x.dim() != 1 or (x.shape[0] != length if length is not None else x.shape[0] < 1):
        expected = f"[{length}]" if length is not None else "[N + 1]"
        raise ValueError(f"{name} must have shape {expected}, got {list(x.shape)}")
    if x.device != device:
        raise ValueError(f"{name} must be on {device}, where q is, got {x.device}")


def recorded(*tensors: Tensor) -> bool:
    """Whether one of these may be differentiated. Dynamo cannot trace the check for transforms of torch.func."""
    if torch.compiler.is_compiling():
        return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    return differentiated(*tensors)


def check_key_lengths(key_lengths: Tensor, q: Tensor, k: Tensor, kind: str | None) -> None:
    """ValueError unless lengths [B] lie in 1..Lk, and in Lq..Lk under a positional mask, `kind`; synchronises with a GPU."""
    check_integers("key_lengths", key_lengths, q.shape[0], q.device)
    if not values_readable(key_lengths) or key_lengths.shape[0] == 0:
        return
    shortest, longest = (int(value) for value in key_lengths.aminmax())
    if shortest < 1 or longest > k.shape[2]:
        raise ValueError(f"key_lengths must lie in 1..Lk = 1..{k.shape[2]}, got {shortest}..{longest}")
    if kind and shortest < q.shape[2]:
        raise ValueError(
            f"{kind} attention needs Lq <= key_lengths (the first queries would see no key), got {q.shape[2]} > {shortest}"
        )


def sequence_lengths(
    cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, total_q: int, total_k: int, kind: str | None
) -> tuple[tuple[int, int], ...] | None:
    """((queries, keys), ...) per sequence, from checked boundaries; None if they may not be read."""
    if not values_readable(cu_seqlens_q, cu_seqlens_k):
        return None
    lengths = []
    for name, borders, total in (
        ("cu_seqlens_q", cu_seqlens_q.tolist(), total_q),
        ("cu_seqlens_k", cu_seqlens_k.tolist(), total_k),
    ):
        steps = [end - start for start, end in pairwise(borders)]
        if borders[0] != 0 or borders[-1] != total or min(steps, default=0) < 0:
            raise ValueError(f"{name} must rise from 0 to the number of rows, {total}, got {borders}")
        lengths.append(steps)
    pairs = tuple(zip(*lengths, strict=True))
    for i, (num_queries, num_keys) in enumerate(pairs):
        if num_queries and not num_keys:
            raise ValueError(f"attention over no keys is undefined: sequence {i} has {num_queries} queries and no key")
        if kind and num_queries > num_keys:
            raise ValueError(
                f"{kind} attention needs Lq <= Lk (the first queries would see no key), "
                f"got {num_queries} > {num_keys} in sequence {i}"
            )
    return pairs


def check_device_and_dtype(impl: str, q: Tensor, dtypes: tuple[torch.dtype, ...], devices: tuple[str, ...] | None = None) -> None:
    """ValueError unless `impl` takes the device and the dtype of `q`."""
    devices = devices or FUSED_DEVICES
    if q.device.type not in devices:
        raise ValueError(f"impl={impl!r} needs CUDA tensors, got {q.device}; use impl='auto'")
    if q.dtype not in dtypes:
        raise ValueError(f"impl={impl!r} takes {', '.join(map(str, dtypes))}, got {q.dtype}; cast, or use impl='auto'")


def check_unbatched(impl: str, what: str, *tensors: Tensor | None) -> None:
    """ValueError if torch.vmap batches a tensor, which `impl` does not support; graphs of torch.compile are left to torch."""
    if not torch.compiler.is_compiling() and batched(*(x for x in tensors if x is not None)):
        raise ValueError(f"impl={impl!r} does not take {what} that torch.vmap batches, got such; use impl='auto'")


def check_head_dimension(impl: str, size: int, minimum: int = 1, maximum: int | None = None) -> None:
    """ValueError unless `impl` takes heads of this size."""
    if size < minimum:
        raise ValueError(f"impl={impl!r} takes head dimensions from {minimum}, got {size}; use impl='sdpa'")
    if maximum is not None and size > maximum:
        raise ValueError(f"impl={impl!r} takes head dimensions up to {maximum}, got {size}; use impl='sdpa'")
