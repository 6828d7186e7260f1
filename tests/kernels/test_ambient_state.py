"""Results and gradients are the same bits whatever state of torch the caller has set around a call."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager

import pytest
import torch

pytestmark = pytest.mark.filterwarnings("ignore")  # of numpy in the interpreter


@contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def deterministic():
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


STATES = {
    "default dtype float64": lambda: default_dtype(torch.float64),
    "default dtype bfloat16": lambda: default_dtype(torch.bfloat16),
    "default device": lambda: torch.device("meta"),
    "deterministic algorithms": deterministic,
    "autocast": lambda: torch.autocast("cuda" if torch.cuda.is_available() else "cpu", torch.bfloat16),
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
}
# Several at once, which none of them hides: a run of the interpreter takes long.
TOGETHER = (
    ("default dtype float64", "deterministic algorithms", "autocast"),
    ("default dtype bfloat16", "default device"),
    ("no_grad",),
    ("inference_mode",),
)
# Their products are those of a model's layers, so they follow autocast as torch's own do; their docstrings say so.
FOLLOW_AUTOCAST = ("attention", "attention_varlen", "linear_cross_entropy")
# They have no operand to be like, so they are made where torch's factories make tensors.
FOLLOW_THE_DEFAULT_DEVICE = ("rotary_table", "rotary_table_2d")


def outcome(operation, states=()):
    """The results of `operation` inside all of `states`, and its gradients under fixed cotangents, taken outside."""
    operands = operation.operands()
    for i in operation.leaves:
        operands[i].requires_grad_()
    torch.manual_seed(0)
    with ExitStack() as stack:
        for state in states:
            stack.enter_context(STATES[state]())
        results = operation(*operands)
    differentiable = [result for result in results if result.requires_grad]
    if not differentiable:
        return list(results), []
    cotangents = [torch.linspace(-1, 2, r.numel() + 1, dtype=r.dtype)[1:].view(r.shape) for r in differentiable]
    return list(results), list(torch.autograd.grad(differentiable, [operands[i] for i in operation.leaves], cotangents))


def same(got, expected):
    pairs = zip(got, expected, strict=True)
    return all(one.dtype == other.dtype and one.device == other.device and torch.equal(one, other) for one, other in pairs)


def test_bits_do_not_depend_on_ambient_state(operation):
    followed = {"autocast"} if operation.public in FOLLOW_AUTOCAST else set()
    followed |= {"default device"} if operation.public in FOLLOW_THE_DEFAULT_DEVICE else set()
    expected, expected_gradients = outcome(operation)
    for states in TOGETHER:
        got, gradients = outcome(operation, [state for state in states if state not in followed])
        assert same(got, expected), states
        assert same(gradients, [] if states[0] in ("no_grad", "inference_mode") else expected_gradients), states
