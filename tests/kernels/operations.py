"""Every public operation of dae_kernels on small operands, with each implementation that runs on a CPU.

What must hold for all of them (checkpointing, dispatch modes, ambient state) is tested over this list; conftest.py hands it out
as the fixtures `operation` and `differentiable`. A new operation or option that takes another path through the code gets a line.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest import mock

import dae_kernels as k
import torch
from dae_kernels.sliced_wasserstein import autograd as sliced
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
Operand = Callable[[torch.Generator], Tensor]


@dataclass(frozen=True)
class Operation:
    """function(*operands) is a tensor or a tuple of tensors; `leaves` are the positions of the operands that have a gradient."""

    name: str
    public: str
    function: Callable[..., Any]
    makers: tuple[Operand, ...]
    leaves: tuple[int, ...]

    def operands(self, seed: int = 0) -> list[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return [make(generator).to(DEVICE) for make in self.makers]

    @property
    def random(self) -> bool:
        return "drawn" in self.name or "dropout" in self.name

    def __call__(self, *operands: Tensor) -> tuple[Tensor, ...]:
        result = self.function(*operands)
        return (result,) if isinstance(result, Tensor) else tuple(result)


def normal(*shape: int, dtype: torch.dtype = torch.float32, memory_format: torch.memory_format | None = None) -> Operand:
    def make(generator: torch.Generator) -> Tensor:
        x = torch.randn(shape, generator=generator, dtype=dtype, device="cpu")
        return x if memory_format is None else x.contiguous(memory_format=memory_format)

    return make


def positive(*shape: int) -> Operand:
    return lambda generator: torch.rand(shape, generator=generator, dtype=torch.float32, device="cpu") + 0.2


def integers(below: int, *shape: int) -> Operand:
    return lambda generator: torch.randint(below, shape, generator=generator, dtype=torch.int64, device="cpu")


def numbers(*values: int) -> Operand:
    return lambda generator: torch.tensor(values, dtype=torch.int64, device="cpu")


def covariance(D: int) -> Operand:
    def make(generator: torch.Generator) -> Tensor:
        points = torch.randn(3 * D, D, generator=generator, dtype=torch.float32, device="cpu")
        return points.T @ points / (3 * D)

    return make


OPERATIONS: dict[str, Operation] = {}


def case(name: str, public: str, function: Callable[..., Any], *makers: Operand, leaves: tuple[int, ...] | None = None) -> None:
    """One line of the list. Every operand has a gradient unless `leaves` says which."""
    assert name not in OPERATIONS and public in k.__all__
    OPERATIONS[name] = Operation(name, public, function, makers, tuple(range(len(makers))) if leaves is None else leaves)


def in_blocks(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` with two of the small clouds' projections in a block of the sliced distances."""

    def run(*operands: Tensor) -> Any:
        with mock.patch.object(sliced, "MAX_PROJECTED", 2 * (7 + 9)):
            return function(*operands)

    return run


X, Y, W = normal(7, 4), normal(9, 4), positive(7)
MAP, CHANNELS_LAST = normal(2, 8, 3, 5), normal(2, 8, 3, 5, memory_format=torch.channels_last)

for impl in ("reference", "triton"):
    case(
        f"energy weights {impl}",
        "energy_distance",
        lambda x, y, w, i=impl: k.energy_distance(x, y, weights_x=w, impl=i),
        *(X, Y, W),
    )
    case(
        f"mmd weights {impl}",
        "mmd",
        lambda x, y, w, i=impl: k.mmd(x, y, bandwidths=(0.5, 2.0), weights_x=w, impl=i),
        *(X, Y, W),
    )
    for p in (1, 2):  # the shortest schedule: an update takes the interpreter long
        case(
            f"sinkhorn p={p} {impl}",
            "sinkhorn_divergence",
            lambda x, y, w, p=p, i=impl: k.sinkhorn_divergence(
                x, y, p=p, blur=3.0, weights_x=w, debias=p == 2, diameter=3.0, impl=i
            ),
            *(X, Y, W),
        )
    case(
        f"transport {impl}",
        "sinkhorn_transport",
        lambda x, y, v, w, i=impl: k.sinkhorn_transport(
            x, y, v, blur=3.0, diameter=3.0, reach=5.0, max_iter=1, tolerance=None, weights_x=w, impl=i
        ),
        *(X, Y, normal(9, 2), W),
        leaves=(2,),
    )
    case(
        f"group norm {impl}",
        "group_norm_silu",
        lambda x, w, b, i=impl: k.group_norm_silu(x, 2, w, b, impl=i),
        *(CHANNELS_LAST, positive(8), normal(8)),
    )
    case(
        f"group norm adaptive {impl}",
        "group_norm_silu",
        lambda x, w, b, scale, shift, i=impl: k.group_norm_silu(x, 4, w, b, scale=scale, shift=shift, activation=None, impl=i),
        *(normal(2, 8, 6), positive(8), normal(8), normal(2, 8), normal(2, 8)),
    )
    case(
        f"perceptual {impl}",
        "lpips",
        lambda a, b, w, i=impl: k.lpips(a, b, w, impl=i),
        *(MAP, MAP, positive(8)),
    )
    case(f"nearest {impl}", "nearest_code", lambda x, c, i=impl: k.nearest_code(x, c, impl=i), X, normal(11, 4), leaves=())
    case(
        f"quantize heads {impl}",
        "vector_quantize",
        lambda x, c, i=impl: k.vector_quantize(x, c, gradient="rotation", metric="cosine", impl=i),
        *(normal(7, 2, 4), normal(2, 11, 4)),
        leaves=(0,),
    )

case("energy", "energy_distance", lambda x, y: k.energy_distance(x, y), X, Y)
case("mmd", "mmd", lambda x, y: k.mmd(x, y, bandwidths=(1.0,), unbiased=False), X, Y)
case("sinkhorn", "sinkhorn_divergence", lambda x, y: k.sinkhorn_divergence(x, y), X, Y)
case("sinkhorn p=1", "sinkhorn_divergence", lambda x, y: k.sinkhorn_divergence(x, y, p=1), X, Y)
case("sinkhorn potentials", "sinkhorn_divergence", lambda x, y: k.sinkhorn_divergence(x, y, potentials=True), X, Y)
case("sinkhorn reach", "sinkhorn_divergence", lambda x, y: k.sinkhorn_divergence(x, y, blur=1.0, reach=2.0, tolerance=0.1), X, Y)
case("barycentric", "barycentric_map", lambda x, y: k.barycentric_map(x, y, blur=1.0, tolerance=0.1), X, Y, leaves=())
case("mmd polynomial", "mmd", lambda x, y, w: k.mmd(x, y, kernel="polynomial", weights_x=w), X, Y, W)
case("quantize", "vector_quantize", lambda x, c: k.vector_quantize(x, c), X, normal(11, 4), leaves=(0,))
case("group norm bare", "group_norm_silu", lambda x: k.group_norm_silu(x, 2), CHANNELS_LAST)
case("group norm contiguous", "group_norm_silu", lambda x, w, b: k.group_norm_silu(x, 2, w, b), MAP, positive(8), normal(8))
case("perceptual layouts", "lpips", lambda a, b: k.lpips(a, b), MAP, CHANNELS_LAST)
case("nearest cosine", "nearest_code", lambda x, c: k.nearest_code(x, c, metric="cosine"), X, normal(11, 4), leaves=())

ROWS, WEIGHT, TARGETS = normal(3, 5, 8), normal(11, 8), integers(11, 3, 5)
for impl in ("reference", "chunked", "triton"):
    case(
        f"cross-entropy {impl}",
        "linear_cross_entropy",
        lambda h, w, t, i=impl: k.linear_cross_entropy(h, w, t, label_smoothing=0.1, z_loss=1e-3, ignore_index=4, impl=i),
        *(ROWS, WEIGHT, TARGETS),
        leaves=(0, 1),
    )
    case(
        f"cross-entropy rows {impl}",
        "linear_cross_entropy",
        lambda h, w, t, b, c, i=impl: k.linear_cross_entropy(h, w, t, bias=b, weight=c, softcap=3.0, reduction="none", impl=i),
        *(ROWS, WEIGHT, TARGETS, normal(11), positive(11)),
        leaves=(0, 1, 3),
    )
case(
    "cross-entropy sum",
    "linear_cross_entropy",
    lambda h, w, t: k.linear_cross_entropy(h, w, t, reduction="sum"),
    *(ROWS, WEIGHT, TARGETS),
    leaves=(0, 1),
)
if hasattr(torch.nn, "LinearCrossEntropyOptions"):  # torch 2.13 or later
    case(
        "cross-entropy torch",
        "linear_cross_entropy",
        lambda h, w, t: k.linear_cross_entropy(h, w, t, impl="torch"),
        *(ROWS, WEIGHT, TARGETS),
        leaves=(0, 1),
    )

Q, KV = normal(2, 4, 3, 8), normal(2, 2, 5, 8)
for impl in ("reference", "sdpa"):
    case(f"attention {impl}", "attention", lambda q, key, v, i=impl: k.attention(q, key, v, scale=0.3, impl=i), Q, KV, KV)
    case(
        f"attention causal {impl}", "attention", lambda q, key, v, i=impl: k.attention(q, key, v, causal=True, impl=i), Q, KV, KV
    )
    case(
        f"attention causal square {impl}",
        "attention",
        lambda q, key, v, i=impl: k.attention(q, key, v, causal=True, impl=i),
        *(normal(2, 4, 5, 8), KV, KV),
    )
    case(
        f"attention one query {impl}",
        "attention",
        lambda q, key, v, i=impl: k.attention(q, key, v, causal=True, impl=i),
        *(normal(2, 4, 1, 8), KV, KV),
    )
    case(
        f"attention bias window values {impl}",
        "attention",
        lambda q, key, v, b, i=impl: k.attention(q, key, v, bias=b, window=(1, 1), impl=i),
        *(Q, KV, normal(2, 2, 5, 6), normal(4, 3, 5)),
    )
    case(
        f"attention dropout {impl}", "attention", lambda q, key, v, i=impl: k.attention(q, key, v, dropout=0.3, impl=i), Q, KV, KV
    )
    for causal in (False, True):
        case(
            f"attention lengths causal={causal} {impl}",
            "attention",
            lambda q, key, v, n, c=causal, i=impl: k.attention(q, key, v, causal=c, key_lengths=n, impl=i),
            *(Q, KV, KV, numbers(3, 5)),
            leaves=(0, 1, 2),
        )
        case(
            f"attention varlen causal={causal} {impl}",
            "attention_varlen",
            lambda q, key, v, m, n, c=causal, i=impl: k.attention_varlen(q, key, v, m, n, causal=c, impl=i),
            *(normal(6, 4, 8), normal(9, 2, 8), normal(9, 2, 8), numbers(0, 2, 4, 6), numbers(0, 2, 5, 9)),
            leaves=(0, 1, 2),
        )

case("attention softcap", "attention", lambda q, key, v: k.attention(q, key, v, softcap=2.0), Q, KV, KV)

for p in (1, 2, 3.0):
    case(
        f"sliced p={p}",
        "sliced_wasserstein",
        lambda x, y, d, p=p: k.sliced_wasserstein(x, y, p=p, projections=d),
        *(X, Y, normal(4, 5)),
    )
case("sliced drawn", "sliced_wasserstein", lambda x, y: k.sliced_wasserstein(x, y, num_projections=6), X, Y)
case(
    "sliced generator",
    "sliced_wasserstein",
    lambda x, y: k.sliced_wasserstein(x, y, num_projections=6, generator=torch.Generator().manual_seed(3)),
    *(X, Y),
)
case(
    "sliced weights",
    "sliced_wasserstein",
    lambda x, y, w, d: k.sliced_wasserstein(x, y, weights_x=w, projections=d),
    X,
    Y,
    W,
    normal(4, 5),
)
case(
    "max sliced",
    "max_sliced_wasserstein",
    lambda x, y, w, d: k.max_sliced_wasserstein(x, y, weights_x=w, projections=d),
    *(X, Y, W, normal(4, 5)),
)
case("max sliced drawn", "max_sliced_wasserstein", lambda x, y: k.max_sliced_wasserstein(x, y), X, Y)
case(
    "sliced blocks",
    "sliced_wasserstein",
    in_blocks(lambda x, y, w, d: k.sliced_wasserstein(x, y, weights_x=w, projections=d)),
    *(X, Y, W, normal(4, 5)),
)
case(
    "max sliced blocks",
    "max_sliced_wasserstein",
    in_blocks(lambda x, y, d: k.max_sliced_wasserstein(x, y, projections=d)),
    *(X, Y, normal(4, 5)),
)
case("frechet", "frechet_distance", lambda x, y: k.frechet_distance(x, y), X, Y)
case("gaussian", "gaussian_w2", lambda m, s, n, t: k.gaussian_w2(m, s, n, t), normal(4), covariance(4), normal(4), covariance(4))
case(
    "frechet statistics",
    "GaussianStatistics",
    lambda x, y: k.frechet_distance(k.GaussianStatistics().update(x[:4]).update(x[4:]), k.GaussianStatistics().update(y)),
    *(X, Y),
    leaves=(),
)
case(
    "statistics reduced",
    "GaussianStatistics",
    lambda x: k.GaussianStatistics().update(x).all_reduce(lambda t: t).state(),
    X,
    leaves=(),
)
case("codebook statistics", "codebook_statistics", lambda x, i: k.codebook_statistics(x, i, 5), X, integers(5, 7), leaves=())
case(
    "precision recall",
    "precision_recall_density_coverage",
    lambda x, y: k.precision_recall_density_coverage(x, y, k=2),
    *(X, Y),
    leaves=(),
)
case("k nearest", "k_nearest_distances", lambda x, y: k.k_nearest_distances(x, y, 3), X, Y, leaves=())
case("k nearest self", "k_nearest_distances", lambda x: k.k_nearest_distances(x, x, 3, exclude_self=True), X, leaves=())

BLC, BC = normal(2, 3, 8), normal(2, 8)
case("modulate", "layer_norm_modulate", lambda x, s, t: k.layer_norm_modulate(x, s, t), BLC, BC, BC)
case("gated residual", "gated_residual", lambda x, h, g: k.gated_residual(x, h, g), BLC, BLC, BC)
case("rms norm", "rms_norm", lambda x, w: k.rms_norm(x, w), BLC, positive(8))
case("rms norm bare", "rms_norm", lambda x: k.rms_norm(x), BLC)
case("qk norm", "qk_norm", lambda q, key, w, u: k.qk_norm(q, key, w, u), BLC, BLC, positive(8), positive(8))
case("rotate", "rotate", lambda x, t: k.rotate(x, t), BLC, normal(2, 3, 4))
case("rotary table", "rotary_table", lambda: k.rotary_table(3, 8), leaves=())
case("rotary table 2d", "rotary_table_2d", lambda: k.rotary_table_2d(2, 3, 8), leaves=())
case("swiglu", "swiglu", lambda x: k.swiglu(x), BLC)
