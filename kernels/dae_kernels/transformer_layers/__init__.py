"""Norms, rotary positions and the gated activation of Transformer blocks, in plain torch.

There is no kernel: each of these reads and writes its operands once, and torch.compile achieves that from the definitions.
Whether a kernel would be faster is not measured on a GPU. The README of dae_kernels has figures, eager and compiled.
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
