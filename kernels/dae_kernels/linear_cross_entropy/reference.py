"""The cross-entropy of a linear layer by all its logits, in plain torch: the definition, and the fastest where they are few."""

from __future__ import annotations

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

NOT_COUNTED = -1  # the target of a row without a loss


def without_autocast(device: torch.device):
    """Operands are cast by hand; autocast would cast float32 sums down again."""
    known = torch.amp.is_autocast_available(device.type)  # not for meta tensors
    return torch.autocast(device.type, enabled=False) if known else nullcontext()


def counted_rows(hidden_ND: Tensor, target_N: Tensor) -> Tensor:
    """hidden with zeros in the rows that do not count: what lies there could be NaN, and 0 * NaN would reach the gradients."""
    return hidden_ND.masked_fill((target_N == NOT_COUNTED).unsqueeze(1), 0.0)


def linear_cross_entropy_reference(
    hidden_ND: Tensor, weight_VD: Tensor, target_N: Tensor, label_smoothing: float, z_loss: float, dtype: torch.dtype
) -> Tensor:
    """Sum of the losses of the rows whose target is not NOT_COUNTED; products in `dtype`, all else in at least float32."""
    with without_autocast(hidden_ND.device):
        hidden_ND = counted_rows(hidden_ND, target_N)
        logits_NV = F.linear(hidden_ND.to(dtype), weight_VD.to(dtype)).to(torch.promote_types(dtype, torch.float32))
        total = F.cross_entropy(logits_NV, target_N, ignore_index=NOT_COUNTED, label_smoothing=label_smoothing, reduction="sum")
        if z_loss:
            square_N = logits_NV.logsumexp(dim=1).square()
            total = total + z_loss * square_N.where(target_N != NOT_COUNTED, 0.0).sum()
    return total
