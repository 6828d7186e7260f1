"""A package that is not there, and one that is there and broken, are one line each, wherever it is asked for."""

import sys
import types

import pytest
import torch
from dae_kernels.attention import attention, flash
from dae_kernels.attention import checks as attention_checks

from dae.complexity.gromov_wasserstein import gromov_wasserstein
from dae.complexity.latents import load_latent
from dae.config import Config
from dae.optional import optional


def test_optional_packages():
    with (
        pytest.raises(
            ImportError, match=r"features:x needs the package nothing-at-all \(No module named.*pip install nothing-at"
        ),
        optional("nothing-at-all", "features:x"),
    ):
        import nothing_at_all  # noqa: F401
    with optional("torch", "all of this"):
        import torch as found
    assert isinstance(found, types.ModuleType)
    with pytest.raises(ImportError, match=r"installed but cannot be imported \(OSError: libcuda"), optional("p", "x"):
        raise OSError("libcuda.so.1: cannot open shared object file")
    with pytest.raises(KeyboardInterrupt), optional("p", "x"):
        raise KeyboardInterrupt


def fused(impl):
    """Attention by a package that runs on a GPU, on operands of the CPU."""
    q = torch.zeros(1, 2, 8, 16, dtype=torch.float16)
    return attention(q, q, q, impl=impl)


USES = {
    "timm": lambda: load_latent("features:resnet18", torch.zeros(4, 3, 8, 8), None, Config(), 0),
    "ot": lambda: gromov_wasserstein(torch.rand(4, 2), torch.rand(4, 2)),
    "xformers": lambda: fused("xformers"),
    "flash_attn": lambda: fused("flash_attn"),
}


@pytest.fixture
def no_gpu_needed(monkeypatch):
    monkeypatch.setattr(attention_checks, "FUSED_DEVICES", ("cpu", "cuda"))
    monkeypatch.setattr(flash, "compute_capability", lambda device: 8)


@pytest.mark.parametrize("package", USES)
@pytest.mark.parametrize("error", ["RuntimeError('operator torchvision::nms\\n does not exist')", "OSError('libcudart.so')"])
def test_broken(tmp_path, monkeypatch, no_gpu_needed, package, error):
    """As `import timm` is where torchvision was built for another torch."""
    (tmp_path / f"{package}.py").write_text(f"raise {error}")
    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(
        ImportError, match=r"is installed but cannot be imported \((RuntimeError: operator|OSError: lib)"
    ) as caught:
        USES[package]()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("package", USES)
def test_missing(monkeypatch, no_gpu_needed, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match="pip install") as caught:
        USES[package]()
    assert "\n" not in str(caught.value)
