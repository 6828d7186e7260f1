"""The prior: causal, the same with and without cache, and random only where it should be."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from dae_kernels import rotary_table, rotate
from dae_kernels.attention.api import BACKENDS

import dae.distributed
from dae.config import KernelsConfig, PriorConfig
from dae.models import ARPrior, choose_kernels
from dae.models.ar_prior import FixedKVCache, KVCache
from dae.quantizers.tokens import digits_of

K, T, C = 11, 9, 3


def make(train=False, attention="auto", loss="auto", **changes) -> ARPrior:
    torch.manual_seed(0)
    config = PriorConfig(**{"width": 16, "depth": 2, "num_heads": 2} | changes)
    prior = ARPrior(config, vocab_size=K, sequence_length=T, num_classes=C).double()
    for p in prior.parameters():  # far from the small initial values, so that every path matters
        torch.nn.init.normal_(p, std=0.5)
    choose_kernels(prior, KernelsConfig(attention=attention, linear_cross_entropy=loss))
    return prior.train(train)


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(1)
    return torch.tensor([0, C, 2, 1]), torch.randint(K, (4, T - 1), generator=generator)


@pytest.mark.parametrize("attention", ["auto", "sdpa", "reference"])
@pytest.mark.parametrize("chunks", [[1] * (T - 1), [0] + [1] * (T - 1), [3, 2, 3], [T - 1]])
def test_cache_gives_the_logits_of_the_full_forward(inputs, attention, chunks):
    """Fed token by token or in chunks; the class goes in with the first chunk, which may hold no token."""
    labels, tokens = inputs
    prior = make(attention=attention)
    full = prior(labels, tokens)
    assert full.shape == (4, T, K)
    cache, pieces = prior.make_cache(4), []
    for part in tokens.split(chunks, dim=1):
        pieces.append(prior(labels, part, cache))
    assert cache.position == T
    torch.testing.assert_close(torch.cat(pieces, dim=1), full, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("attention", ["auto", "sdpa", "reference"])
@pytest.mark.parametrize("filled", [0, 3])
def test_a_cache_that_counts_on_the_device(inputs, attention, filled):
    """What a CUDA graph repeats: one position a call, over the whole length, of which what is not filled is hidden."""
    labels, tokens = inputs
    prior = make(attention=attention)
    cache = prior.make_cache(4)
    pieces = [prior(labels, tokens[:, :filled], cache)]
    cache.keys[:, :, :, filled + 1 :] = 1e3  # must not be seen
    fixed = FixedKVCache(cache)
    for t in range(filled, T - 1):
        pieces.append(prior(labels, tokens[:, t : t + 1], fixed))
    torch.testing.assert_close(torch.cat(pieces, dim=1), prior(labels, tokens), rtol=1e-10, atol=1e-10)
    with pytest.raises(ValueError, match="one position a call, got 2"):
        prior(labels, tokens[:, :2], fixed)


@pytest.mark.parametrize("attention", ["sdpa", "reference"])
def test_causality(inputs, attention):
    """Token t is position t + 1 of the input: it may change the logits of what comes after it only."""
    labels, tokens = inputs
    prior = make(attention=attention)
    logits = prior(labels, tokens)
    for t in range(T - 1):
        other = tokens.clone()
        other[:, t] = (other[:, t] + 1) % K
        changed = prior(labels, other)
        assert torch.equal(changed[:, : t + 1], logits[:, : t + 1])
        assert ((changed - logits).abs().amax(-1)[:, t + 1 :] > 1e-6).all()
    relabelled = prior((labels + 1) % (C + 1), tokens)
    assert ((relabelled - logits).abs().amax(-1) > 1e-6).all()


def test_rows_do_not_see_each_other(inputs):
    labels, tokens = inputs
    prior = make()
    torch.testing.assert_close(prior(labels[1:2], tokens[1:2]), prior(labels, tokens)[1:2], rtol=1e-12, atol=1e-12)


def test_too_long(inputs):
    labels, tokens = inputs
    prior, long = make(), torch.zeros(4, T, dtype=torch.int64)
    with pytest.raises(ValueError, match=rf"models {T} tokens; class and {T} tokens given"):
        prior(labels, long)
    cache = prior.make_cache(4)
    prior(labels, tokens, cache)
    with pytest.raises(ValueError, match=f"models {T} tokens"):
        prior(labels, tokens[:, :1], cache)
    assert cache.position == T
    small = KVCache(1, 1, 1, 2, 4, device="cpu", dtype=torch.float32)
    with pytest.raises(ValueError, match="holds 2 positions, asked to hold 3"):
        small.extend(0, torch.zeros(1, 1, 3, 4), torch.zeros(1, 1, 3, 4))


@pytest.mark.parametrize("changes", [{"width": 10, "num_heads": 4}, {"width": 12, "num_heads": 4}])
def test_head_dimensions_that_are_refused(changes):
    with pytest.raises(ValueError, match="even, whole head dimension"):
        make(**changes)


def test_rotary_turns_pairs_by_position():
    table, x = rotary_table(5, 4).double(), torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
    y = rotate(x.expand(1, 1, 5, 4), table)[0, 0]
    for p in range(5):
        for i, angle in enumerate((p * 1.0, p * 0.01)):  # 10000^(-2i/4)
            z = complex(x[i], x[i + 2]) * complex(torch.tensor(angle).cos(), torch.tensor(angle).sin())
            torch.testing.assert_close(
                y[p, [i, i + 2]], torch.tensor([z.real, z.imag], dtype=torch.float64), rtol=1e-6, atol=1e-6
            )


def test_rotary_scores_depend_on_relative_positions():
    table = rotary_table(20, 8).double()
    q, k = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64)
    scores = rotate(q.expand(1, 1, 20, 8), table)[0, 0] @ rotate(k.expand(1, 1, 20, 8), table)[0, 0].T
    for offset in range(-19, 20):
        diagonal = scores.diagonal(offset)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=1e-5, atol=1e-5)  # the table is fp32
    assert (scores.diagonal(3)[0] - scores.diagonal(-3)[0]).abs() > 1e-3
    torch.testing.assert_close(scores.diagonal(0)[0], (q * k).sum(), rtol=1e-6, atol=1e-6)


def test_the_configuration_names_the_back_ends_there_are(inputs):
    [knob] = [field for field in dataclasses.fields(KernelsConfig) if field.name == "attention"]
    assert set(knob.metadata["choices"]) == set(BACKENDS)
    labels, tokens = inputs
    single = make(attention="flex").float()
    with torch.no_grad():
        logits = single(labels, tokens)
        choose_kernels(single, KernelsConfig(attention="reference"))
        torch.testing.assert_close(logits, single(labels, tokens))
    choose_kernels(single, KernelsConfig(attention="flash_attn"))
    with pytest.raises(ValueError, match="impl='flash_attn' needs CUDA tensors, got cpu"):
        single(labels, tokens)


def plain_block(block, x, table):
    """A block as it reads without dae_kernels, by the modules that hold its parameters."""
    B, L = x.shape[:2]
    q, k, v = block.qkv(block.norm_attention(x)).view(B, L, 3, block.heads, -1).permute(2, 0, 3, 1, 4)
    cos, sin = table.to(x.dtype)
    turned = []
    for y in (block.norm_q(q), block.norm_k(k)):
        a, b = y.chunk(2, dim=-1)
        turned.append(torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1))
    h = F.scaled_dot_product_attention(*turned, v, is_causal=True)
    x = x + block.proj(h.transpose(1, 2).flatten(2))
    gate, up = block.gate_up(block.norm_mlp(x)).chunk(2, dim=-1)
    return x + block.down(F.silu(gate) * up)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_block_is_the_same_to_the_bit_without_dae_kernels(dtype):
    prior = make().to(dtype)
    x = torch.randn(3, T, 16, dtype=dtype)
    assert torch.equal(prior.blocks[0](x, prior.rotary, None), plain_block(prior.blocks[0], x, prior.rotary))


def test_names_of_the_parameters():
    """What saved models hold."""
    norms = ["norm_attention", "norm_q", "norm_k", "norm_mlp"]
    of_a_block = {f"{name}.weight" for name in [*norms, "qkv", "proj", "gate_up", "down"]}
    names = {f"blocks.{layer}.{name}" for layer in range(2) for name in of_a_block}
    names |= {f"{name}.weight" for name in ("class_embedding", "token_embedding", "position_embedding", "norm", "head")}
    assert set(make().state_dict()) == names


def test_positions_matter(inputs):
    """Equal tokens at all positions still give other logits at each."""
    prior = make()
    logits = prior(torch.tensor([0]), torch.full((1, T - 1), 5))[0]
    assert ((logits[1:, None] - logits[None, 1:]).abs().amax(-1) + torch.eye(T - 1) > 1e-6).all()


def processes(monkeypatch, rank, world):
    monkeypatch.setattr(dae.distributed, "rank", lambda: rank)
    monkeypatch.setattr(dae.distributed, "world_size", lambda: world)


def test_drop_labels(monkeypatch):
    prior, labels = make(class_dropout=0.3), torch.arange(6000) % C
    torch.manual_seed(0)
    hidden = prior.drop_labels(labels)
    rate = (hidden == prior.null_class).double().mean().item()
    assert abs(rate - 0.3) < 4 * (0.3 * 0.7 / 6000) ** 0.5
    assert torch.equal(hidden[hidden != C], labels[hidden != C])
    for p, expected in ((0.0, labels), (1.0, torch.full_like(labels, C))):
        assert torch.equal(make(class_dropout=p).drop_labels(labels), expected)
    for rank in range(3):  # process r holds rows r, r + 3, ...
        processes(monkeypatch, rank, 3)
        torch.manual_seed(0)
        assert torch.equal(prior.drop_labels(labels[rank::3]), hidden[rank::3])


def test_corrupt(monkeypatch):
    tokens = torch.randint(K, (600, T), generator=torch.Generator().manual_seed(0))
    assert make().corrupt(tokens) is tokens
    prior = make(token_noise=0.4)
    torch.manual_seed(0)
    noisy = prior.corrupt(tokens)
    n, expected = tokens.numel(), 0.4 * (K - 1) / K  # a random token may be the old one
    rate = (noisy != tokens).double().mean().item()
    assert abs(rate - expected) < 4 * (expected * (1 - expected) / n) ** 0.5
    counts = make(token_noise=1.0).corrupt(torch.zeros_like(tokens)).flatten().bincount(minlength=K)
    assert len(counts) == K and (counts - n / K).abs().max() < 5 * (n / K) ** 0.5
    for rank in range(2):
        processes(monkeypatch, rank, 2)
        torch.manual_seed(0)
        assert torch.equal(prior.corrupt(tokens[rank::2]), noisy[rank::2])


def test_gradient_checkpointing_gives_equal_gradients(inputs):
    labels, tokens = inputs
    gradients = []
    for enabled in (False, True):
        prior = make(train=True, dropout=0.3)
        prior.gradient_checkpointing = enabled
        torch.manual_seed(2)
        prior(labels, tokens).square().mean().backward()
        gradients.append([p.grad for p in prior.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_dropout_in_training_only(inputs):
    prior = make(train=True, dropout=0.3)
    assert not torch.equal(prior(*inputs), prior(*inputs))
    prior.eval()
    assert torch.equal(prior(*inputs), prior(*inputs))


@pytest.mark.parametrize("impl", ["auto", "reference", "chunked"])
def test_loss_is_nats_a_token(inputs, impl):
    """The cross-entropy of the logits; smoothing and z-loss are for training and no part of a code length."""
    labels, tokens = inputs
    targets = torch.cat([tokens, tokens[:, :1]], dim=1)
    prior = make(loss=impl, label_smoothing=0.2, z_loss=0.1)
    logits = prior(labels, tokens).flatten(0, 1)
    exact = {"rtol": 1e-12, "atol": 0}
    torch.testing.assert_close(prior(labels, tokens, targets_BT=targets), F.cross_entropy(logits, targets.flatten()), **exact)
    smoothed = F.cross_entropy(logits, targets.flatten(), label_smoothing=0.2) + 0.1 * logits.logsumexp(1).square().mean()
    torch.testing.assert_close(prior.train()(labels, tokens, targets_BT=targets), smoothed, **exact)
    with pytest.raises(ValueError, match=r"targets \[4, 8\]"):
        prior(labels, tokens, targets_BT=tokens)
    torch.nn.init.zeros_(prior.head.weight)
    uniform = prior.eval()(labels, tokens, targets_BT=targets)
    torch.testing.assert_close(uniform, torch.tensor(float(K), dtype=torch.float64).log(), **exact)


@pytest.mark.parametrize("impl", ["auto", "chunked"])
def test_compiles_whole_with_its_loss(inputs, impl):
    labels, tokens = inputs
    targets = torch.cat([tokens, tokens[:, :1]], dim=1)
    prior = make(train=True, loss=impl).float()
    loss = prior(labels, tokens, targets_BT=targets)
    expected = torch.autograd.grad(loss, list(prior.parameters()))
    compiled = torch.compile(prior, fullgraph=True, backend="aot_eager")(labels, tokens, targets_BT=targets)
    torch.testing.assert_close(compiled, loss, rtol=1e-5, atol=0)
    got = torch.autograd.grad(compiled, list(prior.parameters()))
    for a, b in zip(got, expected, strict=True):  # float32 in another order, through two blocks with weights of 0.5
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * b.abs().max().item())


def test_a_step_learns(inputs):
    labels, tokens = inputs
    torch.manual_seed(0)
    prior = ARPrior(PriorConfig(width=16, depth=2, num_heads=2), vocab_size=K, sequence_length=T, num_classes=C)
    target = torch.cat([tokens, tokens[:, :1]], dim=1)
    optimizer = torch.optim.Adam(prior.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        loss = prior(labels, target[:, :-1], targets_BT=target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert abs(losses[0] - torch.tensor(K).log().item()) < 0.1 and losses[-1] < 0.5 * losses[0]


FACTORS = [5, 3, 4]


def factorised(**changes):
    torch.manual_seed(0)
    config = PriorConfig(**{"width": 16, "depth": 2, "num_heads": 2, "class_dropout": 0.1} | changes)
    prior = ARPrior(config, vocab_size=60, sequence_length=T, num_classes=C, factors=FACTORS).double().eval()
    for parameter in prior.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return prior


def test_digits_make_a_distribution_over_all_tokens(inputs):
    """Probabilities of digit after digit sum to one over the 60 tokens, and the loss is their mean -log."""
    labels, _ = inputs
    prior, tokens = factorised(), torch.randint(60, (4, T), generator=torch.Generator().manual_seed(2))
    state = prior.hidden(labels, tokens[:, :-1])
    every = digits_of(torch.arange(60), FACTORS)
    log_p = torch.zeros(4, T, 60, dtype=torch.float64)
    for k in range(60):
        digits = [every[k, f].expand(4, T) for f in range(3)]
        for f in range(3):
            log_p[..., k] += prior.digit_logits(state, digits[:f]).log_softmax(-1).gather(-1, digits[f][..., None])[..., 0]
    torch.testing.assert_close(log_p.exp().sum(-1), torch.ones(4, T, dtype=torch.float64))
    loss = prior(labels, tokens[:, :-1], targets_BT=tokens)
    torch.testing.assert_close(loss, -log_p.gather(-1, tokens[..., None]).mean())
    assert prior.head.weight.shape[0] == prior.token_embedding.weight.shape[0] == sum(FACTORS)
    loss.backward()
    assert all(p.grad is not None for p in prior.parameters())


def test_digits_are_saved_and_cached(inputs, tmp_path):
    labels, _ = inputs
    prior, tokens = factorised(), torch.randint(60, (4, T - 1), generator=torch.Generator().manual_seed(2))
    cache, pieces = prior.make_cache(4), []
    for part in tokens.split([3] + [1] * (T - 4), dim=1):
        pieces.append(prior.hidden(labels, part, cache))
    torch.testing.assert_close(torch.cat(pieces, dim=1), prior.hidden(labels, tokens), rtol=1e-10, atol=1e-10)
    prior.save_pretrained(tmp_path)
    again = ARPrior.from_pretrained(tmp_path, torch_dtype=torch.float64)
    assert again.factors == FACTORS
    torch.testing.assert_close(again.hidden(labels, tokens), prior.hidden(labels, tokens))
    assert "factors" not in make().to_config(), "of an ordinary prior nothing changes"


def test_digits_that_do_not_fit():
    with pytest.raises(ValueError, match=r"factors \[5, 3\] have the product 15, expected vocab_size=60"):
        ARPrior(PriorConfig(width=8, num_heads=1), vocab_size=60, sequence_length=T, num_classes=C, factors=[5, 3])
    with pytest.raises(ValueError, match="logits digit by digit: use `hidden` and `digit_logits`"):
        factorised()(torch.zeros(1, dtype=torch.int64), torch.zeros(1, 0, dtype=torch.int64))
