"""Flow matching: its value where the best velocity is known, that this is the minimum, and what its draws depend on."""

import math

import pytest
import torch
from torch import nn

import dae.distributed
import dae.losses.flow_matching
from dae.losses.flow_matching import flow_matching_loss


class GaussianVelocity(nn.Module):
    """E[noise - x | x_t] for x ~ N(0, s^2), plus `offset`: (t - (1 - t) s^2) / (t^2 + (1 - t)^2 s^2) x_t."""

    def __init__(self, s, offset=0.0):
        super().__init__()
        self.s, self.offset = s, nn.Parameter(torch.tensor(offset, dtype=torch.float64))

    def forward(self, x, t, labels):
        t = t[:, None, None, None]
        return (t - (1 - t) * self.s**2) / (t**2 + (1 - t) ** 2 * self.s**2) * x + self.offset


class Recorder(nn.Module):
    def forward(self, x, t, labels):
        self.seen = (x, t, labels)
        return torch.zeros_like(x)


def latents(n, s=1.0, seed=0, shape=(2, 2, 2)):
    return s * torch.randn(n, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("s", [0.5, 1.0, 3.0])
def test_the_best_velocity_has_the_loss_of_the_closed_form(s):
    """Var[noise - x | x_t] = s^2 / (t^2 + (1 - t)^2 s^2), whose integral over t is s pi / 2.

    For every s: t^2 + (1 - t)^2 s^2 has the discriminant -4 s^2, and the angles atan(1 / s) and atan(s) add up to pi / 2.
    """
    x = latents(40000, s)
    labels = torch.zeros(len(x), dtype=torch.int64)
    loss = flow_matching_loss(GaussianVelocity(s), x, labels, generator=generator(1)).item()
    error = math.sqrt(2 / x.numel()) * (1 + s**2)  # mean of squared Gaussians; that is the greatest variance, at any t
    assert abs(loss - s * math.pi / 2) < 4 * error


def test_it_is_the_minimum():
    """Adding a constant adds its square; the gradient at the best velocity is zero within its noise."""
    x, labels = latents(20000), torch.zeros(20000, dtype=torch.int64)
    best = GaussianVelocity(1.0)
    floor = flow_matching_loss(best, x, labels, generator=generator(1))
    floor.backward()
    assert abs(best.offset.grad.item()) < 4 * 2 * math.sqrt(math.pi / 2 / x.numel())
    for offset in (-0.5, 0.5):
        other = flow_matching_loss(GaussianVelocity(1.0, offset), x, labels, generator=generator(1))
        torch.testing.assert_close(other - floor, torch.tensor(0.25 + offset * best.offset.grad.item()).double())


@pytest.mark.parametrize("spread", [0.0, 0.3, 1.0, 2.0])
def test_posteriors_add_no_noise_of_their_own(spread):
    """For means ~ N(0, m^2) and posteriors N(mean, v) the best velocity is that of N(0, m^2 + v), as for latents drawn from
    them, and only what the means leave open remains: E Var[noise - x | x_t] - E Var[noise - x | x_t, mean] = (s - sqrt v) pi / 2.
    """
    means, variance = latents(40000, spread), 0.64
    s, labels = math.sqrt(spread**2 + variance), torch.zeros(len(means), dtype=torch.int64)
    given = {"variance_BDhw": torch.full_like(means, variance), "generator": generator(1)}
    best = GaussianVelocity(s)
    loss = flow_matching_loss(best, means, labels, **given)
    t = torch.linspace(0, 1, 1001, dtype=torch.float64)
    open_, known = (v / (t**2 + (1 - t) ** 2 * v) for v in (s**2, variance))
    most = (open_ - known).max().item()  # of the variance of a residual, at any t; 0 without spread, but for rounding
    assert abs(loss.item() - (s - math.sqrt(variance)) * math.pi / 2) < 4 * math.sqrt(2 / means.numel()) * most + 1e-12
    loss.backward()
    assert abs(best.offset.grad.item()) < 4 * 2 * math.sqrt(most / means.numel()) + 1e-12


def test_a_variance_of_zero_is_a_latent_that_is_known():
    x, labels = latents(64), torch.zeros(64, dtype=torch.int64)
    model = GaussianVelocity(1.0)
    known = flow_matching_loss(model, x, labels, generator=generator(3))
    for variance in (0.0, 1e-30):
        given = {"variance_BDhw": torch.full_like(x, variance), "generator": generator(3)}
        loss = flow_matching_loss(model, x, labels, **given)
        torch.testing.assert_close(loss, known, rtol=1e-12, atol=0)  # float64: sqrt(t^2) / t is 1 but for its last bits


def test_a_known_latent_at_time_zero_is_finite(monkeypatch):
    """There the noise is not seen at all: E[noise - x | x] = -x."""
    monkeypatch.setattr(dae.losses.flow_matching, "even_times", lambda shape, dtype, **_: torch.zeros(shape, dtype=dtype))
    x, labels = latents(8), torch.zeros(8, dtype=torch.int64)
    loss = flow_matching_loss(Recorder(), x, labels, variance_BDhw=torch.zeros_like(x), generator=generator(0))
    assert torch.equal(loss, x.square().mean())


def test_paths_are_straight_and_times_even():
    x, labels = latents(64), torch.arange(64)
    model = Recorder()
    loss = flow_matching_loss(model, x, labels, generator=generator(3))
    x_t, t, seen = model.seen
    assert torch.equal(seen, labels) and t.dtype == x_t.dtype == torch.float64
    assert ((t >= 0) & (t < 1)).all()
    torch.testing.assert_close(t.sort().values.diff(), torch.full((63,), 1 / 64).double(), rtol=1e-10, atol=0)
    noise = (x_t - (1 - t[:, None, None, None]) * x) / t[:, None, None, None]
    torch.testing.assert_close(loss, (noise - x).square().mean(), rtol=1e-8, atol=0)


def test_each_time_is_uniform():
    """Of any single row, over many batches: 1000 draws of the first and last rows' times against U[0, 1] by their quarters."""
    model, x, labels = Recorder(), latents(3, shape=(1, 1, 1)), torch.zeros(3, dtype=torch.int64)
    stream, times = generator(0), []
    for _ in range(1000):
        flow_matching_loss(model, x, labels, generator=stream)
        times.append(model.seen[1][[0, 2]])
    counts = torch.stack(times).mul(4).long()
    for row in counts.T:
        assert (row.bincount(minlength=4) - 250).abs().max() < 4.5 * math.sqrt(1000 * 0.25 * 0.75)


def test_processes_share_the_draws_of_one(monkeypatch):
    x, labels = latents(12), torch.arange(12)
    whole = Recorder()
    torch.manual_seed(0)
    flow_matching_loss(whole, x, labels)
    monkeypatch.setattr(dae.distributed, "world_size", lambda: 3)
    for rank in range(3):
        monkeypatch.setattr(dae.distributed, "rank", lambda rank=rank: rank)
        part = Recorder()
        torch.manual_seed(0)
        flow_matching_loss(part, x[rank::3], labels[rank::3])
        for a, b in zip(part.seen, whole.seen, strict=True):
            assert torch.equal(a, b[rank::3])


def test_the_generator_decides():
    x, labels, model = latents(5), torch.zeros(5, dtype=torch.int64), GaussianVelocity(1.0)
    state = torch.get_rng_state()
    one = flow_matching_loss(model, x, labels, generator=generator(3))
    assert torch.equal(one, flow_matching_loss(model, x, labels, generator=generator(3)))
    assert not torch.equal(one, flow_matching_loss(model, x, labels, generator=generator(4)))
    assert torch.equal(torch.get_rng_state(), state)


def test_the_error_is_of_float32_where_the_velocity_is_not():
    class Coarse(Recorder):
        def forward(self, x, t, labels):
            return super().forward(x, t, labels).bfloat16()

    x, labels = latents(6).float(), torch.zeros(6, dtype=torch.int64)
    coarse = flow_matching_loss(Coarse(), x, labels, generator=generator(0))
    assert coarse.dtype == torch.float32
    assert torch.equal(coarse, flow_matching_loss(Recorder(), x, labels, generator=generator(0)))


@pytest.mark.parametrize(
    "x, labels, error, message",
    [
        (torch.zeros(2, 1, 1, 1, dtype=torch.int64), [0, 0], TypeError, "floating point tensor latents, got torch.int64"),
        (torch.zeros(2, 1, 1), [0, 0], ValueError, r"got latents \[2, 1, 1\]"),
        (torch.zeros(2, 1, 1, 1), [0, 0, 0], ValueError, r"labels \[3\]"),
        (torch.zeros(0, 1, 1, 1), [], ValueError, "B >= 1"),
    ],
)
def test_refusals(x, labels, error, message):
    with pytest.raises(error, match=message):
        flow_matching_loss(Recorder(), x, torch.tensor(labels, dtype=torch.int64))


def test_a_variance_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"variance for each of \[2, 1, 1, 1\] latents, got \[2, 1\]"):
        flow_matching_loss(Recorder(), torch.zeros(2, 1, 1, 1), torch.zeros(2, dtype=torch.int64), variance_BDhw=torch.ones(2, 1))
