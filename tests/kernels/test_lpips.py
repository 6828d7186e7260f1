"""`lpips` against the lpips package's formula, written out in float64: values and all three gradients.

Tolerances: an implementation may err as much as twice that formula does when torch computes it in the dtype of the maps. Where
torch happens to be (nearly) exact, which is often so for the few numbers that are sums, the roundings of the formula stand in for
its error (tests/tolerances.py): to float32 for the value and the weight's gradient, to the map's dtype for the others.
"""

import os
import subprocess
import sys

import dae_kernels
import pytest
import torch
from dae_kernels.lpips import api, lpips
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import assert_errors
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IMPLS = ["reference", "triton"]
SHAPES = [(2, 64, 8, 8), (3, 60, 7, 9), (1, 1, 1, 1), (2, 63, 60), (5, 3), (1, 130, 5, 1), (2, 5, 2, 3, 4), (3, 512, 3, 3)]


def lpips_formula(a: Tensor, b: Tensor, weight: Tensor | None, eps: float = 1e-10) -> Tensor:
    """normalize_tensor, difference, 1x1 convolution and spatial_average of the lpips package."""
    u, v = (x / (torch.sqrt(torch.sum(x**2, dim=1, keepdim=True)) + eps) for x in (a, b))
    squares = (u - v) ** 2
    if weight is not None:
        squares = squares * weight.to(squares.dtype).view(1, -1, *[1] * (a.dim() - 2))
    return squares.sum(dim=1).reshape(len(a), -1).mean(dim=1)


def draw(shape, seed=0, dtype=torch.float32):
    """a, b, weight and a cotangent; non-negative with many zeros, as features behind a ReLU are."""
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(shape, generator=generator).add(0.7).relu() for _ in range(2))
    weight, cotangent = torch.randn(shape[1], generator=generator), torch.randn(shape[0], generator=generator)
    a[:, 0] += 0.1  # zero vectors have a test of their own: the formula's gradient is NaN there
    b[:, 0] += 0.1
    return a.to(DEVICE, dtype), b.to(DEVICE, dtype), weight.to(DEVICE), cotangent.to(DEVICE)


def arrange(x: Tensor, layout: str) -> Tensor:
    if layout == "channels_last":
        return x.movedim(1, -1).contiguous().movedim(-1, 1)
    if layout == "expanded":  # of the first image
        return x[:1].expand(x.shape)
    if layout == "sliced":  # neither dense nor of positions at one distance
        wide = torch.full((x.shape[0], 2 * x.shape[1], *[2 * n for n in x.shape[2:]]), torch.nan, dtype=x.dtype, device=x.device)
        view = wide[(slice(None), slice(1, None, 2), *[slice(1, None, 2) for _ in x.shape[2:]])]
        return view.copy_(x)
    if layout == "turned":
        return x.transpose(-1, -2).contiguous().transpose(-1, -2) if x.dim() > 3 else x
    return x.contiguous()


def gradients(function, a, b, weight, cotangent):
    """Value and gradients, with respect to operands of exactly these strides."""
    operands = [None if x is None else x.detach().requires_grad_() for x in (a, b, weight)]
    out = function(*operands)
    wanted = [x for x in operands if x is not None]
    return out.detach(), torch.autograd.grad(out, wanted, cotangent.to(out.dtype))


def check(a, b, weight, cotangent, **options) -> None:
    out, grads = gradients(lambda *x: lpips(*x, **options), a, b, weight, cotangent)
    eps = options.get("eps", 1e-10)
    wide = [None if x is None else x.double() for x in (a, b, weight)]

    def formula(*operands):
        value, derivatives = gradients(lambda *x: lpips_formula(*x, eps), *operands, cotangent)
        return [value, *derivatives]

    assert out.dtype == torch.float32 and out.shape == a.shape[:1]
    assert_errors([out, *grads], formula(*wide), formula(a, b, weight), results=lambda: formula(*wide))
    for x, gradient in zip((a, b), grads, strict=False):
        assert gradient.dtype == x.dtype and gradient.shape == x.shape
        if options["impl"] == "triton":
            assert gradient.stride() == torch.empty_like(x).stride()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", SHAPES)
def test_float32(impl, layout, shape):
    a, b, weight, cotangent = draw(shape)
    a, b = arrange(a, layout), arrange(b, layout)
    check(a, b, weight, cotangent, impl=impl)
    check(a, b, None, cotangent, impl=impl)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_half(impl, dtype, layout):
    a, b, weight, cotangent = draw((2, 60, 7, 9), dtype=dtype)
    check(arrange(a, layout), arrange(b, layout), weight, cotangent, impl=impl)
    check(arrange(a, layout), arrange(b, layout), weight.to(dtype), cotangent, impl=impl)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("layouts", [("sliced", "contiguous"), ("channels_last", "sliced"), ("turned", "channels_last")])
def test_each_gradient_has_the_layout_of_its_map(impl, layouts):
    a, b, weight, cotangent = draw((2, 6, 5, 4))
    a, b = (arrange(x, layout) for x, layout in zip((a, b), layouts, strict=True))
    check(a, b, weight, cotangent, impl=impl)
    check(b, a, weight.repeat_interleave(2)[::2], cotangent.repeat(2)[::2], impl=impl)
    check(a, b, None, cotangent[:1].expand(2), impl=impl)


@pytest.mark.parametrize("impl", IMPLS)
def test_expanded_map(impl):
    a, b, weight, cotangent = draw((3, 6, 5, 4))
    base = a[:1].clone().requires_grad_()
    out = lpips(base.expand(3, 6, 5, 4), b, weight, impl=impl)
    (gradient,) = torch.autograd.grad(out, base, cotangent)
    wide = base.detach().double().requires_grad_()
    truth = lpips_formula(wide.expand(3, 6, 5, 4), b.double(), weight)
    torch.testing.assert_close(out.double(), truth)
    torch.testing.assert_close(gradient.double(), torch.autograd.grad(truth, wide, cotangent.double())[0])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("layouts", [("contiguous", "contiguous"), ("channels_last", "contiguous"), ("channels_last", "turned")])
def test_equal_maps_have_distance_and_gradients_of_exactly_zero(impl, layouts):
    a, _, weight, cotangent = draw((2, 67, 6, 5))
    a, b = (arrange(a.clone(), layout) for layout in layouts)
    out, grads = gradients(lambda *x: lpips(*x, impl=impl), a, b, weight, cotangent)
    assert (out == 0).all() and all((gradient == 0).all() for gradient in grads)


@pytest.mark.parametrize("impl", IMPLS)
def test_zero_vectors(impl):
    a, b, weight, cotangent = draw((2, 6, 4, 3))
    a[:, :, 1] = 0
    b[:, :, 2] = 0
    a[0, :, 3], b[0, :, 3] = 0, 0
    out, (da, db, d_weight) = gradients(lambda *x: lpips(*x, impl=impl), a, b, weight, cotangent)
    assert all(g.isfinite().all() for g in (da, db, d_weight))
    torch.testing.assert_close(out.double(), lpips_formula(a.double(), b.double(), weight))  # |0 - v|^2 = weight . v^2
    assert (da[:, :, 1] == 0).all() and (db[:, :, 2] == 0).all()
    assert (da[:, :, 2] != 0).any() and (db[:, :, 1] != 0).any()
    zero = torch.zeros_like(a).requires_grad_()
    nothing = lpips(zero, zero, impl=impl)
    assert (nothing == 0).all() and (torch.autograd.grad(nothing.sum(), zero)[0] == 0).all()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_nan_is_not_hidden(impl, value):
    """NaN, or an infinity, whose unit vector is NaN, in one channel of one position of the first image."""
    a, b, weight, cotangent = draw((2, 6, 4, 3))
    a[0, 2, 1, 1] = value
    out, (da, db, d_weight) = gradients(lambda *x: lpips(*x, impl=impl), a, b, weight, cotangent)
    assert out[0].isnan() and out[1].isfinite()
    here = torch.zeros_like(a, dtype=torch.bool)
    here[0, 2 if value == torch.inf else slice(None), 1, 1] = True
    assert da[here].isnan().all() and da[:, :, 2:].isfinite().all() and da[1].isfinite().all()
    assert db[:, :, 2:].isfinite().all() and d_weight[2].isnan()
    if value != value:
        assert db[here].isnan().all() and d_weight.isnan().all()
        assert lpips(a, a, impl=impl)[0].isnan()
        single = torch.full((1, 1), torch.nan, device=DEVICE)
        assert lpips(single, single, impl=impl).isnan().all()


@pytest.mark.parametrize("impl", IMPLS)
def test_closed_forms(impl):
    a = torch.tensor([[3.0, 0.0], [0.0, 2.0], [5.0, 0.0]], device=DEVICE)
    b = torch.tensor([[0.0, 7.0], [0.0, -1.0], [1.0, 0.0]], device=DEVICE)
    weight = torch.tensor([2.0, 0.5], device=DEVICE)
    torch.testing.assert_close(lpips(a, b, impl=impl).cpu(), torch.tensor([2.0, 4.0, 0.0]))  # 2 - 2 cos
    torch.testing.assert_close(lpips(a, b, weight, impl=impl).cpu(), torch.tensor([2.5, 2.0, 0.0]))
    # A large eps: u = 3 / (3 + 1), v = 7 / (7 + 1).
    torch.testing.assert_close(lpips(a, b, eps=1.0, impl=impl)[0].cpu(), torch.tensor(0.75**2 + 0.875**2))
    check(a + 0.5, b - 0.5, weight, weight.new_ones(3), eps=0.3, impl=impl)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("scale", [1e-6, 1e4])
def test_length_of_the_vectors_does_not_matter(impl, scale):
    a, b, weight, cotangent = draw((2, 20, 4, 4))
    check(a * scale, b / scale, weight, cotangent, impl=impl)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("wanted", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (0, 1, 1)])
def test_only_what_is_wanted_is_computed(impl, wanted, monkeypatch):
    a, b, weight, cotangent = draw((2, 9, 3, 5))
    _, expected = gradients(lambda *x: lpips(*x, impl=impl), a, b, weight, cotangent)
    operands = [x.requires_grad_(bool(wants)) for x, wants in zip((a, b, weight), wanted, strict=True)]
    if impl == "triton":
        from dae_kernels.lpips import fused

        launch, asked = fused.launch_gradient, []
        monkeypatch.setattr(fused, "launch_gradient", lambda *x: (asked.append([y is not None for y in x[5:8]]), launch(*x)))
    lpips(*operands, impl=impl).backward(cotangent)
    if impl == "triton":
        assert asked == [[bool(wants) for wants in wanted]]
    for x, wants, gradient in zip(operands, wanted, expected, strict=True):
        assert torch.equal(x.grad, gradient) if wants else x.grad is None


def test_saved_for_backward():
    """a, b and weight themselves, nothing else."""
    a, b, weight, _ = draw((2, 9, 3, 5))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: (saved.append(x.data_ptr()), x)[1], lambda x: x):
        lpips(a.requires_grad_(), b, weight, impl="triton")
    assert set(saved) == {a.data_ptr(), b.data_ptr(), weight.data_ptr()}


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("B, C, P", [(2, 63, 60), (1, 5, 1), (3, 130, 33)])
def test_kernels_stay_inside_their_buffers(monkeypatch, layout, B, C, P):
    """NaN around what is read, and a value around what is written. A small tile makes many programs and loops."""
    from dae_kernels.lpips import fused

    monkeypatch.setattr(fused, "TILE", 256)

    monkeypatch.setattr(fused, "pair_layout", fused.PairLayout)  # not the ones that were kept
    monkeypatch.setattr(fused, "PROGRAMS", 4)
    guard, wholes = 37, []

    def guarded(value, *shape):
        count = torch.Size(shape).numel()
        wholes.append((torch.full((count + 2 * guard,), value, device=DEVICE), value))
        return wholes[-1][0][guard:-guard].view(shape)

    def maps(value):
        return guarded(value, B, P, C).transpose(1, 2) if layout == "channels_last" else guarded(value, B, C, P)

    a, b, da, db = maps(torch.nan), maps(torch.nan), maps(-7.0), maps(-7.0)
    weight, d_out = guarded(torch.nan, C), guarded(torch.nan, B)
    for target, source in zip((a, b, weight, d_out), draw((B, C, P)), strict=True):
        target.copy_(source)
    split = fused.PairLayout(a.shape)
    part, part_weight = guarded(-7.0, B, split.chunks), guarded(-7.0, split.programs, C)
    fused.launch_distance(split, a, b, weight, part, 1e-10)
    fused.launch_gradient(split, d_out, a, b, weight, da, db, part_weight, 1e-10)
    for whole, value in wholes:
        ends = torch.cat([whole[:guard], whole[-guard:]])
        assert torch.equal(ends, torch.full_like(ends, value)) or (value != value and ends.isnan().all())
    truth, (true_da, true_db, true_dw) = gradients(lpips_formula, a.double(), b.double(), weight.double(), d_out)
    for got, true in ((part.sum(1) / P, truth), (da, true_da), (db, true_db), (part_weight.sum(0), true_dw)):
        # Rounding of C terms and some more in each number, each at most as large as the largest.
        assert (got.double() - true).abs().max() <= 1e-6 * true.abs().max().clamp_min(1e-3)


@pytest.mark.parametrize("splits", [(64, 1), (64, 528), (4096, 4)])
def test_splits_do_not_show(monkeypatch, splits):
    from dae_kernels.lpips import fused

    a, b, weight, cotangent = draw((2, 7, 5, 9))
    monkeypatch.setattr(fused, "TILE", splits[0])
    monkeypatch.setattr(fused, "pair_layout", fused.PairLayout)  # not the ones that were kept
    monkeypatch.setattr(fused, "PROGRAMS", splits[1])
    check(a, b, weight, cotangent, impl="triton")
    again = [gradients(lambda *x: lpips(*x, impl="triton"), a, b, weight, cotangent) for _ in range(2)]
    assert torch.equal(again[0][0], again[1][0]) and all(map(torch.equal, again[0][1], again[1][1]))


def test_float64_is_for_the_reference_alone():
    a, b, weight, _ = draw((2, 4, 3, 2), dtype=torch.float64)
    out = lpips(a, b, weight)
    assert out.dtype == torch.float64
    torch.testing.assert_close(out, lpips_formula(a, b, weight.double()), rtol=1e-14, atol=1e-14)
    operands = [x.double().requires_grad_() for x in (a, b, weight)]
    assert torch.autograd.gradcheck(lpips, operands) and torch.autograd.gradgradcheck(lpips, operands)
    with pytest.raises(ValueError, match="float64"):
        lpips(a, b, impl="triton")


@pytest.mark.parametrize("impl", IMPLS)
def test_compiles_as_one_graph(impl):
    a, b, weight, cotangent = draw((2, 6, 4, 3))
    compiled = torch.compile(lambda *x: lpips(*x, impl=impl), fullgraph=True, backend="aot_eager")
    out, grads = gradients(compiled, a, b, weight, cotangent)
    expected, expected_grads = gradients(lpips_formula, a, b, weight, cotangent)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(grads, expected_grads)


def test_operators():
    """opcheck of the operators, run by the interpreter."""
    from dae_kernels.lpips.fused import lpips_backward, lpips_forward

    a, b, weight, cotangent = draw((2, 6, 4, 3))
    turned = arrange(a, "channels_last")
    torch.library.opcheck(lpips_forward.op, (a, turned, weight, 1e-10))
    torch.library.opcheck(lpips_backward.op, (cotangent, turned, b, None, 1e-10, True, True, False))
    torch.library.opcheck(lpips_backward.op, (cotangent, a, b, weight, 1e-10, False, False, True))


FAKE = """
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from dae_kernels.lpips.fused import lpips_backward, lpips_forward
with FakeTensorMode():
    make = lambda *strides: torch.empty_strided((2, 6, 4, 3), strides, device="cuda", dtype=torch.bfloat16)
    last, first = make(72, 1, 18, 6), make(72, 12, 3, 1)
    out = lpips_forward(last, first, None, 1e-10)
    da, db, dw = lpips_backward(out, last, first, torch.empty(6, device="cuda"), 1e-10, True, True, True)
assert out.shape == (2,) and out.dtype == dw.dtype == torch.float32 and dw.shape == (6,)
assert da.stride() == last.stride() and db.stride() == first.stride() and da.dtype == db.dtype == torch.bfloat16
print("traced")
"""


def test_fake_cuda_tensors_without_the_interpreter():
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", FAKE], capture_output=True, text=True, env=environment)
    assert done.stdout.strip() == "traced", done.stderr[-3000:]


@pytest.mark.parametrize("impl", IMPLS)
def test_autocast_leaves_the_sums_in_float32(impl):
    a, b, weight, _ = draw((2, 6, 4, 3), dtype=torch.bfloat16)
    with torch.autocast(DEVICE, torch.bfloat16):
        out = lpips(a, b, weight, impl=impl)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, lpips(a, b, weight))


@pytest.mark.parametrize("impl", IMPLS)
def test_bad_input(impl):
    a, b, weight, _ = draw((2, 6, 4, 3))
    for operands, options, kind, message in [
        ((a, b[:1]), {}, ValueError, r"one shape, got a \[2, 6, 4, 3\], b \[1, 6, 4, 3\]"),
        ((a[0, 0, 0], b[0, 0, 0]), {}, ValueError, r"\[B, C, \*positions\].*got a \[3\]"),
        ((a, b.half()), {}, TypeError, "one dtype, got a torch.float32, b torch.float16"),
        ((a.int(), b), {}, TypeError, "floating point tensor a, got torch.int32"),
        ((a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn)), {}, TypeError, "a, got torch.float8_e4m3fn; it takes float16"),
        ((a, b, weight.to(torch.float8_e5m2)), {}, TypeError, "weight, got torch.float8_e5m2; .*bfloat16, float32, float64"),
        ((a, None), {}, TypeError, "floating point tensor b, got <class 'NoneType'>"),
        ((a, b, weight[:5]), {}, ValueError, r"weight \[6\].*got \[5\]"),
        ((a, b, weight.long()), {}, TypeError, "floating point tensor weight, got torch.int64"),
        ((a, b.to("meta")), {}, ValueError, "needs b on .*got meta"),
        ((a[:, :0], b[:, :0]), {}, ValueError, r"at least one channel and one position, got \[2, 0, 4, 3\]"),
        ((a[..., :0], b[..., :0]), {}, ValueError, r"at least one channel and one position, got \[2, 6, 4, 0\]"),
        ((a, b), {"eps": -1.0}, ValueError, "not negative, got -1.0"),
        ((a, b), {"eps": float("nan")}, ValueError, "not negative, got nan"),
    ]:
        with pytest.raises(kind, match=message):
            lpips(*operands, **options, impl=impl)
    with pytest.raises(ValueError, match="impl must be one of"):
        lpips(a, b, impl="cuda")


def test_too_many_channels_and_no_images():
    wide = torch.randn(1, api.MAX_CHANNELS + 1, 1, 1, device=DEVICE)
    with pytest.raises(ValueError, match="at most 2048 channels, got 2049"):
        lpips(wide, wide, impl="triton")
    check(wide[:, :-1], wide[:, 1:], None, wide.new_ones(1), impl="triton")
    none = torch.empty(0, 3, 2, 2, device=DEVICE, requires_grad=True)
    out = lpips(none, none)
    assert out.shape == (0,) and torch.autograd.grad(out.sum(), none)[0].shape == none.shape


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 3), st.integers(1, 20), st.integers(1, 12), st.booleans(), st.integers(0, 99), st.sampled_from(IMPLS))
def test_properties(B, C, P, last, seed, impl):
    a, b, weight, _ = draw((B, C, P), seed)
    a, b = (arrange(x, "channels_last" if last else "contiguous") for x in (a, b))
    weight = weight.abs()
    distance = lpips(a, b, weight, impl=impl)
    assert (distance >= 0).all() and (distance <= 2 * weight.max() * (1 + 1e-6)).all()  # of vectors without negative entries
    torch.testing.assert_close(distance, lpips(b, a, weight, impl=impl))
    torch.testing.assert_close(distance, lpips(a * 4, b / 2, weight, impl=impl))
    order = torch.randperm(P)
    torch.testing.assert_close(distance, lpips(a[..., order], b[..., order], weight, impl=impl))


def test_the_old_name_works_with_a_warning():
    a, b, weight, _ = draw((2, 5, 3, 3))
    with pytest.warns(FutureWarning, match=r"dae_kernels\.lpips"):
        distance = dae_kernels.perceptual_tap(a, b, weight, eps=0.1)
    assert torch.equal(distance, lpips(a, b, weight, eps=0.1))
