"""`linear_cross_entropy` against torch's `cross_entropy` of all logits in float64.

Tolerance: an implementation may err at most twice as much as torch's own `cross_entropy(linear(...))` does at that dtype on the
same operands, or twice what the roundings of this chain come to where torch's happen to be less (tests/tolerances.py).
"""

from __future__ import annotations

import math
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from dae_kernels import linear_cross_entropy
from dae_kernels.dispatch import TRITON_INSTALLED
from dae_kernels.linear_cross_entropy import api, autograd, chunked
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import assert_errors

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CHUNKS = ["chunked", *(["triton"] if TRITON_INSTALLED else [])]
IMPLS = ["reference", *CHUNKS]
needs_torch = pytest.mark.skipif(not hasattr(torch.nn, "LinearCrossEntropyOptions"), reason="needs torch 2.13")
TOKENS = {"label_smoothing": 0.0, "z_loss": 0.0}
EVERYTHING = {"label_smoothing": 0.1, "z_loss": 0.01}
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in the interpreter


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Chunks of 8 rows or more, so that small operands have several and a last one that is not full."""
    for name, value in (("CPU_ROWS", 8), ("CPU_CHUNK", 1), ("GPU_ROWS", 8)):
        monkeypatch.setattr(chunked, name, value)


def operands(N, V, D, dtype=torch.float32, ignored=0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(N, D, generator=generator).to(DEVICE, dtype).requires_grad_()
    weight = (torch.randn(V, D, generator=generator) * 2 / math.sqrt(D)).to(DEVICE, dtype).requires_grad_()
    targets = torch.randint(V, (N,), generator=generator)
    targets[torch.randperm(N, generator=generator)[:ignored]] = -100
    return hidden, weight, targets.to(DEVICE)


def plain(hidden, weight, targets, label_smoothing=0.0, z_loss=0.0, reduction="mean", ignore_index=-100):
    """The definition by torch, in the dtype of the operands."""
    logits = F.linear(hidden, weight)
    loss = F.cross_entropy(logits, targets, label_smoothing=label_smoothing, reduction=reduction, ignore_index=ignore_index)
    if z_loss:
        squares = logits.logsumexp(-1).square()[targets != ignore_index]
        loss = loss + z_loss * (squares.mean() if reduction == "mean" else squares.sum())
    return loss


def with_gradients(function, hidden, weight, targets, cotangent, **options):
    loss = function(hidden, weight, targets, **options)
    return [loss, *torch.autograd.grad(loss * cotangent, (hidden, weight))]


def check(hidden, weight, targets, impl, **options):
    """Value and gradients under a random cotangent by the rule above."""
    wide = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    cotangent = torch.randn((), generator=torch.Generator().manual_seed(len(weight))).item()

    def definition():
        return with_gradients(plain, *wide, targets, cotangent, **options)

    theirs, truth = with_gradients(plain, hidden, weight, targets, cotangent, **options), definition()
    ours = with_gradients(linear_cross_entropy, hidden, weight, targets, cotangent, impl=impl, **options)
    wide_dtype = torch.promote_types(hidden.dtype, torch.float32)
    assert [t.dtype for t in ours] == [wide_dtype, hidden.dtype, weight.dtype]
    assert [t.shape for t in ours] == [t.shape for t in truth]
    assert_errors(ours, truth, theirs, results=definition)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("options", [TOKENS, EVERYTHING, {"label_smoothing": 1.0, "reduction": "sum"}], ids=str)
@pytest.mark.parametrize("N, V, D", [(63, 60, 8), (1, 1, 1), (17, 2100, 5), (8, 7, 3), (60, 63, 1)])
def test_float32(impl, options, N, V, D):
    check(*operands(N, V, D, ignored=N // 3), impl, **options)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("options", [TOKENS, EVERYTHING], ids=str)
def test_sixteen_bits(impl, dtype, options):
    check(*operands(37, 130, 24, dtype, ignored=5), impl, **options)


@pytest.mark.parametrize("impl", ["reference", "chunked"])
def test_float64(impl):
    hidden, weight, targets = operands(20, 11, 4, torch.float64, ignored=3)
    for options in (TOKENS, EVERYTHING):
        check(hidden, weight, targets, impl, **options)
        run = lambda h, w, o=options: linear_cross_entropy(h, w, targets, impl=impl, **o)  # noqa: E731
        assert torch.autograd.gradcheck(run, (hidden, weight))
    with pytest.raises(ValueError, match="float64"):
        linear_cross_entropy(hidden, weight, targets, impl="triton")


@needs_torch
def test_torch_gives_the_same():
    check(*operands(37, 130, 24, ignored=5), "torch")
    hidden, weight, targets = operands(37, 130, 24, torch.bfloat16)
    loss, truth = (linear_cross_entropy(hidden, weight, targets, impl=impl) for impl in ("torch", "reference"))
    assert loss.dtype == torch.float32
    assert (loss - truth).abs() <= 10 * 2**-9 * truth  # it rounds the losses of 5 chunks and each partial sum to bfloat16
    hidden, weight, targets = operands(20, 30, 4)
    loss = linear_cross_entropy(hidden, weight, targets, impl="torch", reduction="sum")
    torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    torch.autograd.grad(loss, (hidden, weight))  # a second backward, as everywhere


@pytest.mark.parametrize("impl", IMPLS)
def test_closed_forms(impl):
    V, D = 13, 4
    hidden, targets = torch.zeros(3, D, device=DEVICE), torch.arange(3, device=DEVICE)
    weight = torch.randn(V, D, device=DEVICE)
    uniform = linear_cross_entropy(hidden, weight, targets, impl=impl, label_smoothing=0.3, z_loss=0.5)
    torch.testing.assert_close(uniform.item(), math.log(V) + 0.5 * math.log(V) ** 2, rtol=1e-6, atol=0)
    # One-hot rows: the logits are the columns of the weight.
    eye, table = torch.eye(D, device=DEVICE), torch.full((V, D), -200.0, device=DEVICE)
    table[torch.arange(D), torch.arange(D)] = 200.0
    assert linear_cross_entropy(eye, table, torch.arange(D, device=DEVICE), impl=impl) == 0
    torch.testing.assert_close(
        linear_cross_entropy(eye, table, torch.full_like(targets[:1], 5).expand(D), impl=impl).item(), 400.0
    )


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("scale", [1e3, 1e4])
def test_large_logits_do_not_overflow(impl, scale):
    hidden, weight, targets = operands(20, 30, 6)
    check((hidden * scale).detach().requires_grad_(), weight, targets, impl)


@pytest.mark.parametrize("impl", IMPLS)
def test_shapes_and_strides(impl):
    hidden, weight, targets = operands(24, 10, 6, ignored=4)
    expected = linear_cross_entropy(hidden, weight, targets, impl=impl)
    same = lambda *o: torch.testing.assert_close(linear_cross_entropy(*o, impl=impl), expected, rtol=1e-6, atol=0)  # noqa: E731
    same(hidden.view(2, 3, 4, 6), weight, targets.view(2, 3, 4))
    same(hidden.T.contiguous().T, weight.T.contiguous().T, targets.repeat_interleave(2)[::2])
    one = linear_cross_entropy(hidden[0], weight, targets[0].clamp(min=0), impl=impl)
    assert one.shape == ()
    expanded = hidden[:1].expand(9, 6)
    repeated = linear_cross_entropy(expanded, weight, targets[:1].clamp(min=0).expand(9), impl=impl)
    torch.testing.assert_close(
        repeated, linear_cross_entropy(hidden[:1], weight, targets[:1].clamp(min=0), impl=impl), rtol=1e-6, atol=0
    )
    torch.autograd.grad(repeated, hidden)


@pytest.mark.parametrize("impl", [*IMPLS, pytest.param("torch", marks=needs_torch)])
def test_rows_that_do_not_count(impl):
    """None that counts: torch's NaN and zero gradient for the mean, 0 for the sum; the same without any row."""
    hidden, weight, targets = operands(11, 7, 3)
    for h, t in ((hidden, torch.full_like(targets, 3)), (hidden[:0], targets[:0])):
        mean = with_gradients(linear_cross_entropy, h, weight, t, 1.0, impl=impl, ignore_index=3)
        total = with_gradients(linear_cross_entropy, h, weight, t, 1.0, impl=impl, ignore_index=3, reduction="sum")
        assert mean[0].isnan() and total[0] == 0
        assert not any(g.any() for g in (*mean[1:], *total[1:]))
    check(hidden, weight, targets, impl, ignore_index=int(targets[0]))


@pytest.mark.parametrize("impl", [*IMPLS, pytest.param("torch", marks=needs_torch)])
@pytest.mark.parametrize("hidden_value", [math.nan, math.inf, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ignored_rows_are_taken_out(impl, hidden_value, dtype):
    """Whatever lies there: loss and gradients are bit for bit those with zeros there; rows 9 and 10 are a chunk's own."""
    hidden, weight, targets = operands(11, 7, 3, dtype)
    ignored = torch.tensor([0, 5, 8, 9, 10], device=DEVICE)
    targets[ignored] = -100
    options = TOKENS if impl == "torch" else EVERYTHING
    results = []
    for value in (0.0, hidden_value):
        filled = hidden.detach().index_fill(0, ignored, value).requires_grad_()
        results.append(with_gradients(linear_cross_entropy, filled, weight, targets, 1.5, impl=impl, **options))
        assert (results[-1][1][ignored] == 0).all()
    assert all(t.isfinite().all() for t in results[0]) and all(map(torch.equal, *results))
    nothing = with_gradients(linear_cross_entropy, filled, weight, torch.full_like(targets, -100), 1.0, impl=impl, **options)
    assert nothing[0].isnan() and not any(g.any() for g in nothing[1:])


@pytest.mark.parametrize("impl", IMPLS)
def test_no_z_loss_no_square(impl):
    """Logits of 3e19, whose square is no float32."""
    hidden, weight = torch.tensor([[3e19]], device=DEVICE), torch.tensor([[1.0], [0.0]], device=DEVICE)
    operands = hidden.requires_grad_(), weight.requires_grad_()
    results = with_gradients(linear_cross_entropy, *operands, torch.tensor([1], device=DEVICE), 1.0, impl=impl)
    for got, expected in zip(results, ([3e19], [1.0], [3e19, -3e19]), strict=True):
        torch.testing.assert_close(got.detach().flatten().cpu(), torch.tensor(expected), rtol=1e-6, atol=0)


@needs_torch
def test_torch_refuses_transforms():
    hidden, weight, targets = (t.detach() for t in operands(8, 7, 3))
    loss = lambda h: linear_cross_entropy(h, weight, targets[:4], impl="torch")  # noqa: E731
    for run in (torch.vmap(loss), torch.vmap(torch.func.grad(loss)), lambda h: torch.func.grad(loss)(h[0])):
        with pytest.raises(ValueError, match=r"impl='torch' has no rules for torch\.func .* use impl='chunked'"):
            run(hidden.view(2, 4, 3))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("train", ["hidden", "weight", "nothing", "no_grad"])
def test_only_the_gradients_that_are_wanted(impl, train, monkeypatch):
    hidden, weight, targets = operands(11, 7, 3)
    hidden.requires_grad_(train in ("hidden", "no_grad"))
    weight.requires_grad_(train in ("weight", "no_grad"))
    needs = []
    operator = autograd.chunked_losses
    monkeypatch.setattr(autograd, "chunked_losses", lambda *o: needs.append(o[10:12]) or operator(*o))
    with torch.set_grad_enabled(train != "no_grad"):
        loss = linear_cross_entropy(hidden, weight, targets, impl=impl)
    torch.testing.assert_close(loss, plain(hidden, weight, targets), rtol=1e-6, atol=0)
    wanted = hidden if train == "hidden" else weight if train == "weight" else None
    assert needs == ([] if impl == "reference" else [(wanted is hidden, wanted is weight)])
    assert loss.requires_grad == (wanted is not None)
    if wanted is not None:
        torch.testing.assert_close(*(torch.autograd.grad(x, wanted)[0] for x in (loss, plain(hidden, weight, targets))))


@pytest.mark.parametrize("impl", IMPLS)
def test_autocast(impl):
    """Products in bfloat16, gradients in the operands' own dtypes; as exact as torch's chain under autocast."""
    hidden, weight, targets = operands(30, 50, 16)
    wide = [t.detach().double().requires_grad_() for t in (hidden, weight)]

    def definition():
        return with_gradients(plain, *wide, targets, 1.0, **EVERYTHING)

    with torch.autocast(DEVICE, torch.bfloat16):
        theirs = with_gradients(plain, hidden, weight, targets, 1.0, **EVERYTHING)
        ours = with_gradients(linear_cross_entropy, hidden, weight, targets, 1.0, impl=impl, **EVERYTHING)
        mixed = linear_cross_entropy(hidden.bfloat16(), weight, targets, impl=impl, **EVERYTHING)
    assert all(t.dtype == torch.float32 for t in ours)
    assert_errors(ours, definition(), theirs, results=definition, dtype=torch.bfloat16)
    torch.testing.assert_close(mixed, ours[0], rtol=1e-6, atol=0)
    with pytest.raises(ValueError, match=r"one dtype, got torch\.bfloat16 and torch\.float32"):
        linear_cross_entropy(hidden.bfloat16(), weight, targets, impl=impl)


@pytest.mark.parametrize("impl", CHUNKS)
def test_second_derivatives_are_refused(impl):
    hidden, weight, targets = operands(9, 7, 3)
    loss = linear_cross_entropy(hidden, weight, targets, impl=impl)
    (gradient,) = torch.autograd.grad(loss, hidden, retain_graph=True)
    (again,) = torch.autograd.grad(loss, hidden, create_graph=True)
    assert torch.equal(gradient, again)
    with pytest.raises(RuntimeError, match="no second derivatives: use impl='reference'"):
        again.sum().backward()
    norm = lambda h: torch.func.grad(lambda h: linear_cross_entropy(h, weight, targets, impl=impl))(h).norm()  # noqa: E731
    with pytest.raises(RuntimeError, match="no second derivatives"):
        torch.func.grad(norm)(hidden)


@pytest.mark.parametrize("impl", ["reference", "chunked"])
def test_vmap_and_torch_func(impl):
    hidden, weight, targets = (t.detach() for t in operands(24, 10, 6, torch.float64, ignored=4))
    batch = hidden.view(3, 8, 6), targets.view(3, 8)
    loss = lambda h, w, t: linear_cross_entropy(h, w, t, impl=impl, **EVERYTHING)  # noqa: E731
    rows = list(zip(*batch, strict=True))
    exact = {"rtol": 1e-12, "atol": 1e-12}
    expected = torch.stack([loss(h, weight, t) for h, t in rows])
    torch.testing.assert_close(torch.vmap(loss, (0, None, 0))(batch[0], weight, batch[1]), expected, **exact)
    both = torch.func.grad(loss, (0, 1))
    expected = [torch.stack(g) for g in zip(*(both(h, weight, t) for h, t in rows), strict=True)]
    torch.testing.assert_close(list(torch.vmap(both, (0, None, 0))(batch[0], weight, batch[1])), expected, **exact)
    total = lambda h, w: torch.vmap(loss, (0, None, 0))(h, w, batch[1]).sum()  # noqa: E731
    outside = torch.func.grad(total, (0, 1))(batch[0], weight)
    torch.testing.assert_close(list(outside), [expected[0], expected[1].sum(0)], **exact)


@pytest.mark.parametrize("impl", IMPLS)
def test_compiles_whole_with_backward(impl):
    hidden, weight, targets = operands(20, 11, 4, ignored=3)
    run = lambda h, w, t: linear_cross_entropy(h * 2, w, t, impl=impl, **EVERYTHING)  # noqa: E731
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    got = with_gradients(compiled, hidden, weight, targets, 1.5)
    expected = with_gradients(run, hidden, weight, targets, 1.5)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    wrong = targets.clone()
    wrong[4] = 11
    assert all(t.isnan().any() for t in with_gradients(compiled, hidden, weight, wrong, 1.0))
    transformed = lambda h, w: torch.func.grad(lambda h, w: run(h, w, targets), (0, 1))(h, w)  # noqa: E731
    got = torch.compile(transformed, fullgraph=True, backend="aot_eager")(hidden.detach(), weight.detach())
    torch.testing.assert_close([1.5 * t for t in got], expected[1:], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kernel", [False, True][: len(CHUNKS)])
@pytest.mark.parametrize("needs", [(True, True), (False, False)])
def test_operator_passes_torch_checks(kernel, needs):
    hidden, weight, targets = (t.detach() for t in operands(9, 7, 3))
    bias, classes, factor = weight[:, 0].clone(), weight[:, 1].abs(), hidden[:, 0].clone()
    tensors = hidden, weight, bias, classes, targets, torch.tensor(0.01, device=DEVICE), factor
    torch.library.opcheck(chunked.chunked_losses.op, (*tensors, 0.1, 5.0, torch.float32, *needs, needs[0], kernel, None))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.skipif(DEVICE == "cuda", reason="targets on a GPU are not read")
def test_targets_outside_the_vocabulary(impl):
    hidden, weight, targets = operands(9, 7, 3)
    for value in (7, -1, 2**40):
        targets[3] = value
        with pytest.raises(ValueError, match=f"targets must lie in 0..6 or be ignore_index=-100, got {value}"):
            linear_cross_entropy(hidden, weight, targets, impl=impl)
    targets[3] = -1
    assert linear_cross_entropy(hidden, weight, targets, impl=impl, ignore_index=-1).isfinite()


@pytest.mark.parametrize("impl", IMPLS)
def test_bad_input(impl):
    hidden, weight, targets = operands(9, 7, 3)
    for change, error, message in (
        ({"hidden": hidden.long()}, TypeError, "floating point tensor hidden, got torch.int64"),
        ({"linear_weight": [1.0]}, TypeError, "floating point tensor linear_weight, got <class 'list'>"),
        ({"hidden": hidden.to(torch.float8_e4m3fn)}, TypeError, "tensor hidden, got torch.float8_e4m3fn; it takes float16"),
        (
            {"linear_weight": weight.to(torch.float8_e5m2)},
            TypeError,
            "tensor linear_weight, got torch.float8_e5m2; .* float32, float64",
        ),
        ({"ignore_index": None}, TypeError, "ignore_index as an int, got NoneType"),
        ({"ignore_index": 2.5}, TypeError, "ignore_index as an int, got float 2.5"),
        ({"targets": targets.int()}, TypeError, "int64 targets, got torch.int32"),
        ({"targets": targets[:8]}, ValueError, r"targets \[...\], got hidden \[9, 3\], linear_weight \[7, 3\], targets \[8\]"),
        ({"linear_weight": weight[:, :2]}, ValueError, r"got hidden \[9, 3\], linear_weight \[7, 2\]"),
        ({"linear_weight": weight[:0]}, ValueError, "V >= 1 and D >= 1"),
        ({"linear_weight": weight.half()}, ValueError, "one dtype, got torch.float32 and torch.float16"),
        ({"linear_weight": weight.to("meta")}, ValueError, "one device"),
        ({"label_smoothing": 1.5}, ValueError, r"label_smoothing must lie in \[0, 1\], got 1.5"),
        ({"z_loss": math.nan}, ValueError, "z_loss must be finite in float32 and not negative, got nan"),
        ({"chunk_bytes": 0}, ValueError, "chunk_bytes must be positive, or None for the default, got 0"),
        ({"chunk_bytes": 1.5}, TypeError, "chunk_bytes as an int, got float 1.5"),
        ({"reduction": "max"}, ValueError, "reduction must be one of 'mean', 'sum', 'none', got 'max'"),
        ({"impl": "cut"}, ValueError, "impl must be one of 'auto', 'reference', 'torch', 'chunked', 'triton', got 'cut'"),
    ):
        call = {"hidden": hidden, "linear_weight": weight, "targets": targets, "impl": impl} | change
        with pytest.raises(error, match=message):
            linear_cross_entropy(**call)


def test_torch_is_obeyed_or_refused(monkeypatch):
    hidden, weight, targets = operands(9, 7, 3)
    if hasattr(torch.nn, "LinearCrossEntropyOptions"):
        with pytest.raises(ValueError, match=r"must be 0, 0 and None, got 0\.1, 0\.0 and None"):
            linear_cross_entropy(hidden, weight, targets, impl="torch", label_smoothing=0.1)
        monkeypatch.delattr(torch.nn, "LinearCrossEntropyOptions")
    with pytest.raises(ValueError, match=r"needs torch 2\.13 or later, got"):
        linear_cross_entropy(hidden, weight, targets, impl="torch")


@pytest.mark.skipif(DEVICE == "cuda", reason="the choice on CPUs")
def test_auto_on_a_cpu_goes_by_the_number_of_logits(monkeypatch):
    hidden, weight, targets = operands(16, 8, 3)
    calls = []
    operator = autograd.chunked_losses
    monkeypatch.setattr(autograd, "chunked_losses", lambda *o: calls.append(1) or operator(*o))
    for few, expected in ((128, 0), (127, 1)):
        monkeypatch.setattr(api, "FEW_LOGITS", few)
        linear_cross_entropy(hidden, weight, targets)
        assert len(calls) == expected


@settings(max_examples=15, deadline=None)
@given(
    N=st.integers(1, 30),
    V=st.integers(1, 20),
    D=st.integers(1, 6),
    smoothing=st.floats(0, 1),
    z_loss=st.floats(0, 2),
    reduction=st.sampled_from(["mean", "sum"]),
    seed=st.integers(0, 1000),
)
def test_chunks_are_the_whole(N, V, D, smoothing, z_loss, reduction, seed):
    hidden, weight, targets = operands(N, V, D, torch.float64, ignored=N // 4, seed=seed)
    options = {"label_smoothing": smoothing, "z_loss": z_loss, "reduction": reduction}
    got, expected = (
        with_gradients(linear_cross_entropy, hidden, weight, targets, 0.7, impl=impl, **options)
        for impl in ("chunked", "reference")
    )
    # differences of float64 sums in two orders
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.skipif(not TRITON_INSTALLED, reason="needs triton")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("n, V", [(3, 5), (2, 2048), (2, 2049), (1, 1)])
@pytest.mark.parametrize("smoothing, z_loss, softcap, vectors", [(0.0, None, None, False), (0.1, 0.02, 5.0, True)])
def test_kernel_stays_inside_its_buffers(dtype, n, V, smoothing, z_loss, softcap, vectors):
    """NaN and 7 lie around the operands: NaN would show in every sum, and what lies around the results must survive."""
    from dae_kernels.linear_cross_entropy import fused

    torch.manual_seed(V)
    padded = torch.full((n + 2, V + 40), 7.0, device=DEVICE)
    gradients = padded.to(dtype, copy=True)
    logits, gradient = (t[1:-1, 20:-20] for t in (padded, gradients))
    logits.copy_(torch.randn(n, V) * 3)
    targets = torch.randint(V, (n + 2,), device=DEVICE)
    targets[2] = -1 if n > 1 else targets[2]
    losses = torch.full((n + 2,), math.nan, device=DEVICE)
    z = None if z_loss is None else torch.tensor(z_loss, device=DEVICE)
    bias, weight = (torch.rand(V + 2, device=DEVICE).index_fill_(0, torch.tensor([0, V + 1]), math.nan) for _ in range(2))
    bias, weight = (bias[1:-1], weight[1:-1]) if vectors else (None, None)
    wide = [None if t is None else t.double() for t in (logits, bias, weight)]
    expected_d, expected = wide[0], torch.empty(n, device=DEVICE, dtype=torch.float64)
    chunked.softmax_step(expected_d, *wide[1:], targets[1:-1], expected, z, smoothing, softcap, True)
    before, alone = padded.clone(), losses.clone()
    fused.launch(logits, gradient, bias, weight, targets[1:-1], alone[1:-1], z, smoothing, softcap, False)
    assert (gradient == 7).all()
    fused.launch(logits, gradient, bias, weight, targets[1:-1], losses[1:-1], z, smoothing, softcap, True)
    assert torch.equal(padded, before) and torch.equal(alone[1:-1], losses[1:-1])
    if dtype == torch.float32:  # in place
        fused.launch(logits, logits, bias, weight, targets[1:-1], alone[1:-1], z, smoothing, softcap, True)
        assert torch.equal(logits, gradient) and torch.equal(alone[1:-1], losses[1:-1])
    assert losses[0].isnan() and losses[-1].isnan()
    around = torch.ones_like(padded, dtype=torch.bool)
    around[1:-1, 20:-20] = False
    assert (padded[around] == 7).all() and (gradients[around] == 7).all()
    # float32 sums of up to 2049 terms of the order of 1; the gradient is rounded to its dtype once
    torch.testing.assert_close(losses[1:-1].double(), expected, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(gradient.double(), expected_d, rtol=torch.finfo(dtype).eps + 2e-6, atol=1e-6)


MEMORY = """
import sys, torch
from dae_kernels import linear_cross_entropy
peak = lambda: int(open('/proc/self/status').read().split('VmHWM:')[1].split()[0]) // 1024
def step(N, V=16384):
    hidden, weight = torch.randn(N, 32, requires_grad=True), torch.randn(V, 32, requires_grad=True)
    linear_cross_entropy(hidden, weight, torch.randint(V, (N,)), impl=sys.argv[1]).backward()
step(100)
before = peak()
step(1500)
print(peak() - before)
"""


def test_memory_is_less_than_a_quarter_of_all_logits():
    """At V = 16384, both passes, by the process's peak; the first step pays for what torch sets up."""
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}  # or glibc's hoard of freed blocks counts as well
    grown = {}
    for impl in ("reference", "chunked"):
        done = subprocess.run([sys.executable, "-c", MEMORY, impl], env=environment, check=True, capture_output=True, text=True)
        grown[impl] = int(done.stdout)
    assert grown["reference"] > 2 * 1500 * 16384 * 4 / 2**20  # logits and their softmax
    assert grown["chunked"] < grown["reference"] / 4


def test_cuda_path_on_fake_tensors(monkeypatch):
    """The operator's own code without a GPU: 16-bit products, float32 sums; and no value of a target is read."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    # torch has no working rule for it on fake tensors (2.11 takes the dtype for beta)
    monkeypatch.setattr(torch, "addmm", lambda total, a, b, **_: total)
    expected = [([70], torch.float32), ([70, 8], torch.bfloat16), ([40, 8], torch.float32), ([40], torch.float32)]
    with FakeTensorMode(), torch.no_grad():
        hidden, weight = torch.empty(70, 8, device="cuda"), torch.empty(40, 8, device="cuda")
        targets = torch.zeros(70, dtype=torch.int64, device="cuda")
        class_vector, row_vector = torch.empty(40, device="cuda"), torch.empty(70, device="cuda")
        tensors = hidden, weight, class_vector, class_vector, targets, torch.empty((), device="cuda"), row_vector
        results = chunked.chunked_launcher(*tensors, 0.1, 5.0, torch.bfloat16, True, True, True, False, None)
        for result, (shape, dtype) in zip(results, expected, strict=True):
            assert (list(result.shape), result.dtype, result.device.type) == (shape, dtype, "cuda")
        for impl in ("reference", "chunked"):
            loss = linear_cross_entropy(hidden.bfloat16(), weight.bfloat16(), targets, impl=impl, **EVERYTHING)
            assert (list(loss.shape), loss.dtype, loss.device.type) == ([], torch.float32, "cuda")
