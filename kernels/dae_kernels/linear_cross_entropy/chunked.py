"""Losses and gradients by chunks of rows, as one operator, with at most one chunk of logits in memory.

The gradients of a sum of losses are known up to a factor once a chunk's logits are: they are computed unscaled in the same pass,
and the backward pass only multiplies. If every row has its own factor (reduction="none"), the backward pass calls the operator
again with these factors.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dae_kernels.dispatch import register_op
from dae_kernels.linear_cross_entropy.reference import NOT_COUNTED, counted_rows
from dae_kernels.tracing import without_autocast

# Elements of a chunk of logits, which are float32. CPU: 4 MiB, about what the caches hold. GPU: 64 MiB, which at V = 16384 makes
# 1024 rows, so that adding a chunk's weight gradient to the float32 sum costs no more than the product it comes from.
CPU_CHUNK, GPU_CHUNK = 1 << 20, 1 << 24
MIN_ROWS = 64  # products with fewer rows are slow
WEIGHT_BLOCK = 1 << 22  # elements of the weight gradient added at once where the product's dtype is not the sum's


def chunk_rows(V: int, device: torch.device) -> int:
    return max(MIN_ROWS, (CPU_CHUNK if device.type == "cpu" else GPU_CHUNK) // V)


def softmax_step(
    logits_nV: Tensor, bias_V: Tensor | None, weight_V: Tensor | None, target_n: Tensor, loss_n: Tensor,
    z_loss: Tensor | None, label_smoothing: float, softcap: float | None, gradient: bool,
) -> None:  # fmt: skip
    """Write the losses of a chunk of float32 or float64 products, and with `gradient` their gradient over the products.

    With x the logits, which are the products plus the bias, capped, w the class weights, t the target and s the smoothing:

        loss         = a lse - (1 - s) w_t x_t - s / V sum_v w_v x_v + z lse^2,  a = (1 - s) w_t + s / V sum_v w_v
        d loss / d x = softmax (a + 2 z lse) - (1 - s) w_t [v = t] - s / V w_v

    and 0 in rows that do not count. logits_nV is overwritten in any case.
    """
    counts_n1 = (target_n != NOT_COUNTED).unsqueeze(1)
    safe_n1 = target_n.clamp(min=0).unsqueeze(1)
    if bias_V is not None:
        logits_nV.add_(bias_V)
    slope_nV = None
    if softcap is not None:
        logits_nV.div_(softcap).tanh_()
        slope_nV = 1 - logits_nV.square() if gradient else None
        logits_nV.mul_(softcap)
    share = label_smoothing / logits_nV.shape[1]
    if weight_V is None:
        mass_n1 = torch.ones_like(loss_n).unsqueeze(1)
        target_mass_n1 = mass_n1 * (1 - label_smoothing)
    else:
        target_mass_n1 = (1 - label_smoothing) * weight_V.unsqueeze(1).gather(0, safe_n1)
        mass_n1 = target_mass_n1 + share * weight_V.sum()
    # Subtract the maximum before summing, so that large logits with small differences keep their digits.
    largest_n1 = logits_nV.amax(dim=1, keepdim=True)
    logits_nV.sub_(largest_n1)
    value_n1 = logits_nV.gather(1, safe_n1) * target_mass_n1
    if label_smoothing:
        total_n1 = logits_nV.sum(dim=1, keepdim=True) if weight_V is None else (logits_nV @ weight_V).unsqueeze(1)
        value_n1 += total_n1 * share
    sum_n1 = logits_nV.exp_().sum(dim=1, keepdim=True)
    log_n1 = sum_n1.log()
    loss_n1 = mass_n1 * log_n1 - value_n1
    if z_loss is not None:  # 0 times a square that overflows is NaN
        lse_n1 = largest_n1 + log_n1
        loss_n1 += z_loss * lse_n1.square()
        mass_n1 = mass_n1 + 2 * z_loss * lse_n1
    torch.where(counts_n1.squeeze(1), loss_n1.squeeze(1), loss_n1.new_zeros(()), out=loss_n)
    if not gradient:
        return
    logits_nV.mul_((mass_n1 / sum_n1).where(counts_n1, 0.0))
    logits_nV.scatter_add_(1, safe_n1, -target_mass_n1.where(counts_n1, 0.0))
    if label_smoothing:
        share_n1 = counts_n1.to(logits_nV.dtype) * share
        logits_nV.sub_(share_n1 if weight_V is None else share_n1 * weight_V)
    if slope_nV is not None:
        logits_nV.mul_(slope_nV)


def multiply(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out = a b, summed in the dtype of `out`."""
    if a.dtype == out.dtype:
        torch.mm(a, b, out=out)
    elif a.is_cuda:
        torch.mm(a, b, out_dtype=out.dtype, out=out)
    else:
        torch.mm(a.to(out.dtype), b.to(out.dtype), out=out)


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a b. Operands narrower than the sum go by blocks, whose products fit into a GPU's L2 cache."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
        return
    rows = max(1, WEIGHT_BLOCK // total.shape[1])
    for block, a_block in zip(total.split(rows), a.split(rows), strict=True):
        part = torch.empty_like(block)
        multiply(a_block, b, part)
        block += part


def chunked_launcher(
    hidden_ND: Tensor,
    linear_weight_VD: Tensor,
    bias_V: Tensor | None,
    weight_V: Tensor | None,
    target_N: Tensor,
    z_loss: Tensor | None,
    factor_N: Tensor | None,
    label_smoothing: float,
    softcap: float | None,
    dtype: torch.dtype,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
    kernel: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """[N] losses, their own gradients by hidden (in `dtype`), and the sum's by linear_weight and bias (at least float32).

    Gradients are empty where not needed. `factor_N`, of at most 1 in absolute value, multiplies the rows of that sum.
    """
    N, V = len(hidden_ND), len(linear_weight_VD)
    wide = torch.promote_types(dtype, torch.float32)
    # CPUs multiply 16 bits slowly; the kernel writes gradients in the GPU's product dtype.
    operand = wide if hidden_ND.device.type == "cpu" and not kernel else dtype
    needs = need_hidden, need_weight, need_bias
    loss_N, d_hidden_ND, d_weight_VD, d_bias_V = chunked_empty(hidden_ND, linear_weight_VD, dtype, *needs, kernel)
    d_bias_V.zero_()
    if N == 0:
        d_weight_VD.zero_()
    rows = max(1, min(chunk_rows(V, hidden_ND.device), N))
    with without_autocast(hidden_ND.device):
        w_VD = linear_weight_VD.to(dtype).to(operand)
        b_V = None if bias_V is None else bias_V.to(wide).contiguous()
        buffer_nV = hidden_ND.new_empty(rows, V, dtype=wide)
        # In place for float32, where the rows of both are equal.
        narrow_nV = hidden_ND.new_empty(rows, V, dtype=dtype) if kernel and any(needs) and dtype != wide else buffer_nV
        for start in range(0, N, rows):
            n = min(rows, N - start)
            target_n, loss_n = target_N.narrow(0, start, n), loss_N.narrow(0, start, n)
            h_nD = counted_rows(hidden_ND.narrow(0, start, n), target_n).to(dtype).to(operand)
            logits_nV, gradient_nV = buffer_nV.narrow(0, 0, n), narrow_nV.narrow(0, 0, n)
            multiply(h_nD, w_VD.T, logits_nV)
            step = b_V, weight_V, target_n, loss_n, z_loss, label_smoothing, softcap, any(needs)
            if kernel:
                from dae_kernels.linear_cross_entropy.fused import launch

                launch(logits_nV, gradient_nV, *step)
            else:
                softmax_step(logits_nV, *step)
                gradient_nV = logits_nV.to(operand)
            if need_hidden:
                d_hidden_nD = d_hidden_ND.narrow(0, start, n)
                if operand == dtype:
                    torch.mm(gradient_nV, w_VD, out=d_hidden_nD)
                else:
                    d_hidden_nD.copy_(gradient_nV @ w_VD)
            factor_n = torch.ones_like(loss_n) if factor_N is None else factor_N.narrow(0, start, n)
            factor_1n = factor_n.to(operand).unsqueeze(0)
            if need_bias:
                add_product(d_bias_V.unsqueeze(0), factor_1n, gradient_nV)
            if need_weight:
                if factor_N is not None:
                    h_nD = h_nD * factor_1n.T
                if start == 0:
                    multiply(gradient_nV.T, h_nD, d_weight_VD)
                else:
                    add_product(d_weight_VD, gradient_nV.T, h_nD)
    return loss_N, d_hidden_ND, d_weight_VD, d_bias_V


def chunked_empty(hidden_ND: Tensor, linear_weight_VD: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *_, dtype, need_hidden, need_weight, need_bias, _ = rest
    wide = torch.promote_types(dtype, torch.float32)
    loss_N = hidden_ND.new_empty(len(hidden_ND), dtype=wide)
    d_hidden_ND = hidden_ND.new_empty(hidden_ND.shape if need_hidden else (0, 0), dtype=dtype)
    d_weight_VD = hidden_ND.new_empty(linear_weight_VD.shape if need_weight else (0, 0), dtype=wide)
    return loss_N, d_hidden_ND, d_weight_VD, hidden_ND.new_empty(len(linear_weight_VD) if need_bias else 0, dtype=wide)


# Opaque even without the interpreter: its products are cuBLAS's, and Inductor would unroll the loop.
chunked_losses = register_op("dae_kernels::linear_cross_entropy", chunked_launcher, chunked_empty)
