"""Closed forms of the best linear map between two clouds, on their moments and in float64.

Both are centred: g(z) = W (z - mean z) + mean x, |W| <= L in the operator norm.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def best_reconstruction(z_NK: Tensor, x_ND: Tensor, max_norm: float) -> Tensor:
    """[D, K]: argmin over |W| <= max_norm of mean_n |x_n - mean x - W (z_n - mean z)|^2, row n of z with row n of x.

    Minimum-norm least squares; if its norm exceeds max_norm, the convex problem is solved by projected gradients with momentum
    (FISTA, restarted when the value increases) until steps are at rounding level.
    """
    z_NK, x_ND = centred(z_NK), centred(x_ND)
    within_KK, across_DK = z_NK.T @ z_NK / len(z_NK), x_ND.T @ z_NK / len(z_NK)
    best_DK = across_DK @ torch.linalg.pinv(within_KK, hermitian=True)
    if math.isinf(max_norm) or torch.linalg.matrix_norm(best_DK, 2) <= max_norm:
        return best_DK

    def value(W_DK: Tensor) -> Tensor:  # without the constant E|x|^2
        return ((W_DK @ within_KK - 2 * across_DK) * W_DK).sum()

    rate = 1 / torch.linalg.matrix_norm(within_KK, 2)
    W_DK = ahead_DK = clipped(best_DK, max_norm)
    momentum = 1.0
    for _ in range(10_000):
        next_DK = clipped(ahead_DK - rate * (ahead_DK @ within_KK - across_DK), max_norm)
        if value(next_DK) > value(W_DK) and momentum > 1:
            ahead_DK, momentum = W_DK, 1.0
            continue
        moved = torch.linalg.matrix_norm(next_DK - W_DK)
        grown = (1 + math.sqrt(1 + 4 * momentum**2)) / 2
        ahead_DK = next_DK + (momentum - 1) / grown * (next_DK - W_DK)
        W_DK, momentum = next_DK, grown
        if moved <= 1e-10 * torch.linalg.matrix_norm(W_DK):
            break
    return W_DK


def best_frechet(z_NK: Tensor, x_ND: Tensor, max_norm: float) -> Tensor:
    """[D, K]: argmin over |W| <= L of W_2^2 between the Gaussians with the moments of W z and of x.

    With eigenvalues m_1 >= ... of the latent's covariance and l_1 >= ... of the data's, W z reaches exactly the covariances whose
    eigenvalues are c_i <= L^2 m_i, and W_2^2 >= sum_i (sqrt(c_i) - sqrt(l_i))^2 with equality for common eigenvectors (von
    Neumann's inequality of traces). So W takes the i-th principal axis to the i-th, with gain min(sqrt(l_i / m_i), L):

        W_2^2 = sum_{i <= k} max(sqrt(l_i) - L sqrt(m_i), 0)^2 + sum_{i > k} l_i
    """
    m_K, V_KK = principal_axes(z_NK)
    l_D, U_DD = principal_axes(x_ND)
    rank = min(len(m_K), len(l_D))
    reachable = m_K[:rank] > len(m_K) * torch.finfo(m_K.dtype).eps * m_K[0]
    gain_R = torch.where(reachable, (l_D[:rank] / torch.where(reachable, m_K[:rank], 1.0)).sqrt(), 0.0).clamp_max(max_norm)
    return (U_DD[:, :rank] * gain_R) @ V_KK[:, :rank].T


def principal_axes(x_ND: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues [D] of the covariance, largest first and none negative, and eigenvectors as columns [D, D]."""
    x_ND = centred(x_ND)
    values_D, vectors_DD = torch.linalg.eigh(x_ND.T @ x_ND / len(x_ND))
    return values_D.flip(0).clamp_min(0), vectors_DD.flip(1)


def centred(x_ND: Tensor) -> Tensor:
    return x_ND.double() - x_ND.double().mean(dim=0)


def clipped(W_DK: Tensor, max_norm: float) -> Tensor:
    """The nearest matrix [..., D, K] in the Frobenius norm whose singular values are at most `max_norm`."""
    left, values, right = torch.linalg.svd(W_DK, full_matrices=False)
    return (left * values.clamp_max(max_norm)[..., None, :]) @ right


def sort_pairs(x: Tensor) -> Tensor:
    """(u_i, u_{i + n/2}) -> (max, min) along the last axis, of even length n: 1-Lipschitz and gradient-norm preserving."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat([torch.maximum(first, second), torch.minimum(first, second)], dim=-1)
