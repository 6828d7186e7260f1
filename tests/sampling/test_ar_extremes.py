"""Filters and draws at the ends of their ranges: the token that the formula gives, or one line."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from dae.sampling import filter_logits, sample_tokens

LABELS = torch.tensor([0, 1])


class Table(nn.Module):
    """A prior whose logits are given: of a class [C, K], at every position."""

    null_class, sequence_length, factors = 1, 3, (2,)

    def __init__(self, logits_CK):
        super().__init__()
        self.logits_CK = logits_CK

    def check_labels(self, labels):
        pass

    def check_guidance(self, cfg_scale):
        pass

    def make_cache(self, size):
        return None

    def forward(self, labels, tokens, cache):
        return self.logits_CK[labels][:, None]


def drawn(logits, **options):
    prior = Table(torch.as_tensor(logits).expand(2, -1))
    return sample_tokens(prior, LABELS, generator=torch.Generator().manual_seed(0), **options)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("temperature", [0, 1e-320, 1e-46, 1e-40, 1e-5, np.float32(1e-40), torch.tensor(1e-30)])
def test_cold_draws_are_the_likeliest(dtype, temperature):
    logits = torch.tensor([1.0, -math.inf, 3.0, 2.75, -30000.0], dtype=dtype)
    for options in ({}, {"top_k": 2}, {"top_p": 0.9}, {"top_p": 1e-320}, {"cfg_scale": 0}):
        if options.get("cfg_scale") == 0:  # two infinities have no difference
            logits = logits.clamp(min=-40000.0)
        assert (drawn(logits, temperature=temperature, **options) == 2).all()


@pytest.mark.parametrize("temperature", [1e30, 1e38, 1e40, 1e308, math.inf])
def test_hot_draws_are_uniform_over_what_is_allowed(temperature):
    logits = torch.tensor([5.0, -math.inf, -5.0, 60.0])
    prior = Table(logits.expand(2, -1))
    prior.sequence_length = 3000
    counts = sample_tokens(prior, LABELS, temperature=temperature).flatten().bincount(minlength=4)
    assert counts[1] == 0 and (counts[[0, 2, 3]] - 2000).abs().max() < 6 * (6000 * 2 / 9) ** 0.5


def test_ties_at_a_temperature_near_0_are_drawn():
    assert set(drawn([1.0, 2.0, 2.0, 0.0], temperature=1e-40, top_k=99).flatten().tolist()) == {1, 2}


@pytest.mark.parametrize("logits", [[math.nan, 1.0], [math.inf, 1.0], [-math.inf, -math.inf], [3e38, -3e38]])
@pytest.mark.parametrize("temperature", [0, 1.0])
def test_logits_without_probabilities_are_refused(logits, temperature):
    with pytest.raises(ValueError, match=r"^sample_tokens needs finite logits, got NaN or infinity.*$"):
        table = Table(torch.tensor([logits, [-3e38, 3e38]]))
        sample_tokens(table, LABELS, temperature=temperature, cfg_scale=3.0 if logits[0] == 3e38 else 1.0)


WRONG = {
    "temperature": [-1, -1e-300, math.nan, -math.inf, True, "1", None, [1.0]],
    "cfg_scale": [-1, math.nan, math.inf, True, "1", None],
    "top_k": [0, -1, 1.0, True, "1", math.nan, 10**400],
    "top_p": [0, -0.1, 1 + 1e-9, math.nan, True, "1", [0.5]],
    "generator": [0, "cpu"],
}


@pytest.mark.parametrize("option", WRONG)
def test_options_out_of_range_are_one_line(option):
    for wrong in WRONG[option]:
        with pytest.raises((TypeError, ValueError), match=rf"^[^\n]*{option}[^\n]* got [^\n]*$"):
            sample_tokens(Table(torch.zeros(2, 3)), LABELS, **{option: wrong})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_filters_in_every_dtype(dtype):
    def kept(logits, **options):
        return (filter_logits(torch.tensor(logits, dtype=dtype), **options) > -math.inf).nonzero().flatten().tolist()

    many = torch.zeros(4096, dtype=dtype)  # bfloat16 cannot add 1/4096 to 1/2
    assert int((filter_logits(many, top_p=0.75) > -math.inf).sum()) == 3072
    assert kept([0.0, math.inf, 1.0], top_p=0.9) == [1] and kept([0.0, math.inf, math.inf], top_p=0.9) == [1, 2]
    assert kept([0.0, -math.inf, 1.0], top_p=0.9999) == [0, 2] and kept([-math.inf] * 3, top_p=0.5) == []
    assert kept([0.0, 2.0, 1.0], top_p=1e-320) == [1] and kept([0.0, 2.0, 1.0], top_k=1) == [1]
    row = filter_logits(torch.tensor([1.0, math.nan, 0.0], dtype=dtype), top_k=2, top_p=0.5)
    assert row.isnan().any()


@pytest.mark.parametrize("logits", [[1.0], np.ones(3), None, torch.ones(3, dtype=torch.long), torch.ones(()), torch.ones(2, 0)])
def test_what_are_no_logits(logits):
    with pytest.raises((TypeError, ValueError), match=r"^filter_logits needs .*logits.* got .*$"):
        filter_logits(logits, top_k=1)
