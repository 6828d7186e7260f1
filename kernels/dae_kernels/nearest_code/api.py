"""`nearest_code`: checks and dispatch."""

from __future__ import annotations

from torch import Tensor

from dae_kernels.checks import FLOAT_DTYPES, check_choice, check_tensors
from dae_kernels.clouds import convention
from dae_kernels.dispatch import choose, dtype_refusal, plain
from dae_kernels.nearest_code.reference import nearest_code_reference

MAX_HEADS = 65535  # limit of a CUDA grid's second axis


@convention(
    value="squared",
    cost="l2: |x - c|^2, factor 1; cosine: 1 - x.c / (|x| |c|), not squared",
    bias="none: exact in the vectors it is given",
)
def nearest_code(
    x: Tensor, codebook: Tensor, *, metric: str = "l2", precision: str = "exact", impl: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Index of and distance to the nearest codebook entry of every vector.

        l2:      index = argmin_k |x - c_k|^2,            distance = |x - c_index|^2 (squared)
        cosine:  index = argmax_k x . c_k / (|x| |c_k|),  distance = 1 - that cosine, in [0, 2]

    The code is the float64 result, except with precision="fast": float32 scores decide where they provably can, float64
    distances elsewhere. The lowest index wins a tie, including ties broken only by float64 rounding: codes whose distances differ
    by no more than (D + 4) 2^-51 of the distance (of 1 for the cosine) may count as equal, in either implementation. A multiple
    of a code ties with it in cosine unless the multiple itself is rounded further than that.
    A zero vector has cosine 0 with everything.
    Memory is O(N + K) beside the operands: the [N, K] scores are never stored. The reference works on 2^18 coordinates of
    codes (at least 64 codes) and 2^19 scores at a time, on a GPU 2^23; the kernel keeps 24 bytes per vector, times the splits of
    the codes where vectors are few: as many as fill the GPU. float64 squares may overflow: relative to the middle of the
    codes, distances shorter than 1e-154 of its spread are taken for 0.
    A code with NaN or infinity is never the nearest, unless no code is finite: then, and to a vector with NaN or infinity, the
    index is 0 and the distance is not finite (so the loss of `vector_quantize` is not either). Autocast does not touch the
    operands.

    Neither output is differentiable. The differentiable distance is `(x - codebook[index]).square().sum(-1)`.

    Args:
        x: [..., D], or [..., H, D] for H codebooks, floating; any strides (a layout that does not flatten to rows is copied).
        codebook: [K, D] with K, D >= 1, or [H, K, D], one for each head of `x`, H >= 1; floating. Operands of two dtypes are
            compared in the wider one.
        metric: "l2" or "cosine".
        precision: "exact" decides as float64 does. It is slower if float32 cannot distinguish three codes: several copies of a
            code, or vectors far from the origin relative to their distances. "fast" decides by one tensor-core product in the
            dtype of `x` (tf32 for float32), which can pick another code if two are nearly equally near. The reference is
            always exact.
        impl: "auto" is "triton" for CUDA tensors of at most 32 bits where triton is installed, else "reference"; a named
            choice is obeyed or refused.

    Returns:
        index: x.shape[:-1] int64, so [..., H] with heads.
        distance: x.shape[:-1] float32.

    Raises:
        ValueError: shapes or devices disagree, K = 0 or D = 0, an unknown option, or `impl` cannot run here.
        TypeError: an operand is not floating point.

    Source: van den Oord et al. 2017, arXiv 1711.00937, equation 1; cosine: Yu et al. 2022, arXiv 2110.04627, section 3.2.
    """
    check_choice("metric", metric, ("l2", "cosine"))
    check_choice("precision", precision, ("exact", "fast"))
    check_vectors_and_codes(x, codebook)
    refusal = dtype_refusal(x, codebook)
    if codebook.dim() == 3 and codebook.shape[0] > MAX_HEADS:
        refusal = f"the kernel takes at most {MAX_HEADS} heads, got {codebook.shape[0]}"
    codebook, rows, rank = codebook.detach(), x.detach(), codebook.dim()
    if x.dim() != rank:
        leading = x.shape[: 1 - rank]  # without [H, D] or [D]
        rows = rows.reshape(leading.numel(), *x.shape[len(leading) :])
    if choose(impl, x.device, refusal) == "triton":
        from dae_kernels.nearest_code.fused import nearest_code_triton

        index, distance = nearest_code_triton(rows, codebook, metric == "cosine", precision == "exact")
    else:
        index, distance = nearest_code_reference(rows, codebook, metric)
    shape = x.shape[:-1]
    return (index, distance) if index.shape == shape else (index.view(shape), distance.view(shape))


def check_vectors_and_codes(x: Tensor, codebook: Tensor) -> None:
    if plain(x) and plain(codebook) and x.dim() == codebook.dim() == 2:  # as most calls have them: nothing below objects
        fit = x.shape[1] == codebook.shape[1] and codebook.numel() > 0 and x.device == codebook.device
        if fit:
            return
    check_tensors("nearest_code", x=x, codebook=codebook)
    shapes = f"got x {list(x.shape)}, codebook {list(codebook.shape)}"
    heads, rank = codebook.shape[:-2], codebook.dim()
    if rank not in (2, 3) or x.dim() < rank - 1 or x.shape[1 - rank :] != (*heads, codebook.shape[-1]):
        raise ValueError(f"nearest_code needs x [..., D] and codebook [K, D], or x [..., H, D] and codebook [H, K, D], {shapes}")
    if codebook.numel() == 0:
        raise ValueError(f"nearest_code needs at least one code and one dimension, {shapes}")
    for name, tensor in (("x", x), ("codebook", codebook)):
        if tensor.dtype not in FLOAT_DTYPES:
            raise TypeError(f"nearest_code needs floating point tensors, got {name} of {tensor.dtype}")
    if x.device != codebook.device:
        raise ValueError(f"x and codebook must be on one device, got {x.device} and {codebook.device}")
