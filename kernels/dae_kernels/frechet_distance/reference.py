"""The squared 2-Wasserstein distance of two Gaussians in torch's linear algebra."""

from __future__ import annotations

import torch
from torch import Tensor

from dae_kernels.clouds import power_of_two
from dae_kernels.frechet_distance.autograd import square_root


def gaussian_w2_reference(mean_a_D: Tensor, cov_a_DD: Tensor, mean_b_D: Tensor, cov_b_DD: Tensor) -> Tensor:
    """The distance, a scalar of at least 0, from float64 moments.

    The trace of the root is the sum of the singular values of S1^1/2 S2^1/2, which keeps all digits for singular covariances;
    eigenvalues of the product would lose half of them in the square root. Covariances are scaled to about 1 by a power of 2,
    because below 2^-485 LAPACK scales by another factor, which rounds.
    """
    unit = power_of_two(torch.maximum(cov_a_DD.detach().abs().amax(), cov_b_DD.detach().abs().amax()).sqrt())
    cov_a_DD, cov_b_DD = (cov_DD * unit * unit for cov_DD in (cov_a_DD, cov_b_DD))
    trace_of_root = torch.linalg.svdvals(square_root(cov_a_DD) @ square_root(cov_b_DD)).sum()
    of_covariances = cov_a_DD.trace() + cov_b_DD.trace() - 2 * trace_of_root
    return ((mean_a_D - mean_b_D).square().sum() + of_covariances / unit / unit).clamp_min(0)
