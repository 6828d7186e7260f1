"""Rates in bits per image, against closed forms of Gaussians and of codes."""

import math

import pytest
import torch
from torch.distributions import MultivariateNormal, Normal, kl_divergence

from dae.metrics.rate import bits_back, code_entropy_rate, gaussian_rate

LOG2 = math.log(2)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def channel(n, signal, noise, seed=0):
    """x ~ N(0, signal), z | x ~ N(x, noise): its information is sum 1/2 log2(1 + signal / noise)."""
    mean = signal.sqrt() * torch.randn(n, len(signal), dtype=torch.float64, generator=generator(seed))
    return mean, noise.log().expand(n, -1)


SIGNAL, NOISE = torch.tensor([4.0, 1.0, 0.01]).double(), torch.tensor([0.5, 0.1, 1.0]).double()
INFORMATION = 0.5 * (1 + SIGNAL / NOISE).log2().sum().item()


@pytest.mark.parametrize("covariance", ["auto", "full", "diagonal"])
def test_the_rate_of_a_gaussian_channel_is_its_information(covariance):
    """1/2 log2 of a variance of n points errs by 1 / (sqrt(2 n) log 2), for each of three values at most."""
    n = 20000
    mean, log_variance = channel(n, SIGNAL, NOISE)
    assert abs(gaussian_rate(mean, log_variance, covariance=covariance) - INFORMATION) < 4 * (3 / (2 * n)) ** 0.5 / LOG2


@pytest.mark.parametrize("covariance", ["full", "diagonal"])
def test_the_rate_is_the_mean_kl_divergence(covariance):
    """The definition, by torch's own KL; diagonal means in which the values are correlated."""
    mean = torch.randn(60, 4, dtype=torch.float64, generator=generator()) @ torch.randn(
        4, 4, dtype=torch.float64, generator=generator(1)
    )
    log_variance = torch.randn(60, 4, dtype=torch.float64, generator=generator(2))
    S = torch.cov(mean.T, correction=0) + log_variance.exp().mean(0).diag()
    S = S if covariance == "full" else S.diagonal().diag()
    posterior = MultivariateNormal(mean, torch.diag_embed(log_variance.exp()))
    expected = kl_divergence(posterior, MultivariateNormal(mean.mean(0), S)).mean().item() / LOG2
    assert gaussian_rate(mean, log_variance, covariance=covariance) == pytest.approx(expected, rel=1e-10)
    as_maps = mean.float().view(60, 1, 2, 2), log_variance.float().view(60, 1, 2, 2)
    assert gaussian_rate(*as_maps, covariance=covariance) == pytest.approx(expected, rel=1e-5)


def test_units_do_not_matter_and_correlation_costs_nothing_in_full():
    mean = torch.randn(200, 3, dtype=torch.float64, generator=generator())
    mean[:, 1] += 3 * mean[:, 0]
    log_variance = torch.full_like(mean, -1.0)
    scale = torch.tensor([1e-3, 7.0, 1e4]).double()
    for covariance in ("full", "diagonal"):
        one = gaussian_rate(mean, log_variance, covariance=covariance)
        other = gaussian_rate(mean * scale - 5, log_variance + 2 * scale.log(), covariance=covariance)
        assert other == pytest.approx(one, rel=1e-8)
    full, diagonal = (gaussian_rate(mean, log_variance, covariance=c) for c in ("full", "diagonal"))
    assert diagonal > full + 0.5


def test_auto_is_full_where_there_are_ten_images_a_value():
    mean = torch.randn(30, 3, generator=generator())
    mean[:, 1] += mean[:, 0]
    rate = {n: {c: gaussian_rate(mean[:n], mean[:n] * 0, covariance=c) for c in ("auto", "full", "diagonal")} for n in (29, 30)}
    assert rate[29]["auto"] == rate[29]["diagonal"] != rate[29]["full"]
    assert rate[30]["auto"] == rate[30]["full"] != rate[30]["diagonal"]


def test_the_rate_bounds_the_information_of_two_modes():
    """Two images far apart: one bit. The Gaussian around both pays more, and the same images without a difference nothing."""
    mean = torch.tensor([[-10.0], [10.0]]).repeat(50, 1)
    assert gaussian_rate(mean, torch.zeros_like(mean)) == pytest.approx(0.5 * math.log2(101), rel=1e-6)
    assert gaussian_rate(mean * 0, torch.zeros_like(mean)) == pytest.approx(0, abs=1e-9)
    assert gaussian_rate(mean[:1], torch.zeros(1, 1)) == pytest.approx(0, abs=1e-9)


def test_code_entropy():
    even = torch.arange(8).repeat(2).view(4, 4)
    assert code_entropy_rate(even, 8) == pytest.approx(4 * 3)
    assert code_entropy_rate(even.view(4, 2, 2), 100) == pytest.approx(4 * 3)
    constant_places = torch.arange(8).expand(5, 8)  # position t always holds code t
    assert code_entropy_rate(constant_places, 8) == pytest.approx(8 * 3)
    assert code_entropy_rate(constant_places, 8, per_position=True) == pytest.approx(0, abs=1e-12)
    codes = torch.randint(3, (40, 5), generator=generator())
    shares = [codes[:, t].bincount(minlength=3) / 40 for t in range(5)]
    expected = sum(-(p[p > 0] * p[p > 0].log2()).sum().item() for p in shares)
    assert code_entropy_rate(codes, 3, per_position=True) == pytest.approx(expected, rel=1e-5)
    assert code_entropy_rate(codes, 3) >= code_entropy_rate(codes, 3, per_position=True)


def test_bits_back_of_gaussians_is_the_kl_divergence():
    n = 20000
    mean, log_variance = channel(n, SIGNAL, NOISE)
    prior = Normal(torch.tensor([1.0, 0.0, -1.0]).double(), torch.tensor([2.0, 3.0, 1.0]).double())
    expected = kl_divergence(Normal(mean, (0.5 * log_variance).exp()), prior).sum(1) / LOG2
    got = bits_back(mean, log_variance, lambda z: prior.log_prob(z).sum(1), generator(1))
    # The noise of one sample an image is that of log p(z) given x, which is less than that of log p(z).
    z = mean + NOISE.sqrt() * torch.randn(mean.shape, dtype=torch.float64, generator=generator(2))
    noise = prior.log_prob(z).sum(1).std().item() / LOG2
    assert abs(got - expected.mean().item()) < 4 * noise / n**0.5


def test_the_best_prior_pays_the_information_and_others_more():
    n = 20000
    mean, log_variance = channel(n, SIGNAL, NOISE)
    aggregate = Normal(torch.zeros(3).double(), (SIGNAL + NOISE).sqrt())
    best = bits_back(mean, log_variance, lambda z: aggregate.log_prob(z).sum(1), generator(1))
    assert abs(best - INFORMATION) < 4 * 1.5**0.5 / LOG2 / n**0.5  # variance 1/2 a value, in nats^2
    wide = Normal(torch.zeros(3).double(), 3 * (SIGNAL + NOISE).sqrt())
    worse = bits_back(mean, log_variance, lambda z: wide.log_prob(z).sum(1), generator(1))
    excess = 3 * (math.log(3) + 1 / 18 - 0.5) / LOG2  # KL(N(0, 1) || N(0, 9)) a value
    assert abs(worse - INFORMATION - excess) < 4 * (3 * 0.5 / 81) ** 0.5 / LOG2 / n**0.5  # variance of z^2 / 18 a value


def test_bits_back_hands_maps_over_and_the_generator_decides():
    mean, shapes = torch.randn(5, 2, 3, 3, generator=generator()), []

    def log_prob(z):
        shapes.append(z.shape)
        return -z.square().sum((1, 2, 3))

    state = torch.get_rng_state()
    one, two, other = (bits_back(mean, mean - 1, log_prob, generator(seed)) for seed in (1, 1, 2))
    assert one == two != other and set(shapes) == {mean.shape}
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("rate", [gaussian_rate, lambda mean, log_variance: bits_back(mean, log_variance, lambda z: z.sum(1))])
@pytest.mark.parametrize(
    "mean, log_variance, error, message",
    [
        (torch.zeros(3, 2), torch.zeros(3, 1), ValueError, r"of one shape .* got \[3, 2\] and \[3, 1\]"),
        (torch.zeros(0, 2), torch.zeros(0, 2), ValueError, "N >= 1"),
        (torch.zeros(3), torch.zeros(3), ValueError, "N >= 1"),
        (torch.full((3, 2), torch.nan), torch.zeros(3, 2), ValueError, "mean: expected finite"),
        (torch.zeros(3, 2), torch.full((3, 2), -torch.inf), ValueError, "log_variance: expected finite"),
        (torch.zeros(3, 2, dtype=torch.int64), torch.zeros(3, 2), TypeError, "mean: expected a floating point tensor"),
        (torch.zeros(3, 2), None, TypeError, "log_variance: expected a floating point tensor, got NoneType"),
    ],
)
def test_posteriors_that_are_refused(rate, mean, log_variance, error, message):
    with pytest.raises(error, match=message):
        rate(mean, log_variance)


def test_other_refusals():
    x = torch.zeros(3, 2)
    with pytest.raises(ValueError, match="covariance: expected 'auto', 'full' or 'diagonal', got 'banded'"):
        gaussian_rate(x, x, covariance="banded")
    with pytest.raises(ValueError, match=r"expected 3 finite numbers, one per image, got shape \[3, 2\]"):
        bits_back(x, x, lambda z: z)
    with pytest.raises(ValueError, match="with NaN or infinity"):
        bits_back(x, x, lambda z: z.sum(1) / 0)
    for codes in (torch.zeros(0, 4, dtype=torch.int64), torch.zeros(4, dtype=torch.int64)):
        with pytest.raises(ValueError, match=r"indices: expected \[N, T\] or \[N, h, w\]"):
            code_entropy_rate(codes, 4)
    with pytest.raises(ValueError, match="expected 0 to 3, got 0 to 4"):
        code_entropy_rate(torch.tensor([[0, 4]]), 4)
    with pytest.raises(TypeError, match="expected integers"):
        code_entropy_rate(torch.zeros(2, 2), 4)
