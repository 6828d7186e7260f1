"""The step between the products in Triton: it writes the gradient of a chunk of logits and one loss per row.

Roofline (counts, with the measured floors of an H100: 3.0 TB/s of copy, 798 TFLOP/s in bf16, 132 SMs; not yet measured).
- The kernel is bound by memory: n V logits are read, twice where there is a gradient, and n V gradients written. In bfloat16 both
  have 2 bytes, the gradient takes the place of the logits, and sums are float32: 6 n V bytes, 4 where the second reading comes
  from the L2 cache (50 MB; the rows at work at once are 132 SMs x 8 rows x 32 KB at V = 16384). [2048, 16384]: 67 us, or 45.
  float16 logits would overflow at 65504: they are float32, and gradients have a place of their own.
- The three products around it are 6 n V D flop, 258 us for that chunk and D = 1024: the whole operation is bound by them.
- Memory of the operation by count, at N = 8192, V = 16384, D = 1024 in bf16: 2048 rows of logits, which become their gradients,
  64 MiB, the weight's gradient in float32 64, hidden's gradient 16 and hidden without the ignored rows 16: 160 MiB forward;
  backward 128, as the logits are gone and the two gradients are there once more in bf16. All logits, their logarithmic softmax
  and the gradients of both are 768 MiB.
- Launches: two before the chunks, and four for each: a product, this kernel, a product, a product that adds.
- Arithmetic: two exponentials per logit (four with a soft cap); an SM does 16 per cycle and at 3.0 TB/s meets 2 to 3 logits
  (4 to 6 bytes each) per cycle, so the exponentials take less than half of the time of the traffic.
- A tile is one row, 16 bytes of logits per thread of 8 warps: 2048 in bfloat16, 1024 in float32; 1024 with a soft cap,
  where 8 per thread spilled on sm_80, sm_90 and sm_100. The loop keeps a maximum and a sum for each lane (online softmax) and
  merges lanes once, so nothing is reduced over threads inside it; a short row gets fewer warps.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from dae_kernels.tiles import next_power_of_2


@triton.jit
def tanh_and_slope(u):
    """tanh u and its derivative, from one exponential; below 0.35 from its series, as 1 - exp cancels there."""
    e = tl.exp(-2.0 * tl.abs(u))
    large = (1.0 - e) / (1.0 + e)
    s = u * u
    # The series of tanh u / u: the first omitted term, 0.0036 u^12, is 1.2e-8 at 0.35 (unit roundoff: 6e-8).
    small = 1.0 + s * (-1.0 / 3 + s * (2.0 / 15 + s * (-17.0 / 315 + s * (62.0 / 2835 + s * (-1382.0 / 155925)))))
    return tl.where(tl.abs(u) < 0.35, u * small, tl.where(u < 0, -large, large)), 4.0 * e / ((1.0 + e) * (1.0 + e))


@triton.jit
def softmax_step_kernel(
    logits_ptr, gradient_ptr, bias_ptr, weight_ptr, target_ptr, loss_ptr, z_loss_ptr,
    stride_n, gradient_stride_n,
    V, label_smoothing, softcap,
    GRADIENT: tl.constexpr, SMOOTH: tl.constexpr, Z_LOSS: tl.constexpr, BIAS: tl.constexpr, WEIGHT: tl.constexpr,
    SOFTCAP: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """`chunked.softmax_step` of one row: its loss and gradient; a negative target: 0 and zeros. Grid (rows).

    gradient_ptr may be logits_ptr, and bias, weight and z_loss anything where they are not used.
    """
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(target_ptr + row)
    counts = target >= 0
    target = tl.maximum(target, 0)
    lane = tl.arange(0, BLOCK_V)
    logits_ptr += row * stride_n
    # Read before the row is overwritten, and by every thread.
    x_target = tl.load(logits_ptr + target).to(tl.float32)
    if BIAS:
        x_target += tl.load(bias_ptr + target)
    if SOFTCAP:
        x_target = tanh_and_slope(x_target / softcap)[0] * softcap
    target_mass = 1.0 - label_smoothing
    if WEIGHT:
        target_mass *= tl.load(weight_ptr + target)

    # A lane without a finite logit so far has the maximum -inf, which must not be subtracted.
    largest = tl.full([BLOCK_V], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_V], tl.float32)
    plain = tl.zeros([BLOCK_V], tl.float32)
    mass = tl.zeros([BLOCK_V], tl.float32)
    for v0 in range(0, V, BLOCK_V):
        v = v0 + lane
        inside = v < V
        x = tl.load(logits_ptr + v, mask=inside, other=float("-inf")).to(tl.float32)
        if BIAS:
            x += tl.load(bias_ptr + v, mask=inside, other=0.0)
        if SOFTCAP:
            x = tl.where(inside, tanh_and_slope(x / softcap)[0] * softcap, float("-inf"))
        larger = tl.maximum(largest, x)
        # One of the two exponents is 0, so one exponential suffices.
        e = tl.exp(tl.where(larger == float("-inf"), 0.0, -tl.abs(x - largest)))
        total = tl.where(x > largest, total * e + 1.0, total + tl.where(inside, e, 0.0))
        largest = larger
        if SMOOTH:
            if WEIGHT:
                w = tl.load(weight_ptr + v, mask=inside, other=0.0)
                mass += w
                plain += tl.where(inside, w * x, 0.0)
            else:
                plain += tl.where(inside, x, 0.0)
    top = tl.max(largest, axis=0)
    away = tl.exp(tl.where(largest == float("-inf"), float("-inf"), largest - top))
    total_sum = tl.sum(total * away, axis=0)
    log_sum = tl.log(total_sum)
    row_mass = target_mass
    loss = target_mass * (top - x_target)
    share = 0.0
    if SMOOTH:
        share = label_smoothing / V
        smoothed = label_smoothing
        if WEIGHT:
            smoothed = share * tl.sum(mass, axis=0)
        row_mass += smoothed
        loss += smoothed * top - share * tl.sum(plain, axis=0)
    loss += row_mass * log_sum
    if Z_LOSS:  # 0 times a square that overflows is NaN
        lse = top + log_sum
        z_loss = tl.load(z_loss_ptr)
        loss += z_loss * lse * lse
        row_mass += 2.0 * z_loss * lse
    tl.store(loss_ptr + row, tl.where(counts, loss, 0.0))

    if GRADIENT:
        tl.debug_barrier()  # every thread has read its target's logit
        factor = row_mass / total_sum
        gradient_ptr += row * gradient_stride_n
        for v0 in range(0, V, BLOCK_V):
            v = v0 + lane
            inside = v < V
            x = tl.load(logits_ptr + v, mask=inside, other=0.0).to(tl.float32)
            if BIAS:
                x += tl.load(bias_ptr + v, mask=inside, other=0.0)
            if SOFTCAP:
                x, slope = tanh_and_slope(x / softcap)
                x *= softcap
            d = tl.exp(x - top) * factor - tl.where(v == target, target_mass, 0.0)
            if SMOOTH:
                if WEIGHT:
                    d -= share * tl.load(weight_ptr + v, mask=inside, other=0.0)
                else:
                    d -= share
            if SOFTCAP:
                d *= slope
            tl.store(gradient_ptr + v, tl.where(counts, d, 0.0).to(gradient_ptr.dtype.element_ty), mask=inside)


@functools.cache
def tile(V: int, logits: torch.dtype, softcap: bool) -> dict[str, int]:
    """Of one row, what 8 warps load by 16 bytes per thread; with a soft cap and bfloat16 by 8."""
    lanes = 4 if softcap or logits.itemsize == 4 else 8
    block = min(next_power_of_2(V), 256 * lanes)
    return {"BLOCK_V": block, "num_warps": max(1, block // (32 * lanes))}


def launch(
    logits_nV: Tensor, gradient_nV: Tensor, bias_V: Tensor | None, weight_V: Tensor | None, target_n: Tensor, loss_n: Tensor,
    z_loss: Tensor | None, label_smoothing: float, softcap: float | None, gradient: bool,
) -> None:  # fmt: skip
    """`chunked.softmax_step`, but with its gradient into gradient_nV, of any dtype or logits_nV itself.

    Rows are contiguous, vectors too; logits and gradient have any dtype, all else is float32. gradient_nV is not touched unless
    `gradient`.
    """
    n, V = logits_nV.shape
    if n == 0:
        return
    bias, weight, z = (logits_nV if vector is None else vector for vector in (bias_V, weight_V, z_loss))  # not read if None
    with torch.cuda.device_of(logits_nV):
        softmax_step_kernel[(n,)](
            logits_nV,
            gradient_nV,
            bias,
            weight,
            target_n,
            loss_n,
            z,
            logits_nV.stride(0),
            gradient_nV.stride(0),
            V,
            label_smoothing,
            1.0 if softcap is None else softcap,
            GRADIENT=gradient,
            SMOOTH=label_smoothing > 0,
            Z_LOSS=z_loss is not None,
            BIAS=bias_V is not None,
            WEIGHT=weight_V is not None,
            SOFTCAP=softcap is not None,
            **tile(V, logits_nV.dtype, softcap is not None),
        )
