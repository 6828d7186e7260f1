"""The loss and its gradients by chunks of rows, as one operator: no more than a chunk of logits is ever there.

The loss is one number, so its gradients are known but for one factor as soon as a chunk's logits are: they are made in the same
pass, unscaled. The operator returns them beside the sum, and the backward pass only multiplies.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dae_kernels.dispatch import register_op
from dae_kernels.linear_cross_entropy.reference import NOT_COUNTED, counted_rows, without_autocast

# Elements of a chunk of logits. CPU: 4 MiB in float32, about what the caches hold. GPU: 32 MiB in 16 bits, which stays in the L2
# cache between product and softmax, and at V = 16384 makes 1024 rows, so that adding a chunk's weight gradient to the float32
# sum costs no more than the product it comes from.
CPU_CHUNK, GPU_CHUNK = 1 << 20, 1 << 24
MIN_ROWS = 64  # fewer make slow products
WEIGHT_BLOCK = 1 << 22  # elements of the weight gradient added at once where the product's dtype is not the sum's


def chunk_rows(V: int, device: torch.device) -> int:
    return max(MIN_ROWS, (CPU_CHUNK if device.type == "cpu" else GPU_CHUNK) // V)


def softmax_step(
    logits_nV: Tensor, target_n: Tensor, loss_n: Tensor, label_smoothing: float, z_loss: float, gradient: bool
) -> None:
    """Write the losses of a chunk of float32 or float64 logits, and with `gradient` their gradient over the logits.

    d loss / d logit_v = softmax_v (1 + 2 z lse) - (1 - s) [v = target] - s / V, and 0 in rows that do not count.
    """
    V = logits_nV.shape[1]
    counts_n1 = (target_n != NOT_COUNTED).unsqueeze(1)
    one_n1 = counts_n1.to(logits_nV.dtype)
    safe_n1 = target_n.clamp(min=0).unsqueeze(1)
    value_n1 = logits_nV.gather(1, safe_n1) * (1 - label_smoothing)
    if label_smoothing:
        value_n1 += logits_nV.mean(dim=1, keepdim=True) * label_smoothing
    largest_n1 = logits_nV.amax(dim=1, keepdim=True)
    sum_n1 = logits_nV.sub_(largest_n1).exp_().sum(dim=1, keepdim=True)
    lse_n1 = largest_n1 + sum_n1.log()
    loss_n1 = lse_n1 - value_n1
    if z_loss:  # 0 times a square that overflows is NaN
        loss_n1 += z_loss * lse_n1.square()
    if gradient:
        factor_n1 = (1 + 2 * z_loss * lse_n1) / sum_n1
        logits_nV.mul_(factor_n1.where(counts_n1, 0.0))
        logits_nV.scatter_add_(1, safe_n1, (label_smoothing - 1) * one_n1)
        if label_smoothing:
            logits_nV.sub_(label_smoothing / V * one_n1)
    torch.where(counts_n1.squeeze(1), loss_n1.squeeze(1), loss_n1.new_zeros(()), out=loss_n)


def product(a: Tensor, b: Tensor, out: Tensor) -> None:
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
        product(a_block, b, part)
        block += part


def chunked_launcher(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    target_N: Tensor,
    label_smoothing: float,
    z_loss: float,
    dtype: torch.dtype,
    need_hidden: bool,
    need_weight: bool,
    kernel: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Sum of the losses, and its gradients by hidden (in `dtype`) and weight (at least float32), empty where not needed."""
    N, V = len(hidden_ND), len(weight_VD)
    wide = torch.promote_types(dtype, torch.float32)
    # CPUs multiply 16 bits slowly; the kernel takes the logits as a GPU makes them.
    operand = wide if hidden_ND.device.type == "cpu" and not kernel else dtype
    _, d_hidden_ND, d_weight_VD = chunked_empty(
        hidden_ND, weight_VD, target_N, label_smoothing, z_loss, dtype, need_hidden, need_weight, kernel
    )
    if need_weight and N == 0:
        d_weight_VD.zero_()
    rows = max(1, min(chunk_rows(V, hidden_ND.device), N))
    with without_autocast(hidden_ND.device):
        w_VD = weight_VD.to(dtype).to(operand)
        loss_N = hidden_ND.new_empty(N, dtype=wide)
        buffer_nV = hidden_ND.new_empty(rows, V, dtype=operand)
        chunks = zip(hidden_ND.split(rows), target_N.split(rows), loss_N.split(rows), strict=True)
        for start, (h_nD, target_n, loss_n) in zip(range(0, N, rows), chunks, strict=False):  # without rows there is one of none
            h_nD = counted_rows(h_nD, target_n).to(dtype).to(operand)
            logits_nV = buffer_nV.narrow(0, 0, len(h_nD))
            torch.mm(h_nD, w_VD.T, out=logits_nV)
            if kernel:
                from dae_kernels.linear_cross_entropy.fused import launch

                launch(logits_nV, target_n, loss_n, label_smoothing, z_loss, need_hidden or need_weight)
            else:
                wide_nV = logits_nV.to(wide)
                softmax_step(wide_nV, target_n, loss_n, label_smoothing, z_loss, need_hidden or need_weight)
                logits_nV = wide_nV.to(operand)
            if need_hidden:
                d_hidden_nD = d_hidden_ND.narrow(0, start, len(h_nD))
                if operand == dtype:
                    torch.mm(logits_nV, w_VD, out=d_hidden_nD)
                else:
                    d_hidden_nD.copy_(logits_nV @ w_VD)
            if need_weight and start == 0:
                product(logits_nV.T, h_nD, d_weight_VD)
            elif need_weight:
                add_product(d_weight_VD, logits_nV.T, h_nD)
    return loss_N.sum(), d_hidden_ND, d_weight_VD


def chunked_empty(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    target_N: Tensor,
    label_smoothing: float,
    z_loss: float,
    dtype: torch.dtype,
    need_hidden: bool,
    need_weight: bool,
    kernel: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    wide = torch.promote_types(dtype, torch.float32)
    d_hidden_ND = hidden_ND.new_empty(hidden_ND.shape if need_hidden else (0, 0), dtype=dtype)
    d_weight_VD = weight_VD.new_empty(weight_VD.shape if need_weight else (0, 0), dtype=wide)
    return hidden_ND.new_empty((), dtype=wide), d_hidden_ND, d_weight_VD


# Opaque also without the interpreter: its products are cuBLAS's, and a compiler that saw the loop would unroll it.
chunked_sum = register_op("dae_kernels::linear_cross_entropy", chunked_launcher, chunked_empty)
