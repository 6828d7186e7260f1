"""Choose which implementation of each dae_kernels operation the modules of a model run."""

from __future__ import annotations

from itertools import chain

from dae_kernels.dispatch import triton_refusal
from torch import nn

from dae.config import KernelsConfig


def choose_kernels(model: nn.Module, kernels: KernelsConfig) -> None:
    """Set `impl` of each module that names the `operation` it runs; new modules run "auto".

    Raises:
        ValueError: "triton" is asked for and runs nowhere where the model is. What an operation knows alone (operands, missing
            packages) it says itself when it is first called.
    """
    for module in model.modules():
        if not hasattr(module, "operation"):
            continue
        operation = str(module.operation)
        module.impl = getattr(kernels, operation)
        place = next(chain(module.parameters(), module.buffers(), model.parameters()), None)
        if module.impl == "triton" and place is not None and (refusal := triton_refusal(place.device)):
            raise ValueError(f"kernels.{operation}=triton cannot run here: {refusal}. Use auto or reference")
