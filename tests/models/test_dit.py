"""The Diffusion Transformer: its formulae, what it depends on, how it starts, is saved and compiled."""

import pytest
import torch
import torch.nn.functional as F

import dae.distributed
from dae.config import KernelsConfig, PriorConfig
from dae.losses.flow_matching import flow_matching_loss
from dae.models import choose_kernels
from dae.models.dit import DiT

D, SIZE, C = 3, 4, 5


def make(train=False, attention="auto", spread=0.3, **changes) -> DiT:
    torch.manual_seed(0)
    config = PriorConfig(**{"width": 16, "depth": 2, "num_heads": 2} | changes)
    dit = DiT(config, latent_channels=D, latent_size=SIZE, num_classes=C).double()
    if spread:  # far from the zero gates, so that every path matters
        for p in dit.parameters():
            torch.nn.init.normal_(p, std=spread)
    choose_kernels(dit, KernelsConfig(attention=attention))
    return dit.train(train)


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(4, D, SIZE, SIZE, dtype=torch.float64, generator=generator)
    return x, torch.tensor([0.0, 0.3, 0.8, 1.0], dtype=torch.float64), torch.tensor([0, C, 2, 1])


def plain(dit: DiT, x_BDhw, t_B, labels_B):
    """The model as the paper writes it, without dae_kernels: layer norms, gates, rotations and attention by hand."""
    config = dit.config
    w = 100 * 1000 ** (-torch.arange(64, dtype=torch.float64) / 63)
    angles = t_B[:, None] * w
    time = dit.time_embedding
    c = time.out(F.silu(time.hidden(torch.cat([angles.cos(), angles.sin()], dim=1)))) + dit.class_embedding(labels_B)
    c = F.silu(c)[:, None]
    head_dim = config.width // config.num_heads
    row, column = torch.arange(SIZE**2) // SIZE, torch.arange(SIZE**2) % SIZE
    turns = 10000.0 ** (-4 * torch.arange(head_dim // 4, dtype=torch.float64) / head_dim)
    turns = torch.cat([row[:, None] * turns, column[:, None] * turns], dim=1)
    i = torch.complex(turns.cos(), turns.sin())

    def modulate(x, scale, shift):
        mean, variance = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, correction=0)
        return (x - mean) / (variance + 1e-6).sqrt() * (1 + scale) + shift

    def turn(q, weight):
        q = q / (q.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight
        turned = torch.complex(q[..., : head_dim // 2], q[..., head_dim // 2 :]) * i
        return torch.cat([turned.real, turned.imag], dim=-1)

    x = dit.stem(x_BDhw.flatten(2).transpose(1, 2)) + dit.position_embedding.weight
    for block in dit.blocks:
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = block.modulation(c).chunk(6, dim=-1)
        q, k, v = block.qkv(modulate(x, scale, shift)).unflatten(2, (3, config.num_heads, head_dim)).permute(2, 0, 3, 1, 4)
        q, k = turn(q, block.norm_q.weight), turn(k, block.norm_k.weight)
        h = (q @ k.transpose(2, 3) / head_dim**0.5).softmax(-1) @ v
        x = x + gate * block.proj(h.transpose(1, 2).flatten(2))
        a, b = block.gate_up(modulate(x, mlp_scale, mlp_shift)).chunk(2, dim=-1)
        x = x + mlp_gate * block.down(a * a.sigmoid() * b)
    shift, scale = dit.modulation(c).chunk(2, dim=-1)
    network = dit.head(modulate(x, scale, shift)).transpose(1, 2).unflatten(2, (SIZE, SIZE))
    t = t_B[:, None, None, None]
    return (t - (1 - t)) / (t**2 + (1 - t) ** 2) * x_BDhw + network


@pytest.mark.parametrize("attention", ["auto", "sdpa", "reference"])
def test_values_and_gradients_of_the_papers_formulae(inputs, attention):
    dit, (x, t, labels) = make(attention=attention), inputs
    names, parameters = zip(*dit.named_parameters(), strict=True)
    x.requires_grad_()
    ours, expected = dit(x, t, labels), plain(dit, x, t, labels)
    # The tables of frequencies and rotations are kept in float32: 6e-8 of angles up to 100, through two blocks.
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
    cotangent = torch.randn(ours.shape, dtype=ours.dtype, generator=torch.Generator().manual_seed(2))
    got, wanted = (torch.autograd.grad(y, (x, *parameters), cotangent) for y in (ours, expected))
    for name, a, b in zip(("x", *names), got, wanted, strict=True):
        assert b.abs().max() > 1e-6, f"nothing reaches {name}"
        assert (a - b).norm() <= 1e-4 * b.norm() + 1e-9, name


def test_starts_as_the_velocity_of_a_standard_normal(inputs):
    """E[noise - x | x_t] of x ~ N(0, 1) is (t - (1 - t)) / (t^2 + (1 - t)^2) x_t, the covariance over the variance."""
    x, t, labels = inputs
    dit = make(spread=0.0)
    slope = torch.tensor([-1.0, (2 * 0.3 - 1) / (0.3**2 + 0.7**2), (2 * 0.8 - 1) / (0.8**2 + 0.2**2), 1.0], dtype=torch.float64)
    torch.testing.assert_close(dit(x, t, labels), slope[:, None, None, None] * x, rtol=1e-12, atol=1e-12)


def test_zero_gates_still_let_every_parameter_learn():
    """At the start the head alone has a gradient; three steps of SGD open the rest."""
    dit = make(spread=0.0)
    optimizer = torch.optim.SGD(dit.parameters(), lr=0.5)
    x, labels, generator = torch.randn(32, D, SIZE, SIZE).double() * 0.2, torch.arange(32) % C, torch.Generator()
    for step in range(4):
        optimizer.zero_grad()
        flow_matching_loss(dit, x, labels, generator=generator.manual_seed(step)).backward()
        if step == 0:
            silent = {name for name, p in dit.named_parameters() if p.grad.abs().max() == 0}
            assert silent == {name for name, _ in dit.named_parameters()} - {"head.weight", "head.bias"}
        optimizer.step()
    assert [name for name, p in dit.named_parameters() if not p.grad.abs().max() > 0] == []


def test_depends_on_time_class_and_place(inputs):
    dit, (x, t, labels) = make(), inputs
    v = dit(x, t, labels)
    assert v.shape == x.shape and v.dtype == torch.float64
    assert ((dit(x, t, (labels + 1) % (C + 1)) - v).abs().amax((1, 2, 3)) > 1e-3).all()
    assert ((dit(x, (t + 0.1) % 1, labels) - v).abs().amax((1, 2, 3)) > 1e-3).all()
    same = dit(torch.ones_like(x[:1]), t[1:2], labels[:1]).flatten(2)[0].T  # equal tokens, [hw, D]
    assert (torch.cdist(same, same) + torch.eye(SIZE**2) > 1e-6).all()
    for b in range(4):  # rows do not see each other
        torch.testing.assert_close(dit(x[b : b + 1], t[b : b + 1], labels[b : b + 1]), v[b : b + 1], rtol=1e-12, atol=1e-12)
    assert dit(x[:0], t[:0], labels[:0]).shape == (0, D, SIZE, SIZE)


def test_all_positions_see_all():
    dit = make()
    x = torch.zeros(1, D, SIZE, SIZE, dtype=torch.float64)
    t, labels = torch.full((1,), 0.4, dtype=torch.float64), torch.tensor([1])
    J = torch.autograd.functional.jacobian(lambda x: dit(x, t, labels).sum((0, 1)).flatten(), x).abs().sum((1, 2))
    assert (J.flatten(1) > 1e-6).all()


def test_gradient_checkpointing_changes_nothing(inputs):
    x, t, labels = inputs
    gradients = []
    for on in (False, True):
        dit = make(train=True, dropout=0.3)
        dit.gradient_checkpointing = on
        torch.manual_seed(5)
        dit(x, t, labels).square().sum().backward()
        gradients.append([p.grad for p in dit.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_dropout_in_training_alone(inputs):
    dit = make(dropout=0.5)
    assert torch.equal(dit(*inputs), dit(*inputs))
    dit.train()
    assert not torch.equal(dit(*inputs), dit(*inputs))


def test_hidden_classes(monkeypatch):
    dit, labels = make(class_dropout=0.4), torch.arange(5000) % C
    torch.manual_seed(0)
    hidden = dit.drop_labels(labels)
    assert abs((hidden == dit.null_class).double().mean().item() - 0.4) < 4 * (0.4 * 0.6 / 5000) ** 0.5
    assert torch.equal(hidden[hidden != C], labels[hidden != C])
    monkeypatch.setattr(dae.distributed, "rank", lambda: 1)
    monkeypatch.setattr(dae.distributed, "world_size", lambda: 2)
    torch.manual_seed(0)
    assert torch.equal(dit.drop_labels(labels[1::2]), hidden[1::2])


def test_compiles_whole(inputs):
    """Dropout stands still: compiled code draws other numbers."""
    dit, (x, t, labels) = make(train=True), inputs
    compiled = torch.compile(dit, fullgraph=True, backend="aot_eager")
    results = []
    for model in (dit, compiled):
        v = model(x, t, labels)
        results.append([v.detach(), *torch.autograd.grad(v.square().sum(), list(dit.parameters()))])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_autocast_stays_close(inputs):
    """bfloat16 has 8 bits, 2^-9 a rounding, over some ten matrices."""
    dit, (x, t, labels) = make(spread=0.1).float(), inputs
    expected = dit(x.float(), t.float(), labels)
    with torch.autocast("cpu", torch.bfloat16):
        got = dit(x.float(), t.float(), labels)
    assert (got.float() - expected).norm() < 10 * 2**-8 * expected.norm()
    assert not torch.equal(got.float(), expected)


def test_latent_statistics():
    dit = make()
    latents = torch.randn(50, D, SIZE, SIZE, dtype=torch.float64) * torch.tensor([0.1, 3.0, 7.0])[:, None, None] + 4
    dit.set_latent_statistics(latents.mean((0, 2, 3)), latents.std((0, 2, 3)))
    x = dit.normalise(latents)
    torch.testing.assert_close(x.mean((0, 2, 3)), torch.zeros(D, dtype=torch.float64), rtol=0, atol=1e-10)
    torch.testing.assert_close(x.std((0, 2, 3)), torch.ones(D, dtype=torch.float64), rtol=1e-10, atol=0)
    torch.testing.assert_close(dit.denormalise(x), latents, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "mean, std, message",
    [
        ([0.0, 0.0, 0.0], [1.0, 0.0, 0.0], r"channels \[1, 2\] do not vary"),
        ([0.0, 0.0, 0.0], [1.0, -1.0, 1.0], r"channels \[1\] do not vary"),
        ([0.0, 0.0, 0.0], [1.0, float("nan"), 1.0], "std: expected finite"),
        ([float("inf"), 0.0, 0.0], [1.0, 1.0, 1.0], "mean: expected finite"),
        ([0.0, 0.0], [1.0, 1.0, 1.0], r"mean: expected one number for each of 3 channels, got \[2\]"),
    ],
)
def test_latent_statistics_that_are_refused(mean, std, message):
    dit = make()
    with pytest.raises(ValueError, match=message):
        dit.set_latent_statistics(torch.tensor(mean), torch.tensor(std))
    assert torch.equal(dit.latent_std, torch.ones(D, 1, 1)) and torch.equal(dit.latent_mean, torch.zeros(D, 1, 1))


def test_saved_and_loaded(inputs, tmp_path):
    x, t, labels = (inputs[0].float(), inputs[1].float(), inputs[2])
    dit = make().float()
    dit.tokenizer = "abc"
    dit.set_latent_statistics(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.5, 0.6, 0.7]))
    dit.save_pretrained(tmp_path)
    loaded = DiT.from_pretrained(tmp_path)
    assert loaded.to_config() == dit.to_config() and loaded.tokenizer == "abc"
    assert torch.equal(loaded(x, t, labels), dit(x, t, labels)) and torch.equal(loaded.normalise(x), dit.normalise(x))


def test_names_of_the_parameters():
    """What saved models hold."""
    pairs = ["modulation", "qkv", "proj", "gate_up", "down"]
    of_a_block = {f"{name}.{kind}" for name in pairs for kind in ("weight", "bias")} | {"norm_q.weight", "norm_k.weight"}
    names = {f"blocks.{layer}.{name}" for layer in range(2) for name in of_a_block}
    names |= {f"{name}.{kind}" for name in ("stem", "modulation", "head") for kind in ("weight", "bias")}
    names |= {f"time_embedding.{name}.{kind}" for name in ("hidden", "out") for kind in ("weight", "bias")}
    names |= {"class_embedding.weight", "position_embedding.weight", "latent_mean", "latent_std"}
    assert set(make().state_dict()) == names


@pytest.mark.parametrize("changes", [{"width": 10, "num_heads": 4}, {"width": 12, "num_heads": 2}])
def test_head_dimensions_that_are_refused(changes):
    with pytest.raises(ValueError, match="expected a head dimension that 4 divides"):
        make(**changes)


def test_sizes_and_latents_that_are_refused(inputs):
    x, t, labels = inputs
    config = PriorConfig(width=8, num_heads=1)
    for name in ("latent_channels", "latent_size", "num_classes"):
        with pytest.raises(ValueError, match=f"{name}: expected at least 1, got 0"):
            DiT(config, **{"latent_channels": 1, "latent_size": 1, "num_classes": 1} | {name: 0})
    dit = make()
    for wrong in (x[:, :2], x[..., :3], x[0], x.flatten(2)):
        with pytest.raises(ValueError, match=r"latents: expected \[B, 3, 4, 4\], got"):
            dit(wrong, t, labels)
    with pytest.raises(TypeError, match=r"floating point tensor latents, got torch.int64; tokens take prior.family=ar"):
        dit(x.long(), t, labels)
