"""GroupNorm and SiLU in one operation, with an adaptive variant."""

from dae_kernels.group_norm_silu.api import group_norm_silu

__all__ = ["group_norm_silu"]
