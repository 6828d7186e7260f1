"""The flow: samples and likelihood of a Gaussian, whose velocity is known, and of a small model that was trained."""

import itertools
import math

import pytest
import torch

from dae.config import PriorConfig
from dae.losses.flow_matching import flow_matching_loss
from dae.models.dit import DiT
from dae.priors.dit import log_likelihood, sample_latents

D, SIZE, C = 2, 2, 2
P = D * SIZE**2


class GaussianFlow(DiT):
    """The velocity of latents N(mean_c, S) of class c, in the model's scale: with C(t) = t^2 I + (1 - t)^2 S

    v(x, t, c) = -mean_c + (t I - (1 - t) S) C(t)^-1 (x - (1 - t) mean_c)
    """

    def __init__(self, covariance_PP, means_CP, scale=1.0, shift=0.0):
        super().__init__(PriorConfig(width=4, depth=1, num_heads=1), latent_channels=D, latent_size=SIZE, num_classes=C)
        self.double().eval()
        self.covariance, self.means, self.evaluations = covariance_PP, means_CP, []
        self.set_latent_statistics(torch.full((D,), float(shift)), torch.tensor([scale, 2 * scale]))

    def forward(self, x, t, labels):
        self.evaluations.append((t[0].item() if len(t) else None, labels.tolist()))
        time, eye, mean = t[:, None, None], torch.eye(P, dtype=x.dtype), self.means[labels]
        C_t = time**2 * eye + (1 - time) ** 2 * self.covariance
        gain = (time * eye - (1 - time) * self.covariance) @ torch.linalg.inv(C_t)
        return ((gain @ (x.flatten(1) - (1 - t[:, None]) * mean)[..., None])[..., 0] - mean).view_as(x)


def gaussian(seed=0, correlated=True):
    """A covariance with standard deviations from 0.4 to 1.6, and the means of two classes and of none."""
    generator = torch.Generator().manual_seed(seed)
    deviations = torch.linspace(0.4, 1.6, P, dtype=torch.float64)
    Q = torch.linalg.qr(torch.randn(P, P, dtype=torch.float64, generator=generator)).Q if correlated else torch.eye(P).double()
    return Q @ deviations.square().diag() @ Q.T, torch.randn(C + 1, P, dtype=torch.float64, generator=generator)


def root(covariance):
    values, vectors = torch.linalg.eigh(covariance)
    return vectors @ values.sqrt().diag() @ vectors.T


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def exact_samples(flow, labels, seed, means=None):
    """The flow of a Gaussian carries noise e to mean + S^(1/2) e; its noise is drawn first, in one piece."""
    noise = torch.randn(len(labels), P, dtype=torch.float64, generator=generator(seed))
    x = (flow.means if means is None else means)[labels] + noise @ root(flow.covariance)
    return flow.denormalise(x.view(-1, D, SIZE, SIZE))


@pytest.mark.parametrize("cfg_scale", [1.0, 0.0, 2.5])
def test_samples_of_a_gaussian_to_second_order(cfg_scale):
    """Guidance moves the mean from the null class's: velocities are linear in it. Halving the step quarters the error, or more:

    between a Gaussian and noise the second order's errors happen to cancel.
    """
    flow = GaussianFlow(*gaussian(), scale=3.0, shift=-1.0)
    labels, errors = torch.tensor([0, 1, C, 1, 0]), []
    means = flow.means[C] + cfg_scale * (flow.means - flow.means[C])
    expected = exact_samples(flow, labels, 7, means)
    for steps in (16, 32, 64):
        got = sample_latents(flow, labels, num_inference_steps=steps, cfg_scale=cfg_scale, generator=generator(7))
        assert got.shape == (5, D, SIZE, SIZE) and got.dtype == torch.float64 and not got.requires_grad
        errors.append((got - expected).norm() / expected.norm())
    assert errors[-1] < 1e-4
    for coarse, fine in itertools.pairwise(errors):
        assert coarse / fine > 3.5


def test_guidance_of_one_is_the_conditional_model_alone():
    flow = GaussianFlow(*gaussian())
    labels = torch.tensor([1, 0])
    sample_latents(flow, labels, num_inference_steps=2, generator=generator())
    assert flow.evaluations == [(t, [1, 0]) for t in (1.0, 0.75, 0.5, 0.25)]  # the midpoint rule never asks for t = 0
    flow.evaluations.clear()
    sample_latents(flow, labels, num_inference_steps=1, cfg_scale=2.0, generator=generator())
    assert flow.evaluations == [(t, [1, 0, C, C]) for t in (1.0, 0.5)]


def test_the_generator_decides_and_rows_are_independent():
    flow, options = GaussianFlow(*gaussian()), {"num_inference_steps": 3, "cfg_scale": 1.5}
    labels = torch.tensor([0, 1, 1, C])
    state = torch.get_rng_state()
    one = sample_latents(flow, labels, generator=generator(3), **options)
    assert torch.equal(one, sample_latents(flow, labels, generator=generator(3), **options))
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.allclose(one, sample_latents(flow, labels, generator=generator(4), **options))
    other = sample_latents(flow, torch.tensor([0, 0, 1, 1]), generator=generator(3), **options)
    same = (one - other).abs().amax((1, 2, 3)) < 1e-12
    assert same.tolist() == [True, False, True, False]
    assert sample_latents(flow, labels[:0], **options).shape == (0, D, SIZE, SIZE)


def exact_log_density(flow, latents, labels):
    """Of N(mean_c, S) in the model's scale, brought to the latents': x = (z - shift) / std."""
    normal = torch.distributions.MultivariateNormal(flow.means[labels], flow.covariance)
    return normal.log_prob(flow.normalise(latents).flatten(1)) - SIZE**2 * flow.latent_std.log().sum()


def test_likelihood_of_a_gaussian_by_the_exact_divergence():
    flow = GaussianFlow(*gaussian(), scale=3.0, shift=-1.0)
    labels = torch.tensor([0, 1, C, 1])
    latents = exact_samples(flow, labels, 5) + 0.3
    expected, errors = exact_log_density(flow, latents, labels), []
    for steps in (32, 64, 128):
        got = log_likelihood(flow, latents, labels, num_steps=steps, num_probes=None)
        assert got.shape == (4,) and not got.requires_grad
        errors.append((got - expected).abs().max().item())
    assert errors[-1] < 2e-3
    for coarse, fine in itertools.pairwise(errors):
        assert 3 < coarse / fine < 5.5


def test_random_signs_are_exact_for_a_diagonal_jacobian():
    """e_i^2 = 1, so only products of different dimensions are noise, and there are none."""
    flow = GaussianFlow(*gaussian(correlated=False))
    labels = torch.tensor([0, 1, C])
    latents = exact_samples(flow, labels, 5)
    exact = log_likelihood(flow, latents, labels, num_steps=8, num_probes=None)
    for probes in (1, 3):
        got = log_likelihood(flow, latents, labels, num_steps=8, num_probes=probes, generator=generator(probes))
        torch.testing.assert_close(got, exact, rtol=1e-10, atol=1e-10)


def test_random_signs_are_unbiased_and_probes_average():
    flow = GaussianFlow(*gaussian())
    labels = torch.zeros(400, dtype=torch.int64)
    latents = exact_samples(flow, labels[:1], 5).expand(400, -1, -1, -1)
    [exact] = log_likelihood(flow, latents[:1], labels[:1], num_steps=4, num_probes=None)
    spreads = []
    for probes in (1, 4):
        got = log_likelihood(flow, latents, labels, num_steps=4, num_probes=probes, generator=generator(2))
        spreads.append(got.std().item())
        assert spreads[-1] > 0.01 and abs(got.mean() - exact) < 4 * spreads[-1] / 400**0.5
    # The variance falls with the probes: the standard error of a ratio of two spreads of 400 rows is 5 %.
    assert abs(spreads[0] / spreads[1] - 2) < 4 * 0.05 * 2


def test_likelihood_scales_as_a_density():
    """The same flow of latents twice as large: P log 2 less."""
    labels, latents = torch.tensor([0, 1]), exact_samples(GaussianFlow(*gaussian()), torch.tensor([0, 1]), 1)
    one, two = (
        log_likelihood(GaussianFlow(*gaussian(), scale=s), s * latents, labels, num_steps=5, num_probes=None) for s in (1.0, 2.0)
    )
    torch.testing.assert_close(one - two, torch.full((2,), P * math.log(2), dtype=torch.float64), rtol=1e-10, atol=1e-10)


def test_likelihood_in_inference_mode_and_without_rows():
    flow, labels = GaussianFlow(*gaussian()), torch.tensor([0, 1])
    latents, options = exact_samples(flow, labels, 1), {"num_steps": 3, "num_probes": None}
    expected = log_likelihood(flow, latents, labels, **options)
    with torch.inference_mode():
        assert torch.equal(log_likelihood(flow, latents.clone(), labels.clone(), **options), expected)
    for probes in (None, 1):
        assert log_likelihood(flow, latents[:0], labels[:0], num_steps=2, num_probes=probes).shape == (0,)


def test_an_untrained_model_is_the_gaussian_of_the_channels():
    """Its likelihood and its samples: N(mean, std^2) of each channel."""
    torch.manual_seed(0)
    config = PriorConfig(width=8, depth=1, num_heads=1)
    dit = DiT(config, latent_channels=D, latent_size=SIZE, num_classes=C).double().eval()
    mean, std = torch.tensor([1.0, -2.0]).double(), torch.tensor([0.1, 5.0]).double()
    dit.set_latent_statistics(mean, std)
    labels = torch.arange(2000) % (C + 1)
    z = sample_latents(dit, labels, num_inference_steps=32, generator=generator(0))
    standard = (z.transpose(0, 1).flatten(1) - mean[:, None]) / std[:, None]
    assert (standard.mean(1).abs() < 4 / 8000**0.5).all() and ((standard.std(1) - 1).abs() < 4 / 16000**0.5 + 1e-3).all()
    normal = torch.distributions.Normal(mean[:, None, None], std[:, None, None])
    got = log_likelihood(dit, z[:20], labels[:20], num_steps=64)
    # The solver's error: velocities are linear, so it is 64^-2 of numbers around 10.
    torch.testing.assert_close(got, normal.log_prob(z[:20]).sum((1, 2, 3)), rtol=0, atol=1e-2)


def two_modes(n, seed):
    """Class c is N(+-(2, 2), 0.5^2 I) in two values: latents [n, 2, 1, 1], labels, and the density's own code length."""
    stream = generator(seed)
    labels = torch.randint(2, (n,), generator=stream)
    centre = (2.0 - 4.0 * labels)[:, None].expand(-1, 2)
    z = centre + 0.5 * torch.randn(n, 2, generator=stream)
    conditional = torch.distributions.Normal(centre, 0.5).log_prob(z).sum(1)
    other = torch.distributions.Normal(-centre, 0.5).log_prob(z).sum(1)
    return z.view(n, 2, 1, 1), labels, conditional, torch.logaddexp(conditional, other) - math.log(2)


@pytest.fixture(scope="module")
def trained():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = PriorConfig(width=32, depth=1, num_heads=1, class_dropout=0.3)
        dit = DiT(config, latent_channels=2, latent_size=1, num_classes=2)
        z, labels, *_ = two_modes(20000, seed=0)
        dit.set_latent_statistics(z.mean((0, 2, 3)), z.std((0, 2, 3)))
        steps = 600
        optimizer = torch.optim.Adam(dit.parameters(), lr=5e-3)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for _ in range(steps):
            rows = torch.randint(len(z), (256,))
            loss = flow_matching_loss(dit, dit.normalise(z[rows]), dit.drop_labels(labels[rows]))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
    return dit.eval()


def test_a_trained_model_comes_near_the_entropy(trained):
    """On fresh points; a KL divergence is not negative, and one Gaussian would pay more than 0.5 nats for two modes."""
    z, labels, conditional, marginal = two_modes(1000, seed=1)
    hidden = torch.full_like(labels, trained.null_class)
    for given, truth in ((labels, conditional), (hidden, marginal)):
        excess = truth - log_likelihood(trained, z, given, num_steps=32, num_probes=None)
        error = excess.std().item() / len(z) ** 0.5
        assert -4 * error < excess.mean().item() < 0.1
    gaussian = torch.distributions.MultivariateNormal(torch.zeros(2), 0.25 * torch.eye(2) + 4)
    assert (marginal - gaussian.log_prob(z.flatten(1))).mean() > 0.5


def test_a_trained_model_samples_the_modes(trained):
    labels = torch.arange(600) % 3  # both classes, and none
    z = sample_latents(trained, labels, num_inference_steps=32, generator=generator(0)).flatten(1)
    for label, centre in ((0, 2.0), (1, -2.0)):
        of_class = z[labels == label]
        assert (of_class.mean(0) - centre).abs().max() < 0.2 and (of_class.std(0) - 0.5).abs().max() < 0.15
    free = z[labels == 2]
    upper = (free > 0).all(1)
    assert (upper | (free < 0).all(1)).float().mean() > 0.95 and abs(upper.float().mean() - 0.5) < 4 * 0.5 / 200**0.5


@pytest.mark.parametrize(
    "labels, options, message",
    [
        ([C + 1], {}, r"labels must lie in 0\.\.1 \(2: no class\), got \[3\]"),
        ([-1, 0], {}, "labels must lie"),
        ([0], {"num_inference_steps": 0}, "num_inference_steps must be a whole number of at least 1, got 0"),
        ([0], {"num_inference_steps": 2.5}, "got 2.5"),
        ([0], {"cfg_scale": -1.0}, "cfg_scale must be finite and not negative, got -1.0"),
        ([0], {"cfg_scale": float("nan")}, "cfg_scale must be finite and not negative, got nan"),
        ([0], {"cfg_scale": float("inf")}, "cfg_scale must be finite and not negative, got inf"),
        ([0], {"cfg_scale": 1e308}, "got NaN or infinity"),
    ],
)
def test_refusals_of_the_sampler(labels, options, message):
    with pytest.raises(ValueError, match=message):
        sample_latents(GaussianFlow(*gaussian()), torch.tensor(labels), **{"num_inference_steps": 2} | options)


@pytest.mark.parametrize(
    "shape, labels, options, message",
    [
        ((1, D, SIZE, SIZE), [C + 1], {}, "labels must lie"),
        ((1, D, SIZE, SIZE), [0, 1], {}, r"expected a label for each of 1 latents, got \[2\]"),
        ((1, D, SIZE, SIZE), [0], {"num_steps": 0}, "num_steps must be a whole number"),
        ((1, D, SIZE, SIZE), [0], {"num_probes": 0}, "num_probes must be a whole number"),
        ((1, D + 1, SIZE, SIZE), [0], {}, r"latents: expected \[B, 2, 2, 2\], got \[1, 3, 2, 2\]"),
    ],
)
def test_refusals_of_the_likelihood(shape, labels, options, message):
    with pytest.raises(ValueError, match=message):
        log_likelihood(GaussianFlow(*gaussian()), torch.zeros(shape), torch.tensor(labels), **{"num_steps": 2} | options)
