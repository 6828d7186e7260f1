"""The Gaussian mixture: densities and samples of known mixtures, what the fit finds, and what it refuses."""

import math

import pytest
import torch
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal

from dae.config import PriorConfig
from dae.models.mixture import GaussianMixturePrior

D, SIZE = 2, 2
P = D * SIZE**2


def make(components=3, channels=D, size=SIZE) -> GaussianMixturePrior:
    config = PriorConfig(num_components=components)
    return GaussianMixturePrior(config, latent_channels=channels, latent_size=size, num_classes=10)


def truth(seed=0) -> MixtureSameFamily:
    """Two correlated Gaussians of 30 % and 70 %, three apart in each value."""
    generator = torch.Generator().manual_seed(seed)
    factors = 0.4 * torch.randn(2, P, P, generator=generator, dtype=torch.float64).tril()
    factors.diagonal(dim1=1, dim2=2).copy_(torch.rand(2, P, generator=generator, dtype=torch.float64) + 0.3)
    means = torch.tensor([[-1.5], [1.5]], dtype=torch.float64).expand(2, P)
    return MixtureSameFamily(Categorical(torch.tensor([0.3, 0.7]).double()), MultivariateNormal(means, scale_tril=factors))


def draw(mixture, n, seed):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return mixture.sample((n,)).view(n, D, SIZE, SIZE)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_density_of_the_mixture_it_holds():
    prior, mixture = make(2).double(), truth()
    prior.weights.copy_(mixture.mixture_distribution.probs)
    prior.means.copy_(mixture.component_distribution.mean)
    prior.cholesky.copy_(mixture.component_distribution.scale_tril)
    latents = 3 * torch.randn(50, D, SIZE, SIZE, dtype=torch.float64, generator=generator())
    torch.testing.assert_close(prior.log_prob(latents), mixture.log_prob(latents.flatten(1)), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(prior.log_prob(latents.transpose(2, 3)[:7]), mixture.log_prob(latents.mT[:7].flatten(1)))
    assert prior.log_prob(latents[:0]).shape == (0,)


def test_unfitted_it_is_a_standard_normal():
    latents = torch.randn(5, D, SIZE, SIZE, generator=generator())
    expected = torch.distributions.Normal(0, 1).log_prob(latents).sum((1, 2, 3))
    torch.testing.assert_close(make().log_prob(latents), expected)


def test_fit_finds_the_mixture():
    """Held-out excess over the true density: half a nat a parameter and n points, 2 (P + P (P + 1) / 2) + 1 = 89 of them."""
    mixture, n = truth(), 4000
    prior = make(2)
    assert prior.fit(draw(mixture, n, seed=1), seed=0, regularisation=1e-6) is prior
    held_out = draw(mixture, n, seed=2)
    excess = mixture.log_prob(held_out.flatten(1)) - prior.log_prob(held_out)
    assert abs(excess.mean().item() - 89 / (2 * n)) < 4 * excess.std().item() / n**0.5
    torch.testing.assert_close(prior.weights.sort().values, torch.tensor([0.3, 0.7]), rtol=0, atol=4 * (0.21 / n) ** 0.5)
    one = make(1).fit(draw(mixture, n, seed=1), seed=0)
    assert (prior.log_prob(held_out) - one.log_prob(held_out)).mean() > 0.1


def test_one_component_has_the_moments_of_the_latents():
    latents = draw(truth(), 500, seed=1)
    prior = make(1).fit(latents, seed=0, regularisation=0.01)
    points = latents.flatten(1)
    variance_P = latents.var((0, 2, 3)).repeat_interleave(SIZE**2)
    expected = torch.cov(points.T, correction=0) + 0.01 * variance_P.diag()
    torch.testing.assert_close(prior.means[0].double(), points.mean(0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close((prior.cholesky[0] @ prior.cholesky[0].T).double(), expected, rtol=1e-5, atol=1e-6)


def test_samples_have_the_moments_of_the_mixture():
    prior, n = make(2).fit(draw(truth(), 2000, seed=1), seed=0), 20000
    samples = prior.sample(n, generator(3))
    assert samples.shape == (n, D, SIZE, SIZE) and samples.dtype == torch.float32
    points, weights = samples.flatten(1), prior.weights[:, None]
    mean = (weights * prior.means).sum(0)
    second = (weights[..., None] * (prior.cholesky @ prior.cholesky.mT + prior.means[..., None] * prior.means[:, None])).sum(0)
    covariance = second - mean[:, None] * mean
    deviation = covariance.diagonal().sqrt()
    assert ((points.mean(0) - mean).abs() < 5 * deviation / n**0.5).all()
    # Of two modes, products of two values vary by less than Gaussian ones: at most sqrt(2) of the deviations' product.
    error = 5 * 2**0.5 / n**0.5 * deviation[:, None] * deviation
    assert ((torch.cov(points.T) - covariance).abs() < error).all()
    near = torch.cdist(points, prior.means).argmin(1).bincount(minlength=2) / n
    torch.testing.assert_close(near, prior.weights, rtol=0, atol=0.02)  # a few points lie nearer to the other mean


def test_seeds_and_the_global_state():
    latents, state = draw(truth(), 300, seed=1), torch.get_rng_state()
    one, two = make(5).fit(latents, seed=3), make(5).fit(latents, seed=3)
    for name, buffer in one.named_buffers():
        assert torch.equal(buffer, two.get_buffer(name))
    assert torch.equal(one.sample(9, generator(1)), two.sample(9, generator(1)))
    assert not torch.equal(one.sample(9, generator(1)), one.sample(9, generator(2)))
    assert torch.equal(torch.get_rng_state(), state)
    assert one.sample(0).shape == (0, D, SIZE, SIZE)


def test_the_scale_of_the_latent_does_not_matter():
    """The same fit in other units: a density changes by the volume alone."""
    latents = draw(truth(), 400, seed=1)
    scale, shift = torch.tensor([100.0, 0.01]).double()[:, None, None], 5.0
    held_out = draw(truth(), 100, seed=2)
    one, other = make(3).double().fit(latents, seed=0), make(3).double().fit(latents * scale + shift, seed=0)
    difference = one.log_prob(held_out) - other.log_prob(held_out * scale + shift)
    expected = torch.full((100,), SIZE**2 * math.log(100 * 0.01), dtype=torch.float64)
    torch.testing.assert_close(difference, expected, rtol=0, atol=1e-6)


def test_values_that_never_vary_get_a_density():
    """A dead corner of a channel, and components of fewer points than dimensions."""
    latents = draw(truth(), 40, seed=1)
    latents[:, 0, 0, 0] = 2.0
    prior = make(8).fit(latents, seed=0, regularisation=1e-2)
    assert torch.isfinite(prior.log_prob(draw(truth(), 20, seed=2))).all()
    assert torch.isfinite(prior.sample(20, generator())).all()
    deviation = 0.1 * latents[:, 0].std()  # the square root of the regularisation; 5 of them: 1e-4 over 200 samples
    assert (prior.sample(200, generator())[:, 0, 0, 0] - 2).abs().max() < 5 * deviation


def test_saved_and_loaded(tmp_path):
    prior = make(2).fit(draw(truth(), 100, seed=1), seed=0)
    prior.tokenizer = "abc"
    prior.save_pretrained(tmp_path)
    loaded, latents = GaussianMixturePrior.from_pretrained(tmp_path), draw(truth(), 10, seed=2)
    assert loaded.to_config() == prior.to_config() and loaded.tokenizer == "abc"
    assert torch.equal(loaded.log_prob(latents), prior.log_prob(latents))
    assert torch.equal(loaded.sample(4, generator()), prior.sample(4, generator()))


def spoiled(value):
    latents = torch.randn(10, D, SIZE, SIZE, generator=generator())
    latents[3, 1] = value
    return latents


@pytest.mark.parametrize(
    "latents, components, error, message",
    [
        (torch.randn(4, D, SIZE, SIZE), 5, ValueError, r"at least 5 latents for prior.num_components=5, got 4"),
        (torch.randn(1, D, SIZE, SIZE), 1, ValueError, "at least 2 latents"),
        (spoiled(float("nan")), 2, ValueError, "finite latents"),
        (spoiled(float("inf")), 2, ValueError, "finite latents"),
        (
            torch.randn(9, D, 1, 1).expand(9, D, SIZE, SIZE) * torch.tensor([1.0, 0.0])[:, None, None],
            2,
            ValueError,
            r"\[1\] do not",
        ),
        (torch.randn(9, D, SIZE), 2, ValueError, r"latents: expected \[B, 2, 2, 2\], got \[9, 2, 2\]"),
        (torch.zeros(9, D, SIZE, SIZE, dtype=torch.int64), 2, TypeError, "floating point tensor"),
    ],
)
def test_latents_that_are_refused(latents, components, error, message):
    prior = make(components)
    with pytest.raises(error, match=message):
        prior.fit(latents, seed=0)
    assert torch.equal(prior.means, torch.zeros(components, P))


def test_other_refusals():
    with pytest.raises(ValueError, match="regularisation: expected a positive number, got 0"):
        make().fit(draw(truth(), 9, seed=0), seed=0, regularisation=0)
    with pytest.raises(ValueError, match="count must not be negative, got -1"):
        make().sample(-1)
    with pytest.raises(ValueError, match="latents: expected"):
        make().log_prob(torch.zeros(2, 3))
