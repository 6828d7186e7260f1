"""The generator-induced distance against closed forms, its bounds, its seeds, and what it refuses."""

import dataclasses
import importlib
import itertools
import json
import math

import pytest
import torch

from dae.complexity.distances import ADVERSARIAL, PLAIN, Distance, make_distance
from dae.complexity.estimate import Estimate, check_pair
from dae.complexity.families import ConvDecoders, DropoutNetworks, GeneratorFamily, LinearMaps, LipschitzNetworks, MLPs
from dae.complexity.fitting import Fitting, split_rows
from dae.complexity.generator_distance import fit_generator, generator_distance
from dae.complexity.linear import best_reconstruction

VARIANCES = torch.tensor([4.0, 3.0, 2.0, 1.0, 0.5, 0.25])


def gaussian(N, variances, seed, mean=0.0):
    """[N, D] in random axes, with about these principal variances."""
    generator = torch.Generator().manual_seed(seed)
    axes = torch.linalg.qr(torch.randn(len(variances), len(variances), generator=generator))[0]
    return torch.randn(N, len(variances), generator=generator) * variances.sqrt() @ axes + mean


def least(variances, latent_variances, norm):
    """sum_{i <= k} max(sqrt(l_i) - L sqrt(m_i), 0)^2 + sum_{i > k} l_i"""
    reached = torch.zeros_like(variances)
    k = min(len(variances), len(latent_variances))
    reached[:k] = latent_variances[:k].sqrt() * norm
    return (variances.sqrt() - reached).clamp_min(0).square().sum().item()


@pytest.mark.parametrize("norm", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("k", [2, 6, 9])
def test_gaussians_under_linear_maps(k, norm):
    """W2^2 = sum_{i <= k} max(sqrt(l_i) - L, 0)^2 + sum_{i > k} l_i, to 5 % and what 16000 points a cloud miss."""
    expected = least(VARIANCES, torch.ones(k), norm)
    z, x = gaussian(16_000, torch.ones(k), 0, mean=3.0), gaussian(16_000, VARIANCES, 1, mean=-2.0)
    found = generator_distance(z, x, LinearMaps(norm), "frechet")
    # Where the distance is 0, two samples are apart by sum_ij l_i l_j / (n (l_i + l_j)) + 2 sum_i l_i / n in expectation.
    apart = ((VARIANCES[:, None] * VARIANCES / (VARIANCES[:, None] + VARIANCES)).sum() + 2 * VARIANCES.sum()).item()
    assert abs(found.value - expected) < 0.05 * expected + apart / 16_000
    assert found.bound == "exact" and found.counts == (16_000, 16_000) and found.capacity == norm


def test_the_latent_that_is_the_data_s_own_first_axes_leaves_the_tail():
    """Latent N(0, diag(l_1..l_k)), L = 1: the tail sum alone."""
    z, x = gaussian(16_000, VARIANCES[:3], 0), gaussian(16_000, VARIANCES, 1)
    found = generator_distance(z, x, LinearMaps(1.0), "frechet")
    assert found.value == pytest.approx(VARIANCES[3:].sum().item(), rel=0.05)
    narrow = generator_distance(torch.randn(16_000, 3), x, LinearMaps(1.0), "frechet")
    assert narrow.value > 1.5 * found.value


def test_in_sample_the_closed_form_is_exact():
    z, x = gaussian(300, torch.tensor([2.0, 0.5]), 0).double(), gaussian(300, VARIANCES, 1).double()
    m, v = (torch.linalg.eigvalsh(torch.cov(cloud.T)).flip(0) for cloud in (z, x))
    found = generator_distance(z, x, LinearMaps(0.8), "frechet", heldout=0)
    # Eigenvalues that are 0 to rounding have roots of 1e-8.
    assert found.value == pytest.approx(least(v, m, 0.8), rel=1e-7)
    assert found.bound == "exact" and "empirical laws" in found.convention and found.counts == (300, 300)
    assert found.std < 1e-7 * found.value


def test_training_finds_what_the_closed_form_says():
    """By Poincare's inequality a 1-Lipschitz map takes N(0, I) to no variance above 1: linear maps are the best, as k = d."""
    z, x = gaussian(2000, torch.ones(3), 0), gaussian(2000, VARIANCES[:3], 1)
    closed = generator_distance(z, x, LinearMaps(1.0), "frechet", seeds=(0,), heldout=0)
    trained = generator_distance(
        z, x, LipschitzNetworks(1.0, 16, 1), "frechet", seeds=(0,), heldout=0, steps=150, learning_rate=0.08
    )
    assert 0.95 * closed.value < trained.value < 1.05 * closed.value
    assert trained.bound == "upper"


def test_least_squares():
    z, x = gaussian(200, torch.ones(3), 0).double(), gaussian(200, VARIANCES, 1, mean=5.0).double()
    x[:, :3] += 2 * z
    design = torch.cat([z, torch.ones(200, 1)], dim=1).double()
    residual = x - design @ torch.linalg.lstsq(design, x).solution
    found = generator_distance(z, x, LinearMaps(), "reconstruction", heldout=0)
    assert found.value == pytest.approx(residual.square().mean().item(), rel=1e-9)
    assert found.bound == "exact"
    assert generator_distance(z, x, LinearMaps(), "reconstruction").bound == "upper"


def test_bounded_least_squares_meet_their_optimality_condition():
    """At the minimum of a convex function over a convex set no member of the set lies downhill."""
    generator = torch.Generator().manual_seed(0)
    z, x = torch.randn(100, 4, generator=generator).double(), torch.randn(100, 6, generator=generator).double()
    z[:, 1:] *= 0.1
    x[:, :4] += 3 * z
    best = best_reconstruction(z, x, 0.7)
    assert torch.linalg.matrix_norm(best, 2) <= 0.7 * (1 + 1e-12)
    z, x = z - z.mean(dim=0), x - x.mean(dim=0)
    gradient = 2 * (best @ z.T @ z - x.T @ z) / 100
    # The member that lies most downhill is -0.7 times the polar factor of the gradient.
    downhill = (gradient * best).sum() + 0.7 * torch.linalg.matrix_norm(gradient, "nuc")
    assert gradient.norm() > 0.1, "the bound binds"
    assert downhill < 1e-8 * (x.square().sum() / 100)


@pytest.mark.parametrize("name", sorted(set(PLAIN) - {"reconstruction", "frechet"}))
def test_every_distance_falls_from_a_generator_that_is_too_weak_to_one_that_is_not(name):
    z, x = gaussian(600, torch.ones(2), 0), gaussian(600, torch.tensor([4.0, 4.0]), 1, mean=1.0)
    options = {"seeds": (0,), "steps": 40, "batch_size": 100}
    weak, able = (generator_distance(z, x, LinearMaps(norm), name, **options) for norm in (0.2, 2.0))
    assert able.value < 0.3 * weak.value
    assert weak.bound == able.bound == "upper" and weak.distance == name and weak.convention


def test_networks_reconstruct_what_linear_maps_cannot():
    z = gaussian(1000, torch.ones(1), 0)
    x = torch.cat([z.abs(), (2 * z).sin()], dim=1)
    linear, able = (
        generator_distance(z, x, family, "reconstruction", seeds=(0,), steps=200).value for family in (LinearMaps(), MLPs(32, 2))
    )
    assert able < 0.1 * linear


def test_dropout_hurts_reconstruction():
    z = gaussian(1000, torch.ones(2), 0)
    x = torch.cat([z.abs(), z], dim=1)
    quiet, noisy = (
        generator_distance(z, x, DropoutNetworks(p, 32, 1), "reconstruction", seeds=(0, 1), steps=150) for p in (0.0, 0.5)
    )
    assert noisy.value - noisy.std > quiet.value + quiet.std


def test_images_from_maps():
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(64, 2, 2, 2, generator=generator)
    x = torch.nn.functional.interpolate(z, scale_factor=2)
    found = generator_distance(z, x, ConvDecoders(0.5, 8), "reconstruction", seeds=(0,), steps=120)
    assert found.value < 0.5 * x.var().item()
    assert fit_generator(z, x, ConvDecoders(0.5, 8), "reconstruction", steps=1)(z[:3]).shape == (3, 2, 4, 4)


@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_units_do_not_matter(scale):
    z, x = gaussian(200, torch.ones(2), 0), gaussian(200, VARIANCES[:3], 1)
    options = {"seeds": (0,), "steps": 30}
    for family, bounded in ((MLPs(8, 1), MLPs(8, 1)), (LipschitzNetworks(1.0, 8, 1), LipschitzNetworks(scale / 10, 8, 1))):
        plain = generator_distance(z, x, family, "sliced_wasserstein", **options)
        scaled = generator_distance(10 * z, scale * x + 5 * scale, bounded, "sliced_wasserstein", **options)
        assert scaled.value == pytest.approx(scale * plain.value, rel=0.02)  # rounding, magnified by 30 steps


def test_seeds_repeat_and_leave_the_global_generator_alone():
    z, x = gaussian(100, torch.ones(2), 0), gaussian(100, VARIANCES[:3], 1)
    call = {"family": DropoutNetworks(0.2, 8), "distance": "sliced_wasserstein", "steps": 5}
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    first = generator_distance(z, x, **call)
    assert torch.equal(torch.rand(3), expected)
    torch.manual_seed(2)
    assert generator_distance(z, x, **call) == first
    assert generator_distance(z, x, **call, seeds=(2,)).values[0] == first.values[2]
    assert len(set(first.values)) == 3 and first.std > 0


@pytest.mark.parametrize("paired", [True, False])
@pytest.mark.parametrize("heldout", [0.5, 0.3, 0.0])
def test_rows_serve_one_purpose(paired, heldout):
    rows = torch.arange(100.0)[:, None]
    split = split_rows(rows, rows, 0, paired, Fitting(heldout=heldout))
    if heldout == 0:
        assert split.fit is split.choose is split.measure and len(split.fit.data) == 100
        return
    for side in ("latents", "data"):
        parts = [getattr(part, side).flatten().tolist() for part in (split.fit, split.choose, split.measure)]
        assert sorted(itertools.chain(*parts)) == list(range(100)) and len(parts[2]) == round(100 * heldout)
    common = set(split.measure.latents.flatten().tolist()) & set(split.measure.data.flatten().tolist())
    assert len(common) == (len(split.measure.data) if paired else 0)
    assert not paired or torch.equal(split.fit.latents, split.fit.data)


def test_codes_bear_the_same_sampling_error_as_drawn_latents():
    """The data as its own latent is not measured against itself."""
    x, drawn = gaussian(400, VARIANCES[:3], 0), gaussian(400, VARIANCES[:3], 1)
    own, fresh = (generator_distance(z, x, LinearMaps(), "sinkhorn", steps=1, seeds=(0, 1, 2)) for z in (x, drawn))
    assert own.value > 0.3 * fresh.value > 0


def test_pairs_of_points_are_limited_and_nothing_else():
    z, x = gaussian(9000, torch.ones(1), 0), gaussian(9000, torch.ones(1), 1)
    options = {"seeds": (0,), "steps": 1}
    assert generator_distance(z, x, LinearMaps(), "energy", **options).counts == (3600, 4096)
    assert generator_distance(z, x, LinearMaps(), "energy", measure_limit=100, **options).counts == (4400, 100)
    assert generator_distance(z, x, LinearMaps(), "sliced_wasserstein", **options).counts == (3600, 4500)


def test_a_distance_of_your_own():
    def function(x, y, _):
        return (x.mean(dim=0) - y.mean(dim=0)).square().sum()

    z, x = gaussian(1000, torch.ones(2), 0), gaussian(1000, VARIANCES, 1, mean=1.0)
    means = Distance("frechet", function, "squared distance of means")
    found = generator_distance(z, x, MLPs(8, 1), means, steps=30)
    assert found.convention == "squared distance of means" and 0 <= found.value < 0.6  # it was 6


def test_scales_are_taken_from_the_data_and_said():
    x = gaussian(300, VARIANCES, 0)
    median = torch.pdist(x.double()).median().item()
    assert f"blur {median / 10:.4g}" in make_distance("sinkhorn", x).convention
    assert f"{median / 2:.4g}" in make_distance("mmd", x).convention
    assert "blur 0.3," in make_distance("sinkhorn", x, blur=0.3).convention


ESTIMATE = Estimate.over(
    [1.0, 3.0], (4, 7), bound="upper", distance="mmd", convention="c", family="f", capacity=math.inf, counts=(5, 6)
)


def test_estimate():
    assert (ESTIMATE.value, ESTIMATE.std) == (2.0, pytest.approx(2**0.5))
    assert str(ESTIMATE) == "2 ± 1.4 (upper bound; ± over 2 seeds, sampling error not included)"
    assert str(dataclasses.replace(ESTIMATE, standard_error=0.25)).endswith("sampling error 0.25)")
    read = json.loads(json.dumps(ESTIMATE.to_dict(), allow_nan=False))
    assert read["capacity"] == "infinity" and read["values"] == [1.0, 3.0] and read["counts"] == [5, 6]
    one = dataclasses.replace(ESTIMATE, value=1.0, std=0.0, values=(1.0,), seeds=(0,))
    assert one.to_dict()["seeds"] == [0] and str(one) == "1 (upper bound; 1 seed, sampling error not included)"
    rest = {"bound": "lower", "distance": "js", "convention": "", "family": None, "capacity": None, "counts": (1, 1)}
    assert Estimate.over([1.0], (0,), **rest).std == 0
    with pytest.raises(ValueError, match="bound out of"):
        dataclasses.replace(ESTIMATE, bound="above")
    with pytest.raises(ValueError, match="one value a seed"):
        dataclasses.replace(ESTIMATE, seeds=(0,))
    with pytest.raises(FloatingPointError, match="finite values"):
        Estimate.over([math.nan], (0,), **rest)


GOOD = torch.randn(20, 3, generator=torch.Generator().manual_seed(0))


def with_value(value):
    bad = GOOD.clone()
    bad[7, 1] = value
    return bad


@pytest.mark.parametrize(
    ("latents", "data", "error", "message"),
    [
        (with_value(math.nan), GOOD, ValueError, r"latents: expected finite values, got NaN or infinity in 1 of 20 .* point 7"),
        (GOOD, with_value(math.inf), ValueError, "data: expected finite values"),
        (GOOD[:1], GOOD[:1], ValueError, "at least 2 points, got 1"),
        (GOOD[:0], GOOD[:0], ValueError, "at least 2 points, got 0"),
        (GOOD[:5], GOOD, ValueError, "got 5 latents and 20 data points"),
        (torch.ones(20, 3), GOOD, ValueError, "20 equal ones"),
        (torch.ones(20, 3, dtype=torch.int64), GOOD, TypeError, "floating point tensor .*, got torch.int64"),
        (GOOD, GOOD.numpy(), TypeError, "expected a floating point tensor .*, got ndarray"),
        (GOOD[:, 0], GOOD, ValueError, "at least one value a point"),
        (GOOD[:, :0], GOOD, ValueError, "at least one value a point"),
    ],
)
def test_bad_clouds(latents, data, error, message):
    for refused in (lambda: check_pair(latents, data), lambda: generator_distance(latents, data, LinearMaps(), "mmd")):
        with pytest.raises(error, match=message):
            refused()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"distance": "sinkhron"}, ValueError, "did you mean 'sinkhorn'"),
        ({"distance": "JSD"}, ValueError, "unknown distance 'JSD'"),
        ({"distance": 3}, TypeError, "its name or a Distance"),
        ({"family": ConvDecoders()}, ValueError, "convolutional decoders map"),
        ({"seeds": ()}, ValueError, "at least one seed"),
        ({"seeds": (1, 1)}, ValueError, "none twice"),
        ({"seeds": 3}, TypeError, "sequence of ints"),
        ({"seeds": (True,)}, TypeError, "sequence of ints"),
        ({"seeds": (0.5,)}, TypeError, "sequence of ints"),
        ({"family": "linear"}, TypeError, r"family as a GeneratorFamily, such as LinearMaps\(max_norm=1.0\).* got 'linear'"),
        ({"family": LinearMaps}, TypeError, r"got the class LinearMaps; call it: LinearMaps\(\)"),
        ({"distance": "js"}, ValueError, "got 10 and 10 of N=20 with heldout=0.5; give more rows"),
        ({"distance": "wgan_sn", "heldout": 0}, ValueError, "got 20 and 20 of N=20 with heldout=0;"),
        ({"steps": 0}, ValueError, "steps >= 1"),
        ({"batch_size": 1}, ValueError, "batch_size >= 2"),
        ({"measure_limit": 1}, ValueError, "measure_limit >= 2"),
        ({"measure_limit": 0}, ValueError, "measure_limit >= 1"),
        ({"learning_rate": -1.0}, ValueError, "learning_rate > 0"),
        ({"heldout": 0.9}, ValueError, "heldout in"),
        ({"heldout": "half"}, TypeError, "heldout as a number"),
        ({"heldout": 0.05}, ValueError, "at least 2 rows to fit on"),
    ],
)
def test_bad_options(changes, error, message):
    with pytest.raises(error, match=message):
        generator_distance(**{"latents": GOOD, "data": GOOD, "family": MLPs(4, 1), "distance": "energy"} | changes)


def test_a_training_that_diverges_says_so():
    with pytest.raises(FloatingPointError, match="lower learning_rate"):
        generator_distance(GOOD, GOOD, MLPs(4, 1), "reconstruction", learning_rate=1e30, steps=20)


class Doubled(torch.nn.Module):
    def forward(self, z):
        return 2 * z


def test_adversarial_distances_know_the_data_from_the_generated(monkeypatch):
    """Data N(m, s^2) and generated N(m, 4 s^2): KL(data | generated) = log 2 + 1/8 - 1/2, the other way -log 2 + 2 - 1/2."""
    module = importlib.import_module("dae.complexity.generator_distance")  # as an attribute of its package it is the function
    monkeypatch.setattr(module, "train_adversarial", lambda *_, **__: Doubled())
    z, x = gaussian(8000, torch.ones(1), 0), gaussian(8000, 9 * torch.ones(1), 1, mean=5.0)
    kl, reverse = (generator_distance(z, x, LinearMaps(), name, seeds=(0,)) for name in ("kl", "reverse_kl"))
    # 0.32 and 0.81: heavy tails make the values uncertain, but not which is which.
    assert 0.2 < kl.value < 0.5 < reverse.value < 1.2
    assert kl.bound == "neither" and kl.capacity == math.inf and kl.counts == (4000, 4000)


@pytest.mark.slow
def test_a_critic_tells_a_generator_that_is_too_weak():
    z, x = gaussian(400, torch.ones(1), 0), gaussian(400, 9 * torch.ones(1), 1, mean=5.0)
    weak, able = (generator_distance(z, x, LinearMaps(norm), "js", seeds=(0,), steps=30, batch_size=64) for norm in (0.3, 3.0))
    assert able.value < 0.05 < weak.value <= math.log(2)
    assert weak.convention and weak.bound == "neither"


def test_adversarial_names_have_no_plain_form():
    for name in ADVERSARIAL:
        with pytest.raises(ValueError, match="critic"):
            make_distance(name, GOOD)


def test_the_base_class_says_what_a_family_must_have():
    for missing in (
        lambda: GeneratorFamily().capacity,
        lambda: GeneratorFamily().at(1),
        lambda: GeneratorFamily().build((1,), (1,)),
    ):
        with pytest.raises(NotImplementedError):
            missing()
