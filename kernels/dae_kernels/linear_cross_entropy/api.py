"""`linear_cross_entropy`: checks and dispatch."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from dae_kernels.checks import as_integer, as_number, check_choice, check_dense, check_floating
from dae_kernels.dispatch import choose, dtype_refusal, on_cuda, plain
from dae_kernels.linear_cross_entropy.autograd import chunked_cross_entropy
from dae_kernels.linear_cross_entropy.reference import NOT_COUNTED, counted_rows, linear_cross_entropy_reference
from dae_kernels.tracing import has_autocast, values_readable, without_autocast

IMPLS = ("auto", "reference", "torch", "chunked", "triton")
LARGEST = torch.finfo(torch.float32).max
FEW_LOGITS = 1 << 20  # of all rows; up to here a CPU is as fast without chunks


def linear_cross_entropy(
    hidden: Tensor,
    linear_weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    weight: Tensor | None = None,
    softcap: float | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    chunk_bytes: int | None = None,
    impl: str = "auto",
) -> Tensor:
    """Cross-entropy of the softmax of a linear layer, without the logits of all rows at once.

        x_i = linear_weight hidden_i + bias, or softcap tanh(that / softcap)
        lse_i = logsumexp x_i,   log p_i = x_i - lse_i,   t = targets_i,   w = weight, or ones
        loss_i = -(1 - label_smoothing) w[t] log p_i[t] - label_smoothing / V sum_v w[v] log p_i[v] + z_loss lse_i^2
        mean   = sum_i of the first two terms / sum_i w[t] + z_loss mean_i lse_i^2

    By chunks of rows: a chunk's logits become their own gradient in place and are multiplied into the gradients of hidden and
    linear_weight in the forward pass, as gradients of a scalar are known but for one factor. With reduction="none" they are not:
    the backward pass computes the logits anew, a third more products. The weight's gradient is summed in float32. Where nothing
    requires a gradient, nothing of this is done. Memory: a chunk of logits (twice that with a soft cap by "chunked", and for
    the gradients of float16 by "triton"), the two gradients, twice during the backward pass, and hidden without ignored rows.

    The operands of products have their own dtype, or autocast's where it is on. Softmax and loss are float32 (float64 for
    float64), and logits too, except by "torch" and except bfloat16 by "triton", which rounds them to bfloat16, as torch's linear
    layer does; float16 would overflow. So sizes do not change the result. On a CPU 16-bit operands of all other implementations
    are multiplied in float32. After a cast the gradient of a float32 linear_weight is the float32 sum, where torch would round it
    to 16 bits.

    Targets are checked only on CPUs: reading them on a GPU would synchronise at each step. There, under torch.compile and under
    vmap, a target outside the vocabulary makes all losses and their gradients NaN on every implementation, at the cost of two
    operations on [N].

    Args:
        hidden: [..., D], floating; any strides.
        linear_weight: [V, D], of the dtype of hidden, or castable by autocast.
        targets: [...] int64, in 0..V-1 or ignore_index.
        bias: [V], floating, or None.
        weight: [V], floating: class weights as in torch's `cross_entropy`, or None. Not differentiable.
        softcap: positive and finite, the bound of the logits, or None. Gemma 2 uses 30.
        label_smoothing: in [0, 1], torch's definition.
        z_loss: weight of the squared log-normaliser, finite and not negative; class weights do not apply to it.
        ignore_index: rows with this target have no loss and no gradient and do not count in the mean: NaN, infinities and
            overflows of such rows reach neither the loss nor a gradient.
        reduction: "mean" over the rows that are not ignored, weighted by w[t]; "sum"; or "none". The mean over no rows is NaN
            with a gradient of zero, as torch's; their sum is 0. Likewise where all w[t] are 0 (torch: NaN gradients).
        chunk_bytes: bytes of logits that may be alive at once, positive; at least one row is. None: on a GPU an eighth of all
            logits, but at least 2,048 rows, below which the products lose speed; on a CPU 4 MiB, at least 64 rows.
        impl: "reference": all logits at once, plain torch. "chunked": the above by torch's own operations. "triton": the same
            with one kernel between the products. "torch": `torch.nn.functional.linear_cross_entropy` with its default chunks
            (torch 2.13 or later; no soft cap, smoothing or z-loss, nor torch.func's transforms; it rounds bfloat16 losses and
            their sum to bfloat16, and float16 is computed in float32, as it would overflow).
            "auto": on CUDA "triton" where it runs, else "chunked"; on a CPU "reference" up to 2^20 logits, else "chunked",
            by what was measured (profiling/results/cpu.md): how many times as fast as "reference" they are, both passes, float32,
            D = 128, one thread, medians of one run,

                N x V           chunked   torch
                2048 x 16384        2.2     0.8
                4096 x 1024         1.3     1.2
                1024 x 64           0.3     0.2

    Returns:
        Scalar, or the shape of targets for "none"; float32, or float64 for float64 operands. Differentiable with respect to
        hidden, linear_weight and bias; twice by "reference" only (chunks raise RuntimeError).

    Raises:
        TypeError: an operand is not floating point of 16 to 64 bits, targets are not int64, or ignore_index is not an int.
        ValueError: shapes, dtypes or devices disagree, V = 0 or D = 0, a target outside the vocabulary (see above), an option
            out of range, class weights that require a gradient, or `impl` is unknown or cannot run here; the message says why.

    Source: chunks: Hsu et al. 2024, "Liger Kernel", arXiv 2410.10989; smoothing: Szegedy et al. 2015,
    arXiv 1512.00567, section 7; z-loss: Chowdhery et al. 2022, arXiv 2204.02311, section 5; soft cap: Gemma Team 2024,
    arXiv 2408.00118, section 2; online softmax: Milakov & Gimelshein 2018, arXiv 1805.02867.
    """
    check_choice("impl", impl, IMPLS)
    check_choice("reduction", reduction, ("mean", "sum", "none"))
    check_rows_and_classes(hidden, linear_weight, targets, bias, weight)
    operation = "linear_cross_entropy"
    label_smoothing, z_loss = as_number(operation, "label_smoothing", label_smoothing), as_number(operation, "z_loss", z_loss)
    softcap = None if softcap is None else as_number(operation, "softcap", softcap)
    ignore_index = as_integer(operation, "ignore_index", ignore_index)
    chunk_bytes = None if chunk_bytes is None else as_integer(operation, "chunk_bytes", chunk_bytes)
    if chunk_bytes is not None and chunk_bytes < 1:
        raise ValueError(f"chunk_bytes must be positive, or None for the default, got {chunk_bytes}")
    check_loss_options(label_smoothing, z_loss, softcap)
    dtype = compute_dtype(hidden)
    impl = implementation(impl, hidden, linear_weight, dtype, label_smoothing, z_loss, softcap)
    hidden_ND = hidden if hidden.dim() == 2 else hidden.reshape(-1, hidden.shape[-1])
    targets_N = targets if targets.dim() == 1 else targets.reshape(-1)
    wide = torch.promote_types(dtype, torch.float32)
    weight_V = None if weight is None else weight.detach().to(wide).contiguous()
    target_N, wrong, rows = counted(targets_N, linear_weight.shape[0], ignore_index)
    rows = rows.to(wide)
    mass = rows if weight_V is None else weight_V.gather(0, target_N.clamp(min=0)).where(target_N != NOT_COUNTED, 0.0).sum()
    z = None
    if z_loss:  # a mean over rows, though the sum is divided by class weights
        scaled = reduction == "mean" and weight_V is not None
        z = mass / rows.clamp(min=1) * z_loss if scaled else rows.new_full((), z_loss)
    tensors = (hidden_ND, linear_weight, bias, weight_V, target_N, z)
    options = (label_smoothing, softcap, dtype)
    empty = mass == 0 if reduction == "mean" else None
    divisor = torch.ones_like(rows) if empty is None else mass.masked_fill(empty, 1.0)  # the gradient of 0 / 0 would be NaN
    divisor = divisor.masked_fill(wrong, math.nan)  # gradients are to be NaN, too
    if impl in ("chunked", "triton"):
        losses = chunked_cross_entropy(*tensors, *options, impl == "triton", chunk_bytes, divisor, empty, reduction != "none")
        return losses.view(targets.shape) if reduction == "none" else losses
    if impl == "reference":
        losses = linear_cross_entropy_reference(*tensors, *options)
    else:
        losses = torch_losses(*tensors[:5], dtype, "none" if reduction == "none" else "sum").to(wide)
    if reduction == "none":
        return (losses / divisor).view(targets.shape)
    total = losses.sum() / divisor
    return total if empty is None else total.masked_fill(empty, math.nan)


def compute_dtype(hidden: Tensor) -> torch.dtype:
    """The dtype of the products: autocast's, as for torch's own linear layers, or that of the operands."""
    device = hidden.device.type
    if hidden.dtype != torch.float64 and has_autocast(device) and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return hidden.dtype


def check_rows_and_classes(
    hidden: Tensor, linear_weight: Tensor, targets: Tensor, bias: Tensor | None, weight: Tensor | None
) -> None:
    if usual(hidden, linear_weight, targets) and bias is None and weight is None:
        return
    operation = "linear_cross_entropy"
    check_floating(operation, "hidden", hidden)
    check_floating(operation, "linear_weight", linear_weight)
    if not isinstance(targets, Tensor) or targets.dtype != torch.int64:
        kind = targets.dtype if isinstance(targets, Tensor) else type(targets)
        raise TypeError(f"{operation} needs int64 targets, got {kind}")
    check_dense(operation, "targets", targets)
    matrix = linear_weight.dim() == 2 and hidden.dim() >= 1 and hidden.shape[-1] == linear_weight.shape[1]
    if not matrix or targets.shape != hidden.shape[:-1] or linear_weight.numel() == 0:
        shapes = f"got hidden {list(hidden.shape)}, linear_weight {list(linear_weight.shape)}, targets {list(targets.shape)}"
        needs = "V >= 1 and D >= 1" if matrix and targets.shape == hidden.shape[:-1] else ""
        raise ValueError(f"{operation} needs {needs or 'hidden [..., D], linear_weight [V, D] and targets [...]'}, {shapes}")
    if not hidden.device == linear_weight.device == targets.device:
        raise ValueError(f"{operation} needs one device, got {hidden.device}, {linear_weight.device}, {targets.device}")
    if hidden.dtype != linear_weight.dtype and compute_dtype(hidden) != compute_dtype(linear_weight):
        got = f"{hidden.dtype} and {linear_weight.dtype}"
        raise ValueError(f"{operation} needs hidden and linear_weight of one dtype, got {got}")
    V = linear_weight.shape[0]
    for name, vector in (("bias", bias), ("weight", weight)):
        if vector is None:
            continue
        check_floating(operation, name, vector)
        if vector.shape != (V,) or vector.device != hidden.device:
            got = f"{list(vector.shape)} on {vector.device}"
            raise ValueError(f"{operation} needs {name} [{V}] on {hidden.device}, one value a class, got {got}")
    if weight is not None and weight.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{operation} has no derivative by the class weights, got one that requires it: give weight.detach()")


def usual(hidden: Tensor, linear_weight: Tensor, targets: Tensor) -> bool:
    """Whether neither the checks nor `dtype_refusal` object to these; False where that is not seen at once."""
    if torch.compiler.is_compiling() or not (plain(hidden) and plain(linear_weight)) or not isinstance(targets, Tensor):
        return False
    if targets.dtype is not torch.int64 or targets.is_nested or targets.layout is not torch.strided:
        return False
    shape, matrix = hidden.shape, linear_weight.shape
    if len(matrix) != 2 or len(shape) == 0 or shape[-1] != matrix[1] or targets.shape != shape[:-1] or 0 in matrix:
        return False
    return hidden.dtype is linear_weight.dtype and hidden.device == linear_weight.device == targets.device


def check_loss_options(label_smoothing: float, z_loss: float, softcap: float | None) -> None:
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing must lie in [0, 1], got {label_smoothing}")
    if not 0 <= z_loss <= LARGEST:
        raise ValueError(f"z_loss must be finite in float32 and not negative, got {z_loss}")
    if softcap is not None and not (math.isfinite(softcap) and softcap > 0):
        raise ValueError(f"softcap must be positive and finite, or None for no cap, got {softcap}")


def counted(targets_N: Tensor, V: int, ignore_index: int) -> tuple[Tensor, Tensor, Tensor]:
    """Targets with NOT_COUNTED for ignored and invalid ones, whether any is invalid, and the number not ignored.

    ValueError: an invalid target, if they are read.
    """
    counts_N, valid_N = targets_N != ignore_index, targets_N.clamp(0, V - 1) == targets_N
    wrong_N = counts_N > valid_N
    wrong = wrong_N.any()
    if targets_N.device.type == "cpu" and values_readable(targets_N) and wrong:
        found = targets_N[wrong_N][0].item()
        raise ValueError(f"targets must lie in 0..{V - 1} or be ignore_index={ignore_index}, got {found}")
    if 0 <= ignore_index < V:  # else a valid target counts
        valid_N = counts_N & valid_N
    return targets_N.where(valid_N, NOT_COUNTED), wrong, counts_N.sum()


def implementation(
    impl: str,
    hidden: Tensor,
    linear_weight: Tensor,
    dtype: torch.dtype,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
) -> str:
    """The implementation that runs for a request. ValueError: it cannot run here, or lacks an option."""
    if impl == "torch":
        if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
            raise ValueError(f"impl='torch' needs torch 2.13 or later, got {torch.__version__}: use impl='chunked'")
        if label_smoothing or z_loss or softcap is not None:
            raise ValueError(
                "impl='torch' makes all logits for label_smoothing and has neither z_loss nor softcap: they must be 0, 0 and "
                f"None, got {label_smoothing}, {z_loss} and {softcap}; use impl='chunked'"
            )
        if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
            raise ValueError("impl='torch' has no rules for torch.func (vmap, grad, ...): use impl='chunked'")
        return impl
    if impl == "triton" or (impl == "auto" and on_cuda(hidden.device)):
        refusal = dtype_refusal(hidden, linear_weight)
        if refusal is None and dtype != hidden.dtype:  # autocast's
            refusal = dtype_refusal(hidden.new_empty(0, dtype=dtype))
        return "triton" if choose(impl, hidden.device, refusal) == "triton" else "chunked"
    if impl == "auto":
        return "reference" if math.prod(hidden.shape[:-1]) * len(linear_weight) <= FEW_LOGITS else "chunked"
    return impl


def torch_losses(
    hidden_ND: Tensor,
    linear_weight_VD: Tensor,
    bias_V: Tensor | None,
    weight_V: Tensor | None,
    target_N: Tensor,
    dtype: torch.dtype,
    reduction: str,
) -> Tensor:
    if dtype == torch.float16:  # losses and their sum would overflow
        dtype = torch.float32
    options = torch.nn.LinearCrossEntropyOptions(allow_retain_graph=True)  # a second backward, as everywhere
    with without_autocast(hidden_ND.device):
        return F.linear_cross_entropy(
            counted_rows(hidden_ND, target_N).to(dtype),
            linear_weight_VD.to(dtype),
            target_N,
            linear_bias=None if bias_V is None else bias_V.to(dtype),
            weight=None if weight_V is None else weight_V.to(dtype),
            reduction=reduction,
            ignore_index=NOT_COUNTED,
            options=options,
        )
