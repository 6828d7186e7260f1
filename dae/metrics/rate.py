"""Rates of a latent in bits per image, comparable between VQ and KL latents.

VQ:  tokens x entropy of the codes (`code_entropy_rate`), or the bits of a prior over the tokens
KL:  an upper bound of I(x; z) by one Gaussian (`gaussian_rate`), or the bits of a prior over the latents (`bits_back`)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dae.metrics.codebook import CodebookUsage
from dae.metrics.validation import check_integers, check_values
from dae.precision import own_arithmetic


@own_arithmetic(gradients=False)
def gaussian_rate(mean_NDhw: Tensor, log_variance_NDhw: Tensor, *, covariance: str = "auto") -> float:
    """Mean KL(q(z|x) || N(m, S)) in bits per image, with m and S the moments of the aggregate posterior.

        m = mean_n mean_n,    S = cov_n(mean_n) + diag(mean_n variance_n)
        rate = 1/2 (log2 det S - mean_n sum_p log2 variance_np)

    The trace term of the KL cancels, because S is the aggregate's own second moment. For these N images the rate is
    I(x; z) + KL(aggregate || N(m, S)), an upper bound of their mutual information with the posterior's samples. It is invariant
    to scaling of the latent and, with a full covariance, to any invertible linear map.

    Args:
        mean_NDhw: posterior means, [N, ...], floating, N >= 1.
        log_variance_NDhw: log variances of the diagonal posteriors, same shape.
        covariance: "full"; "diagonal", which ignores correlations and never gives a lower rate; "auto" is full if N is at least
            10 x the P values of a latent, else diagonal: with N images, log det of a full covariance is about P^2 / (2 N) nats
            too small. Compare latents only with the same kind.

    Returns:
        Bits per image, computed in float64.

    Raises:
        TypeError: tensors that are not floating.
        ValueError: other shapes, no images, NaN or infinity, or an unknown `covariance`.

    Source: Alemi et al. 2018, arXiv 1711.00464, section 2 (the rate R as upper bound of I, here with the best Gaussian marginal).
    """
    mean, log_variance = check_posterior(mean_NDhw, log_variance_NDhw)
    if covariance not in ("auto", "full", "diagonal"):
        raise ValueError(f"covariance: expected 'auto', 'full' or 'diagonal', got {covariance!r}")
    N, P = mean.shape
    centred, variance_P = mean - mean.mean(0), log_variance.exp().mean(0)
    if covariance == "full" or (covariance == "auto" and N >= 10 * P):
        log_determinant = torch.linalg.slogdet(centred.T @ centred / N + variance_P.diag()).logabsdet
    else:
        log_determinant = (centred.square().mean(0) + variance_P).log().sum()
    return (0.5 * (log_determinant - log_variance.sum(1).mean()) / math.log(2)).item()


@own_arithmetic(gradients=False)
def code_entropy_rate(
    indices_NT: Tensor, codebook_size: int, factors: Sequence[int] | None = None, *, per_position: bool = False
) -> float:
    """Bits per image of an entropy code that uses token frequencies and ignores dependence between tokens.

        pooled (default):  T H(token),  H over all positions together = T log2(perplexity)
        per position:      sum_t H(token_t)

    Per position is never more; it estimates T times as many frequencies and is too low for few images: at most log2 N per
    position. A prior's held-out bits also account for dependence between tokens.

    Args:
        indices_NT: integer codes [N, T] or [N, h, w], N >= 1.
        codebook_size: K.
        factors: as of `CodebookUsage`, which counts more than 2^24 codes digit by digit; H is then an upper bound.

    Raises:
        TypeError: indices that are not integers.
        ValueError: no images, one dimension, or an index outside 0..K-1.

    Source: Shannon 1948, "A Mathematical Theory of Communication", section 6 and theorem 9.
    """
    check_integers("indices", indices_NT, "pass the codes, not the latents")
    if indices_NT.ndim < 2 or len(indices_NT) == 0:
        raise ValueError(f"indices: expected [N, T] or [N, h, w] with at least one image, got {list(indices_NT.shape)}")
    indices = indices_NT.flatten(1)
    if not per_position:
        return indices.shape[1] * CodebookUsage(codebook_size, factors).update(indices).entropy
    return sum(CodebookUsage(codebook_size, factors).update(codes).entropy for codes in indices.T)


def bits_back(
    mean_NDhw: Tensor,
    log_variance_NDhw: Tensor,
    log_prob: Callable[[Tensor], Tensor],
    generator: torch.Generator | None = None,
) -> float:
    """Code length of the latent under a prior in bits per image: E_q[log2 q(z|x) - log2 p(z)], averaged over images.

    This is KL(q(z|x) || p), the cost of the latent under bits-back coding, at least I(x; z) for any prior. It compares with
    the bits of VQ tokens, whose posterior has no entropy. The entropy of q is exact; log p is evaluated at one posterior
    sample per image.

    Args:
        mean_NDhw, log_variance_NDhw: as in `gaussian_rate`.
        log_prob: latents [N, D, h, w] to log p [N] in nats, in the scale of the latents.
        generator: for the posterior samples, on the means' device.

    Raises:
        TypeError: tensors that are not floating.
        ValueError: other shapes, no images, NaN or infinity, or log_prob without one finite number per image.

    Source: Hinton & van Camp 1993, "Keeping the neural networks simple by minimizing the description length of the weights",
    section 5 (bits back); Townsend et al. 2019, arXiv 1901.04866.
    """
    _, log_variance = check_posterior(mean_NDhw, log_variance_NDhw)
    noise = torch.randn(mean_NDhw.shape, generator=generator, device=mean_NDhw.device, dtype=mean_NDhw.dtype)
    log_p = log_prob(mean_NDhw + (0.5 * log_variance_NDhw).exp() * noise)
    finite = bool(torch.isfinite(log_p).all())
    if log_p.shape != mean_NDhw.shape[:1] or not finite:
        got = f"{list(log_p.shape)}{'' if finite else ' with NaN or infinity'}"
        raise ValueError(f"log_prob: expected {len(mean_NDhw)} finite numbers, one per image, got shape {got}")
    negative_entropy = -0.5 * (1 + math.log(2 * math.pi) + log_variance).sum(1)
    return ((negative_entropy - log_p.double()).mean() / math.log(2)).item()


def check_posterior(mean_NDhw: Tensor, log_variance_NDhw: Tensor) -> tuple[Tensor, Tensor]:
    """Both in float64, flattened to [N, P]; TypeError or ValueError unless they are a diagonal Gaussian posterior."""
    for name, x in (("mean", mean_NDhw), ("log_variance", log_variance_NDhw)):
        check_values(name, x, "a floating point tensor", "a VQ latent takes code_entropy_rate")
        if not torch.isfinite(x).all():
            raise ValueError(f"{name}: expected finite numbers, got NaN or infinity; has the autoencoder diverged?")
    if mean_NDhw.shape != log_variance_NDhw.shape or mean_NDhw.ndim < 2 or len(mean_NDhw) == 0:
        got = f"{list(mean_NDhw.shape)} and {list(log_variance_NDhw.shape)}"
        raise ValueError(f"expected mean and log_variance of one shape [N, D, h, w] with N >= 1, got {got}")
    return mean_NDhw.double().flatten(1), log_variance_NDhw.double().flatten(1)
