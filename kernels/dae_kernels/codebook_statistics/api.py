"""`codebook_statistics`: checks and dispatch."""

from __future__ import annotations

import torch
from torch import Tensor

from dae_kernels.checks import FLOAT_DTYPES, as_integer, check_tensors
from dae_kernels.codebook_statistics.reference import codebook_statistics_reference
from dae_kernels.dispatch import choose

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8)


@torch.no_grad()
def codebook_statistics(x: Tensor, indices: Tensor, K: int, *, impl: str = "auto") -> tuple[Tensor, Tensor]:
    """Counts and sums of the vectors assigned to each code.

        counts_k = #{n: indices_n = k},  sums_k = sum of x_n over these n

    The mean of a code's vectors is sums / counts; moving averages of both give the EMA codebook. The vectors of a code are
    summed in float64 in their order (on a GPU by sorting by code and summing segments, without atomic additions), so results are
    bitwise reproducible on one device. Not differentiable. Extra memory is O(N D + K D).

    There is no Triton kernel, as the search for the codes takes far longer: on one CPU core, N = 8192, K = 1024, D = 64,
    this takes 3 to 7 % of the time of `nearest_code` (four runs on a shared machine). Not measured on a GPU.

    Args:
        x: [..., D], floating; any strides.
        indices: [...], the codes of `x`, in [0, K), of an integer dtype. Their range is checked on CPUs alone: reading them
            on a GPU would synchronise at each step. There, indices out of range are left out of all counts and sums.
        K: the number of codes.
        impl: "auto" or "reference"; there is no Triton kernel, so "triton" is refused.

    Returns:
        counts: [K] int64.
        sums: [K, D] float32, or float64 if `x` is.

    Raises:
        ValueError: shapes or devices disagree, K < 1, an index outside [0, K) on a CPU, or `impl` cannot run here.
        TypeError: `x` is not a floating point tensor, `indices` is not an integer one, or K is not an int.

    Source: van den Oord et al. 2017, arXiv 1711.00937, appendix A.1.
    """
    K = as_integer("codebook_statistics", "K", K)
    check_vectors_and_indices(x, indices, K)
    choose(impl, x.device, "codebook_statistics has no Triton kernel")
    N = indices.numel()
    return codebook_statistics_reference(x.detach().reshape(N, x.shape[-1]), indices.reshape(N), K)


def check_vectors_and_indices(x: Tensor, indices: Tensor, K: int) -> None:
    check_tensors("codebook_statistics", x=x, indices=indices)
    if x.dtype not in FLOAT_DTYPES:
        raise TypeError(f"codebook_statistics needs a floating point x, got {x.dtype}")
    if indices.dtype not in INTEGERS:
        raise TypeError(f"codebook_statistics needs integer indices, got {indices.dtype}")
    if x.dim() == 0 or x.shape[:-1] != indices.shape:
        shapes = f"got x {list(x.shape)}, indices {list(indices.shape)}"
        raise ValueError(f"codebook_statistics needs x [..., D] and indices [...], {shapes}")
    if K < 1:
        raise ValueError(f"codebook_statistics needs at least one code, got K = {K}")
    if x.device != indices.device:
        raise ValueError(f"x and indices must be on one device, got {x.device} and {indices.device}")
