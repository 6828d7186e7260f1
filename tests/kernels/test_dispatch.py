"""Choices are obeyed or refused, and importing the package pulls in nothing but torch."""

from __future__ import annotations

import functools
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from dae_kernels import dispatch, group_norm_silu, nearest_code, tracing
from dae_kernels.pairwise.reference import pair_rows
from torch._subclasses.fake_tensor import FakeTensorMode

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def gpu(monkeypatch):
    """Pretend to a GPU of some compute capability."""

    def pretend(major: int) -> None:
        properties = SimpleNamespace(major=major, name="Pretended")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
        monkeypatch.setattr(torch.version, "hip", None)
        monkeypatch.setattr(dispatch, "TRITON_INSTALLED", True)
        dispatch.known_gpu_refusal.cache_clear()

    yield pretend
    dispatch.known_gpu_refusal.cache_clear()


def test_auto_goes_by_device(gpu):
    gpu(9)
    assert dispatch.choose("auto", CPU) == "reference"
    assert dispatch.choose("auto", CUDA) == "triton"
    assert dispatch.choose("auto", CUDA, "some dtype") == "reference"
    assert dispatch.choose("reference", CUDA) == "reference"
    assert dispatch.choose("triton", CUDA) == "triton"


def test_old_gpus_have_no_triton_kernels(gpu):
    gpu(7)
    assert dispatch.choose("auto", CUDA) == "reference"
    with pytest.raises(ValueError, match=r"compute capability 8.0 or higher, Pretended has 7.x"):
        dispatch.choose("triton", CUDA)


def test_a_gpu_is_asked_once(gpu, monkeypatch):
    gpu(9)
    asked, properties = [], torch.cuda.get_device_properties
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: asked.append(device) or properties(device))
    assert [dispatch.choose("auto", CUDA) for _ in range(3)] == ["triton"] * 3 and asked == [CUDA]


def test_fake_cuda_tensors_stand_for_a_gpu(monkeypatch):
    dispatch.known_gpu_refusal.cache_clear()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(dispatch, "TRITON_INSTALLED", True)
    assert dispatch.choose("auto", CUDA) == "triton"


def test_triton_must_be_installed(gpu, monkeypatch):
    gpu(9)
    monkeypatch.setattr(dispatch, "TRITON_INSTALLED", False)
    assert dispatch.choose("auto", CUDA) == "reference"
    with pytest.raises(ValueError, match="triton is not installed"):
        dispatch.choose("triton", CUDA)


def test_triton_on_the_cpu_is_refused_without_the_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="impl='triton' cannot run here: the tensors are on cpu"):
        nearest_code(torch.zeros(3, 4), torch.zeros(5, 4), impl="triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert dispatch.choose("triton", CPU) == "triton"
    assert dispatch.choose("auto", CPU) == "reference"


def test_the_reason_of_the_operation_is_told(gpu):
    gpu(9)
    with pytest.raises(ValueError, match="cannot run here: no float64"):
        dispatch.choose("triton", CUDA, "no float64")


def test_unknown_choices_are_refused():
    with pytest.raises(ValueError, match="impl must be one of 'auto', 'reference', 'triton', got 'cuda'"):
        dispatch.choose("cuda", CPU)


def test_what_transforms_have_wrapped_is_seen():
    x, seen = torch.zeros(2, 3), []

    def look(row):
        seen.append((tracing.values_readable(row), tracing.differentiated(row)))
        return row.sum()

    look(x[0])
    torch.func.grad(look)(x[0])
    torch.vmap(look)(x)
    torch.vmap(torch.func.grad(look))(x)
    torch.func.grad(lambda x: torch.vmap(look)(x).sum())(x)
    assert seen == [(True, False), (True, True), (False, False), (False, True), (False, True)]


def test_importing_and_the_cpu_path_need_torch_alone():
    """Whatever `import torch` itself brings (numpy, sympy, ...) is there before; after it only dae_kernels may come."""
    script = (
        "import sys, torch; before = {name.partition('.')[0] for name in sys.modules}\n"
        "import dae_kernels\n"
        "dae_kernels.nearest_code(torch.zeros(3, 4), torch.zeros(5, 4))\n"
        "q = torch.zeros(1, 2, 3, 4); dae_kernels.attention(q, q, q, causal=True)\n"
        "after = {name.partition('.')[0] for name in sys.modules} - before - set(sys.stdlib_module_names)\n"
        "print(sorted(after), 'triton' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "['dae_kernels'] False"


def test_the_package_works_without_triton():
    script = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch; from dae_kernels import dispatch, nearest_code\n"
        "print(nearest_code(torch.zeros(3, 4), torch.zeros(5, 4))[0].tolist())"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[0, 0, 0]"


class Doubled(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x, factor):
        return factor * x

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.factor = inputs[1]

    @staticmethod
    def backward(ctx, d):
        return ctx.factor * d, None


def test_functions_are_applied_without_looking_at_signatures(monkeypatch):
    """torch's own `apply` does at each call, which takes longer than three launches."""
    x = torch.ones(3, requires_grad=True)
    monkeypatch.setattr(inspect, "signature", None)
    y = dispatch.apply(Doubled, x, 2.0)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert not y._is_view()
    assert torch.equal(gradient, torch.full((3,), 2.0)) and type(y.grad_fn).__name__ == "DoubledBackward"
    with torch.no_grad():
        assert not dispatch.apply(Doubled, x, 2.0).requires_grad
    plain = dispatch.apply(Doubled, x.detach(), 2.0)
    assert torch.equal(plain, y) and plain.grad_fn is None


def test_applied_functions_under_transforms_and_forward_mode():
    x, double = torch.ones(3), functools.partial(dispatch.apply, Doubled)
    assert torch.equal(torch.func.grad(lambda v: double(v, 2.0).sum())(x), torch.full((3,), 2.0))
    assert torch.equal(torch.vmap(lambda v: double(v, 2.0))(x), torch.full((3,), 2.0))
    with torch.autograd.forward_ad.dual_level(), pytest.raises(RuntimeError, match="jvp"):  # not a result without its tangent
        double(torch.autograd.forward_ad.make_dual(x, x), 2.0)


def test_subclasses_of_tensors_go_through_the_dispatcher():
    """A kernel would take the memory behind a DTensor for the whole: its own rules decide, whichever operand it is."""
    names = []

    class Wrapping(torch.Tensor):
        @staticmethod
        def __new__(cls, inner):
            return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, device=inner.device)

        def __init__(self, inner):
            self.inner = inner

        @classmethod
        def __torch_dispatch__(cls, function, types, arguments=(), options=None):
            names.append(function.name())
            return function(*(a.inner if isinstance(a, Wrapping) else a for a in arguments))

    q, s, v = torch.randn(4, 2), torch.randn(5, 2), torch.rand(5)
    expected = pair_rows(q, s, v, (1.0,), False, True)
    for operands in ((Wrapping(q), s, v), (q, Wrapping(s), v), (q, s, Wrapping(v))):
        assert all(map(torch.equal, pair_rows(*operands, (1.0,), False, True), expected))
    assert names == ["dae_kernels::pair_rows_reference"] * 3
    parameter = torch.nn.Parameter(q)  # plain, as far as memory is concerned
    with torch.no_grad():
        assert torch.equal(pair_rows(parameter, s, v, (1.0,), False, True)[0], expected[0]) and len(names) == 3


def test_results_that_nobody_needs_are_no_outputs():
    class Kept(torch.autograd.Function):
        used = 1

        @staticmethod
        def forward(x):
            return 2 * x, 3 * x

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.save_for_backward(output[1])

        @staticmethod
        def backward(ctx, d, *_):
            return d * ctx.saved_tensors[0]

    x = torch.ones(3, requires_grad=True)
    results = dispatch.apply(Kept, x)
    assert len(results) == 1
    assert torch.equal(torch.autograd.grad(results[0].sum(), x)[0], torch.full((3,), 3.0))
    assert torch.equal(torch.func.grad(lambda v: dispatch.apply(Kept, v)[0].sum())(x.detach()), torch.full((3,), 3.0))


def test_host_overhead_takes_the_path_of_the_kernels(tmp_path):
    """A CPU without the interpreter: launches are counted, nothing is computed."""
    root = Path(__file__).resolve().parents[2]
    names = ("group_norm_silu", "nearest_code", "linear_cross_entropy", "mmd", "energy_distance", "sinkhorn_divergence")
    options = [*(part for name in names for part in ("--op", name)), "--seconds", "0.01", "--device", "cpu"]
    command = [sys.executable, str(root / "profiling" / "host_overhead.py"), *options, "--json", str(tmp_path / "rows.jsonl")]
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    launches = {(row["op"], row["phase"]): row["kernels"] for row in rows}
    assert launches[("group_norm_silu", "forward")] == 3 and launches[("group_norm_silu", "both")] == 7
    assert launches[("group_norm_silu 16x16", "forward")] == 1 and launches[("group_norm_silu 16x16", "both")] == 3
    assert launches[("nearest_code fast", "forward")] == 3
    assert launches[("mmd", "forward")] == 6 and launches[("energy_distance", "both")] == 9
    assert launches[("sinkhorn_divergence", "both")] == 7  # a first step, five of the schedule, one for the slopes
    operators = {(row["op"], row["phase"]): row["torch_operators"] for row in rows}
    assert operators[("group_norm_silu adaptive", "both")] == 0
    most = {"linear_cross_entropy": (20, 26), "mmd": (2, 4), "energy_distance": (3, 5), "sinkhorn_divergence": (32, 36)}
    for name, (forward, both) in most.items():  # of small tensors, each a launch: what they cost a GPU's host is their number
        assert operators[(name, "forward")] <= forward and operators[(name, "both")] <= both
    assert all(row["us"]["median"] > 0 and row["command"].startswith("python profiling/host_overhead.py") for row in rows)


def test_fake_tensors_on_a_cpu_stand_for_those_of_a_gpu():
    """What runs there is chosen, with bfloat16 too, which the interpreter of the tests cannot compute."""
    x = torch.ones(1, 4, 2, 2, dtype=torch.bfloat16)
    with FakeTensorMode() as mode, dispatch.standing_for_cuda():
        assert dispatch.choose("auto", x.device) == "triton" and dispatch.choose("reference", x.device) == "reference"
        assert group_norm_silu(mode.from_tensor(x), 2).shape == x.shape
        assert dispatch.dtype_refusal(x) is None
    assert dispatch.choose("auto", x.device) == "reference"
