"""Layers that encoder, decoders, discriminator and priors share. Feature maps are [B, C, H, W]."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from dae_kernels import attention, qk_norm, rotate, swiglu
from dae_kernels.group_norm_silu import group_norm_silu
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dae.config import PriorConfig
from dae.distributed import draw_rows

NORM_EPS = 1e-6  # of all normalisations of the Transformers


class GroupNorm(nn.GroupNorm):
    """GroupNorm and optionally SiLU, with gcd(groups, channels) groups."""

    operation, impl = "group_norm_silu", "auto"  # for dae.models.kernels

    def __init__(self, channels: int, activation: str | None = "silu", groups: int = 32):
        super().__init__(math.gcd(groups, channels), channels, eps=1e-6)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        return group_norm_silu(x, self.num_groups, self.weight, self.bias, self.eps, self.activation, impl=self.impl)


class Dropout(nn.Module):
    """Zero entries with probability p in training and scale the rest by 1 / (1 - p).

    The mask is drawn by `draw_rows`, so it does not depend on how many processes share the batch. `channelwise` drops
    whole channels of a [B, C, H, W] map, as `nn.Dropout2d` does.
    """

    def __init__(self, p: float, channelwise: bool = False):
        super().__init__()
        if not 0 <= p < 1:
            raise ValueError(f"a dropout probability lies in [0, 1), got {p}")
        self.p, self.channelwise = p, channelwise

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x
        shape = (*x.shape[:2], 1, 1) if self.channelwise else x.shape
        keep = draw_rows(torch.rand, shape, device=x.device, dtype=torch.float32) >= self.p
        return x * keep / (1 - self.p)


class ClassConditional:
    """Mix-in of priors over C = `num_classes` classes: label C is the null class of guidance (Ho & Salimans 2022)."""

    num_classes: int
    config: PriorConfig

    @property
    def null_class(self) -> int:
        return self.num_classes

    def drop_labels(self, labels_B: Tensor) -> Tensor:
        """Labels with each replaced by the null class with probability `class_dropout`, as guidance needs in training."""
        draws = draw_rows(torch.rand, labels_B.shape, device=labels_B.device, dtype=torch.float32)
        hidden = draws < self.config.class_dropout
        return torch.where(hidden, self.null_class, labels_B)

    def check_guidance(self, cfg_scale: float) -> None:
        """ValueError for a scale other than 1 if the prior was trained without class dropout, which guidance needs."""
        if cfg_scale != 1 and self.config.class_dropout == 0:
            raise ValueError(
                f"a guidance scale of {cfg_scale:g} needs a prior trained with prior.class_dropout above 0, this one had 0: take "
                "a scale of 1 (sampling.cfg_scale, evaluation.cfg_scales), or train it again"
            )

    def check_labels(self, labels_B: Tensor) -> None:
        """ValueError unless each label is a class or the null class."""
        if labels_B.numel() and not (labels_B.min() >= 0 and labels_B.max() <= self.null_class):
            raise ValueError(
                f"labels must lie in 0..{self.num_classes - 1} ({self.null_class}: no class), got {labels_B.unique().tolist()}"
            )


class ResidualBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), then channel dropout if asked for."""

    def __init__(self, in_channels: int, out_channels: int, dropout: float = 0.0, groups: int = 32):
        super().__init__()
        self.norm1 = GroupNorm(in_channels, groups=groups)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = GroupNorm(out_channels, groups=groups)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.skip = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()
        self.dropout = Dropout(dropout, channelwise=True)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(self.norm1(x))
        h = self.conv2(self.norm2(h))
        return self.dropout(self.skip(x) + h)


class SelfAttention2d(nn.Module):
    """Residual single-head self-attention over the positions of a feature map."""

    operation, impl = "attention", "auto"

    def __init__(self, channels: int, groups: int = 32):
        super().__init__()
        self.norm = GroupNorm(channels, activation=None, groups=groups)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        B, C, H, W = x.shape
        # Positions before channels, as in channels_last: then all of this and its backward are views.
        qkv = self.qkv(self.norm(x)).movedim(1, -1).reshape(B, 1, H * W, 3, C)
        q, k, v = qkv.unbind(3)  # [B, 1 head, HW, C]
        h = attention(q, k, v, impl=self.impl).view(B, H, W, C).movedim(-1, 1)
        return x + self.out(h)


class TransformerBlock(nn.Module):
    """x + attention(norm(x)), then x + swiglu(norm(x)), with QK-norm and rotary positions; no bias anywhere."""

    operation, impl = "attention", "auto"

    def __init__(self, width: int, heads: int, dropout: float = 0.0):
        super().__init__()
        self.heads, head_dim = heads, width // heads
        hidden = -(-width * 8 // 3 // 16) * 16  # as many parameters as a 4 x MLP, rounded up to a multiple of 16
        self.norm_attention = nn.RMSNorm(width, eps=NORM_EPS)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.norm_q, self.norm_k = nn.RMSNorm(head_dim, eps=NORM_EPS), nn.RMSNorm(head_dim, eps=NORM_EPS)
        self.proj = nn.Linear(width, width, bias=False)
        self.norm_mlp = nn.RMSNorm(width, eps=NORM_EPS)
        self.gate_up = nn.Linear(width, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor, table: Tensor) -> Tensor:
        """[B, L, width] to the same, every position attending to all; `table` of `dae_kernels.rotary_table` or its like."""
        q, k, v = self.queries_keys_values(x, table)
        return self.finish(x, attention(q, k, v, impl=self.impl))

    def queries_keys_values(self, x: Tensor, table: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, heads, L, head_dim] each, queries and keys normalised and rotated."""
        B, L, width = x.shape
        qkv = self.qkv(self.norm_attention(x)).view(B, L, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        q, k = qk_norm(q, k, self.norm_q.weight, self.norm_k.weight, NORM_EPS)
        return rotate(q, table), rotate(k, table), v

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        """The rest of the block, from what attention [B, heads, L, head_dim] gave."""
        x = x + self.dropout(self.proj(attended.transpose(1, 2).flatten(2)))
        return x + self.dropout(self.down(swiglu(self.gate_up(self.norm_mlp(x)))))


class Downsample(nn.Conv2d):
    """Halve the resolution by a strided convolution."""

    def __init__(self, channels: int):
        super().__init__(channels, channels, 3, stride=2, padding=1)


class Upsample(nn.Module):
    """Double the resolution: nearest neighbour, then a convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class LevelNetwork(nn.Module):
    """conv_in, one `nn.Sequential` per resolution, norm_out, conv_out; subclasses build them.

    With `gradient_checkpointing` the activations of a level are recomputed in the backward pass.
    """

    gradient_checkpointing = False
    conv_in: nn.Conv2d
    levels: nn.ModuleList
    norm_out: GroupNorm
    conv_out: nn.Conv2d

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(x)
        for level in self.levels:
            recompute = self.gradient_checkpointing and self.training
            h = checkpoint(level, h, use_reentrant=False) if recompute else level(h)
        return self.conv_out(self.norm_out(h))
