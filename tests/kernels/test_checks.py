"""Options of all operations come as Python's, NumPy's or torch's numbers alike; what is none is one line."""

from __future__ import annotations

from fractions import Fraction

import dae_kernels as ops
import numpy as np
import pytest
import torch
from dae_kernels.checks import as_flag, as_integer, as_number, as_numbers

X, Y = torch.randn(9, 4, dtype=torch.float64), torch.randn(8, 4, dtype=torch.float64)
Q, IMAGE = torch.randn(1, 2, 5, 4), torch.randn(2, 4, 3)
TARGETS = torch.arange(9) % 8

NUMBERS = {
    "sliced_wasserstein.p": (2.0, lambda v: ops.sliced_wasserstein(X, Y, p=v, projections=torch.eye(4).double())),
    "max_sliced_wasserstein.p": (3.0, lambda v: ops.max_sliced_wasserstein(X, Y, p=v, projections=torch.eye(4).double())),
    "sinkhorn_divergence.p": (1.0, lambda v: ops.sinkhorn_divergence(X, Y, p=v)),
    "sinkhorn_divergence.blur": (0.5, lambda v: ops.sinkhorn_divergence(X, Y, blur=v)),
    "sinkhorn_divergence.scaling": (0.5, lambda v: ops.sinkhorn_divergence(X, Y, scaling=v)),
    "sinkhorn_divergence.diameter": (8.0, lambda v: ops.sinkhorn_divergence(X, Y, diameter=v)),
    "attention.scale": (0.5, lambda v: ops.attention(Q, Q, Q, scale=v)),
    "attention_varlen.scale": (
        0.5,
        lambda v: ops.attention_varlen(Q[0], Q[0], Q[0], torch.tensor([0, 2]), torch.tensor([0, 2]), scale=v),
    ),
    "group_norm_silu.eps": (0.5, lambda v: ops.group_norm_silu(IMAGE, 2, eps=v)),
    "layer_norm_modulate.eps": (0.5, lambda v: ops.layer_norm_modulate(X, X, X, eps=v)),
    "rms_norm.eps": (0.5, lambda v: ops.rms_norm(X, eps=v)),
    "qk_norm.eps": (0.5, lambda v: ops.qk_norm(X, Y, X[0], X[0], eps=v)[1]),
    "lpips.eps": (0.5, lambda v: ops.lpips(IMAGE, IMAGE + 1, eps=v)),
    "linear_cross_entropy.label_smoothing": (0.5, lambda v: ops.linear_cross_entropy(X, Y, TARGETS, label_smoothing=v)),
    "linear_cross_entropy.z_loss": (0.5, lambda v: ops.linear_cross_entropy(X, Y, TARGETS, z_loss=v)),
    "vector_quantize.commitment_weight": (0.5, lambda v: ops.vector_quantize(X, Y, commitment_weight=v).loss),
    "rotary_table.base": (8.0, lambda v: ops.rotary_table(5, 4, base=v)),
    "rotary_table_2d.base": (8.0, lambda v: ops.rotary_table_2d(2, 3, 4, base=v)),
}
INTEGERS = {
    "precision_recall_density_coverage.k": (3, lambda v: torch.stack(ops.precision_recall_density_coverage(X, Y, k=v))),
    "k_nearest_distances.k": (3, lambda v: ops.k_nearest_distances(X, Y, v)),
    "codebook_statistics.K": (8, lambda v: ops.codebook_statistics(X, TARGETS, v)[1]),
    "sliced_wasserstein.num_projections": (
        5,
        lambda v: ops.sliced_wasserstein(X, Y, num_projections=v, generator=torch.Generator().manual_seed(0)),
    ),
    "group_norm_silu.num_groups": (2, lambda v: ops.group_norm_silu(IMAGE, v)),
    "linear_cross_entropy.ignore_index": (3, lambda v: ops.linear_cross_entropy(X, Y, TARGETS, ignore_index=v)),
    "rotary_table.length": (5, lambda v: ops.rotary_table(v, 4)),
    "rotary_table.head_dim": (4, lambda v: ops.rotary_table(5, v)),
    "rotary_table_2d.height": (5, lambda v: ops.rotary_table_2d(v, 3, 4)),
}
FLAGS = {
    "attention.causal": lambda v: ops.attention(Q, Q, Q, causal=v),
    "mmd.unbiased": lambda v: ops.mmd(X, Y, bandwidths=[1.0], unbiased=v),
    "sinkhorn_divergence.debias": lambda v: ops.sinkhorn_divergence(X, Y, debias=v),
    "sinkhorn_divergence.potentials": lambda v: torch.tensor(isinstance(ops.sinkhorn_divergence(X, Y, potentials=v), tuple)),
    "k_nearest_distances.exclude_self": lambda v: ops.k_nearest_distances(X, X, 2, exclude_self=v),
}


@pytest.mark.parametrize("case", NUMBERS)
def test_numbers_of_every_library(case):
    value, call = NUMBERS[case]
    expected = call(value)
    forms = [np.float64(value), np.float32(value), np.longdouble(value), np.array(value), np.array([value]), Fraction(value)]
    forms += [torch.tensor(value), torch.tensor([value], dtype=torch.bfloat16)]
    for form in forms + ([int(value), np.int64(value), torch.tensor(int(value))] if value == int(value) else []):
        assert torch.equal(call(form), expected), type(form)


@pytest.mark.parametrize("case", INTEGERS)
def test_integers_of_every_library(case):
    value, call = INTEGERS[case]
    expected = call(value)
    for form in (
        np.int64(value),
        np.uint8(value),
        np.array(value),
        torch.tensor(value),
        torch.tensor([value], dtype=torch.int32),
    ):
        assert torch.equal(call(form), expected), type(form)


@pytest.mark.parametrize("case", FLAGS)
def test_flags_of_every_library(case):
    for value in (True, False):
        for form in (np.bool_(value), torch.tensor(value)):
            assert torch.equal(FLAGS[case](form), FLAGS[case](value)), type(form)


def test_bandwidths_of_every_library():
    values = [0.5, 1.0, 2.0]
    expected = ops.mmd(X, Y, bandwidths=values)
    for form in (
        tuple(values),
        np.array(values),
        torch.tensor(values),
        [np.float32(v) for v in values],
        torch.tensor(values).unbind(),
    ):
        assert torch.equal(ops.mmd(X, Y, bandwidths=form), expected), type(form)


@pytest.mark.parametrize("case", NUMBERS | INTEGERS | dict.fromkeys(FLAGS))
def test_what_is_no_number_is_one_line(case):
    operation, name = case.replace("qk_norm", "rms_norm").split(".")  # which is the one that checks
    call = FLAGS[case] if case in FLAGS else (NUMBERS | INTEGERS)[case][1]
    wrong = ["1", [1], 1j, np.ones(2), torch.ones(2), torch.ones(0), torch.tensor(1j), object()]
    wrong += [1, 1.0] if case in FLAGS else [True, np.True_, torch.tensor(True)]
    wrong += [2.5, np.float32(2), torch.tensor(2.0)] if case in INTEGERS else []
    for bad in wrong:
        with pytest.raises(TypeError, match=rf"^{operation} needs {name} as an? \w+, got {type(bad).__name__}[^\n]*$"):
            call(bad)


def test_tensors_that_ask_for_a_gradient_or_cannot_be_read():
    blur = torch.tensor(0.5, requires_grad=True)
    with pytest.raises(ValueError, match=r"no gradient by blur, got a tensor that requires one; pass blur.item\(\)"):
        ops.sinkhorn_divergence(X, Y, blur=blur)
    with torch.no_grad():
        assert torch.equal(ops.sinkhorn_divergence(X, Y, blur=blur), ops.sinkhorn_divergence(X, Y, blur=0.5))
    with pytest.raises(ValueError, match="needs blur where it can be read, got a traced tensor"):
        torch.vmap(lambda b: ops.sinkhorn_divergence(X, Y, blur=b))(torch.ones(2))
    with pytest.raises(ValueError, match="needs eps where it can be read"):
        ops.rms_norm(X, eps=torch.ones((), device="meta"))


def test_limits():
    with pytest.raises(ValueError, match="beyond 1e308"):
        as_number("op", "x", 10**400)
    for beyond in (10**400, 2**63, -(2**63) - 1):  # which no size or value of torch can be
        with pytest.raises(ValueError, match="op needs x as an int of 64 bits"):
            as_integer("op", "x", beyond)
    assert as_number("op", "x", 3) == 3.0 and type(as_number("op", "x", 3)) is float
    assert type(as_integer("op", "x", np.int8(3))) is int and type(as_flag("op", "x", np.True_)) is bool
    for bad in ("12", 1.0, {1.0, 2.0}, np.float64(1.0), torch.tensor(1.0), np.ones((2, 2)), iter([1.0])):
        with pytest.raises(TypeError, match="as a sequence of numbers"):
            as_numbers("op", "x", bad)
    with pytest.raises(TypeError, match="x as a number, got str 'a'"):
        as_numbers("op", "x", [1.0, "a"])


def test_options_compile():
    """Python's numbers stay what they were to torch.compile, which makes symbols of some."""
    torch._dynamo.reset()
    compiled = torch.compile(ops.rms_norm, fullgraph=True, backend="eager", dynamic=True)
    for eps in (0.5, 0.25, 1):
        torch.testing.assert_close(compiled(X, eps=eps), ops.rms_norm(X, eps=eps))
