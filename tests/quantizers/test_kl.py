"""The Gaussian bottleneck against torch.distributions."""

import pytest
import torch
from torch.distributions import Independent, Normal, kl_divergence

import dae.distributed
from dae.config import KLConfig
from dae.quantizers import GaussianBottleneck


def posterior(features):
    mean, log_variance = features.double().chunk(2, dim=1)
    return mean, (0.5 * log_variance).exp()


@pytest.mark.parametrize("shape", [(3, 8, 4, 4), (1, 2, 1, 1), (2, 6, 3, 5)])
def test_kl_against_torch(shape):
    torch.manual_seed(0)
    features = torch.randn(shape, requires_grad=True)
    encoding = GaussianBottleneck(KLConfig(kl_weight=0.3))(features, False)
    mean, std = posterior(features)
    prior = Normal(torch.zeros_like(mean), torch.ones_like(std))
    expected = 0.3 * kl_divergence(Independent(Normal(mean, std), 3), Independent(prior, 3)).mean()
    torch.testing.assert_close(encoding.loss.double(), expected, rtol=1e-6, atol=1e-7)
    got, want = (torch.autograd.grad(loss, features, retain_graph=True)[0] for loss in (encoding.loss, expected))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7)
    assert encoding.indices is None and torch.equal(encoding.latents, features.chunk(2, 1)[0])
    assert torch.equal(encoding.features, encoding.latents)


def test_the_prior_itself_costs_nothing():
    assert GaussianBottleneck(KLConfig(kl_weight=1.0))(torch.zeros(2, 4, 2, 2), True).loss == 0


def test_samples_have_the_posteriors_moments():
    features = torch.tensor([1.0, -2.0, 0.5, -3.0]).view(1, 4, 1, 1).expand(20000, 4, 1, 1)
    torch.manual_seed(0)
    samples = GaussianBottleneck(KLConfig())(features, True).latents.flatten(1).double()
    mean, std = (m[0].flatten() for m in posterior(features))
    assert ((samples.mean(0) - mean).abs() < 4 * std / 20000**0.5).all()
    assert ((samples.std(0) / std - 1).abs() < 4 / (2 * 20000) ** 0.5).all()


def test_the_gradient_of_a_sample_reaches_mean_and_variance():
    features = torch.randn(2, 4, 2, 2, requires_grad=True)
    torch.manual_seed(1)
    encoding = GaussianBottleneck(KLConfig())(features, True)
    mean, log_variance = features.chunk(2, 1)
    noise = (encoding.latents - mean) / (0.5 * log_variance).exp()
    (gradient,) = torch.autograd.grad(encoding.latents.sum(), features)
    torch.testing.assert_close(gradient[:, :2], torch.ones_like(mean))
    torch.testing.assert_close(gradient[:, 2:], 0.5 * (0.5 * log_variance).exp() * noise, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("extreme", [1e4, -1e4])
def test_extreme_variances_stay_finite(extreme):
    features = torch.cat([torch.zeros(1, 2, 2, 2), torch.full((1, 2, 2, 2), extreme)], dim=1)
    encoding = GaussianBottleneck(KLConfig())(features, True)
    assert encoding.loss.isfinite() and encoding.latents.isfinite().all()


def test_samples_do_not_depend_on_the_number_of_processes(monkeypatch):
    features, bottleneck = torch.randn(6, 4, 2, 2), GaussianBottleneck(KLConfig())
    torch.manual_seed(0)
    whole = bottleneck(features, True).latents
    monkeypatch.setattr(dae.distributed, "world_size", lambda: 3)
    for rank in range(3):
        monkeypatch.setattr(dae.distributed, "rank", lambda rank=rank: rank)
        torch.manual_seed(0)
        assert torch.equal(bottleneck(features[rank::3], True).latents, whole[rank::3])
