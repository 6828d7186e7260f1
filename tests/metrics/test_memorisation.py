"""Memorisation: samples against training images, held-out images as the yardstick."""

import math

import pytest
import torch

from dae.metrics import memorisation


def images(rows, seed, shape=(1, 4, 4)):
    return torch.rand(rows, *shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


TRAIN, HELDOUT = images(300, 0), images(200, 1)


def test_copies_are_found():
    order = torch.randperm(300, generator=torch.Generator().manual_seed(2))[:50]
    result = memorisation(TRAIN[order], TRAIN, HELDOUT)
    assert result.share_samples == 1.0
    assert torch.equal(result.nearest_index, order)
    assert (result.nearest_distance == 0).all()
    assert result.share_heldout == 0.01
    assert (result.heldout_distance < result.threshold).sum() == 2


def test_fresh_samples_are_not_copies():
    result = memorisation(images(1000, 3), TRAIN, HELDOUT)
    # The threshold is the 3rd smallest of 200: a share of 1.5 % is expected, and 6 % is ten deviations of binomial noise,
    # or the threshold itself three times too high a quantile.
    assert result.share_samples < 0.06
    assert (result.nearest_distance > 0).all()


def test_a_mixture_of_copies_and_fresh_samples():
    far = torch.ones(30, 1, 4, 4) * 3
    assert memorisation(torch.cat([TRAIN[:10], far]), TRAIN, HELDOUT).share_samples == 0.25


def test_distance_is_the_root_mean_square_a_pixel():
    black, white, grey = (torch.full((1, 3, 2, 5), value) for value in (-1.0, 1.0, 0.25))
    result = memorisation(torch.cat([white, grey]), black, white)
    assert result.nearest_distance.tolist() == [2.0, 1.25]
    assert result.heldout_distance.tolist() == [2.0]


def test_nearest_agrees_with_the_definition():
    samples = images(37, 4)
    result = memorisation(samples, TRAIN, HELDOUT, block=8)
    distance = (samples.double()[:, None] - TRAIN.double()[None]).square().mean((2, 3, 4)).sqrt()
    assert torch.equal(result.nearest_index, distance.argmin(1))
    torch.testing.assert_close(result.nearest_distance, distance.min(1).values, rtol=1e-14, atol=0)  # the order of 16 terms


@pytest.mark.parametrize("block", [1, 7, 60, 5000])
def test_block_size_does_not_matter(block):
    samples, train, heldout = images(20, 4), TRAIN[:60], HELDOUT[:30]
    expected = memorisation(samples, train, heldout)
    result = memorisation(samples, train, heldout, block=block)
    assert torch.equal(result.nearest_index, expected.nearest_index)
    assert torch.equal(result.nearest_distance, expected.nearest_distance)
    assert result.threshold == expected.threshold


@pytest.mark.parametrize(("rows", "below"), [(1, 0), (49, 0), (50, 1), (149, 1), (150, 2), (360, 4), (1000, 10)])
def test_heldout_share_is_one_percent_as_nearly_as_the_count_allows(rows, below):
    result = memorisation(TRAIN[:1], TRAIN, images(rows, 5))
    assert result.share_heldout == pytest.approx(below / rows, rel=1e-15)
    assert result.threshold == result.heldout_distance.sort().values[below].item()
    assert result.share_samples == 1.0


def test_copies_among_the_heldout_images():
    result = memorisation(torch.cat([TRAIN[:3], HELDOUT[:1]]), TRAIN, torch.cat([HELDOUT[:50], TRAIN[:50]]))
    assert 0 < result.threshold < 1e-300
    assert result.share_heldout == 0.5
    assert result.share_samples == 0.75


def test_errors():
    for empty in range(3):
        arguments = [TRAIN, TRAIN, HELDOUT]
        arguments[empty] = TRAIN[:0]
        with pytest.raises(ValueError, match=f"{('samples', 'train', 'heldout')[empty]}: expected images, got none"):
            memorisation(*arguments)
    with pytest.raises(ValueError, match=r"one size, got \(1, 4, 4\) \(train\) and \(1, 2, 4\) \(samples\)"):
        memorisation(TRAIN[:, :, :2], TRAIN, HELDOUT)
    with pytest.raises(ValueError, match="samples: expected finite pixels"):
        memorisation(TRAIN * math.nan, TRAIN, HELDOUT)
    with pytest.raises(ValueError, match="block: expected at least 1"):
        memorisation(TRAIN, TRAIN, HELDOUT, block=0)
    with pytest.raises(TypeError, match=r"heldout: .* got torch\.int16"):
        memorisation(TRAIN, TRAIN, HELDOUT.short())


def test_images_held_as_8_bits_give_the_same_bits():
    from dae.metrics import as_float

    generator = torch.Generator().manual_seed(0)
    held = [torch.randint(0, 256, (n, 3, 6, 6), dtype=torch.uint8, generator=generator) for n in (20, 30, 60)]
    a, b = memorisation(*held), memorisation(*map(as_float, held))
    assert torch.equal(a.nearest_distance, b.nearest_distance) and torch.equal(a.nearest_index, b.nearest_index)
    assert a.threshold == b.threshold
