"""The codebook of several processes, real ones over gloo, that hold different numbers of latents and are seeded differently."""

import pytest
import torch

from dae.config import VQConfig
from dae.distributed import gather_objects, in_global_order, rank
from dae.quantizers import VectorQuantizer

D, K = 3, 12
SPLITS = [(4, 3), (0, 5), (1, 7), (4, 0, 2), (2, 3, 4)]  # images in each process


def make(**changes):
    options = {"codebook_size": K, "ema_decay": 0.5, "revive_threshold": 0.5} | changes
    quantizer = VectorQuantizer(VQConfig(**options), D)
    quantizer.codebook[K // 3 :] += 50  # these are hardly used
    quantizer.average_sums.copy_(quantizer.codebook)
    return quantizer


def latents(images, size, seed):
    return torch.randn(images, D, size, size, generator=torch.Generator().manual_seed(seed))


def rows(z):
    """[B, D, h, w] to [B h w, D]."""
    return z.movedim(1, -1).flatten(0, -2)


def state(quantizer):
    return {name: buffer.clone() for name, buffer in quantizer.state_dict().items()}


def step(quantizer, mine, micro_batches=2, skip_empty=False):
    for z in mine.chunk(micro_batches) if len(mine) else [mine] * micro_batches:
        if len(z) or not skip_empty:
            quantizer.observe(quantizer(z))
    quantizer.update_codebook()


@pytest.mark.parametrize("split", SPLITS)
def test_any_seeds_and_any_numbers_of_latents(in_processes, split):
    """Every process ends with one codebook to the bit, whose revived codes are latents of the last micro-batches."""

    def body(rank):
        torch.manual_seed(100 + rank)  # other codes at the start, and other draws
        quantizer, found = make(), []
        for number in range(4):
            mine = latents(split[rank], 2, seed=10 * rank + number)
            before = quantizer.average_counts.clone()
            step(quantizer, mine, skip_empty=number % 2 == 1)
            everything = torch.cat(gather_objects(rows(mine)))
            assert quantizer.codebook.isfinite().all() and not torch.equal(quantizer.average_counts, before)
            on_a_latent = (quantizer.codebook[:, None] == everything).all(2).any(1)
            found.append((state(quantizer), on_a_latent))
        return found

    first, *others = in_processes(len(split), body)
    for other in others:
        for (mine, _), (same, _) in zip(first, other, strict=True):
            assert all(torch.equal(mine[name], same[name]) for name in mine)
    revived = first[0][1][K // 3 :]
    assert revived.all(), "each far code has moved onto one latent"
    assert first[-1][0]["codebook"].abs().max() < 10


@pytest.mark.parametrize("split", [(4, 3), (3, 2, 2)])
def test_processes_are_one(in_processes, split):
    """Row i of the global batch lies in process i mod W; seeded alike, they revive the codes that one process would."""
    images, world = sum(split), len(split)

    def body(rank):
        torch.manual_seed(0)
        quantizer = make()
        for number in range(3):
            torch.manual_seed(number)
            whole = latents(images, 2, seed=number)
            step(quantizer, whole[rank::world] if world > 1 else whole, micro_batches=1)
        return state(quantizer)

    several, world = in_processes(world, body), 1
    one = body(0)
    for name, expected in one.items():
        assert all(torch.equal(each[name], several[0][name]) for each in several)
        torch.testing.assert_close(several[0][name], expected, rtol=1e-6, atol=1e-7)  # sums in float64, rounded once
    far = one["codebook"][K // 3 :]
    assert far.abs().max() < 10, "codes were revived"


def test_a_step_without_latents_changes_nothing(in_processes):
    """On one process and on two; and without `observe` all of them say so, rather than one alone."""

    def body(rank):
        torch.manual_seed(rank)
        quantizer = make()
        step(quantizer, latents(2, 2, seed=rank))
        before = state(quantizer)
        step(quantizer, latents(0, 2, seed=0))
        unchanged = all(torch.equal(before[name], value) for name, value in quantizer.state_dict().items())
        with pytest.raises(RuntimeError, match="nothing to update from"):
            quantizer.update_codebook()
        step(quantizer, latents(2, 2, seed=5))  # and it goes on
        return unchanged, state(quantizer)

    assert body(0)[0]
    first, second = in_processes(2, body)
    assert first[0] and second[0]
    assert all(torch.equal(first[1][name], second[1][name]) for name in first[1])


def test_an_empty_last_micro_batch(in_processes):
    """Codes are revived from the last micro-batch that had latents, here of process 1 alone."""

    def body(rank):
        torch.manual_seed(rank)
        quantizer, z = make(revive_threshold=0.6), latents(3, 2, seed=1)  # what no latent is nearest to is below that
        for part in (latents(3 * rank, 2, seed=1), latents(0, 2, seed=2)):
            quantizer.observe(quantizer(part))
        quantizer.update_codebook()
        return (quantizer.codebook[K // 3 :, None] == rows(z)).all(2).any(1).all(), quantizer.codebook.clone()

    first, second = in_processes(2, body)
    assert first[0] and second[0] and torch.equal(first[1], second[1])


def test_images_of_different_sizes(in_processes):
    def body(rank):
        torch.manual_seed(rank)
        quantizer, mine = make(), latents(2, 1 + 2 * rank, seed=rank)
        step(quantizer, mine, micro_batches=1)
        everything = torch.cat(gather_objects(rows(mine)))
        on_a_latent = (quantizer.codebook[K // 3 :, None] == everything).all(2)
        return quantizer.codebook.clone(), on_a_latent

    (first, on_a_latent), (second, _) = in_processes(2, body)
    assert torch.equal(first, second) and on_a_latent.any(1).all()


@pytest.mark.parametrize("split, iterations", [((4, 3), 0), ((0, 5), 10), ((1, 0), 10), ((2, 3, 4), 10)])
def test_kmeans_on_the_latents_of_all(in_processes, split, iterations):
    """As one process that has them all, by the random numbers of process 0; also with fewer latents than codes."""

    def body(seed):
        torch.manual_seed(seed)
        quantizer, generator = make(kmeans_iterations=iterations), torch.Generator().manual_seed(seed)
        mine = latents(split[seed], 2, seed=seed)
        quantizer.initialize_codebook(mine, generator)
        return state(quantizer), torch.rand(1, generator=generator).item(), in_global_order(mine), rank()

    results = in_processes(len(split), body)
    (found, drawn, everything, _), *others = results
    assert len(everything) == sum(split) and [each[3] for each in results] == list(range(len(split)))
    for other, also_drawn, _, _ in others:
        assert all(torch.equal(found[name], other[name]) for name in found) and drawn == also_drawn
    alone = make(kmeans_iterations=iterations)
    alone.initialize_codebook(everything, torch.Generator().manual_seed(0))
    assert all(torch.equal(found[name], value) for name, value in alone.state_dict().items())
    if iterations == 0 and len(rows(everything)) >= K:
        assert (found["codebook"][:, None] == rows(everything)).all(2).any(1).all()


def test_kmeans_of_nothing_is_refused_everywhere(in_processes):
    def body(rank):
        with pytest.raises(ValueError, match="at least one latent, got none"):
            make().initialize_codebook(latents(0, 2, seed=0), torch.Generator())
        return True

    assert body(0) and all(in_processes(2, body))
