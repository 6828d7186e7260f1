"""`linear_cross_entropy` with a bias, class weights, a soft cap and no reduction, and its sums beyond float16.

Tolerance: as in test_linear_cross_entropy.py, an implementation may err at most twice as much as torch's own chain at that dtype
does against float64, or as the roundings of this chain come to.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from dae_kernels import linear_cross_entropy
from dae_kernels.dispatch import TRITON_INSTALLED
from dae_kernels.linear_cross_entropy import api, chunked
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import assert_errors

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IMPLS = ["reference", "chunked", *(["triton"] if TRITON_INSTALLED else [])]
REDUCTIONS = ["none", "mean", "sum"]
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in the interpreter


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Chunks of 8 rows or more, so that small operands have several and a last one that is not full."""
    for name, value in (("CPU_ROWS", 8), ("CPU_CHUNK", 1), ("GPU_ROWS", 8)):
        monkeypatch.setattr(chunked, name, value)


def operands(N, V, D, dtype=torch.float32, ignored=0, seed=0):
    """hidden, linear_weight and bias that require gradients, class weights with a zero, and targets."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(N, D, generator=generator).to(DEVICE, dtype).requires_grad_()
    matrix = (torch.randn(V, D, generator=generator) * 2 / math.sqrt(D)).to(DEVICE, dtype).requires_grad_()
    bias = torch.randn(V, generator=generator).to(DEVICE, dtype).requires_grad_()
    weight = (torch.rand(V, generator=generator) * 3).to(DEVICE, dtype)
    weight[V // 2] = 0 if V > 1 else 1
    targets = torch.randint(V, (N,), generator=generator)
    targets[torch.randperm(N, generator=generator)[:ignored]] = -100
    return (hidden, matrix, bias), weight, targets.to(DEVICE)


def definition(hidden, matrix, targets, bias, weight, softcap, label_smoothing, z_loss, reduction, ignore_index=-100):
    """By torch, in the dtype of the operands."""
    logits = F.linear(hidden, matrix, bias)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    loss = F.cross_entropy(
        logits, targets, weight, ignore_index=ignore_index, label_smoothing=label_smoothing, reduction=reduction
    )
    if z_loss:
        counted = targets != ignore_index
        squares = logits.logsumexp(-1).square().where(counted, 0.0)
        loss = loss + z_loss * {"none": squares, "sum": squares.sum(), "mean": squares.sum() / counted.sum()}[reduction]
    return loss


def results(function, leaves, weight, targets, cotangent, use, **options):
    """The loss and the gradients by hidden, matrix and bias under a cotangent; what `use` lacks is left out."""
    leaves = [t.detach().requires_grad_() for t in leaves]
    bias, weight = leaves[2] if "bias" in use else None, weight if "weight" in use else None
    softcap = 3.0 if "softcap" in use else None
    extra = {"label_smoothing": 0.1, "z_loss": 0.01} if "both" in use else {"label_smoothing": 0.0, "z_loss": 0.0}
    loss = function(*leaves[:2], targets, bias=bias, weight=weight, softcap=softcap, **extra, **options)
    wanted = leaves if bias is not None else leaves[:2]
    return [loss, *torch.autograd.grad(loss, wanted, cotangent.to(loss.dtype).expand_as(loss))]


def check(leaves, weight, targets, impl, use, reduction):
    generator = torch.Generator().manual_seed(len(weight))
    cotangent = torch.randn(targets.shape if reduction == "none" else (), generator=generator).to(DEVICE)
    options = {"use": use, "reduction": reduction}
    wide = [t.double() for t in leaves], weight.double()

    def exact():
        return results(definition, *wide, targets, cotangent, **options)

    theirs, truth = results(definition, leaves, weight, targets, cotangent, **options), exact()
    ours = results(linear_cross_entropy, leaves, weight, targets, cotangent, impl=impl, **options)
    assert [t.dtype for t in ours] == [torch.promote_types(leaves[0].dtype, torch.float32), *[leaves[0].dtype] * (len(ours) - 1)]
    assert [t.shape for t in ours] == [t.shape for t in truth]
    assert_errors(ours, truth, theirs, results=exact)


ALL = ("bias", "weight", "softcap", "both")
USES = [("bias",), ("weight",), ("softcap",), ("weight", "both"), ALL]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("use", [(), *USES], ids="+".join)
def test_float32(impl, reduction, use):
    check(*operands(17, 60, 8, ignored=5), impl, use, reduction)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("N, V, D", [(1, 1, 1), (9, 2100, 5), (16, 63, 1)])
def test_odd_shapes(impl, reduction, N, V, D):
    check(*operands(N, V, D, ignored=N // 3), impl, ALL, reduction)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_sixteen_bits(impl, dtype, reduction):
    check(*operands(19, 130, 24, dtype, ignored=5), impl, ALL, reduction)


@pytest.mark.parametrize("impl", ["reference", "chunked"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("use", [(), *USES], ids="+".join)
def test_float64_equals_torch(impl, reduction, use):
    leaves, weight, targets = operands(20, 11, 4, torch.float64, ignored=3)
    cotangent = torch.randn(20 if reduction == "none" else (), dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    cotangent = cotangent.to(DEVICE)
    ours = results(linear_cross_entropy, leaves, weight, targets, cotangent, use, reduction=reduction, impl=impl)
    theirs = results(definition, leaves, weight, targets, cotangent, use, reduction=reduction)
    # sums of at most 20 x 11 float64 terms of the order of 10, in two orders
    torch.testing.assert_close(ours, theirs, rtol=0, atol=220 * 10 * 2.0**-53)


@pytest.mark.skipif(not hasattr(torch.nn, "LinearCrossEntropyOptions"), reason="needs torch 2.13")
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_torch_takes_bias_and_weights(reduction):
    check(*operands(37, 30, 4, ignored=5), "torch", ("bias", "weight"), reduction)
    leaves, _, targets = operands(9, 7, 3)
    with pytest.raises(ValueError, match=r"must be 0, 0 and None, got 0\.0, 0\.0 and 30\.0; use impl='chunked'"):
        linear_cross_entropy(*leaves[:2], targets, softcap=30.0, impl="torch")


@pytest.mark.parametrize("impl", IMPLS[:2])
def test_gradients_by_finite_differences(impl):
    leaves, weight, targets = operands(9, 5, 3, torch.float64, ignored=2)
    for reduction in REDUCTIONS:
        options = {"weight": weight, "softcap": 2.0, "label_smoothing": 0.2, "z_loss": 0.1, "reduction": reduction, "impl": impl}
        run = lambda h, w, b, o=options: linear_cross_entropy(h, w, targets, bias=b, **o)  # noqa: E731
        assert torch.autograd.gradcheck(run, leaves)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_rows_that_do_not_count(impl, reduction):
    """NaN in an ignored row, and in the cotangent of its loss, reaches nothing; without rows: 0, or NaN for the mean."""
    leaves, weight, targets = operands(19, 7, 3, ignored=6)
    ignored = targets == -100
    with torch.no_grad():
        leaves[0][ignored] = math.nan
    cotangent = (
        torch.ones(19, device=DEVICE).masked_fill(ignored, math.nan) if reduction == "none" else torch.ones((), device=DEVICE)
    )
    found = results(linear_cross_entropy, leaves, weight, targets, cotangent, ALL, impl=impl, reduction=reduction)
    assert all(t.isfinite().all() for t in found) and (found[1][ignored] == 0).all()
    for rows in (slice(None), slice(0)):
        hidden = leaves[0].detach()[rows].requires_grad_()
        nothing = torch.full_like(targets[rows], -100)
        cotangent = torch.ones(len(nothing) if reduction == "none" else (), device=DEVICE)
        loss, *gradients = results(
            linear_cross_entropy, (hidden, *leaves[1:]), weight, nothing, cotangent, ALL, impl=impl, reduction=reduction
        )
        assert loss.isnan() if reduction == "mean" else not loss.any()
        assert not any(g.any() for g in gradients)


@pytest.mark.parametrize("impl", IMPLS)
def test_shapes_and_strides(impl):
    (hidden, matrix, bias), weight, targets = operands(24, 10, 6, ignored=4)
    expected = linear_cross_entropy(hidden, matrix, targets, bias=bias, weight=weight, reduction="none", impl=impl)
    every = lambda t: t.repeat_interleave(2)[::2]  # noqa: E731
    got = linear_cross_entropy(
        hidden.view(2, 3, 4, 6), matrix.T.contiguous().T, targets.view(2, 3, 4), bias=every(bias), weight=every(weight),
        reduction="none", impl=impl,
    )  # fmt: skip
    assert got.shape == (2, 3, 4)
    torch.testing.assert_close(got.flatten(), expected, rtol=1e-6, atol=1e-6)
    one = linear_cross_entropy(hidden[0], matrix, targets[0].clamp(min=0), reduction="none", impl=impl)
    assert one.shape == ()
    wide = linear_cross_entropy(hidden, matrix, targets, bias=bias.double(), weight=weight.half(), impl=impl)
    assert wide.dtype == torch.float32


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("factor", [1e-30, 1e30])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_cotangents_of_any_size(impl, factor, dtype):
    """Those of float16 rows are no float16 numbers, and what they are multiplied with must not become 0 or infinity."""
    leaves, weight, targets = operands(20, 9, 4, dtype)
    cotangent = torch.randn(20, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(DEVICE)
    if dtype == torch.float16:  # gradients in float32
        leaves, weight = [t.detach().float() for t in leaves], weight.float()

    def function(*arguments, **options):
        with torch.autocast(DEVICE, torch.float16, enabled=dtype == torch.float16):
            return linear_cross_entropy(*arguments, **options)

    def run(cotangent):
        return results(function, leaves, weight, targets, cotangent, ("bias",), reduction="none", impl=impl)

    for got, expected in zip(run(cotangent * factor)[1:], run(cotangent)[1:], strict=True):
        size = expected.double().norm()
        assert size > 0 and (got.double() / factor - expected.double()).norm() <= 2 * torch.finfo(dtype).eps * size


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("scale", [1.0, 400.0])
def test_the_number_of_rows_does_not_choose_the_result(dtype, scale, monkeypatch):
    """At scale 400 the logits are beyond 65504, the largest float16. `auto` chooses by size on a CPU."""
    leaves, weight, targets = operands(16, 10, 4, dtype)
    with torch.no_grad():
        leaves = [t * scale for t in leaves]
    if scale > 1:
        assert F.linear(*(t.float() for t in leaves)).abs().max() > 65504
    cotangent = torch.ones((), device=DEVICE)
    found = []
    for impl, few in [*((impl, 0) for impl in IMPLS), ("auto", 0), ("auto", 1 << 20)]:
        monkeypatch.setattr(api, "FEW_LOGITS", few)
        found.append(results(linear_cross_entropy, leaves, weight, targets, cotangent, ("bias",), reduction="mean", impl=impl))
    assert all(t.isfinite().all() for t in found[0])
    for impl, other in zip((*IMPLS, "auto", "auto"), found, strict=True):
        for k, (got, expected) in enumerate(zip(other, found[0], strict=True)):
            # float32 logits of D + 1 = 5 terms; the operands of the gradients' products, and these, are rounded to dtype,
            # and the logits of "triton" to bfloat16: the largest and the target's, by half an eps each
            narrow = k > 0 or (impl == "triton" and dtype == torch.bfloat16)
            eps = torch.finfo(dtype).eps * (4 if k else 1) if narrow else 8 * torch.finfo(torch.float32).eps
            size = scale**2 * 20 if k == 0 else expected.float().norm()
            assert (got.float() - expected.float()).norm() <= eps * size


@pytest.mark.parametrize("impl", IMPLS)
def test_a_soft_cap_bounds_what_would_overflow(impl):
    """Logits of 1e38, -1e38 and infinity become 30, -30 and 30."""
    hidden = torch.tensor([[1e38], [-1e38]], device=DEVICE, requires_grad=True)
    matrix = torch.tensor([[1.0], [-1.0], [10.0]], device=DEVICE)
    targets = torch.tensor([1, 0], device=DEVICE)
    losses = linear_cross_entropy(hidden, matrix, targets, softcap=30.0, reduction="none", impl=impl)
    expected = torch.tensor([60 + math.log(2), 60.0], device=DEVICE)
    torch.testing.assert_close(losses.detach(), expected, rtol=1e-6, atol=0)
    assert (torch.autograd.grad(losses.sum(), hidden)[0] == 0).all()


@pytest.mark.parametrize("impl", IMPLS)
def test_a_soft_cap_is_exact_on_both_sides_of_its_series(impl):
    """One class against a logit of 0: loss = log(1 + exp(-x)) for logits from 1e-6 to 10 caps."""
    raw = torch.logspace(-6, 1, 29, dtype=torch.float32, device=DEVICE) * 2.0
    hidden = raw[:, None].detach().requires_grad_()
    matrix = torch.tensor([[1.0], [0.0]], device=DEVICE)
    losses = linear_cross_entropy(hidden, matrix, torch.zeros(29, dtype=torch.int64, device=DEVICE), softcap=2.0,
                                  reduction="none", impl=impl)  # fmt: skip
    (gradient,) = torch.autograd.grad(losses.sum(), hidden)
    x = 2 * torch.tanh(raw.double() / 2)
    exact, slope = torch.log1p(torch.exp(-x)), -torch.sigmoid(-x) * (1 - (x / 2).square())
    # a handful of float32 roundings of numbers below 2; 1 - tanh^2 of torch's own derivative cancels in its last digit
    torch.testing.assert_close(losses.double(), exact, rtol=0, atol=5 * 2.0**-23)
    torch.testing.assert_close(gradient[:, 0].double(), slope, rtol=0, atol=5 * 2.0**-23)


@pytest.mark.parametrize("impl", IMPLS[1:])
def test_second_derivatives_are_refused_without_reduction(impl):
    (hidden, matrix, bias), weight, targets = operands(9, 7, 3)
    losses = linear_cross_entropy(hidden, matrix, targets, bias=bias, weight=weight, reduction="none", impl=impl)
    (gradient,) = torch.autograd.grad(losses.square().sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivatives: use impl='reference'"):
        gradient.sum().backward()


@pytest.mark.parametrize("impl", ["reference", "chunked"])
def test_vmap_and_torch_func_without_reduction(impl):
    leaves, weight, targets = operands(24, 10, 6, torch.float64, ignored=4)
    hidden, matrix, bias = (t.detach() for t in leaves)
    options = {"weight": weight, "softcap": 4.0, "label_smoothing": 0.1, "z_loss": 0.01, "impl": impl}
    for reduction in ("none", "mean"):
        loss = lambda h, m, b, t, r=reduction: linear_cross_entropy(h, m, t, bias=b, reduction=r, **options).sin().sum()  # noqa: E731
        both, rows = torch.func.grad(loss, (0, 1, 2)), (hidden.view(3, 8, 6), targets.view(3, 8))
        got = torch.vmap(both, (0, None, None, 0))(rows[0], matrix, bias, rows[1])
        expected = [both(h, matrix, bias, t) for h, t in zip(*rows, strict=True)]
        for g, e in zip(got, (torch.stack(parts) for parts in zip(*expected, strict=True)), strict=True):
            torch.testing.assert_close(g, e, rtol=1e-12, atol=1e-12)  # the same operations


@pytest.mark.parametrize("impl", IMPLS)
def test_compiles_whole_without_reduction(impl):
    leaves, weight, targets = operands(20, 11, 4, ignored=3)
    options = {"weight": weight, "softcap": 4.0, "label_smoothing": 0.1, "z_loss": 0.01, "reduction": "none", "impl": impl}
    run = lambda h, m, b: linear_cross_entropy(h * 2, m, targets, bias=b, **options).sin().sum()  # noqa: E731
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    got, expected = (torch.autograd.grad(f(*leaves), leaves) for f in (compiled, run))
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_wrong_target_that_is_not_read_makes_all_nan(impl):
    """Under vmap no target is read."""
    (hidden, matrix, _), weight, targets = operands(20, 11, 4)
    targets[4] = 11
    for reduction in REDUCTIONS:
        run = lambda h, t, r=reduction: linear_cross_entropy(h, matrix, t, weight=weight, reduction=r, impl=impl)  # noqa: E731
        loss = torch.vmap(run)(hidden[None], targets[None])
        assert loss.isnan().all() and torch.autograd.grad(loss.sum(), matrix)[0].isnan().any()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("smoothing, z_loss", [(0.0, 0.0), (0.3, 0.5), (1.0, 0.0)])
def test_the_mean_over_targets_without_weight(impl, smoothing, z_loss):
    """There is none, and it moves nothing; rows that are ignored are no others."""
    leaves, weight, _ = operands(5, 3, 2)
    targets = torch.tensor([-100, 1, 1, 1, 1], device=DEVICE)  # class 1 has the weight 0
    options = {"weight": weight, "label_smoothing": smoothing, "z_loss": z_loss, "impl": impl}
    loss = linear_cross_entropy(leaves[0], leaves[1], targets, **options)
    assert loss.isnan()
    assert not any(gradient.any() for gradient in torch.autograd.grad(loss, leaves[:2]))


@settings(max_examples=15, deadline=None)
@given(
    N=st.integers(0, 30),
    V=st.integers(1, 20),
    D=st.integers(1, 6),
    smoothing=st.floats(0, 1),
    z_loss=st.floats(0, 2),
    use=st.lists(st.sampled_from(["bias", "weight", "softcap"]), unique=True),
    reduction=st.sampled_from(REDUCTIONS),
    seed=st.integers(0, 1000),
)
def test_chunks_are_the_whole(N, V, D, smoothing, z_loss, use, reduction, seed):
    leaves, weight, targets = operands(N, V, D, torch.float64, ignored=N // 4, seed=seed)
    cotangent = torch.linspace(-1, 1, N, device=DEVICE) if reduction == "none" else torch.tensor(0.7, device=DEVICE)
    run = lambda *o, **k: linear_cross_entropy(*o, **k | {"label_smoothing": smoothing, "z_loss": z_loss})  # noqa: E731
    got, expected = (results(run, leaves, weight, targets, cotangent, use, reduction=reduction, impl=i) for i in IMPLS[1::-1])
    # differences of float64 sums in two orders
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10, equal_nan=True)


def test_bad_input():
    (hidden, matrix, bias), weight, targets = operands(9, 7, 3)
    for change, error, message in (
        ({"bias": [1.0] * 7}, TypeError, "floating point tensor bias, got <class 'list'>"),
        ({"weight": weight.long()}, TypeError, "floating point tensor weight, got torch.int64"),
        ({"bias": bias[:6]}, ValueError, r"needs bias \[7\] on .*, one value a class, got \[6\] on"),
        ({"weight": matrix}, ValueError, r"needs weight \[7\] on .*, one value a class, got \[7, 3\] on"),
        ({"weight": weight.to("meta")}, ValueError, r"needs weight \[7\] on .* got \[7\] on meta"),
        ({"weight": weight.clone().requires_grad_()}, ValueError, "no derivative by the class weights, .* weight.detach"),
        ({"softcap": 0.0}, ValueError, "softcap must be positive and finite, or None for no cap, got 0.0"),
        ({"softcap": -1.0}, ValueError, "got -1.0"),
        ({"softcap": math.inf}, ValueError, "got inf"),
    ):
        with pytest.raises(error, match=message):
            linear_cross_entropy(hidden, matrix, targets, **change)
