"""`linear_cross_entropy`: checks, dispatch, and the gradient of the chunked implementations."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from dae_kernels.dispatch import check_choice, check_floating, choose, differentiated, dtype_refusal, values_readable
from dae_kernels.linear_cross_entropy.chunked import chunked_sum
from dae_kernels.linear_cross_entropy.reference import NOT_COUNTED, counted_rows, linear_cross_entropy_reference, without_autocast

IMPLS = ("auto", "reference", "torch", "chunked", "triton")
FEW_LOGITS = 1 << 20  # of all rows together; on a CPU they are then as fast at once


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    impl: str = "auto",
) -> Tensor:
    """Cross-entropy of the softmax of a linear layer, without the logits of all rows at once.

        x_i = weight hidden_i,   lse_i = logsumexp x_i,   t = targets_i
        loss_i = lse_i - (1 - label_smoothing) x_i[t] - label_smoothing mean_v x_i[v] + z_loss lse_i^2

    By chunks of rows: a chunk's logits become their own gradient in place and are multiplied into the gradients of hidden and
    weight in the forward pass, for a scalar's gradients are known but for one factor. The weight's gradient is summed in
    float32. Where nothing requires a gradient, nothing of this is done. Memory: a chunk of logits (2^20 on a CPU, 2^24 on
    a GPU, at least 64 rows) and the two gradients, twice during the backward pass.

    Products are in the dtype of the operands, or in autocast's where it is on, softmax and loss in float32 (float64 for
    float64). On a CPU chunks of 16-bit operands are multiplied in float32. After a cast the gradient of a float32 weight is the
    float32 sum, where torch would round it to 16 bits.

    Targets are read, and wrong ones refused, on CPUs alone: reading them on a GPU would stop the host at each step until the
    device has caught up. There, under torch.compile and under vmap, a target outside the vocabulary makes the loss and its
    gradients NaN on every implementation, and costs two operations on [N].

    Args:
        hidden: [..., D], floating; any strides.
        weight: [V, D], of the dtype of hidden, or castable by autocast.
        targets: [...] int64, in 0..V-1 or ignore_index.
        label_smoothing: in [0, 1], torch's definition.
        z_loss: weight of the squared log-normaliser, finite and not negative.
        ignore_index: rows with this target have no loss, no gradient, and no part in the mean, whatever hidden is there: NaN,
            infinities and overflows of such rows reach neither the loss nor a gradient.
        reduction: "mean" over the rows that are not ignored, or "sum". The mean over no rows is NaN with a gradient of zero, as
            torch's; their sum is 0.
        impl: "reference": all logits at once, plain torch. "chunked": the above by torch's own operations. "triton": the same
            with one kernel between the products. "torch": `torch.nn.functional.linear_cross_entropy` with its default chunks
            (torch 2.13 or later; neither smoothing nor z_loss, nor torch.func's transforms; 16-bit operands round the sum of the
            losses to 16 bits).
            "auto": on CUDA "triton" where it runs, else "chunked"; on a CPU "reference" up to 2^20 logits, else "chunked",
            by what was measured (profiling/results/cpu.md): how many times as fast as "reference" they are, both passes, float32,
            D = 128, one thread, medians of one run,

                N x V           chunked   torch
                2048 x 16384        2.2     0.8
                4096 x 1024         1.3     1.2
                1024 x 64           0.3     0.2

    Returns:
        Scalar, float32, or float64 for float64 operands. Differentiable with respect to hidden and weight; twice by "reference"
        only (chunks raise RuntimeError).

    Raises:
        TypeError: hidden or weight is not floating point of 16 to 64 bits, targets are not int64, or ignore_index is no int.
        ValueError: shapes, dtypes or devices disagree, V = 0 or D = 0, a target outside the vocabulary (see above), an option
            out of range, or `impl` is unknown or cannot run here; the message says why.

    Source: chunks: Hsu et al. 2024, "Liger Kernel", arXiv 2410.10989; smoothing: Szegedy et al. 2015,
    arXiv 1512.00567, section 7; z-loss: Chowdhery et al. 2022, arXiv 2204.02311, section 5; online softmax: Milakov &
    Gimelshein 2018, arXiv 1805.02867.
    """
    check_choice("impl", impl, IMPLS)
    check_choice("reduction", reduction, ("mean", "sum"))
    check_operands(hidden, weight, targets, label_smoothing, z_loss, ignore_index)
    dtype = compute_dtype(hidden)
    impl = implementation(impl, hidden, weight, dtype, label_smoothing, z_loss)
    hidden_ND, targets_N = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    wide = torch.promote_types(dtype, torch.float32)
    target_N, count = counted(targets_N, len(weight), ignore_index, reduction, wide)
    if impl == "reference":
        return linear_cross_entropy_reference(hidden_ND, weight, target_N, label_smoothing, z_loss, dtype) / count
    if impl == "torch":
        total = torch_sum(hidden_ND, weight, target_N, dtype).to(wide)
        return (total / count.clamp(min=1)).masked_fill(count == 0, math.nan)  # a gradient of 0, where 0 / 0 has NaN
    if torch.compiler.is_compiling():
        from dae_kernels.whole import chunked_loss_function
    else:
        chunked_loss_function = apply_chunked_loss
    return chunked_loss_function(hidden_ND, weight, target_N, count, label_smoothing, z_loss, dtype, impl == "triton")


def compute_dtype(hidden: Tensor) -> torch.dtype:
    """The dtype of the products: autocast's, as for torch's own linear layers, or that of the operands."""
    device = hidden.device.type
    if hidden.dtype != torch.float64 and torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return hidden.dtype


def check_operands(
    hidden: Tensor, weight: Tensor, targets: Tensor, label_smoothing: float, z_loss: float, ignore_index: int
) -> None:
    operation = "linear_cross_entropy"
    check_floating(operation, "hidden", hidden)
    check_floating(operation, "weight", weight)
    if not isinstance(targets, Tensor) or targets.dtype != torch.int64:
        got = targets.dtype if isinstance(targets, Tensor) else type(targets)
        raise TypeError(f"{operation} needs int64 targets, got {got}")
    if not isinstance(ignore_index, int) or isinstance(ignore_index, bool):
        raise TypeError(f"{operation} needs an int ignore_index, got {ignore_index!r}")
    shapes = f"got hidden {list(hidden.shape)}, weight {list(weight.shape)}, targets {list(targets.shape)}"
    if hidden.dim() < 1 or weight.dim() != 2 or hidden.shape[-1] != weight.shape[1] or targets.shape != hidden.shape[:-1]:
        raise ValueError(f"{operation} needs hidden [..., D], weight [V, D] and targets [...], {shapes}")
    if weight.numel() == 0:
        raise ValueError(f"{operation} needs V >= 1 and D >= 1, {shapes}")
    if not hidden.device == weight.device == targets.device:
        raise ValueError(f"{operation} needs one device, got {hidden.device}, {weight.device}, {targets.device}")
    if hidden.dtype != weight.dtype and compute_dtype(hidden) != compute_dtype(weight):
        raise ValueError(f"{operation} needs hidden and weight of one dtype, got {hidden.dtype} and {weight.dtype}")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing must lie in [0, 1], got {label_smoothing}")
    if not (math.isfinite(z_loss) and z_loss >= 0):
        raise ValueError(f"z_loss must be finite and not negative, got {z_loss}")


def counted(targets_N: Tensor, V: int, ignore_index: int, reduction: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Targets with NOT_COUNTED for ignored ones, and the divisor of the sum: NaN if a target that is not read here is wrong."""
    counts_N = targets_N != ignore_index
    outside_N = ((targets_N < 0) | (targets_N >= V)) & counts_N
    if targets_N.device.type == "cpu" and values_readable(targets_N) and outside_N.any():
        wrong = targets_N[outside_N][0].item()
        raise ValueError(f"targets must lie in 0..{V - 1} or be ignore_index={ignore_index}, got {wrong}")
    count = counts_N.sum().to(dtype)
    if reduction == "sum":
        count = torch.ones_like(count)
    return targets_N.where(counts_N, NOT_COUNTED).masked_fill(outside_N, NOT_COUNTED), count.masked_fill(
        outside_N.any(), math.nan
    )


def implementation(impl: str, hidden: Tensor, weight: Tensor, dtype: torch.dtype, label_smoothing: float, z_loss: float) -> str:
    """The implementation that runs, for a request that it can obey; ValueError otherwise."""
    if impl == "torch":
        if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
            raise ValueError(f"impl='torch' needs torch 2.13 or later, got {torch.__version__}: use impl='chunked'")
        if label_smoothing or z_loss:
            raise ValueError(
                "impl='torch' makes all logits for label_smoothing and has no z_loss: both must be 0, "
                f"got {label_smoothing} and {z_loss}; use impl='chunked'"
            )
        if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
            raise ValueError("impl='torch' has no rules for torch.func (vmap, grad, ...): use impl='chunked'")
        return impl
    if impl == "triton" or (impl == "auto" and hidden.device.type == "cuda"):
        refusal = dtype_refusal(hidden, weight)
        return "triton" if choose(impl, hidden.device, refusal) == "triton" else "chunked"
    if impl == "auto":
        return "reference" if math.prod(hidden.shape[:-1]) * len(weight) <= FEW_LOGITS else "chunked"
    return impl


def torch_sum(hidden_ND: Tensor, weight_VD: Tensor, target_N: Tensor, dtype: torch.dtype) -> Tensor:
    options = torch.nn.LinearCrossEntropyOptions(allow_retain_graph=True)  # a second backward, as everywhere
    with without_autocast(hidden_ND.device):
        return F.linear_cross_entropy(
            counted_rows(hidden_ND, target_N).to(dtype),
            weight_VD.to(dtype),
            target_N,
            reduction="sum",
            ignore_index=NOT_COUNTED,
            options=options,
        )


class ChunkedLoss(torch.autograd.Function):
    """Sum of the losses over `count`. A Function, as what `register_autograd` makes is closed to torch.func.

    The gradients are results too: what differentiates them is then seen, and refused.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(hidden_ND, weight_VD, target_N, count, label_smoothing, z_loss, dtype, need_hidden, need_weight, kernel):
        total, *gradients = chunked_sum(
            hidden_ND, weight_VD, target_N, label_smoothing, z_loss, dtype, need_hidden, need_weight, kernel
        )
        return total / count, *gradients

    @staticmethod
    def setup_context(ctx, inputs, output):
        hidden_ND, weight_VD, _, count, *_ = inputs
        ctx.dtypes, ctx.needs = (hidden_ND.dtype, weight_VD.dtype), inputs[7:9]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(count, *output[1:])

    @staticmethod
    def backward(ctx, d_loss, *d_gradients):
        if any(d is not None for d in d_gradients):
            raise RuntimeError("linear_cross_entropy by chunks has no second derivatives: use impl='reference'")
        if d_loss is None:
            return (None,) * 10
        count, *gradients = ctx.saved_tensors
        factor = d_loss / count.clamp(min=1)  # without rows the mean is NaN and its gradient 0, as torch's
        # The weight's first: its product in float32 is the largest tensor here.
        d_weight_VD, d_hidden_ND = ((gradients[i] * factor).to(ctx.dtypes[i]) if ctx.needs[i] else None for i in (1, 0))
        return d_hidden_ND, d_weight_VD, *[None] * 8


def apply_chunked_loss(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    target_N: Tensor,
    count: Tensor,
    label_smoothing: float,
    z_loss: float,
    dtype: torch.dtype,
    kernel: bool,
) -> Tensor:
    needs = differentiated(hidden_ND), differentiated(weight_VD)
    return ChunkedLoss.apply(hidden_ND, weight_VD, target_N, count, label_smoothing, z_loss, dtype, *needs, kernel)[0]
