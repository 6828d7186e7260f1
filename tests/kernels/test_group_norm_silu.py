"""group_norm_silu: the formula in float64, layouts in and out, gradients in any layout, what the kernels touch and save."""

import functools
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from dae_kernels import group_norm_silu
from dae_kernels.dispatch import triton_refusal
from dae_kernels.group_norm_silu import fused
from dae_kernels.group_norm_silu import layout as layouts
from group_norm import DEVICE, GRADIENT_LAYOUTS, LAYOUTS, Counted, by_hand, call, check, needs_triton, operands, run
from hypothesis import given, settings
from hypothesis import strategies as st

IMPLS = ["reference", pytest.param("triton", marks=needs_triton)]


@pytest.fixture(params=["whole groups", "chunks"])
def way(request, monkeypatch):
    """The two ways of the kernels' forward pass, both for small maps."""
    if request.param == "chunks":
        monkeypatch.setattr(layouts, "WHOLE_GROUP", 0)
    monkeypatch.setattr(layouts, "map_layout", layouts.MapLayout)  # not the ones that were kept
    return request.param


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "shape, groups",
    [((1, 63, 9, 1), 21), ((2, 15, 1, 1), 15), ((1, 6, 33, 31), 1), ((1, 130, 6, 5), 13), ((1, 1, 3, 50), 1)],
)
def test_formula(impl, layout, shape, groups, way):
    check(operands(shape, layout), groups, impl)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("activation", ["silu", None])
@pytest.mark.parametrize("affine, adaptive", [(True, True), (False, True), (False, False)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_parameters(impl, activation, affine, adaptive, layout, way):
    check(operands((2, 12, 5, 6), layout, affine=affine, adaptive=adaptive), 3, impl, activation)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", [(3, 6), (2, 6, 9), (2, 6, 2, 3, 4)])
def test_other_numbers_of_dimensions(impl, shape):
    check(operands(shape), 2, impl)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(impl, layout, dtype, way):
    check(operands((2, 16, 6, 7), layout, dtype), 4, impl)


@pytest.mark.parametrize("layout", LAYOUTS)
@needs_triton
def test_mean_far_from_zero(layout, way):
    """At mean / std = 200, E[x^2] - E[x]^2 in float32 leaves three digits of the deviation."""
    check(operands((2, 16, 33, 31), layout, mean=200.0), 4, "triton")


@needs_triton
@pytest.mark.parametrize("layout", LAYOUTS)
def test_more_tiles_than_one_program_takes(layout, monkeypatch):
    """Chunks of several tiles, a last one that is not full, more chunks and channels than the merging kernels take at once."""
    for name, value in {"TILE": 16, "PROGRAMS": 4, "TILES_PER_CHUNK": 3, "WHOLE_GROUP": 0}.items():
        monkeypatch.setattr(layouts, name, value)
    for name, value in {"MERGE": {"BLOCK": 8}, "MERGE_GRADIENTS": {"BLOCK_C": 2, "BLOCK_S": 2}}.items():
        monkeypatch.setattr(fused, name, value)
    monkeypatch.setattr(layouts, "map_layout", layouts.MapLayout)  # not the ones that were kept
    check(operands((2, 6, 13, 11), layout), 2, "triton")


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("gradient", GRADIENT_LAYOUTS)
def test_gradients_of_any_layout(impl, layout, gradient):
    values = operands((2, 8, 5, 6), layout)
    check(values, 4, impl, cotangent=GRADIENT_LAYOUTS[gradient](torch.randn_like(values[0])))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_inputs_that_are_not_dense(impl, layout):
    """A crop, every other position, and a tensor expanded over the batch."""
    x, weight, bias, *_ = operands((2, 8, 12, 10), layout)
    for view in (x[:, :, 1:7, 2:9], x[:, :, ::2], x[:1].expand(3, -1, -1, -1), x[:, 2:6], x.transpose(2, 3)):
        w, b = (None, None) if view.shape[1] != 8 else (weight, bias)
        expected = by_hand(view, w, b, None, None, 2, 1e-6, "silu").float()
        torch.testing.assert_close(group_norm_silu(view, 2, w, b, 1e-6, impl=impl), expected, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("impl", IMPLS)
def test_only_what_needs_a_gradient_has_one(impl):
    x, weight, bias, *_ = operands((2, 4, 3, 3))
    weight.requires_grad_()
    group_norm_silu(x, 2, weight, bias, impl=impl).sum().backward()
    assert x.grad is None and bias.grad is None and weight.grad is not None


@pytest.mark.parametrize("impl", IMPLS)
def test_dtypes_of_parameters_are_kept(impl):
    """float32 parameters beside a bfloat16 map, as under autocast, and parameters of half precision."""
    for dtype in (torch.float32, torch.bfloat16):
        x, weight, bias, *_ = operands((2, 4, 3, 3), dtype=torch.bfloat16)
        weight, bias = weight.to(dtype).requires_grad_(), bias.to(dtype).requires_grad_()
        with torch.autocast(DEVICE.type, torch.bfloat16):
            y = group_norm_silu(x, 2, weight, bias, impl=impl)
        y.float().sum().backward()
        assert y.dtype == torch.bfloat16 and weight.grad.dtype == bias.grad.dtype == dtype


@pytest.mark.parametrize("impl", IMPLS)
def test_constant_and_extreme_groups(impl, way):
    """No spread gives bias alone; a NaN stays within its group; large values do not overflow SiLU's exponential."""
    close = {"rtol": 0, "atol": 7.0 * 2**-23 * 1e-5**-0.5}  # a rounding of the mean, over sqrt(eps)
    x = torch.full((1, 4, 3, 3), 7.0, device=DEVICE)
    bias = torch.arange(4.0, device=DEVICE)
    torch.testing.assert_close(
        group_norm_silu(x, 2, None, bias, impl=impl), F.silu(bias).view(1, 4, 1, 1).expand(1, 4, 3, 3), **close
    )
    x = torch.randn(2, 4, 3, 3, device=DEVICE)
    x[0, 1, 2, 2] = float("nan")
    y = group_norm_silu(x, 2, impl=impl)
    assert y[0, :2].isnan().all() and y[0, 2:].isfinite().all() and y[1].isfinite().all()
    weight = torch.full((4,), 1e4, device=DEVICE)
    x = torch.randn(2, 4, 3, 3, device=DEVICE, requires_grad=True)
    y = group_norm_silu(x, 2, weight, impl=impl)
    y.sum().backward()
    assert y.isfinite().all() and x.grad.isfinite().all() and (y >= -0.2785).all()


@pytest.mark.parametrize("shape", [(0, 4, 3, 3), (2, 4, 0, 3)])
def test_empty(shape):
    x = torch.randn(shape, device=DEVICE, requires_grad=True)
    group_norm_silu(x, 2).sum().backward()
    assert x.grad.shape == shape
    if not triton_refusal(DEVICE):
        with pytest.raises(ValueError, match="at least one element"):
            group_norm_silu(x, 2, impl="triton")


@needs_triton
@settings(max_examples=8, deadline=None)
@given(
    B=st.integers(1, 2),
    G=st.integers(1, 5),
    per_group=st.integers(1, 9),
    H=st.integers(1, 7),
    W=st.integers(1, 7),
    layout=st.sampled_from(sorted(LAYOUTS)),
    seed=st.integers(0, 99),
)
def test_invariances(B, G, per_group, H, W, layout, seed):
    """A group's shift and scale do not matter; positions and images commute with it; the kernel is deterministic."""
    x, weight, bias, *_ = operands((B, G * per_group, H, W), layout, seed=seed)
    apply = functools.partial(group_norm_silu, num_groups=G, weight=weight, bias=bias, eps=1e-12, impl="triton")
    y = apply(x)
    assert torch.equal(apply(x), y)
    if H * W * per_group > 1 and x.reshape(B, G, -1).std(2).min() > 0.1:
        scale = torch.rand(B, G, 1, 1, 1, device=DEVICE) + 0.5
        moved = (x.view(B, G, per_group, H, W) if layout == "contiguous" else x.unflatten(1, (G, per_group))) * scale + scale
        torch.testing.assert_close(apply(moved.flatten(1, 2)), y, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(apply(x.flip(0, 2, 3)), y.flip(0, 2, 3), rtol=1e-5, atol=1e-5)


@needs_triton
@pytest.mark.parametrize("shape, groups, launches", [((2, 32, 16, 16), 2, 1), ((1, 16, 32, 32), 1, 1), ((1, 17, 32, 32), 1, 3)])
def test_a_group_that_fits_into_a_program_takes_one_launch(shape, groups, launches, monkeypatch):
    counts = []
    for name in ("whole_group_kernel", "moments_kernel", "merge_moments_kernel", "normalise_kernel"):
        kernel = getattr(fused, name)
        monkeypatch.setattr(fused, name, Counted(kernel, counts))
    check(operands(shape), groups, "triton")
    assert len(counts) == launches


@needs_triton
def test_gradients_of_parameters_are_deterministic():
    values = operands((3, 16, 17, 19), "channels_last", adaptive=True)
    cotangent = torch.randn_like(values[0])
    first, second = (run(call("triton", 4), values, cotangent) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@needs_triton
@pytest.mark.parametrize("layout", LAYOUTS)
def test_nothing_is_touched_beyond_the_buffers(layout, way):
    """NaN around x and dy must not come in, and guards around y and dx must stand."""
    B, C, H, W = 2, 9, 7, 5
    size, guard = B * C * H * W, 300

    def surrounded(value):
        buffer = torch.full((size + 2 * guard,), value, device=DEVICE)
        strides = (C * H * W, 1, W * C, C) if layout == "channels_last" else (C * H * W, H * W, W, 1)
        return buffer, buffer.as_strided((B, C, H, W), strides, guard)

    (_, x), (_, dy) = surrounded(float("nan")), surrounded(float("nan"))
    x.copy_(torch.randn(B, C, H, W)), dy.copy_(torch.randn(B, C, H, W))
    outputs = []
    empty_like = torch.empty_like

    def guarded(t, **options):
        if t.shape != x.shape:
            return empty_like(t, **options)
        outputs.append(surrounded(-77.0))
        return outputs[-1][1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused.torch, "empty_like", guarded)
        y, mean, rstd = fused.forward_launcher(x, None, None, None, None, 3, 1e-6, True)
        dx, *_ = fused.backward_launcher(dy, x, None, None, None, None, mean, rstd, 3, True)
    expected = run(lambda v: by_hand(v, None, None, None, None, 3, 1e-6, "silu"), [x.double()], dy)
    torch.testing.assert_close([y, dx], [t.float() for t in expected], rtol=1e-5, atol=1e-5)
    for buffer, _ in outputs:
        assert (buffer[:guard] == -77).all() and (buffer[-guard:] == -77).all()
    assert len(outputs) == 2


@needs_triton
def test_saves_x_and_statistics_only():
    x, weight, bias, *_ = operands((2, 8, 16, 16))
    x.requires_grad_(), weight.requires_grad_()
    saved = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.setdefault(t.data_ptr(), t), lambda t: t):
        group_norm_silu(x, 4, weight, bias, impl="triton")
    shapes = sorted(tuple(t.shape) for t in saved.values())
    assert shapes == sorted([(2, 8, 16, 16), (8,), (8,), (2, 4), (2, 4)])


def test_gradcheck_of_the_reference():
    values = [t.double().requires_grad_() for t in operands((2, 4, 3, 2), adaptive=True)]
    assert torch.autograd.gradcheck(call("reference", 2), values)
    assert torch.autograd.gradgradcheck(call("reference", 2), values)


@needs_triton
def test_second_derivatives_are_refused():
    x = torch.randn(1, 4, 3, 3, device=DEVICE, requires_grad=True)
    (dx,) = torch.autograd.grad(group_norm_silu(x, 2, impl="triton").square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        dx.sum().backward()
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.func.grad(lambda v: torch.func.grad(lambda u: group_norm_silu(u, 2, impl="triton").sum())(v).sum())(x.detach())


@needs_triton
def test_operators_pass_torch_checks():
    x, weight, bias, scale, shift = operands((2, 6, 4, 3), "channels_last", adaptive=True)
    torch.library.opcheck(fused.group_norm_silu_forward.op, (x, weight, bias, scale, shift, 3, 1e-6, True))
    torch.library.opcheck(fused.group_norm_silu_forward.op, (x, None, None, None, None, 3, 1e-6, False))
    statistics = torch.randn(2, 3, device=DEVICE), torch.rand(2, 3, device=DEVICE)
    torch.library.opcheck(fused.group_norm_silu_backward.op, (x, x, weight, None, None, None, *statistics, 3, True))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_compiles_whole(impl, layout):
    values = operands((2, 8, 5, 6), layout, adaptive=True)
    cotangent = torch.randn_like(values[0])
    compiled = torch.compile(call(impl, 4), fullgraph=True, backend="aot_eager")
    got, expected = run(compiled, values, cotangent), run(call(impl, 4), values, cotangent)
    assert got[0].stride() == values[0].stride()
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("impl", IMPLS)
def test_vmap_and_func_grad(impl):
    x = torch.randn(3, 2, 4, 3, 3, device=DEVICE)
    weight = torch.randn(4, device=DEVICE)
    function = lambda v: group_norm_silu(v, 2, weight, impl=impl).square().sum()  # noqa: E731
    torch.testing.assert_close(torch.vmap(function)(x), torch.stack([function(v) for v in x]))
    expected = torch.stack([torch.func.grad(function)(v) for v in x])
    torch.testing.assert_close(torch.vmap(torch.func.grad(function))(x), expected)


BAD = [
    ({"num_groups": 3}, ValueError, r"got 4 channels and num_groups=3"),
    ({"num_groups": 0}, ValueError, r"num_groups=0"),
    ({"eps": 0.0}, ValueError, "positive eps, got 0.0"),
    ({"activation": "gelu"}, ValueError, "'silu', None, got 'gelu'"),
    ({"weight": torch.ones(3)}, ValueError, r"weight \[4\].*got \[3\]"),
    ({"weight": torch.ones(4, dtype=torch.int64)}, TypeError, "floating point tensor weight.*got torch.int64"),
    ({"bias": torch.ones(4, device="meta")}, ValueError, "bias on .*, got meta"),
    ({"scale": torch.ones(2, 4)}, ValueError, "only scale"),
    ({"scale": torch.ones(2, 4), "shift": torch.ones(2, 3)}, ValueError, r"shift \[2, 4\].*got \[2, 3\]"),
    ({"x": torch.ones(2, 4, 3, 3, dtype=torch.int32)}, TypeError, "got torch.int32"),
    ({"x": torch.ones(4)}, ValueError, r"\[B, C, \*positions\], got \[4\]"),
    ({"x": [1.0]}, TypeError, "list"),
    ({"weight": [1.0] * 4}, TypeError, "floating point tensor weight.*list"),
    ({"bias": 1.0}, TypeError, "floating point tensor bias.*float"),
    ({"num_groups": 2.0}, TypeError, "num_groups as an int, got float"),
    ({"num_groups": None}, TypeError, "num_groups as an int, got NoneType"),
    ({"eps": "a"}, TypeError, "eps as a number, got str"),
    ({"x": torch.ones(2, 4, 3, 3).to(torch.float8_e4m3fn)}, TypeError, "got torch.float8_e4m3fn"),
    ({"x": torch.ones(2, 4, 3, 3).to_sparse()}, TypeError, "sparse"),
    ({"impl": "cuda"}, ValueError, "got 'cuda'"),
]


@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize("change, error, message", BAD)
def test_bad_input_is_the_same_on_all_implementations(impl, change, error, message):
    move = lambda v: v.to(DEVICE) if isinstance(v, torch.Tensor) and v.device.type == "cpu" else v  # noqa: E731
    arguments = {"x": torch.ones(2, 4, 3, 3), "num_groups": 2, "impl": impl} | change
    with pytest.raises(error, match=message):
        group_norm_silu(**{key: move(value) for key, value in arguments.items()})


def test_triton_is_refused_where_it_cannot_run():
    with pytest.raises(ValueError, match="float64"):
        group_norm_silu(torch.ones(1, 2, 2, dtype=torch.float64), 1, impl="triton")


def test_layout_on_fake_cuda_tensors():
    """In a process without the interpreter."""
    script = (
        "import torch; from torch._subclasses.fake_tensor import FakeTensorMode\n"
        "from dae_kernels.group_norm_silu.fused import group_norm_silu_forward\n"
        "with FakeTensorMode():\n"
        "    x = torch.empty_strided((2, 8, 4, 4), (128, 1, 32, 8), device='cuda')\n"
        "    y, mean, rstd = group_norm_silu_forward(x, None, None, None, None, 2, 1e-6, True)\n"
        "    print(y.stride(), tuple(mean.shape), rstd.device.type)\n"
    )
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    result = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == ["(128, 1, 32, 8) (2, 2) cuda"]
