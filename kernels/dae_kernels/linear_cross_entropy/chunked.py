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

# CPU: elements of a chunk of logits, 4 MiB of float32, about what the caches hold, and the fewest rows: fewer make slow products.
CPU_CHUNK, CPU_ROWS = 1 << 20, 64
# GPU: the fewest rows of a chunk, unless a budget says less. By count at 2048: the product with the weight makes 16 V / 256 tiles
# of 128 x 256, several rounds of 132 SMs from V = 16384 on; adding to the float32 weight gradient reads and writes 8 V D bytes,
# half of the time of its product (2 n V D flop at 798 TFLOP/s and 3.0 TB/s), most of it while other tiles multiply.
GPU_ROWS = 2048
SHARE = 8  # GPU: a chunk is at most this part of all rows, beyond GPU_ROWS


def chunk_rows(N: int, V: int, device: torch.device, element_size: int, chunk_bytes: int | None) -> int:
    """Rows of a chunk: what `chunk_bytes` of logits hold, or the default of the device; on GPUs in chunks of nearly one size."""
    if chunk_bytes is not None:
        rows = max(1, chunk_bytes // (V * element_size))
    elif device.type == "cpu":
        return max(1, min(N, max(CPU_ROWS, CPU_CHUNK // V)))
    else:
        rows = max(GPU_ROWS, -(-N // SHARE))
    chunks = max(1, -(-N // rows))
    even = -(-N // chunks)
    # 128 rows are a tile of the product.
    return max(1, min(N, rows, -(-even // 128) * 128))


def logits_dtype(dtype: torch.dtype, kernel: bool) -> torch.dtype:
    """bfloat16 for the kernel, which sums in float32; float16 would overflow at 65504."""
    return dtype if kernel and dtype == torch.bfloat16 else torch.promote_types(dtype, torch.float32)


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


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x.to(dtype), at a tenth of its host time where x has it."""
    return x if x.dtype == dtype else x.to(dtype)


def part(x: Tensor, start: int, n: int) -> Tensor:
    """n rows of x, or x itself if it has no others."""
    return x if x.shape[0] == n else x.narrow(0, start, n)


def multiply(a: Tensor, b: Tensor, out: Tensor, add: bool = False) -> None:
    """out = a b, or out += a b, summed in the dtype of `out`, or in float32 if that is narrower, by the product itself."""
    if not a.is_cuda:
        a, b = cast(a, out.dtype), cast(b, out.dtype)
    if a.dtype == out.dtype:
        torch.addmm(out, a, b, out=out) if add else torch.mm(a, b, out=out)
    elif add:
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    else:
        torch.mm(a, b, out_dtype=out.dtype, out=out)


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
    chunk_bytes: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """[N] losses, their own gradients by hidden (in `dtype`), and the sum's by linear_weight and bias (at least float32).

    Gradients are empty where not needed. `factor_N`, of at most 1 in absolute value, multiplies the rows of that sum.
    """
    N, V = hidden_ND.shape[0], linear_weight_VD.shape[0]
    wide = torch.promote_types(dtype, torch.float32)
    # CPUs multiply 16 bits slowly; the kernel writes gradients in the GPU's product dtype.
    operand = wide if hidden_ND.device.type == "cpu" and not kernel else dtype
    needs = need_hidden, need_weight, need_bias
    loss_N, d_hidden_ND, d_weight_VD, d_bias_V = chunked_empty(hidden_ND, linear_weight_VD, dtype, *needs, kernel, chunk_bytes)
    if need_bias:
        d_bias_V.zero_()
    if N == 0:
        d_weight_VD.zero_()
    logits = logits_dtype(dtype, kernel)
    rows = chunk_rows(N, V, hidden_ND.device, logits.itemsize, chunk_bytes)
    if kernel:
        from dae_kernels.linear_cross_entropy.fused import launch
    with without_autocast(hidden_ND.device):
        w_VD = cast(cast(linear_weight_VD, dtype), operand)
        b_V = None if bias_V is None else bias_V.to(wide).contiguous()
        # At once on a GPU, which saves launches; by chunks on a CPU, whose products round by how their operands are aligned.
        h_ND = cast(counted_rows(hidden_ND, target_N), operand) if hidden_ND.is_cuda else None
        buffer_nV = hidden_ND.new_empty(rows, V, dtype=logits)
        # In place where the rows of both are equal.
        narrow_nV = hidden_ND.new_empty(rows, V, dtype=dtype) if kernel and any(needs) and dtype != logits else buffer_nV
        for start in range(0, N, rows):
            n = min(rows, N - start)
            target_n, loss_n = part(target_N, start, n), part(loss_N, start, n)
            if h_ND is None:
                h_nD = cast(cast(counted_rows(part(hidden_ND, start, n), target_n), dtype), operand)
            else:
                h_nD = part(h_ND, start, n)
            logits_nV, gradient_nV = part(buffer_nV, 0, n), part(narrow_nV, 0, n)
            multiply(h_nD, w_VD.T, logits_nV)
            step = b_V, weight_V, target_n, loss_n, z_loss, label_smoothing, softcap, any(needs)
            if kernel:
                launch(logits_nV, gradient_nV, *step)
            else:
                softmax_step(logits_nV, *step)
                gradient_nV = cast(logits_nV, operand)
            if need_hidden:
                d_hidden_nD = part(d_hidden_ND, start, n)
                if operand == dtype:
                    torch.mm(gradient_nV, w_VD, out=d_hidden_nD)
                else:
                    d_hidden_nD.copy_(gradient_nV @ w_VD)
            factor_1n = None if factor_N is None else cast(part(factor_N, start, n), operand).unsqueeze(0)
            if need_bias:
                ones_1n = torch.ones_like(loss_n, dtype=operand).unsqueeze(0) if factor_1n is None else factor_1n
                multiply(ones_1n, gradient_nV, d_bias_V.unsqueeze(0), add=True)
            if need_weight:
                if factor_1n is not None:
                    h_nD = h_nD * factor_1n.T
                multiply(gradient_nV.T, h_nD, d_weight_VD, add=start > 0)
    return loss_N, d_hidden_ND, d_weight_VD, d_bias_V


def chunked_empty(hidden_ND: Tensor, linear_weight_VD: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *_, dtype, need_hidden, need_weight, need_bias, _, _ = rest
    wide = torch.promote_types(dtype, torch.float32)
    loss_N = hidden_ND.new_empty(hidden_ND.shape[0], dtype=wide)
    d_hidden_ND = hidden_ND.new_empty(hidden_ND.shape if need_hidden else (0, 0), dtype=dtype)
    d_weight_VD = hidden_ND.new_empty(linear_weight_VD.shape if need_weight else (0, 0), dtype=wide)
    return loss_N, d_hidden_ND, d_weight_VD, hidden_ND.new_empty(linear_weight_VD.shape[0] if need_bias else 0, dtype=wide)


# Opaque even without the interpreter: its products are cuBLAS's, and Inductor would unroll the loop.
chunked_losses = register_op("dae_kernels::linear_cross_entropy", chunked_launcher, chunked_empty)
