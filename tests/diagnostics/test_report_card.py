"""The latent report card: each predictor against a closed form, the whole card on both bottlenecks, and what it refuses."""

import math

import pytest
import torch

from dae.config import AutoencoderConfig
from dae.diagnostics import predictors as measure
from dae.diagnostics.ranking import rank_predictors
from dae.diagnostics.report_card import PREDICTORS, encode_images, report_card
from dae.models import Autoencoder


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def codes(*shape, size=8, seed=0):
    return torch.randint(size, shape, generator=torch.Generator().manual_seed(seed))


# ---- bits ----


def test_ngram_is_a_distribution():
    """The probabilities of all codes in one place, given their neighbours, sum to 1: whatever was counted."""
    train = codes(20, 3, 3, size=5)
    image = codes(1, 3, 3, size=5, seed=1)
    images = image.repeat(5, 1, 1)
    images[:, -1, -1] = torch.arange(5)  # nothing depends on the last one
    totals = [measure.ngram_bits(train, x[None], 5) for x in images]
    shared = -math.log2(sum(2**-bits for bits in totals))
    # so `shared` are the bits of all other tokens: another last token must not move them
    others = [measure.ngram_bits(train, torch.cat([x[None]] * 2), 5) for x in images]
    assert shared == pytest.approx(-math.log2(sum(2**-bits for bits in others)), abs=1e-9)
    one = [measure.ngram_bits(codes(20, 1, 1, size=5), torch.tensor([[[t]]]), 5) for t in range(5)]
    assert sum(2**-bits for bits in one) == pytest.approx(1, abs=1e-12)


def test_ngram_bits_of_known_sources():
    independent = measure.ngram_bits(codes(800, 4, 4), codes(200, 4, 4, seed=1), 8)
    assert independent == pytest.approx(16 * 3, rel=0.02)  # log2 8 a token; the counts' noise costs less than 2 %
    constant = torch.full((100, 4, 4), 3)
    assert measure.ngram_bits(constant, constant, 8) < 0.1
    copied_from_left = codes(800, 4, 1).expand(-1, -1, 4)
    assert measure.ngram_bits(copied_from_left[:600], copied_from_left[600:], 8) == pytest.approx(4 * 3, rel=0.05)
    copied_from_above = copied_from_left.transpose(1, 2)
    assert measure.ngram_bits(copied_from_above[:600], copied_from_above[600:], 8) == pytest.approx(4 * 3, rel=0.05)


def test_ngram_bits_of_huge_codebooks():
    """Only how often codes occur together counts, and K in the smoothing: numbers of codes far apart are none other."""
    near, far = codes(300, 4, 4), codes(300, 4, 4) * 2_000_003
    assert measure.ngram_bits(near[:200], near[200:], 2**24) == measure.ngram_bits(far[:200], far[200:], 2**24)


def test_tiny_transformer_bits():
    state = torch.get_rng_state()
    independent = measure.tiny_transformer_bits(codes(3000, 2, 2), codes(500, 2, 2, seed=1), 8, seed=0)
    assert independent == pytest.approx(4 * 3, rel=0.02)  # nothing to learn but that the codes are equally frequent
    twice = codes(3500, 2, 1).expand(-1, -1, 2)  # each code stands beside itself: half of them are known
    assert measure.tiny_transformer_bits(twice[:3000], twice[3000:], 8, seed=0) == pytest.approx(2 * 3, rel=0.05)
    few = measure.tiny_transformer_bits(codes(50, 2, 2), codes(200, 2, 2, seed=1), 8, seed=0)
    assert few < 1.1 * 4 * 3, "few images are not learned by heart"
    assert torch.equal(state, torch.get_rng_state())


def test_gaussian_prior_bits():
    """Means N(0, S), variances v: E KL = log(det(S + v) / det v) / 2, as quadratic form and trace sum to the dimension."""
    mix = normal(4, 4, seed=1)
    mean = (normal(24000, 4) @ mix)[:, :, None, None]
    log_variance = torch.full_like(mean, math.log(0.1))
    bits = measure.gaussian_prior_bits(mean[:12000], log_variance[:12000], mean[12000:], log_variance[12000:])
    covariance = mix.T @ mix + 0.1 * torch.eye(4, dtype=torch.float64)
    expected = (torch.logdet(covariance).item() - 4 * math.log(0.1)) / 2 / math.log(2)
    assert bits == pytest.approx(expected, rel=0.01)  # 12,000 draws know a variance to about 1 %
    larger = measure.gaussian_prior_bits(
        *(x for m, v in ((mean[:12000], log_variance[:12000]), (mean[12000:], log_variance[12000:]))
          for x in (100 * m, v + 2 * math.log(100)))
    )  # fmt: skip
    assert larger == pytest.approx(bits, rel=1e-9)


def test_gaussian_prior_bits_of_fewer_images_than_dimensions():
    mean, log_variance = normal(60, 100, 1, 1), torch.full((60, 100, 1, 1), -20.0)
    independent = measure.gaussian_prior_bits(mean[:40], log_variance[:40], mean[40:], log_variance[40:])
    assert independent == pytest.approx(100 * 10 / math.log(2), rel=0.05)  # log of sqrt(1 / e^-20) each; fitted on 40


# ---- shape ----


def test_spectrum():
    scales = torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64)
    x_NP = torch.linalg.qr(normal(50, 4) - normal(50, 4).mean(0))[0][:, :3]
    x_NP = torch.linalg.qr(x_NP - x_NP.mean(0))[0] * scales * math.sqrt(50)
    x_NP = x_NP - x_NP.mean(0)
    rotated = x_NP @ torch.linalg.qr(normal(3, 3, seed=2))[0]
    torch.testing.assert_close(measure.spectrum(rotated), scales.square(), rtol=1e-9, atol=0)
    wide = torch.cat([rotated[:2], -rotated[:2]]).repeat(1, 4)  # 4 points in 12 dimensions: at most 2 of them are seen
    assert len(measure.spectrum(wide)) == 2
    assert len(measure.spectrum(torch.ones(5, 3))) == 0


def test_slope_and_effective_dimension():
    ranks = torch.arange(1, 20, dtype=torch.float64)
    assert measure.spectrum_slope(ranks**-1.5) == pytest.approx(-1.5)
    assert measure.spectrum_slope(torch.cat([ranks**-1.5, torch.tensor([1e-8])])) == pytest.approx(-1.5)
    assert measure.spectrum_slope(torch.ones(2)) is None and measure.spectrum_slope(torch.ones(0)) is None
    assert measure.effective_dimension(torch.full((7,), 2.0)) == pytest.approx(7)
    assert measure.effective_dimension(torch.tensor([3.0, 1.0])) == pytest.approx(16 / 10)
    assert measure.effective_dimension(torch.ones(0)) is None


# ---- answers to changes ----


def test_perturbation_of_a_decoder_that_passes_on():
    latents = normal(4000, 3, 2, 2) * torch.tensor([1.0, 10.0, 0.1])[:, None, None]
    latents = latents / torch.tensor([1.0, 10.0, 0.1])[:, None, None]
    disturbed = measure.perturb(latents, seed=0)
    assert measure.relative_change(disturbed, latents) == pytest.approx(0.1, rel=0.02)
    assert torch.equal(disturbed, measure.perturb(latents, seed=0))
    assert not torch.equal(disturbed, measure.perturb(latents, seed=1))
    assert measure.relative_change(latents, torch.zeros_like(latents)) is None
    still = torch.cat([latents, torch.ones(4000, 1, 2, 2)], dim=1)
    assert (measure.perturb(still, seed=0)[:, 3] == 1).all(), "a channel without spread is not disturbed"


def test_equivariance_error():
    a, b = normal(500, 2, 3, 3), normal(500, 2, 3, 3, seed=1)
    assert measure.equivariance_error(a, a) == 0
    assert measure.equivariance_error(a, b) == pytest.approx(1, rel=0.05)  # unrelated
    assert measure.equivariance_error(a, -a) == pytest.approx(math.sqrt(2), rel=0.05)
    assert measure.equivariance_error(torch.ones(4, 1), torch.ones(4, 1)) is None


def test_shift_and_midpoints():
    image = torch.arange(6.0).view(1, 1, 1, 6)
    assert measure.shift_images(image, 2).flatten().tolist() == [0, 0, 0, 1, 2, 3]
    latents = torch.arange(7.0)[:, None]
    middle, first, second = measure.midpoints(latents, seed=3)
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(7)) and (first != second).all()
    assert torch.equal(middle, (latents[first] + latents[second]) / 2)


def test_energy_coefficient():
    a = normal(30, 4)
    assert measure.energy_coefficient(a, a) == pytest.approx(0, abs=1e-12)
    assert measure.energy_coefficient(torch.zeros(3, 2), torch.ones(5, 2)) == pytest.approx(1)
    assert measure.energy_coefficient(torch.ones(3, 2), torch.ones(5, 2)) is None


# ---- readers ----


@pytest.mark.parametrize("features", [3, 40])
def test_ridge_leaves_one_out(features):
    x, y = normal(25, features), normal(25, 2, seed=1)
    fitted = measure.Ridge(x, y)
    z = (x - x.mean(0)) / x.std(0, correction=0)

    def left_out(penalty):
        errors = []
        for n in range(25):
            rest = torch.arange(25) != n
            a = torch.cat([torch.ones(24, 1), z[rest]], dim=1)
            penalties = 25 * penalty * torch.eye(features + 1, dtype=torch.float64)
            penalties[0, 0] = 0
            weight = torch.linalg.solve(a.T @ a + penalties, a.T @ y[rest])
            errors.append((y[n] - weight[0] - z[n] @ weight[1:]).square().mean())
        return torch.stack(errors).mean().item()

    assert fitted.residuals.square().mean().item() == pytest.approx(left_out(fitted.penalty), rel=1e-6)
    assert fitted.residuals.square().mean().item() == pytest.approx(min(map(left_out, measure.PENALTIES)), rel=1e-6)


def test_ridge_of_pca_leaves_the_tail():
    """The best linear map from the first k principal components makes an error of the other eigenvalues' sum."""
    x = normal(400, 6) * torch.tensor([3.0, 2.0, 1.0, 0.5, 0.3, 0.2])
    values, vectors = torch.linalg.eigh(torch.cov(x.T, correction=0))
    latents = torch.cat([(x - x.mean(0)) @ vectors[:, -2:], torch.ones(400, 1)], dim=1)  # and one that never changes
    made = measure.Ridge(latents, x)(latents)
    assert measure.mean_squared_error(made, x) * 6 == pytest.approx(values[:-2].sum().item(), rel=1e-6)
    assert torch.equal(measure.Ridge(torch.ones(400, 2), x)(latents[:5, :2]), x.mean(0).expand(5, -1))


def test_mlp_distance_is_below_the_linear_one_where_the_relation_bends():
    z = normal(1200, 2)
    x = torch.cat([z[:, :1].square(), z[:, 1:]], dim=1)  # the square is uncorrelated with z: a linear map makes its mean
    linear = measure.Ridge(z[:1000], x[:1000])
    straight = measure.mean_squared_error(linear(z[1000:]), x[1000:])
    bent = measure.mlp_distance(linear, z[:1000], z[1000:], x[1000:], seed=0)
    assert straight == pytest.approx(x[1000:, 0].var().item() / 2, rel=0.05)
    assert bent < straight / 5
    exact = measure.mlp_distance(measure.Ridge(z, z), z, z, z, seed=0)
    assert exact < 1e-6, "it starts as the linear map and keeps to it"


def test_mlp_distance_of_few_images_with_long_latents():
    """More latent values than images: what a hidden layer would learn by heart does not make it worse than linear maps."""
    z = normal(200, 300)
    x = z[:, :20] + 0.5 * normal(200, 20, seed=1)
    linear = measure.Ridge(z[:100], x[:100])
    straight = measure.mean_squared_error(linear(z[100:]), x[100:])
    assert measure.mlp_distance(linear, z[:100], z[100:], x[100:], seed=0) < 1.05 * straight


def test_sliced_distance():
    x = normal(100, 5)
    assert measure.sliced_distance(x, x, seed=0) == pytest.approx(0, abs=1e-12)
    moved = measure.sliced_distance(x, x + torch.tensor([2.0, 0, 0, 0, 0]), seed=0)
    assert moved == pytest.approx(2 / math.sqrt(5), rel=0.15)  # root of the mean of cos^2 over 128 directions


def test_probe_accuracy():
    labels = torch.tensor([3, 5, 9]).repeat(40)  # not 0, 1, 2
    apart = normal(120, 4) * 0.01 + torch.eye(4, dtype=torch.float64)[labels % 4]  # 5 and 9 share a place
    accuracy = measure.probe_accuracy(apart[:60], labels[:60], apart[60:], labels[60:])
    of_three = (labels == 3) | (torch.arange(120) < 60)
    assert measure.probe_accuracy(apart[:60], labels[:60], apart[60:][of_three[60:]], labels[60:][of_three[60:]]) == 1
    assert 1 / 3 <= accuracy < 0.95
    unknown = measure.probe_accuracy(apart[:60], labels[:60], apart[60:], torch.full((60,), 7))
    assert unknown == 0, "a class that was not seen is never named"


# ---- the whole card ----


def autoencoder(bottleneck="vq", seed=0, **rest):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = AutoencoderConfig(base_channels=12, latent_channels=3, bottleneck=bottleneck, **rest)
        config.vq.codebook_size = 6
        return Autoencoder(config, 1, 8)


@pytest.fixture(autouse=True)
def short(request, monkeypatch):
    """Trainings of a few steps where the card as a whole is tested: what they reach is tested above."""
    if "images" in request.fixturenames:
        monkeypatch.setattr(measure, "PRIOR_STEPS", 5)
        monkeypatch.setattr(measure, "MLP_STEPS", 10)


@pytest.fixture(scope="module")
def images():
    """Two classes, bright above and bright below, as (train, labels, held out, labels)."""
    labels = codes(90, size=2)
    x = normal(90, 1, 8, 8).float() * 0.3
    x[:, :, :4] += (labels * 2.0 - 1)[:, None, None, None] * 0.5
    x = x.clamp(-1, 1)
    return x[:60], labels[:60], x[60:], labels[60:]


OF_CODES = {"codebook_usage", "codebook_perplexity", "code_entropy", "ngram_bits"}


@pytest.mark.parametrize(("bottleneck", "without"), [("vq", {"gaussian_rate"}), ("kl", OF_CODES)])
def test_card(bottleneck, without, images):
    model = autoencoder(bottleneck).train()
    model.encoder.eval()
    modes = [module.training for module in model.modules()]
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    card = report_card(model, *images, seed=5)
    assert list(card) == list(PREDICTORS)
    assert {name for name, value in card.items() if value is None} == without
    assert all(math.isfinite(value) for value in card.values() if value is not None)
    assert 0.5 < card["linear_probe"] <= 1, "bright above or below: what a random encoder keeps tells"
    assert torch.equal(state, torch.get_rng_state())
    assert modes == [module.training for module in model.modules()]
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    torch.rand(1)  # another global state must not matter
    assert report_card(model.eval(), *images, seed=5) == card
    unlabelled = report_card(model, images[0], None, images[2], None, seed=6)
    assert unlabelled["linear_probe"] is None
    assert unlabelled["sensitivity"] != card["sensitivity"] and unlabelled["linear_distance"] == card["linear_distance"]


def test_values_on_the_card(images):
    """Those that can be had in another way."""
    model = autoencoder().eval()
    train, labels, heldout, heldout_labels = images
    card = report_card(model, *images, seed=0)
    with torch.no_grad():
        found = model(heldout)
    share = torch.bincount(found.encoding.indices.flatten(), minlength=6) / found.encoding.indices.numel()
    assert card["codebook_usage"] == pytest.approx((share > 0).float().mean().item())
    assert card["code_entropy"] == pytest.approx(torch.special.entr(share.double()).sum().item() / math.log(2), rel=1e-5)
    assert card["codebook_perplexity"] == pytest.approx(2 ** card["code_entropy"])
    error = (found.sample.clamp(-1, 1) - heldout).square().mean().item()
    assert card["reconstruction_error"] == pytest.approx(error, rel=1e-5)
    assert card["mlp_distance"] < 2 * card["linear_distance"]
    one_class = report_card(model, train, torch.zeros_like(labels), heldout, torch.zeros_like(heldout_labels), seed=0)
    assert one_class["linear_probe"] is None


def test_collapsed_latent(images):
    """One code for everything: a card with gaps, no error, as a comparison of many trials needs it."""
    model = autoencoder().eval()
    model.bottleneck.codebook[1:] = 1e6
    card = report_card(model, *images, seed=0)
    gaps = {"gaussian_rate", "spectrum_slope", "effective_dimension", "sensitivity", "shift_error", "flip_error"}
    assert {name for name, value in card.items() if value is None} == gaps | {"interpolation_distance"}
    assert card["code_entropy"] == 0 and card["codebook_perplexity"] == 1
    assert card["linear_distance"] == pytest.approx((images[2] - images[0].mean(0)).square().mean().item(), rel=1e-5)


def test_one_latent_position_cannot_shift(images):
    card = report_card(autoencoder("kl", channel_multipliers=[1, 1, 1, 1]), *images, seed=0)
    assert card["shift_error"] is None and card["flip_error"] is not None


def test_encodings_are_those_of_the_autoencoder(images):
    model = autoencoder("kl").eval()
    found = encode_images(model, images[0])
    with torch.no_grad():
        expected = model.encode(images[0])
    assert torch.equal(found.latents, expected.latents) and torch.equal(found.log_variance, expected.log_variance)
    assert found.indices is None


def test_every_predictor_says_what_it_means():
    for name, predictor in PREDICTORS.items():
        assert predictor.direction in ("lower", "higher", "either"), name
        assert len(predictor.meaning) > 20 and predictor.meaning.endswith(".") and predictor.title, name
    signs = {PREDICTORS[name].sign for name in ("linear_distance", "linear_probe", "code_entropy")}
    assert signs == {1, -1, 0}


# ---- which predictor to trust ----


def trial(arm, seed, distance, purpose="measure", rate=None, **card):
    return {
        "arm": arm, "seed": seed, "purpose": purpose, "rate": rate, "priors": [{"frechet": distance}], "card": card or None,
    }  # fmt: skip


def test_rank_predictors():
    trials = [
        trial(arm, seed, distance + seed / 10, prior_bits=distance**3, linear_probe=-distance, sensitivity=float(seed),
              codebook_usage=1.0, gaussian_rate=None, flip_error=distance if arm == "a" and seed == 0 else math.nan)
        for seed in (0, 1, 2) for arm, distance in (("a", 1.0), ("b", 2.0), ("c", 3.0))
    ]  # fmt: skip
    trials += [trial("a", 9, 0.0, "tune", prior_bits=1e9), trial("a", 3, 50.0), trial("a", 0, 0.0, rate=64.0, prior_bits=1e9)]
    found = rank_predictors(trials)
    assert set(found) == {"prior_bits", "linear_probe", "sensitivity", "codebook_usage"}
    assert list(found)[-1] == "codebook_usage" and math.isnan(found["codebook_usage"].rho)
    assert found["prior_bits"].n == 9
    # Ranks of x about their mean: -3, 0, 3, each three times; of y: -4 to 4. rho = 54 / sqrt(54 * 60).
    assert found["prior_bits"].rho == pytest.approx(math.sqrt(54 / 60), abs=1e-9)
    assert found["linear_probe"].rho == pytest.approx(-found["prior_bits"].rho)
    assert found["prior_bits"].low > 0.9 and abs(found["sensitivity"].rho) < 0.5
    assert rank_predictors(trials[:2]) == {}


# ---- bad input ----


def test_refusals(images):
    model = autoencoder().eval()
    train, labels, heldout, heldout_labels = images

    def card(*arguments):
        return report_card(model, *arguments, seed=0)

    with pytest.raises(ValueError, match="heldout_images: expected at least 10 images, got 9"):
        card(train, labels, heldout[:9], heldout_labels[:9])
    with pytest.raises(ValueError, match=r"expected the autoencoder's images \(1, 8, 8\), got \(1, 16, 16\)"):
        card(*(x.repeat(1, 1, 2, 2) if x.ndim == 4 else x for x in images))
    with pytest.raises(ValueError, match="images of one size"):
        card(train, labels, heldout.repeat(1, 1, 2, 2), heldout_labels)
    with pytest.raises(TypeError, match="floating point"):
        card((train * 100).byte(), labels, heldout, heldout_labels)
    broken = train.clone()
    broken[3, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="train_images: expected finite pixels"):
        card(broken, labels, heldout, heldout_labels)
    with pytest.raises(ValueError, match="heldout_labels are missing"):
        card(train, labels, heldout, None)
    with pytest.raises(ValueError, match=r"one label an image, \[60\], got \[59\]"):
        card(train, labels[:59], heldout, heldout_labels)
    with pytest.raises(TypeError, match="train_labels: expected integers"):
        card(train, labels.float(), heldout, heldout_labels)


@pytest.mark.parametrize("bottleneck", ["vq", "kl"])
@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_diverged_weights(bottleneck, part, images):
    model = autoencoder(bottleneck).eval()
    getattr(model, part).conv_out.weight.data[0] = torch.nan
    with pytest.raises(FloatingPointError, match=f"the {part} gives NaN or infinity"):
        report_card(model, *images, seed=0)
