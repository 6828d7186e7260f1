"""Which implementation of the operations of dae_kernels a model's modules run."""

from __future__ import annotations

from torch import nn

from dae.config import KernelsConfig


def choose_kernels(model: nn.Module, kernels: KernelsConfig) -> None:
    """Set `impl` of each module that names the `operation` it runs; new modules run "auto".

    An implementation that cannot run is refused by the operation, when it is called.
    """
    for module in model.modules():
        if hasattr(module, "operation"):
            module.impl = getattr(kernels, module.operation)
