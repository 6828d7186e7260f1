"""Choices are obeyed or refused, and importing the package pulls in nothing but torch."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from dae_kernels import dispatch, nearest_code, tracing

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

    return pretend


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


def test_fake_cuda_tensors_stand_for_a_gpu(monkeypatch):
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
