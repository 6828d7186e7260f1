"""Sampling from the prior: filters, guidance, reproducibility, and frequencies of a model whose probabilities are known."""

import itertools

import pytest
import torch
from tiny_training import Reads, Rerun

from dae.config import PriorConfig
from dae.models import ARPrior
from dae.sampling import balanced_labels, filter_logits, sample_tokens

K, T, C = 3, 2, 2


def make(vocab=K, length=T, **changes) -> ARPrior:
    torch.manual_seed(0)
    config = PriorConfig(**{"width": 8, "depth": 1, "num_heads": 1} | changes)
    prior = ARPrior(config, vocab_size=vocab, sequence_length=length, num_classes=C).eval()
    for p in prior.parameters():
        torch.nn.init.normal_(p, std=0.7)
    return prior


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def kept(logits, **options):
    return (filter_logits(logits, **options) > -torch.inf).tolist()


PROBABILITIES = torch.tensor([[0.1, 0.5, 0.15, 0.25]]).log()


@pytest.mark.parametrize(
    "options, expected",
    [
        ({}, [True, True, True, True]),
        ({"top_k": 1}, [False, True, False, False]),
        ({"top_k": 2}, [False, True, False, True]),
        ({"top_k": 9}, [True, True, True, True]),
        ({"top_p": 1e-6}, [False, True, False, False]),  # the likeliest always stays
        ({"top_p": 0.45}, [False, True, False, False]),
        ({"top_p": 0.55}, [False, True, False, True]),
        ({"top_p": 0.74}, [False, True, False, True]),
        ({"top_p": 0.8}, [False, True, True, True]),
        ({"top_p": 1.0}, [True, True, True, True]),
        ({"top_k": 2, "top_p": 0.6}, [False, True, False, False]),  # of the two kept, 2/3 and 1/3: one reaches 0.6
        ({"top_k": 2, "top_p": 0.7}, [False, True, False, True]),
    ],
)
def test_filters(options, expected):
    assert kept(PROBABILITIES, **options) == [expected]
    filtered = filter_logits(PROBABILITIES, **options)
    assert torch.equal(filtered[filtered > -torch.inf], PROBABILITIES[filtered > -torch.inf])


def test_ties():
    tied = torch.tensor([[1.0, 2.0, 1.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    assert kept(tied, top_k=2) == [[True, True, True, False], [True] * 4]  # the border's ties all stay
    assert kept(tied[1:], top_p=0.5) == [[True, True, False, False]]  # the fewest that reach it
    assert kept(tied[1:], top_p=0.51) == [[True, True, True, False]]


def test_top_p_of_one_keeps_a_long_tail():
    """Rounded sums of probabilities reach 1 before the tail does."""
    logits = 4 * torch.randn(8, 5000, generator=generator())
    assert torch.equal(filter_logits(logits, top_p=1.0), logits)


def test_filters_are_of_each_row():
    logits = torch.randn(20, 11, generator=generator())
    whole = filter_logits(logits, 5, 0.7)
    rows = torch.cat([filter_logits(row, 5, 0.7) for row in logits.split(1)])
    assert torch.equal(whole, rows) and (whole > -torch.inf).any(1).all()


@pytest.mark.parametrize("options", [{"top_k": 0}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.1}, {"top_p": float("nan")}])
def test_filters_out_of_range(options):
    name = next(iter(options))
    with pytest.raises(ValueError, match=name):
        filter_logits(PROBABILITIES, **options)
    for temperature in (1.0, 0.0):
        with pytest.raises(ValueError, match=name):
            sample_tokens(make(), torch.tensor([0]), temperature=temperature, **options)


@pytest.mark.parametrize(
    "labels, options, message",
    [
        ([0], {"temperature": -1.0}, "must not be negative"),
        ([0], {"cfg_scale": -0.1}, "must not be negative"),
        ([C + 1], {}, r"labels must lie in 0\.\.1 \(2: no class\), got \[3\]"),
        ([-1, 0], {}, "labels must lie"),
    ],
)
def test_requests_that_are_refused(labels, options, message):
    with pytest.raises(ValueError, match=message):
        sample_tokens(make(), torch.tensor(labels), **options)


def sequences(prior, label, transform=lambda conditional, null: conditional):
    """Probability [K, K] of every sequence of two tokens, from the full forward."""
    labels, null = torch.full((K,), label), torch.full((K,), C)
    with torch.no_grad():
        logits = transform(prior(labels, torch.arange(K)[:, None]), prior(null, torch.arange(K)[:, None]))
    first, second = logits[0, 0].double().softmax(-1), logits[:, 1].double().softmax(-1)
    return first[:, None] * second


def agree(tokens, expected):
    counts = (tokens[:, 0] * K + tokens[:, 1]).bincount(minlength=K * K).view(K, K)
    n = len(tokens)
    tolerance = 4.5 * (expected * (1 - expected) / n).sqrt() + 1e-6
    return bool(((counts / n - expected).abs() < tolerance).all())


N = 6000
CASES = {
    "plain": ({}, lambda c, n: c),
    "no class": ({"cfg_scale": 0.0}, lambda c, n: n),
    "guided": ({"cfg_scale": 2.5}, lambda c, n: n + 2.5 * (c - n)),
    "weakly guided": ({"cfg_scale": 0.5}, lambda c, n: n + 0.5 * (c - n)),
    "cold": ({"temperature": 0.5}, lambda c, n: c / 0.5),
    "top_k": ({"top_k": 2}, lambda c, n: filter_logits(c, top_k=2)),
    "all": (
        {"cfg_scale": 2.0, "temperature": 0.7, "top_p": 0.8},
        lambda c, n: filter_logits((n + 2.0 * (c - n)) / 0.7, top_p=0.8),
    ),
}


@pytest.mark.parametrize("label", [0, 1, C])
@pytest.mark.parametrize("case", CASES)
def test_frequencies_of_a_known_model(case, label):
    options, transform = CASES[case]
    prior = make()
    tokens = sample_tokens(prior, torch.full((N,), label), generator=generator(), **options)
    assert tokens.shape == (N, T) and tokens.dtype == torch.int64
    assert agree(tokens, sequences(prior, label, transform))
    if case == "guided" and label != C:
        assert not agree(tokens, sequences(prior, label)), "the test can tell guidance from none"


def test_temperature_zero_takes_the_likeliest():
    prior = make(vocab=7, length=5, depth=2)
    labels = torch.tensor([0, 1, C])
    tokens = sample_tokens(prior, labels, temperature=0.0)
    assert torch.equal(tokens, prior(labels, tokens[:, :-1]).argmax(-1))
    assert torch.equal(tokens, sample_tokens(prior, labels, temperature=0.0, generator=generator(8)))
    guided = sample_tokens(prior, labels, temperature=0.0, cfg_scale=3.0)
    conditional, null = prior(labels, guided[:, :-1]), prior(torch.full((3,), C), guided[:, :-1])
    assert torch.equal(guided, (null + 3 * (conditional - null)).argmax(-1))
    assert torch.equal(sample_tokens(prior, labels, top_k=1), tokens)


def test_the_generator_decides():
    prior, labels = make(vocab=16, length=8), balanced_labels(6, C)
    torch.manual_seed(1)
    one = sample_tokens(prior, labels, generator=generator(3))
    torch.manual_seed(2)
    state = torch.get_rng_state()
    assert torch.equal(sample_tokens(prior, labels, generator=generator(3)), one)
    assert torch.equal(torch.get_rng_state(), state)  # the global generator is not touched
    assert not torch.equal(sample_tokens(prior, labels, generator=generator(4)), one)


def test_the_cache_changes_no_sample():
    """Against the whole prefix anew for each token, from an equal generator; guided, as both halves then use the cache."""
    prior, labels = make(vocab=16, length=8, depth=2).double(), balanced_labels(6, C)
    null, drawn, tokens = torch.full_like(labels, C), generator(5), torch.empty(6, 0, dtype=torch.int64)
    with torch.no_grad():
        for _ in range(8):
            conditional, free = prior(labels, tokens)[:, -1].float(), prior(null, tokens)[:, -1].float()
            probabilities = (free + 1.5 * (conditional - free)).softmax(-1)
            tokens = torch.cat([tokens, torch.multinomial(probabilities, 1, generator=drawn)], dim=1)
    assert torch.equal(sample_tokens(prior, labels, cfg_scale=1.5, generator=generator(5)), tokens)


def test_no_labels_no_tokens():
    assert sample_tokens(make(), torch.empty(0, dtype=torch.int64)).shape == (0, T)


def test_balanced_labels():
    assert balanced_labels(7, 3).tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert balanced_labels(3, 1).tolist() == [0, 0, 0] and balanced_labels(0, 5).numel() == 0


def test_probabilities_sum_to_one():
    """The model of two tokens is a distribution over its K^2 sequences: what the frequencies are compared with."""
    prior = make()
    for label, (_, transform) in itertools.product((0, 1, C), CASES.values()):
        assert abs(sequences(prior, label, transform).sum().item() - 1) < 1e-6


class Watched(Rerun):
    """And no value of a tensor is read by the work."""

    def record(self, work):
        def watched():
            with Reads() as reads:
                result = work()
            assert reads.lines == []
            return result

        return super().record(watched)


@pytest.mark.parametrize("length", [1, 2, 9])
@pytest.mark.parametrize("options", [{}, {"cfg_scale": 2.0, "top_k": 4}, {"top_p": 0.8, "temperature": 0.7}, {"temperature": 0}])
def test_a_graph_a_token(monkeypatch, length, options):
    prior, labels = make(vocab=7, length=length, width=16, depth=2, class_dropout=0.1), torch.arange(40) % C
    plain = sample_tokens(prior, labels, **options, generator=generator())
    monkeypatch.setattr("dae.priors.ar.Recorder", Watched)
    assert torch.equal(sample_tokens(prior, labels, **options, generator=generator(), cuda_graphs=True), plain)


def test_a_graph_a_token_under_autocast(monkeypatch):
    """Keys are narrower than the cache there."""
    prior, labels = make(vocab=7, length=5, width=16, depth=2), torch.zeros(4, dtype=torch.int64)
    monkeypatch.setattr("dae.priors.ar.Recorder", Rerun)
    with torch.autocast("cpu", torch.bfloat16):
        tokens = [sample_tokens(prior, labels, generator=generator(), cuda_graphs=graphs) for graphs in (False, True)]
    assert torch.equal(*tokens)


def test_graphs_need_a_gpu():
    with pytest.raises(ValueError, match="CUDA graphs need a CUDA device, got cpu; leave cuda_graphs out"):
        sample_tokens(make(), torch.zeros(1, dtype=torch.int64), cuda_graphs=True)


@pytest.mark.parametrize("options", [{}, {"cfg_scale": 1.7}, {"temperature": 0.5}])
def test_tokens_of_several_digits_have_their_frequencies(options):
    """Drawn digit by digit, against the product of the digits' probabilities."""
    torch.manual_seed(0)
    config = PriorConfig(width=8, depth=1, num_heads=1, class_dropout=0.1)
    prior = ARPrior(config, vocab_size=6, sequence_length=1, num_classes=C, factors=[2, 3]).eval()
    for parameter in prior.parameters():
        torch.nn.init.normal_(parameter, std=0.7)
    labels = torch.ones(40_000, dtype=torch.int64)
    tokens = sample_tokens(prior, labels, **options, generator=generator())
    assert tokens.shape == (40_000, 1)
    with torch.no_grad():
        states = prior.hidden(torch.tensor([1, prior.null_class]), torch.zeros(2, 0, dtype=torch.int64))
        scale, temperature = options.get("cfg_scale", 1.0), options.get("temperature", 1.0)

        def probabilities(digits):
            conditional, null = prior.digit_logits(states, [torch.full((2, 1), digit) for digit in digits])[:, 0]
            return ((null + scale * (conditional - null)) / temperature).softmax(-1)

        first = probabilities([])
        wanted = torch.stack([first[a] * probabilities([a])[b] for b in range(3) for a in range(2)])
    found = tokens.flatten().bincount(minlength=6) / len(tokens)
    assert (found - wanted).abs().max() < 5 * 0.5 / 40_000**0.5


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_graph_a_token_on_a_gpu():
    prior, labels = make(vocab=7, length=16, width=32, depth=2).cuda(), torch.zeros(64, dtype=torch.int64, device="cuda")
    found = [sample_tokens(prior, labels, generator=torch.Generator("cuda").manual_seed(0), cuda_graphs=g) for g in (False, True)]
    assert (found[0] == found[1]).float().mean() > 0.99  # a draw may fall between two tokens
