"""Vector quantization: the nearest code, its gradient, and a codebook that follows the latents of all processes."""

import pytest
import torch
import torch.nn.functional as F

from dae.config import VQConfig
from dae.quantizers import VectorQuantizer

D = 3


def make(K=7, **changes) -> VectorQuantizer:
    torch.manual_seed(0)
    return VectorQuantizer(VQConfig(codebook_size=K, **changes), D)


def features(*shape, seed=1, **options):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), **options)


def rows(z):
    """[B, D, h, w] to [B h w, D]."""
    return z.movedim(1, -1).flatten(0, -2)


@pytest.mark.parametrize("shape", [(2, D, 4, 4), (1, D, 1, 1), (3, D, 5, 2), (0, D, 2, 2)])
def test_nearest_code(shape):
    quantizer, z = make(), features(*shape)
    out = quantizer(z)
    distances = (rows(z)[:, None].double() - quantizer.codebook.double()).square().sum(-1)
    assert torch.equal(out.indices.flatten(), distances.argmin(1))
    assert out.indices.shape == (shape[0], *shape[2:])
    assert torch.equal(rows(out.latents), quantizer.codebook[out.indices.flatten()])
    assert torch.equal(quantizer.lookup(out.indices), out.latents)
    assert torch.equal(out.features, z)


def test_straight_through_gradient_and_commitment():
    quantizer, z = make(commitment_weight=0.75), features(2, D, 4, 4).requires_grad_()
    out = quantizer(z)
    codes = rows(quantizer.lookup(out.indices))
    assert torch.equal(rows(out.latents), codes)  # the codes to the bit, also with a gradient
    cotangent = features(2, D, 4, 4, seed=2)
    assert torch.equal(torch.autograd.grad(out.latents, z, cotangent, retain_graph=True)[0], cotangent)
    torch.testing.assert_close(out.loss, 0.75 * (rows(z) - codes).square().mean())
    (gradient,) = torch.autograd.grad(out.loss, z)
    torch.testing.assert_close(rows(gradient), 0.75 * 2 * (rows(z) - codes).detach() / z.numel())
    assert not list(quantizer.parameters())  # the codebook moves by averages, not by gradients


def test_the_forward_pass_changes_nothing():
    quantizer = make().train()
    before = {k: v.clone() for k, v in quantizer.state_dict().items()}
    quantizer(features(2, D, 4, 4))
    assert all(torch.equal(v, before[k]) for k, v in quantizer.state_dict().items())


def test_ema_by_hand():
    """Two micro-batches, one update; then a second update."""
    quantizer = make(K=2, ema_decay=0.75, revive_threshold=0.0)
    codes = torch.tensor([[0.0, 0, 0], [10, 0, 0]])
    quantizer.codebook.copy_(codes)
    quantizer.average_sums.copy_(codes)

    def batch(*firsts):
        return torch.tensor([[f, 1.0, 0.0] for f in firsts]).T.view(1, D, 1, len(firsts))

    for micro in (batch(1.0, 9.0), batch(3.0, 2.0)):
        quantizer.observe(quantizer(micro))
    quantizer.update_codebook()
    counts = torch.tensor([0.75 * 1 + 0.25 * 3, 0.75 * 1 + 0.25 * 1])
    sums = torch.tensor([[0.25 * 6, 0.25 * 3, 0], [0.75 * 10 + 0.25 * 9, 0.25 * 1, 0]])
    torch.testing.assert_close(quantizer.average_counts, counts)
    torch.testing.assert_close(quantizer.average_sums, sums)
    torch.testing.assert_close(quantizer.codebook, sums / counts[:, None])

    quantizer.observe(quantizer(batch(9.0)))
    quantizer.update_codebook()
    counts = 0.75 * counts + 0.25 * torch.tensor([0.0, 1.0])
    sums = 0.75 * sums + 0.25 * torch.tensor([[0.0, 0, 0], [9, 1, 0]])
    torch.testing.assert_close(quantizer.codebook, sums / counts[:, None])
    with pytest.raises(RuntimeError, match="nothing to update from"):
        quantizer.update_codebook()


def test_micro_batches_are_one_batch():
    """Accumulating the statistics of three micro-batches equals one large batch."""
    z, books = features(6, D, 4, 4), []
    for pieces in (1, 3):
        quantizer = make(revive_threshold=0.0)
        for part in z.chunk(pieces):
            quantizer.observe(quantizer(part))
        quantizer.update_codebook()
        books.append(quantizer.codebook.clone())
    torch.testing.assert_close(books[0], books[1], rtol=1e-6, atol=1e-7)


def test_the_codebook_follows_the_latents():
    """Mixture of three separated clusters: the codes end at their means."""
    centres = torch.tensor([[5.0, 0, 0], [0, 5, 0], [0, 0, 5]])
    quantizer = make(K=3, ema_decay=0.5)
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        x = centres.repeat(32, 1) + 0.1 * torch.randn(96, D, generator=generator)
        quantizer.observe(quantizer(x.T.reshape(1, D, 8, 12)))
        quantizer.update_codebook()
    nearest = torch.cdist(centres, quantizer.codebook).min(1)
    assert sorted(nearest.indices.tolist()) == [0, 1, 2] and nearest.values.max() < 0.1


def test_dead_codes_move_onto_latents():
    quantizer, z = make(ema_decay=0.1, revive_threshold=0.2), features(2, D, 4, 4)
    quantizer.codebook[2:] += 100
    quantizer.average_sums.copy_(quantizer.codebook)
    torch.manual_seed(3)
    quantizer.observe(quantizer(z))
    quantizer.update_codebook()
    for k in range(2, 7):
        assert (quantizer.codebook[k] == rows(z)).all(1).any(), "a revived code lies on a latent, exactly"
    assert len(quantizer.codebook.unique(dim=0)) > 4
    assert (quantizer.average_counts > 0.2 * quantizer.average_counts.mean()).all()  # not dead at once again
    assert set(quantizer(z).indices.unique().tolist()) >= {2, 3}
    torch.testing.assert_close(quantizer.average_sums, quantizer.codebook * quantizer.average_counts[:, None])


def test_without_revival_dead_codes_stay():
    quantizer, z = make(ema_decay=0.1, revive_threshold=0.0), features(2, D, 4, 4)
    quantizer.codebook[2:] += 100
    quantizer.average_sums.copy_(quantizer.codebook)
    before = quantizer.codebook[2:].clone()
    for _ in range(2):
        quantizer.observe(quantizer(z))
        quantizer.update_codebook()
    torch.testing.assert_close(quantizer.codebook[2:], before, rtol=1e-4, atol=0)


def test_kmeans_initialisation():
    z, books = features(4, D, 8, 8), {}
    for iterations in (0, 1, 10, 10):
        quantizer = make(kmeans_iterations=iterations)
        torch.manual_seed(iterations)  # the global generator has no say
        quantizer.initialize_codebook(z, torch.Generator().manual_seed(5))
        books.setdefault(iterations, []).append(quantizer.codebook.clone())
        assert torch.equal(quantizer.average_counts, torch.ones(7))
        assert torch.equal(quantizer.average_sums, quantizer.codebook)
    assert torch.equal(*books[10])
    assert all((code == rows(z)).all(1).any() for code in books[0][0])

    def error(book):
        return torch.cdist(rows(z), book).min(1).values.square().mean()

    assert error(books[10][0]) < error(books[1][0]) < error(books[0][0])  # Lloyd's algorithm never goes up


def test_kmeans_finds_separated_clusters():
    centres = 20 * torch.eye(D)
    x = centres.repeat(50, 1) + 0.01 * features(150, D)
    quantizer = make(K=3, kmeans_iterations=20)
    found = []
    for seed in range(10):
        quantizer.initialize_codebook(x.T.reshape(1, D, 10, 15), torch.Generator().manual_seed(seed))
        found.append(torch.cdist(centres, quantizer.codebook).min(1).values.max() < 0.1)
    assert any(found)  # k-means has local optima; from some start it finds them


@pytest.mark.parametrize("vectors", [1, 2, 6])
def test_kmeans_with_more_codes_than_vectors(vectors):
    quantizer, z = make(), features(1, D, 1, vectors)
    quantizer.initialize_codebook(z, torch.Generator().manual_seed(0))
    assert quantizer.codebook.isfinite().all() and quantizer.codebook.shape == (7, D)
    nearest = torch.cdist(rows(z), quantizer.codebook).min(1).values
    assert nearest.max() < 0.5 and (vectors == 1 or len(quantizer.codebook.unique(dim=0)) == 7)


def test_sampled_codes_at_low_temperature_are_the_nearest():
    quantizer, z = make(K=16), features(3, D, 4, 5)
    nearest = quantizer(z).indices
    torch.manual_seed(0)
    assert torch.equal(quantizer.sample_indices(z, 1e-6), nearest)
    drawn = quantizer.sample_indices(z, 5.0)
    assert drawn.shape == nearest.shape and drawn.dtype == torch.int64 and not torch.equal(drawn, nearest)
    for temperature in (0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="must be positive"):
            quantizer.sample_indices(z, temperature)


def test_sampled_codes_follow_the_formula():
    quantizer, draws, temperature = make(K=5), 4000, 0.8
    z = features(1, D, 1, 3).expand(draws, D, 1, 3)
    torch.manual_seed(0)
    counts = F.one_hot(quantizer.sample_indices(z, temperature)[:, 0], 5).sum(0)  # [3 positions, K]
    squared = torch.cdist(rows(z[:1]).double(), quantizer.codebook.double()).square()
    expected = (-squared / (temperature * squared.min(1).values.mean())).softmax(1)
    tolerance = 4.5 * (expected * (1 - expected) / draws).sqrt() + 1e-6
    assert ((counts / draws - expected).abs() < tolerance).all()
    torch.manual_seed(0)
    assert torch.equal(F.one_hot(quantizer.sample_indices(z, temperature)[:, 0], 5).sum(0), counts)


def test_updates_do_not_depend_on_the_number_of_processes(in_processes):
    """Three updates, two micro-batches each, of the rows of each process; dead codes are revived."""

    def update(rank, world=2):
        quantizer = make(ema_decay=0.5, revive_threshold=0.5)
        quantizer.codebook[4:] += 50
        quantizer.average_sums.copy_(quantizer.codebook)
        for step in range(3):
            torch.manual_seed(step)
            for micro in range(2):
                quantizer.observe(quantizer(features(6, D, 2, 2, seed=10 * step + micro)[rank::world]))
            quantizer.update_codebook()
        return quantizer.state_dict()

    one, (first, second) = update(0, world=1), in_processes(2, update)
    for name, tensor in one.items():
        assert torch.equal(first[name], second[name]), "processes stay equal to the bit"
        torch.testing.assert_close(first[name], tensor, rtol=1e-6, atol=1e-7)  # sums in fp64, rounded once
    assert one["codebook"].abs().max() < 10  # the far codes were revived
