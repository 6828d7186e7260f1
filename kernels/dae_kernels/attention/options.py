"""Options of attention for all back-ends: positional mask, scale, soft cap, dropout."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from dae_kernels.checks import as_flag, as_integer, as_number, check_dense, described


@dataclass(frozen=True)
class AttentionOptions:
    """Positional mask and transformations of the scores.

    Args:
        causal: mask keys after the query's position, where the last query is at the last key.
        scale: factor of the scores.
        window: keys attended to before and after the query's position, or None for all; -1 for all of a side.
        softcap: scores become softcap * tanh(score / softcap); 0 for none.
        dropout: probability that a weight is zeroed; the others are scaled by 1 / (1 - dropout).
    """

    causal: bool
    scale: float
    window: tuple[int, int] | None = None
    softcap: float = 0.0
    dropout: float = 0.0

    @property
    def before(self) -> int | None:
        """Number of keys attended to before the query's position, None for all."""
        return None if self.window is None or self.window[0] < 0 else self.window[0]

    @property
    def after(self) -> int | None:
        """Number of keys attended to after the query's position, None for all."""
        after = None if self.window is None or self.window[1] < 0 else self.window[1]
        return 0 if self.causal else after

    @property
    def by_position(self) -> bool:
        """Whether there is a positional mask."""
        return self.before is not None or self.after is not None

    @property
    def kind(self) -> str | None:
        """The name of the positional mask, for messages; None without one."""
        return None if not self.by_position else "causal" if self.causal else "windowed"

    def sees(self, distance: Tensor) -> Tensor:
        """Bool: whether a key at `distance` (its position minus the query's) is attended to; needs `by_position`."""
        if self.before is None:
            return distance <= self.after  # type: ignore[operator]  # a number, by position
        seen = distance >= -self.before
        return seen if self.after is None else seen & (distance <= self.after)


def as_options(
    operation: str, D: int, causal: bool, scale: float | None, window: tuple[int, int] | None, softcap: float, dropout: float
) -> AttentionOptions:
    """The checked options for heads of D dimensions. TypeError or ValueError for invalid values."""
    causal, softcap, dropout = (
        as_flag(operation, "causal", causal),
        as_number(operation, "softcap", softcap),
        as_number(operation, "dropout", dropout),
    )
    scale = 1.0 / math.sqrt(D) if scale is None else as_number(operation, "scale", scale)
    if window is not None:
        if not isinstance(window, (tuple, list)) or len(window) != 2:
            raise TypeError(
                f"{operation} needs window to be two integers (keys before, keys after) or None, got {described(window)}"
            )
        window = (as_integer(operation, "window[0]", window[0]), as_integer(operation, "window[1]", window[1]))
        if min(window) < -1:
            raise ValueError(f"{operation} needs each side of window to be at least 0, or -1 for all keys, got {window!r}")
    if not 0 <= softcap < math.inf:
        raise ValueError(f"{operation} needs a finite softcap of at least 0 (0: none), got {softcap!r}")
    if not 0 <= dropout < 1:
        raise ValueError(f"{operation} needs a dropout in [0, 1), got {dropout!r}")
    return AttentionOptions(causal, scale, window, softcap, dropout)


def check_bias(bias: Tensor, q: Tensor, k: Tensor) -> None:
    """TypeError or ValueError unless `bias` can be added to the scores [B, H, Lq, Lk]."""
    shape = (*q.shape[:3], k.shape[2])
    if not isinstance(bias, Tensor) or not bias.is_floating_point():
        got = bias.dtype if isinstance(bias, Tensor) else type(bias).__name__
        raise TypeError(f"bias must be a floating point tensor that is added to the scores, got {got}; hide keys by -inf")
    check_dense("attention", "bias", bias)
    fits = bias.dim() <= 4 and all(b in (1, s) for b, s in zip(bias.shape[::-1], shape[::-1], strict=False))
    if not fits:
        raise ValueError(f"bias must broadcast to the scores [B, H, Lq, Lk] = {list(shape)}, got {list(bias.shape)}")
    if bias.dtype != q.dtype or bias.device != q.device:
        raise ValueError(f"bias must have the dtype and device of q, {q.dtype} on {q.device}, got {bias.dtype} on {bias.device}")


def refuse(impl: str, remedy: str, **given: object) -> None:
    """ValueError if an option is given that `impl` does not support."""
    for name, value in given.items():
        if value is not None and value is not False and not (isinstance(value, (int, float)) and value == 0):
            raise ValueError(f"impl={impl!r} has no {name.replace('_', ' ')}; use impl={remedy!r}")


def refuse_other_values(impl: str, k: Tensor, v: Tensor) -> None:
    """ValueError unless values have the head dimension of keys."""
    if k.shape[-1] != v.shape[-1]:
        raise ValueError(f"impl={impl!r} needs v with the head dimension of k, {k.shape[-1]}, got {v.shape[-1]}; use impl='sdpa'")
