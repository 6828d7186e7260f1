"""The cross-entropy of a linear layer from all its logits, in eager torch: the definition, and fastest for few logits."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dae_kernels.tracing import without_autocast

NOT_COUNTED = -1  # the target of a row without a loss


def counted_rows(hidden_ND: Tensor, target_N: Tensor) -> Tensor:
    """hidden with zeros in ignored rows, whose NaN would otherwise reach the gradients as 0 * NaN."""
    return hidden_ND.masked_fill((target_N == NOT_COUNTED).unsqueeze(1), 0.0)


def rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x rounded to `dtype`, in at least float32; its gradient is passed to x unrounded."""
    wide = x.to(torch.promote_types(dtype, torch.float32))
    return wide if x.dtype == dtype else wide + (wide.to(dtype).to(wide.dtype) - wide).detach()


def linear_cross_entropy_reference(
    hidden_ND: Tensor, linear_weight_VD: Tensor, bias_V: Tensor | None, weight_V: Tensor | None, target_N: Tensor,
    z_loss: Tensor | None, label_smoothing: float, softcap: float | None, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """[N] losses, 0 where the target is NOT_COUNTED; operands rounded to `dtype`, all else in at least float32."""
    with without_autocast(hidden_ND.device):  # operands are cast explicitly
        hidden_ND = rounded(counted_rows(hidden_ND, target_N), dtype)
        # Sums of 16-bit products are kept in float32, as by chunks: float16 would overflow from 65504 on.
        logits_NV = F.linear(hidden_ND, rounded(linear_weight_VD, dtype), None if bias_V is None else bias_V.to(hidden_ND.dtype))
        if softcap is not None:
            logits_NV = softcap * torch.tanh(logits_NV / softcap)
        loss_N = F.cross_entropy(
            logits_NV, target_N, weight_V, ignore_index=NOT_COUNTED, label_smoothing=label_smoothing, reduction="none"
        )
        if z_loss is not None:
            loss_N = loss_N + z_loss * logits_NV.logsumexp(dim=1).square().where(target_N != NOT_COUNTED, 0.0)
    return loss_N
