"""`gaussian_w2` from moments and `frechet_distance` from samples or statistics: checks and dtypes."""

from __future__ import annotations

import torch
from torch import Tensor

from dae_kernels.checks import FLOAT_DTYPES, check_dense, check_tensors
from dae_kernels.clouds import convention
from dae_kernels.frechet_distance.reference import gaussian_w2_reference
from dae_kernels.frechet_distance.statistics import GaussianStatistics, mean_and_scatter
from dae_kernels.tracing import values_readable


@convention(value="squared", cost="|x - y|^2, without a factor", bias="none: exact in the moments it is given")
def gaussian_w2(mean_a: Tensor, cov_a: Tensor, mean_b: Tensor, cov_b: Tensor) -> Tensor:
    """Squared 2-Wasserstein distance between two Gaussians.

        |m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a^1/2 S_b S_a^1/2)^1/2)

    All arithmetic is float64, in plain torch: two eigendecompositions and one singular value decomposition. A custom kernel could
    not speed them up: in LAPACK they take 57 % of `frechet_distance`'s forward time on one CPU core at 2000 points per cloud and
    D = 256, and matrix products most of the rest. Not measured on a GPU.

    Differentiable once, with respect to all four, if both covariances are positive definite (equal eigenvalues included).
    If one is singular but A A^T with A of full column rank, as for points in a subspace, the gradient by A is accurate to about
    1e-7 of its size. Otherwise it is finite but need not be correct.

    Args:
        mean_a, mean_b: [D], D >= 1, floating.
        cov_a, cov_b: [D, D], floating, positive semi-definite; the symmetric part is used.

    Returns:
        Scalar, at least 0; float64 if all four are float64, else float32.

    Raises:
        TypeError: not tensors, or not floating point.
        ValueError: shapes or devices disagree, or NaN or infinity in what is given.

    Source: Dowson and Landau 1982, "The Fréchet Distance between Multivariate Normal Distributions".
    """
    moments = {"mean_a": mean_a, "cov_a": cov_a, "mean_b": mean_b, "cov_b": cov_b}
    check_tensors("gaussian_w2", **moments)
    for name, tensor in moments.items():
        if tensor.dtype not in FLOAT_DTYPES:
            raise TypeError(f"gaussian_w2 needs floating point moments, got {name} of {tensor.dtype}")
    D = mean_a.shape[-1:].numel()
    if D == 0 or mean_a.shape != (D,) or mean_b.shape != (D,) or cov_a.shape != (D, D) or cov_b.shape != (D, D):
        got = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in moments.items())
        raise ValueError(f"gaussian_w2 needs means [D] and covariances [D, D] of one D >= 1, got {got}")
    if len({tensor.device for tensor in moments.values()}) > 1:
        got = ", ".join(f"{name} on {tensor.device}" for name, tensor in moments.items())
        raise ValueError(f"gaussian_w2 needs moments on one device, got {got}")
    for name, tensor in moments.items():  # LAPACK would not converge
        if values_readable(tensor) and not tensor.isfinite().all():
            raise ValueError(f"gaussian_w2 needs finite moments, got NaN or infinity in {name}")
    exact = all(tensor.dtype == torch.float64 for tensor in moments.values())
    distance = gaussian_w2_reference(*(tensor.double() for tensor in moments.values()))
    return distance if exact else distance.float()


@convention(value="squared", cost="|x - y|^2, without a factor", bias="upwards, by an amount that depends on both counts")
def frechet_distance(x: Tensor | GaussianStatistics, y: Tensor | GaussianStatistics) -> Tensor:
    """Squared 2-Wasserstein distance between the Gaussians with the means and unbiased covariances of two clouds.

        gaussian_w2(mean(x), cov(x), mean(y), cov(y))

    This is the formula of FID; it is FID only with the features of FID's Inception network. The estimate from few points
    is biased upwards, depending on their number: compare distances only at equal counts. Differentiable with
    respect to clouds given as tensors where `gaussian_w2` is, which needs more points than dimensions.

    There is no Triton kernel, for the reason and with the figure in `gaussian_w2`.

    Args:
        x, y: points [N, D] and [M, D], N, M >= 2, floating, or the `GaussianStatistics` of such; statistics may be on another
            device than what they are compared with.

    Returns:
        Scalar, at least 0; float32 if an argument is a tensor of another dtype than float64, else float64.

    Raises:
        TypeError: arguments other than floating point tensors and `GaussianStatistics`.
        ValueError: fewer than 2 points, different D, tensors on two devices, or NaN or infinity among the points.

    Source: Heusel et al. 2017, arXiv 1706.08500, section 3 (after Dowson and Landau 1982).
    """
    (mean_a, cov_a), (mean_b, cov_b) = (moments(name, cloud) for name, cloud in (("x", x), ("y", y)))
    if len(mean_a) != len(mean_b):
        raise ValueError(f"expected features of one dimension, got {len(mean_a)} and {len(mean_b)}; use one feature extractor")
    if isinstance(x, GaussianStatistics) or isinstance(y, GaussianStatistics):
        if mean_b.is_meta and not mean_a.is_meta:
            raise ValueError("frechet_distance needs points with values, got a meta tensor, which has none")
        mean_b, cov_b = mean_b.to(mean_a.device), cov_b.to(mean_a.device)
    distance = gaussian_w2(mean_a, cov_a, mean_b, cov_b)
    exact = all(isinstance(cloud, GaussianStatistics) or cloud.dtype == torch.float64 for cloud in (x, y))
    return distance if exact else distance.float()


def moments(name: str, cloud: Tensor | GaussianStatistics) -> tuple[Tensor, Tensor]:
    """float64 mean [D] and unbiased covariance [D, D]."""
    if isinstance(cloud, GaussianStatistics):
        return cloud.mean, cloud.covariance
    if not isinstance(cloud, Tensor):
        got = type(cloud).__name__
        raise TypeError(f"frechet_distance needs {name} as a torch.Tensor or GaussianStatistics, got {got}")
    check_dense("frechet_distance", name, cloud)
    if cloud.dtype not in FLOAT_DTYPES:
        raise TypeError(f"frechet_distance needs floating point clouds, got {name} of {cloud.dtype}")
    if cloud.dim() != 2 or cloud.shape[1] == 0:
        raise ValueError(f"frechet_distance needs clouds [N, D], D >= 1, got {name} {list(cloud.shape)}")
    if len(cloud) < 2:
        raise ValueError(f"frechet_distance needs at least 2 points for a covariance, got {len(cloud)} in {name}")
    mean_D, scatter_DD = mean_and_scatter(cloud)
    if values_readable(mean_D) and not mean_D.isfinite().all():
        raise ValueError(f"frechet_distance needs finite points, got NaN or infinity in {name}")
    return mean_D, scatter_DD / (len(cloud) - 1)
