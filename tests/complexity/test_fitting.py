"""What trainings, choices and measurements are made on, and the sampling error that is said."""

import importlib
import math
import statistics

import numpy
import pytest
import torch

from dae.complexity.curves import complexity_curve
from dae.complexity.distances import Distance, make_distance
from dae.complexity.estimate import Estimate
from dae.complexity.families import ConvDecoders, DropoutNetworks, LinearMaps, MLPs
from dae.complexity.fitting import Fitting, Rows, jackknife, split_rows
from dae.complexity.generator_distance import Trial, fit_generator, fit_trial, generator_distance

TAIL = torch.tensor([9.0, 5.0, 3.0, 2.0, 1.0, 0.6, 0.3, 0.1])


def normal(N, D, seed):
    return torch.randn(N, D, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("k", [2, 4, 6])
def test_a_small_tail_is_found_without_bias(k):
    """Latent N(0, diag(l_1..l_k)), |W| <= 1: the truth is the tail sum. The mean of 12 samples, to 5 %."""
    truth, errors, values = TAIL[k:].sum().item(), [], []
    for sample in range(12):
        z, x = normal(1000, k, 2 * sample) * TAIL[:k].sqrt(), normal(1000, 8, 2 * sample + 1) * TAIL.sqrt()
        found = generator_distance(z, x, LinearMaps(1.0), "frechet", seeds=(0,))
        values.append(found.value)
        errors.append(found.standard_error)
    assert statistics.fmean(values) == pytest.approx(truth, rel=0.05)
    # Deviations of 12 spread by a fifth, and so do those of 10 groups
    assert 0.5 < statistics.fmean(errors) / statistics.stdev(values) < 2


def test_the_jackknife_removes_the_bias_of_a_variance():
    """sum (x - mean)^2 / n is too small by 1/n; the jackknife of groups of one row removes it, to rounding."""
    x = normal(10, 1, 0).double()
    plain, corrected, error = jackknife(lambda rows: rows.data.var(correction=0).item(), Rows(x, x), 0)
    assert plain == pytest.approx(x.var(correction=0).item()) and corrected == pytest.approx(x.var().item())
    _, mean, error = jackknife(lambda rows: rows.data.mean().item(), Rows(x + 5, x + 5), 0)
    assert mean == pytest.approx(x.mean().item() + 5) and error == pytest.approx(x.std().item() / math.sqrt(10))


def test_the_standard_error_of_paired_errors_is_that_of_a_mean():
    z, x = normal(4000, 1, 0), normal(4000, 1, 1)
    found = generator_distance(z, x, LinearMaps(), "reconstruction")
    # Squares of a normal value have the variance 2; 2000 are measured. An error of 10 groups spreads by a quarter.
    assert found.standard_error == pytest.approx(math.sqrt(2 / 2000), rel=0.5)
    assert generator_distance(z[:100], x[:100], LinearMaps(), "energy", steps=1).standard_error is None
    assert generator_distance(z, x, LinearMaps(), "reconstruction", heldout=0).standard_error is None


def test_the_empirical_laws_are_meant_where_nothing_is_held_out():
    z, x = normal(200, 2, 0), normal(200, 2, 1)
    for distance in ("frechet", "energy"):
        assert "empirical laws" in generator_distance(z, x, LinearMaps(), distance, heldout=0, steps=1).convention
        assert "empirical laws" not in generator_distance(z, x, LinearMaps(), distance, steps=1).convention
    limited = generator_distance(z, x, LinearMaps(), "reconstruction", heldout=0, measure_limit=50)
    assert limited.counts == (200, 50) and limited.bound == "upper"  # the best for 200 rows is not for 50


def test_rows_to_choose_on_are_limited():
    rows = torch.arange(1000.0)[:, None]
    split = split_rows(rows, rows, 0, False, Fitting(), 30)
    assert (len(split.fit.data), len(split.choose.data), len(split.measure.data)) == (470, 30, 30)


@pytest.mark.parametrize("distance", ["sinkhorn", "mmd", "energy", "sliced_wasserstein"])
def test_training_by_each_distance_tears_a_gaussian_in_two(distance):
    """Two modes at +-3: a linear map puts half of a Gaussian between them, P(|3 z| < 2); an MLP can leave the gap empty."""
    sign = torch.tensor([-3.0, 3.0]).repeat(300)[:, None]
    z, x = normal(600, 1, 0), sign + 0.2 * normal(600, 1, 1)
    generator = fit_generator(z, x, MLPs(32, 2), distance, steps=150, batch_size=128)
    with torch.no_grad():
        made = generator(normal(2000, 1, 2)).flatten()
    assert (made.abs() < 2).float().mean() < 0.25  # half of what a linear map leaves
    assert 0.35 < (made > 0).float().mean() < 0.65


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda z, x: fit_generator(z, x, MLPs(4), "energy", stepz=3), TypeError, "unknown option 'stepz': did you mean 'steps'"),
        (
            lambda z, x: complexity_curve(z, x, MLPs(4), [1], "energy", rate=3),
            TypeError,
            "unknown option 'rate': known are steps,",
        ),
        (lambda z, x: complexity_curve(z, x, "linear", [1], "energy"), TypeError, "family as a GeneratorFamily"),
        (lambda z, x: make_distance("sinkhorn", x, blur=0), ValueError, "blur > 0, got 0"),
        (lambda z, x: make_distance("mmd", x, bandwidths=(1.0, -1.0)), ValueError, "a bandwidth > 0, got -1"),
        (lambda z, x: make_distance("mmd", x, bandwidths=()), ValueError, "at least one bandwidth"),
        (lambda z, x: make_distance("mmd", x.tolist()), TypeError, "data: expected a floating torch.Tensor .* got list"),
        (lambda z, x: make_distance("mmd", x.long()), TypeError, "got torch.int64"),
        (lambda z, x: make_distance("sliced_wasserstein", x, num_projections=0), ValueError, "num_projections >= 1"),
        (lambda z, x: DropoutNetworks().at(1.5), ValueError, r"share of units kept in \(0, 1\], got 1.5"),
        (lambda z, x: ConvDecoders().build((3, 0, 0), (3, 4, 4)), ValueError, "at least one value along every axis"),
        (
            lambda z, x: generator_distance(z, 1e20 * x, LinearMaps(), "reconstruction"),
            ValueError,
            "data: .* overflow torch.float32",
        ),
    ],
)
def test_what_is_refused_says_what_is_expected(call, error, message):
    with pytest.raises(error, match=message):
        call(normal(40, 2, 0), normal(40, 2, 1))


@pytest.mark.parametrize("scale", [1e-25, 1e17])
def test_small_and_large_units_are_no_matter(scale):
    z, x = normal(100, 1, 0), normal(100, 2, 1)
    plain, scaled = (generator_distance(z, x, LinearMaps(), "reconstruction").value for x in (x.double(), scale * x.double()))
    assert scaled == pytest.approx(scale**2 * plain, rel=1e-9)
    module = fit_generator(z, scale * x, MLPs(8, 1), "sliced_wasserstein", steps=20)
    with torch.no_grad():  # 20 steps from about 0: the size of the data at most some times over
        assert 0.01 * scale < module(z).std() < 10 * scale


class Recorder:
    """A mean squared error that remembers which rows it was given."""

    def __init__(self):
        self.seen = []

    def __call__(self, made, data, _):
        self.seen.append(frozenset(data.flatten().tolist()))
        return (made - data).square().mean()

    @property
    def distance(self):
        return Distance("mine", self, "", paired=True)


def test_states_of_a_training_are_chosen_on_rows_that_are_not_measured_on():
    """What is measured is measured once, at the end, by the rows to measure on alone."""
    x = torch.arange(100.0)[:, None]
    recorder = Recorder()
    generator_distance(x, x, MLPs(4, 1), recorder.distance, seeds=(0,), steps=20, batch_size=8)
    split = split_rows(x, x, 0, True, Fitting())
    measured, choosing = (frozenset(part.data.flatten().tolist()) for part in (split.measure, split.choose))
    touching = [index for index, seen in enumerate(recorder.seen) if seen & measured]
    during = recorder.seen[: touching[0]]
    assert len(during) >= 20 + 11 and during.count(choosing) >= 11  # 20 steps, 10 checks and the start
    assert all(not seen & measured for seen in during)


def test_a_curve_keeps_the_better_trial_by_the_rows_to_choose_on():
    """A width that is trained at a rate that ruins it is no better than the smaller one, whose trial is kept."""
    trials = [
        [Trial(None, value, score, False, "", (1, 1)) for value, score in row]
        for row in ([(1.0, 1.0), (5.0, 0.5)], [(0.5, 2.0), (1.0, 0.7)], [(3.0, 0.9), (9.0, 0.4)])
    ]
    from dae.complexity.curves import best_so_far

    values = [[trial.value for trial in row] for row in best_so_far(trials)]
    assert values == [[1.0, 5.0], [1.0, 5.0], [3.0, 9.0]]  # by the score, not by the value


def test_the_score_of_a_trial_is_that_of_the_rows_to_choose_on():
    z, x = normal(100, 1, 0), normal(100, 1, 1)
    trial = fit_trial(z, x, LinearMaps(0.5), "reconstruction", 0, Fitting())
    split = split_rows(z, x, 0, True, Fitting())
    with torch.no_grad():
        by_hand = [(trial.generator(part.latents) - part.data).square().mean().item() for part in (split.choose, split.measure)]
    assert [trial.score, trial.value] == pytest.approx(by_hand, rel=1e-5) and trial.score != trial.value


def test_adversarial_distances_are_measured_on_held_out_rows(monkeypatch):
    z, x = torch.arange(200.0)[:, None], torch.arange(1000.0, 1200.0)[:, None]
    given = {}

    def train(family, latents, data, *_, **__):
        given["fitted"] = len(data)
        return torch.nn.Identity()

    def measured(data, generated, name, *, seeds):
        given["measured"] = data.flatten().tolist()
        return ADVERSARIAL

    module = importlib.import_module("dae.complexity.generator_distance")  # as an attribute of its package it is the function
    monkeypatch.setattr(module, "train_adversarial", train)
    monkeypatch.setattr(module, "adversarial_distance", measured)
    found = generator_distance(z, x, LinearMaps(), "js", seeds=(0,), heldout=0.4)
    split = split_rows(z, x, 0, False, Fitting(heldout=0.4))
    assert given["measured"] == split.measure.data.flatten().tolist() and given["fitted"] == 120
    assert not set(given["measured"]) & {*split.fit.data.flatten().tolist(), *split.choose.data.flatten().tolist()}
    assert found.counts == (120, 80) and found.standard_error == 0.25 and "flat" in found.convention


ADVERSARIAL = Estimate.over(
    [0.5], (0,), bound="lower", distance="js", convention="", family=None, capacity=None, counts=(1, 1), standard_error=0.25
)


def test_whole_numbers_of_numpy_are_seeds_and_capacities():
    z, x = normal(40, 2, 0), normal(40, 2, 1)
    options = {"distance": "reconstruction", "steps": 2}
    assert generator_distance(z, x, MLPs(4), seeds=numpy.arange(2), **options) == generator_distance(
        z, x, MLPs(4), seeds=(0, 1), **options
    )
    curve = complexity_curve(z, x, MLPs(), numpy.array([2, 4]), seeds=(0,), **options)
    assert curve.capacities == (2.0, 4.0) and type(curve.capacities[0]) is float
