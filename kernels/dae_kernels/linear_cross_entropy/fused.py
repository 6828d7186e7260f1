"""The step between the products in Triton: a chunk of logits becomes its own gradient in place, and one loss a row is written.

Roofline (counts, with the measured floors of an H100: 3.0 TB/s of copy, 798 TFLOP/s in bf16, 132 SMs; not yet measured).
- The kernel is bound by memory: n V logits of b bytes are read and written, 2 n V b; the eager steps it stands for move about
  8 n V float32 and cast twice. A program reads its row once for the maximum and the sum and once more for the gradient; the
  rows at work at once (8 warps a program, at most 8 programs an SM, 32 KB a row at V = 16384 in bf16: 35 MB) lie in the L2
  cache (50 MB) by then, as may the whole chunk as it comes from the product (32 MB). From memory, [1024, 16384] in bf16 would
  take 22 us.
- The three products around it are 6 n V D flop, 129 us for that chunk and D = 1024: the whole operation is bound by them.
- Memory of the operation by count, at N = 8192, V = 16384, D = 1024 in bf16: a chunk of logits 32 MiB, the weight's gradient in
  float32 64 and the block that is added to it 16, hidden's gradient 16: 128 MiB forward; 176 backward. All logits, their
  logarithmic softmax and the gradients of both are 768 MiB.
- Arithmetic: two exponentials a logit; an SM does 16 a cycle and at 3.0 TB/s meets 3.2 bf16 logits a cycle (2 b bytes each), so
  the exponentials take less than half of the time of the traffic.
- A tile is one row of at most 2048 logits over 8 warps: 8 a thread, one load of 16 bytes in bf16. With 16 a thread ptxas spilled
  a few registers on sm_80, sm_90 and sm_100. The loop keeps a maximum and a sum for each lane (online softmax) and merges lanes
  once, so nothing is reduced over threads inside it; a short row gets fewer warps.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_BLOCK = 2048


@triton.jit
def softmax_step_kernel(
    logits_ptr,
    target_ptr,
    loss_ptr,
    stride_n,
    V,
    label_smoothing,
    z_loss,
    GRADIENT: tl.constexpr,
    SMOOTH: tl.constexpr,
    Z_LOSS: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """loss = lse - (1 - s) x_t - s mean x + z lse^2, and d loss / d x over x; a negative target: 0 and zeros. Grid (rows)."""
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(target_ptr + row)
    counts = target >= 0
    lane = tl.arange(0, BLOCK_V)
    x_ptrs = logits_ptr + row * stride_n + lane
    # Read before the row is overwritten, and by every thread.
    x_target = tl.load(logits_ptr + row * stride_n + tl.maximum(target, 0)).to(tl.float32)

    # A lane without a finite logit so far has the maximum -inf, from which nothing may be subtracted.
    largest = tl.full([BLOCK_V], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_V], tl.float32)
    plain = tl.zeros([BLOCK_V], tl.float32)
    for v0 in range(0, V, BLOCK_V):
        inside = v0 + lane < V
        x = tl.load(x_ptrs + v0, mask=inside, other=float("-inf")).to(tl.float32)
        larger = tl.maximum(largest, x)
        # One of the two exponents is 0: one exponential does for both.
        e = tl.exp(tl.where(larger == float("-inf"), 0.0, -tl.abs(x - largest)))
        total = tl.where(x > largest, total * e + 1.0, total + tl.where(inside, e, 0.0))
        largest = larger
        if SMOOTH:
            plain += tl.where(inside, x, 0.0)
    top = tl.max(largest, axis=0)
    away = tl.exp(tl.where(largest == float("-inf"), float("-inf"), largest - top))
    lse = top + tl.log(tl.sum(total * away, axis=0))
    loss = lse - (1.0 - label_smoothing) * x_target
    if Z_LOSS:  # 0 times a square that overflows is NaN
        loss += z_loss * lse * lse
    if SMOOTH:
        loss -= label_smoothing * (tl.sum(plain, axis=0) / V)
    tl.store(loss_ptr + row, tl.where(counts, loss, 0.0))

    if GRADIENT:
        tl.debug_barrier()  # every thread has read its target's logit
        factor = 1.0 + 2.0 * z_loss * lse
        for v0 in range(0, V, BLOCK_V):
            v = v0 + lane
            x = tl.load(x_ptrs + v0, mask=v < V, other=0.0).to(tl.float32)
            d = tl.exp(x - lse) * factor - tl.where(v == target, 1.0 - label_smoothing, 0.0)
            if SMOOTH:
                d -= label_smoothing / V
            tl.store(x_ptrs + v0, tl.where(counts, d, 0.0).to(logits_ptr.dtype.element_ty), mask=v < V)


def tile(V: int) -> dict[str, int]:
    """One row of at most MAX_BLOCK logits, 8 a thread."""
    block = min(triton.next_power_of_2(V), MAX_BLOCK)
    return {"BLOCK_V": block, "num_warps": max(1, block // 256)}


def launch(logits_nV: Tensor, target_n: Tensor, loss_n: Tensor, label_smoothing: float, z_loss: float, gradient: bool) -> None:
    """Write loss_n, and with `gradient` the gradient over logits_nV, whose rows are contiguous."""
    if len(logits_nV) == 0:
        return
    with torch.cuda.device_of(logits_nV):
        softmax_step_kernel[(len(logits_nV),)](
            logits_nV,
            target_n,
            loss_n,
            logits_nV.stride(0),
            logits_nV.shape[1],
            label_smoothing,
            z_loss,
            GRADIENT=gradient,
            SMOOTH=label_smoothing > 0,
            Z_LOSS=z_loss > 0,
            **tile(logits_nV.shape[1]),
        )
