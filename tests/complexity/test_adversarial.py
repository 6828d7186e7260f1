"""Distances by critics against closed forms: two points, Gaussians of a line, equal clouds, disjoint supports."""

import itertools
import math
import re

import pytest
import torch
from torch import nn

from dae.complexity import adversarial
from dae.complexity.adversarial import ADVERSARIAL, DIVERGENCES, TABLE, WASSERSTEIN, adversarial_distance, train_adversarial
from dae.complexity.critics import FOLDS, Stack, gradient_norms, parts_of
from dae.complexity.distances import ADVERSARIAL as NAMES
from dae.complexity.families import GeneratorFamily


def integral(name: str, log_p: torch.Tensor, log_q: torch.Tensor, weight: float) -> float:
    """A divergence from densities in float64 at equal steps `weight`, or from masses with weight 1."""
    p, q = log_p.exp(), log_q.exp()
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    integrand = {
        "js": (p * (log_p - log_m) + q * (log_q - log_m)) / 2,
        "kl": p * (log_p - log_q),
        "reverse_kl": q * (log_q - log_p),
        "chi2": (2 * log_p - log_q).exp() - 2 * p + q,
        "hellinger": (p.sqrt() - q.sqrt()).square(),
    }
    return integrand[name].sum().item() * weight


def of_gaussians(name: str, m1: float, s1: float, m2: float, s2: float) -> float:
    width = 12 * max(s1, s2)
    t = torch.linspace(min(m1, m2) - width, max(m1, m2) + width, 100_001, dtype=torch.float64)
    log_p, log_q = (torch.distributions.Normal(m, s).log_prob(t) for m, s in ((m1, s1), (m2, s2)))
    if name in WASSERSTEIN:  # int |F - G|
        F, G = (torch.distributions.Normal(m, s).cdf(t) for m, s in ((m1, s1), (m2, s2)))
        return ((F - G).abs().sum() * (t[1] - t[0])).item()
    return integral(name, log_p, log_q, (t[1] - t[0]).item())


def gaussian(seed: int, count: int, mean: float, std: float, dimensions: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return mean + std * torch.randn(count, dimensions, generator=generator, dtype=torch.float64)


def quantiles(seed: int, count: int, mean: float, std: float) -> torch.Tensor:
    """A Gaussian's quantiles at equal steps, shuffled: no error of sampling is left but that of the splits."""
    share = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return torch.distributions.Normal(mean, std).icdf(share)[order, None]


def test_the_integrals_agree_with_closed_forms():
    assert of_gaussians("kl", 1, 1, 0, 1) == pytest.approx(0.5, rel=1e-6)
    assert of_gaussians("reverse_kl", 0, 1, 0, 2) == pytest.approx(-math.log(2) + 4 / 2 - 0.5, rel=1e-6)
    assert of_gaussians("chi2", 1, 1, 0, 1) == pytest.approx(math.e - 1, rel=1e-6)
    assert of_gaussians("hellinger", 1, 1, 0, 1) == pytest.approx(2 - 2 * math.exp(-1 / 8), rel=1e-6)
    assert of_gaussians("wgan_gp", 0, 1, 0, 2) == pytest.approx(math.sqrt(2 / math.pi), rel=1e-6)


PAIRS = [(name, (1.0, 1.0, 0.0, 1.2)) for name in ADVERSARIAL]
PAIRS += [(name, (100.0, 0.011, 100.01, 0.01)) for name in ("chi2", "wgan_gp")]


@pytest.mark.parametrize("name, pair", PAIRS, ids=str)
def test_gaussians(name, pair):
    m1, s1, m2, s2 = pair
    x, y = quantiles(1, 4000, m1, s1), quantiles(2, 4000, m2, s2)
    estimate = adversarial_distance(x, y, name, seeds=(0,))
    assert estimate.value == pytest.approx(of_gaussians(name, *pair), rel=0.1)
    assert estimate.bound == "lower" and estimate.distance == name and estimate.counts == (2000, 1000)


@pytest.mark.parametrize("name", WASSERSTEIN)
def test_wasserstein_of_two_scales_needs_a_bent_critic(name):
    x, y = quantiles(1, 3000, 0, 1), quantiles(2, 3000, 0, 2)
    assert adversarial_distance(x, y, name, seeds=(0,)).value == pytest.approx(math.sqrt(2 / math.pi), rel=0.1)


@pytest.mark.parametrize("name", WASSERSTEIN)
def test_wasserstein_of_a_shift(name):
    x, y = gaussian(1, 3000, 0, 1, dimensions=4), gaussian(2, 5000, 0, 1, dimensions=4)
    shift = torch.tensor([1.0, -2.0, 0.0, 2.0])
    assert adversarial_distance(x + shift, y, name, seeds=(0,)).value == pytest.approx(3.0, rel=0.1)


@pytest.mark.parametrize("name", ["js", "kl", "reverse_kl"])
def test_three_dimensions_and_different_counts_against_the_true_critic(name):
    """The bound of the true log p/q at the same rows has the same error of sampling, so what is left is the critic's."""
    x, y = 0.7 * gaussian(1, 3000, 0, 1, dimensions=3), gaussian(2, 4500, 0, 1, dimensions=3)
    shift = torch.tensor([0.7, 0.0, 0.0])
    x += shift
    p, q = torch.distributions.Normal(shift.double(), 0.7), torch.distributions.Normal(torch.zeros(3).double(), 1.0)
    truth = TABLE[name].bound(*((p.log_prob(cloud) - q.log_prob(cloud)).sum(dim=1) for cloud in (x, y))).item()
    assert adversarial_distance(x, y, name, seeds=(0,)).value == pytest.approx(truth, rel=0.1)


@pytest.mark.parametrize("name, dimensions", [*((name, 3) for name in ADVERSARIAL), ("js", 1)])
def test_two_points(name, dimensions):
    """Shares of exactly 0.8 and 0.3, so that no error of sampling is left but that of the split."""
    a, b = torch.full((dimensions,), 3.0), torch.full((dimensions,), -1.0)
    share_x, share_y = (torch.arange(2000) < count for count in (1600, 600))
    x, y = (torch.where(share[:, None], a, b) for share in (share_x, share_y))
    if name in WASSERSTEIN:
        truth = 0.5 * (a - b).norm().item()
    else:
        truth = integral(name, torch.tensor([0.8, 0.2]).log(), torch.tensor([0.3, 0.7]).log(), 1.0)
    assert adversarial_distance(x, y, name, seeds=(0,), steps=40).value == pytest.approx(truth, rel=0.1)


@pytest.mark.parametrize("name", ADVERSARIAL)
def test_equal_clouds_have_no_distance(name):
    x = gaussian(1, 1000, 0, 1, dimensions=2)
    assert adversarial_distance(x, x.clone(), name, seeds=(0,), steps=50).value < 1e-12  # the rounding of 1 - 1
    # Two draws: W1 errs like a mean of 2,000 values of scale 1, and the divergences like parameters over rows
    small = 2 / math.sqrt(1000) if name in WASSERSTEIN else 20 / 1000
    assert adversarial_distance(x, gaussian(2, 1000, 0, 1, dimensions=2), name, seeds=(0,), steps=50).value < small


def test_disjoint_supports():
    """Intervals beside each other, four in turn, which no quadric parts, and rings about each other."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.rand(2, 2000, 1, generator=generator)
    alternate = 4.0 * (torch.arange(2000) % 2)[:, None]
    angle = 2 * math.pi * torch.rand(2000, generator=generator)
    ring = torch.stack([angle.cos(), angle.sin()], dim=1)
    for p, q in ((x, y + 1.5), (x + alternate, y + 2 + alternate), (ring, 0.5 * ring)):
        value = adversarial_distance(p, q, "js", seeds=(0,)).value
        assert 0.95 * math.log(2) < value <= math.log(2)
    assert 1.9 < adversarial_distance(ring, 0.5 * ring, "hellinger", seeds=(0,)).value <= 2
    far = gaussian(1, 200, 0, 1)
    assert 1e3 < adversarial_distance(far, far + 1e4, "chi2", seeds=(0,), steps=20).value < math.inf


def test_a_plane_in_a_volume():
    """What a linear map makes of a narrower latent: no mass in common, but points of the volume lie as near as one likes."""
    stretch = torch.tensor([3.0, 1.0, 0.2])
    x, y = gaussian(1, 2000, 0, 1, dimensions=3) * stretch, gaussian(2, 2000, 0, 1, dimensions=3) * stretch
    y[:, 2] = 0
    turn = torch.linalg.qr(gaussian(3, 3, 0, 1, dimensions=3)).Q
    assert 0.85 * math.log(2) < adversarial_distance(x @ turn, y @ turn, "js", seeds=(0,)).value <= math.log(2)


def test_mixture_that_no_quadric_parts_from_a_gaussian():
    """Two modes against a Gaussian of equal mean and variance: all of the distance is the network's to find."""
    mode = torch.where(torch.arange(8000) % 2 == 0, 1.8, -1.8)[:, None]
    x, y = gaussian(1, 8000, 0, 0.5) + mode, gaussian(2, 8000, 0, math.sqrt(0.25 + 1.8**2))
    t = torch.linspace(-20, 20, 20_001, dtype=torch.float64)
    normal = torch.distributions.Normal
    log_p = torch.logaddexp(normal(1.8, 0.5).log_prob(t), normal(-1.8, 0.5).log_prob(t)) - math.log(2)
    log_q = normal(0.0, math.sqrt(0.25 + 1.8**2)).log_prob(t)
    truth = integral("js", log_p, log_q, (t[1] - t[0]).item())
    assert adversarial_distance(x, y, "js", seeds=(0,)).value == pytest.approx(truth, rel=0.1)


def test_units_and_exchange():
    x, y = gaussian(1, 1500, 0.5, 1, dimensions=2), gaussian(2, 1500, 0, 1.5, dimensions=2)
    moved = [cloud * torch.tensor([1e3, 1e-3]) + 50 for cloud in (x, y)]
    plain, units = (adversarial_distance(*pair, "js", seeds=(3,), steps=20).value for pair in ((x, y), moved))
    assert units == pytest.approx(plain, rel=1e-4)  # rounding of 1e-7, which 20 steps may magnify
    doubled = adversarial_distance(1e200 * x, 1e200 * y, "wgan_gp", seeds=(3,), steps=20).value
    assert doubled == pytest.approx(1e200 * adversarial_distance(x, y, "wgan_gp", seeds=(3,), steps=20).value, rel=1e-4)
    # The clouds exchange their roles in the training, so it may find another critic, as good as the first on these rows
    kl = adversarial_distance(x, y, "kl", seeds=(3,))
    assert adversarial_distance(y, x, "reverse_kl", seeds=(3,)).value == pytest.approx(kl.value, abs=kl.standard_error)


def test_the_standard_error_is_that_of_the_measured_rows():
    """W1 of a shift is a difference of means."""
    x, y = gaussian(1, 400, 0, 1), gaussian(2, 900, 0, 1) + 3
    found = adversarial_distance(x, y, "wgan_sn", seeds=(0, 1), steps=20)
    # Variances of 400 values of variance 1 spread by 7 %
    assert found.standard_error == pytest.approx(math.sqrt(1 / 400 + 1 / 900), rel=0.1)
    assert adversarial_distance(x, x + 3, "wgan_sn", seeds=(0,), steps=1).standard_error < 1e-6  # rounding: all pairs alike
    x, y = gaussian(1, 1000, 0.5, 1), gaussian(2, 1000, 0, 1)
    l_x, l_y = x[:, 0] / 2 - 1 / 8, y[:, 0] / 2 - 1 / 8
    for name in sorted(set(DIVERGENCES) - {"chi2"}):  # of which a few rows decide
        truth = math.sqrt((TABLE[name].on_P(l_x).var() + TABLE[name].on_Q(l_y).var()).item() / 1000)
        # A critic of 500 rows, whose slope 1/2 has the standard error sqrt(2 / 500) = 0.06; twice that, of 1/2
        assert adversarial_distance(x, y, name, seeds=(0,), steps=20).standard_error == pytest.approx(truth, rel=0.3)


@pytest.mark.parametrize("name", ["js", "wgan_gp"])
def test_a_critic_is_not_measured_on_the_rows_that_it_is_chosen_on(name, monkeypatch):
    """A critic that knows the rows to choose on by heart, and nothing of the others, is worth 0."""

    def candidates(parts, *_, **__):
        signs = [torch.ones(part.shape[1]) for part in (*parts.select, *parts.measure)]
        known = torch.cat([5 * signs[0], -5 * signs[1], 0 * signs[2], 0 * signs[3]])
        return known.double().expand(1, FOLDS, -1)

    monkeypatch.setattr(adversarial, "ratio_candidates", candidates)
    monkeypatch.setattr(adversarial, "potential_candidates", candidates)
    x = gaussian(1, 100, 0, 1)
    # Logits: the clamp by the rows to choose on, +-(5 + log 100) / 2, leaves 0 as it is
    assert adversarial_distance(x, x + 1, name, seeds=(0,)).value == pytest.approx(0, abs=1e-12)


def test_logarithms_of_ratios_are_cut_where_no_point_is_to_be_expected(monkeypatch):
    """A critic says l = 20 on all of P and -20 on all of Q; half of that and of log 100 is what 100 rows let one say."""

    def candidates(parts, **_):
        parts = (*parts.select, *parts.measure)
        known = [torch.full((part.shape[1],), 20.0 * sign) for part, sign in zip(parts, (1, -1, 1, -1), strict=True)]
        return torch.cat(known).expand(1, FOLDS, -1)

    monkeypatch.setattr(adversarial, "ratio_candidates", candidates)
    x, cut = gaussian(1, 100, 0, 1), (20 + math.log(100)) / 2
    assert adversarial_distance(x, x + 1, "kl", seeds=(0,)).value == pytest.approx(cut - math.expm1(-cut), rel=1e-5)  # float32


def test_seeds_are_all_the_randomness():
    x, y = gaussian(1, 200, 0.5, 1), gaussian(2, 240, 0, 1)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    both = adversarial_distance(x, y, "hellinger", seeds=(0, 7), steps=10)
    assert torch.equal(torch.get_rng_state(), state)
    alone = adversarial_distance(x, y, "hellinger", seeds=(7,), steps=10)
    assert alone.values == both.values[1:] and both.values[0] != both.values[1] and both.std > 0


def test_parts_are_disjoint_and_measure_every_row():
    x, y = torch.arange(42.0)[:, None], torch.arange(33.0)[:, None]
    for cloud, parts in ((0, parts_of(x, y, torch.Generator().manual_seed(0))), (1, parts_of(x, y, torch.Generator()))):
        rows = (x, y)[cloud]
        measured = set()
        for k in range(FOLDS):
            pieces = [part[cloud][k].flatten().tolist() for part in (parts.fit, parts.select, parts.measure)]
            assert sorted(itertools.chain(*pieces)) == rows.flatten().tolist()
            assert not measured & set(pieces[2])
            measured |= set(pieces[2])
        assert len(measured) == len(rows) // FOLDS * FOLDS


def test_critics_are_one_lipschitz():
    generator = torch.Generator().manual_seed(0)
    network = Stack(2, 3, 8, generator, torch.device("cpu"), radial=True, maxmin=True)
    for weight in network.weights:
        weight.data *= 3
    network.clip_norms_()
    points = 4 * torch.randn(2, 500, 3, generator=generator)
    assert gradient_norms(network, points).max() <= 1 + 1e-5


def test_names_and_conventions():
    assert ADVERSARIAL == NAMES and tuple(TABLE) == DIVERGENCES
    x = gaussian(0, 40, 0, 1)
    for name in ADVERSARIAL:
        assert "P = data, Q = generated" in adversarial_distance(x, x + 1, name, seeds=(0,), steps=1).convention


def test_bad_input():
    x, y = gaussian(1, 40, 0, 1), gaussian(2, 40, 0, 1)
    with pytest.raises(ValueError, match=re.escape("did you mean 'hellinger'?")):
        adversarial_distance(x, y, "helinger")
    with pytest.raises(ValueError, match=r"sinkhorn needs no critic: call dae.complexity.generator_distance"):
        adversarial_distance(x, y, "sinkhorn")
    with pytest.raises(ValueError, match="y: expected finite values, got NaN"):
        adversarial_distance(x, torch.where(y > 1, torch.nan, y), "js")
    with pytest.raises(ValueError, match=r"x: expected at least 32 rows.*got 31"):
        adversarial_distance(x[:31], y, "js")
    with pytest.raises(ValueError, match="rows of one size"):
        adversarial_distance(x, y.expand(40, 2), "js")
    with pytest.raises(TypeError, match="floating"):
        adversarial_distance(x.long(), y, "js")
    with pytest.raises(ValueError, match="steps >= 1, got 0"):
        adversarial_distance(x, y, "js", steps=0)
    with pytest.raises(ValueError, match="at least one seed"):
        adversarial_distance(x, y, "js", seeds=())


class Affine(GeneratorFamily):
    """z -> scale z + shift with any scale in [0, 1]."""

    capacity, knob = 1.0, "scale"

    def build(self, latent_shape, data_shape):
        return nn.Linear(*latent_shape, *data_shape)

    def constrain_(self, module):
        with torch.no_grad():
            module.weight.clamp_(0, 1)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in ADVERSARIAL if name not in ("kl", "hellinger")])  # both like chi2
def test_training_learns_scale_and_shift(name):
    z, x = gaussian(1, 2000, 0, 1).float(), gaussian(2, 2000, 2, 0.5).float()
    torch.manual_seed(5)
    state = torch.get_rng_state()
    module = train_adversarial(Affine(), z, x, name, seed=0, steps=300, learning_rates=(5e-2, 2e-2))
    assert torch.equal(torch.get_rng_state(), state) and not module.training
    assert module.weight.item() == pytest.approx(0.5, abs=0.1) and module.bias.item() == pytest.approx(2, abs=0.1)
    with torch.no_grad():
        generated = module(gaussian(3, 2000, 0, 1).float())
    before = adversarial_distance(x, z, name, seeds=(0,), steps=50).value
    assert adversarial_distance(x, generated, name, seeds=(0,), steps=50).value < 0.1 * before


@pytest.mark.parametrize("name", ADVERSARIAL)
def test_training_finds_a_shift(name):
    """From the start, a shift in [-1, 1], to 2."""
    z, x = gaussian(1, 500, 0, 1).float(), gaussian(2, 500, 2, 0.5).float()
    options = {"seed": 0, "steps": 80, "batch_size": 128, "learning_rates": (8e-2, 3e-2)}
    assert train_adversarial(Affine(), z, x, name, **options).bias.item() == pytest.approx(2, abs=0.5)


def test_training_stays_in_the_family():
    z, x = gaussian(1, 100, 0, 1).float(), gaussian(2, 100, 0, 3).float()
    module = train_adversarial(Affine(), z, x, "reverse_kl", seed=0, steps=20, batch_size=50, learning_rates=(0.1, 0.01))
    assert 0 <= module.weight.item() <= 1
    with pytest.raises(ValueError, match="did you mean 'wgan_sn'"):
        train_adversarial(Affine(), z, x, "wgan_s", seed=0)
    with pytest.raises(ValueError, match="latents: expected at least 32 rows"):
        train_adversarial(Affine(), z[:4], x, "js", seed=0)
    with pytest.raises(TypeError, match="family as a GeneratorFamily"):
        train_adversarial("linear", z, x, "js", seed=0)
