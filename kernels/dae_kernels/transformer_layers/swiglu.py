"""The gated activation of a Transformer's MLP."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from dae_kernels.transformer_layers.checks import check_operands


def swiglu(gate_up: Tensor) -> Tensor:
    """out = silu(gate) * up, of the two halves of what one matrix product gives.

    Args:
        gate_up: [..., 2 F], floating; the gate comes first.

    Returns:
        [..., F] in the dtype of `gate_up`; differentiable.

    Raises:
        TypeError: not a floating point tensor.
        ValueError: an odd last dimension.

    Source: Shazeer 2020, arXiv 2002.05202.
    """
    check_operands("swiglu", gate_up=gate_up)
    if gate_up.dim() < 1 or gate_up.shape[-1] % 2:
        raise ValueError(f"swiglu needs [..., 2 F], got {list(gate_up.shape)}")
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up
