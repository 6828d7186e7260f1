"""What rounding may do to a result, so that no test depends on the processor.

A sum may be taken in any order, in vectors of any width, with or without fused multiply-adds: its last digits differ from one
processor to the next, and so does the error of the implementation that a test compares with, which is nearly 0 by luck on some
operands of some processor. So "at most twice torch's error" is a bar only above what the roundings of the formula come to:
`rounding_bound` where they are counted by hand, `rounding_error` where the formula is long.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch._decomp import decomposition_table
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
# Sums of products of their operands, and of how many terms each element is one.
SUMS = {
    aten.mm.default: lambda a, b: a.shape[1],
    aten.bmm.default: lambda a, b: a.shape[2],
    aten.mv.default: lambda a, b: a.shape[1],
    aten.dot.default: lambda a, b: a.shape[0],
    aten.sum.default: lambda x, **_: x.numel(),
    aten.sum.dim_IntList: lambda x, dims=None, *_, **__: math.prod(x.shape[d] for d in dims or range(x.dim())),
}


def mean(x: Tensor, dims: Sequence[int] | None = None, keepdim: bool = False) -> Tensor:
    total = x.sum(dims, keepdim)
    return total / (x.numel() / max(total.numel(), 1))


def variance(x: Tensor, dims: Sequence[int] | None = None, correction: float = 1, keepdim: bool = False) -> Tensor:
    squares = (x - mean(x, dims, True)).square().sum(dims, keepdim)
    return squares / (x.numel() / squares.numel() - correction)


# Of what else there is, how it is made of sums and operations by elements.
TAKEN_APART = decomposition_table | {aten.mean.default: mean, aten.mean.dim: mean, aten.var.correction: variance}
# Operations that copy or choose values, or create constants.
EXACT = {
    "_to_copy", "_unsafe_view", "abs", "alias", "amax", "amin", "arange", "cat", "clone", "constant_pad_nd", "copy_", "detach",
    "empty", "empty_like", "empty_strided", "expand", "eye", "fill", "fill_", "full", "full_like", "gather", "index",
    "index_put", "index_select", "lift_fresh", "masked_fill", "masked_fill_", "max", "min", "neg", "new_empty",
    "new_empty_strided", "new_full", "new_zeros", "ones", "ones_like", "scalar_tensor", "scatter", "select_backward", "sign",
    "slice_backward", "sort", "stack", "where", "zero_", "zeros", "zeros_like",
}  # fmt: skip


def rounding_bound(roundings: float | Tensor, magnitude: float | Tensor, dtype: torch.dtype) -> float | Tensor:
    """n u / (1 - n u) * magnitude: the most that n roundings to `dtype` change a sum whose terms' sizes sum to `magnitude`.

    u = eps / 2. In a sum of n products, in any order, each term goes through n roundings at most (Higham 2002, "Accuracy and
    Stability of Numerical Algorithms", section 3.1).
    """
    n_u = roundings * (torch.finfo(dtype).eps / 2)
    return n_u / (1 - n_u) * magnitude


class Rounding(TorchDispatchMode):
    """Adds to the result of each operation in float64 random numbers as large as its roundings to `dtype` would be.

    An operation by elements rounds its result once. A sum of n terms t rounds n partial sums, each about as large as the root of
    sum t^2 or as the whole, and roundings add like the steps of a random walk: u sqrt(n (sum t^2 + (sum t)^2)) (Higham and Mary
    2019, "A New Approach to Probabilistic Rounding Error Analysis"). Other operations are taken apart into these. This is
    Parker's Monte Carlo arithmetic (1997).
    """

    def __init__(self, dtype: torch.dtype, seed: int) -> None:
        super().__init__()
        self.unit, self.generator = torch.finfo(dtype).eps / 2, torch.Generator().manual_seed(seed)

    def noise(self, like: Tensor) -> Tensor:
        return self.unit * torch.randn(like.shape, generator=self.generator, dtype=torch.float64).to(like.device)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, function._opname
        if function in SUMS:
            out = function(*args, **kwargs)
            squares = function(*(a.square() if isinstance(a, Tensor) else a for a in args), **kwargs)
            return out + (SUMS[function](*args, **kwargs) * (squares + out.square())).sqrt() * self.noise(out)
        by_elements = torch.Tag.pointwise in function.tags
        if function in TAKEN_APART and not (by_elements or function.is_view or name in EXACT):
            with self:
                return TAKEN_APART[function](*args, **kwargs)
        out = function(*args, **kwargs)
        if function.is_view or name in EXACT or not any(map(torch.is_floating_point, tensors(out))):
            return out
        assert by_elements, f"how does {function} round?"
        noise = 1 + self.noise(out)
        return out.mul_(noise) if function._schema.is_mutable else out * noise


def tensors(out) -> list[Tensor]:
    return [x for x in (out if isinstance(out, (tuple, list)) else (out,)) if isinstance(x, Tensor)]


def rounding_error(results: Callable[[], Sequence[Tensor]], dtype: torch.dtype, runs: int = 4) -> list[float]:
    """How far roundings to `dtype` took each of `results()`, which computes in float64, at most in `runs` runs."""
    exact = [r.detach() for r in results()]
    worst = [0.0] * len(exact)
    for seed in range(runs):
        with Rounding(dtype, seed):
            rounded = results()
        worst = [max(w, largest(r.detach() - e)) for w, r, e in zip(worst, rounded, exact, strict=True)]
    return worst


def largest(difference: Tensor) -> float:
    return difference.abs().max().item() if difference.numel() else 0.0


def assert_errors(
    got: Sequence[Tensor],
    truth: Sequence[Tensor],
    *theirs: Sequence[Tensor],
    results: Callable[[], Sequence[Tensor]],
    dtype: torch.dtype | None = None,
) -> None:
    """Each of `got` is as near to `truth`, in float64, as torch's own in that dtype (the farthest of `theirs`), times two.

    Where torch is nearer than the roundings of the formula, `results()` in float64, they stand in for its error. `dtype` is that
    of the arithmetic, by default of each result.
    """
    for i, (mine, value) in enumerate(zip(got, truth, strict=True)):
        error, own = largest(mine.double() - value), max(largest(their[i].double() - value) for their in theirs)
        if not error <= 2 * own:
            floor = rounding_error(results, dtype or mine.dtype)[i]
            assert error <= 2 * floor, f"result {i} errs by {error:.3g}, torch by {own:.3g}, roundings by {floor:.3g}"
