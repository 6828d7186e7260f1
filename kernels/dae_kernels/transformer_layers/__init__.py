"""Norms, rotary positions and the gated activation of Transformer blocks, in plain torch.

There is no kernel: each of these is one read and one write of its operands, and torch.compile achieves that from the definitions.
Whether a kernel beats its code, only a GPU can show. The README of dae_kernels has the figures, eager and compiled.
"""

from dae_kernels.transformer_layers.api import (
    gated_residual,
    layer_norm_modulate,
    qk_norm,
    rms_norm,
    rotary_table,
    rotary_table_2d,
    rotate,
    swiglu,
)

__all__ = [
    "gated_residual",
    "layer_norm_modulate",
    "qk_norm",
    "rms_norm",
    "rotary_table",
    "rotary_table_2d",
    "rotate",
    "swiglu",
]
