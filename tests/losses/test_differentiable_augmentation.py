"""Each augmentation by its formula, its range, its gradient, and that processes draw as one."""

import pytest
import torch

from dae.config import LossConfig
from dae.losses import AUGMENTATIONS, differentiable_augmentation

IMAGES = torch.rand(64, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


def drawn(kinds, images=IMAGES, seed=0):
    torch.manual_seed(seed)
    return differentiable_augmentation(images, kinds)


def test_nothing_draws_nothing():
    state = torch.get_rng_state()
    assert differentiable_augmentation(IMAGES, []) is IMAGES and torch.equal(state, torch.get_rng_state())
    with pytest.raises(ValueError, match=r"expected augmentations of \('color', 'translation', 'cutout'\), got 'flip'"):
        differentiable_augmentation(IMAGES, ["flip"])


def test_color_by_hand():
    found = drawn(["color"])
    torch.manual_seed(0)
    b, s, c = (torch.rand(64, 3) + torch.tensor([-0.5, 0, 0.5])).T.reshape(3, 64, 1, 1, 1)
    x = IMAGES + b
    grey = x.mean(1, keepdim=True)
    x = 2 * s * x + (1 - 2 * s) * grey
    whole = x.mean((1, 2, 3), keepdim=True)
    # sums of values up to 4 in another order, of 768 terms at most: some rounding errors of float32 each
    torch.testing.assert_close(found, c * x + (1 - c) * whole, rtol=1e-5, atol=4e-6)


def test_translation_moves_whole_images_by_an_eighth():
    found, seen = drawn(["translation"]), set()
    for before, after in zip(IMAGES, found, strict=True):
        framed = torch.nn.functional.pad(before, (2, 2, 2, 2))
        shifts = [(dy, dx) for dy in range(5) for dx in range(5) if torch.equal(framed[:, dy : dy + 16, dx : dx + 16], after)]
        assert len(shifts) == 1
        seen.update(shifts)
    assert {dy for dy, _ in seen} == {dx for _, dx in seen} == set(range(5))


def test_cutout_is_a_square_of_half_the_side():
    gone = drawn(["cutout"], torch.ones(512, 2, 16, 16)) == 0
    assert torch.equal(gone[:, 0], gone[:, 1])
    rows, columns = gone[:, 0].any(2), gone[:, 0].any(1)
    assert torch.equal(gone[:, 0], rows[:, :, None] & columns[:, None, :])
    for side in (rows, columns):
        assert side.sum(1).max() == 8 and side.sum(1).min() == 4, "at the border half of it is outside"
        assert side.any(0).all()


@pytest.mark.parametrize("kind", AUGMENTATIONS)
def test_gradients_pass(kind):
    images = IMAGES[:3].double().requires_grad_()
    torch.manual_seed(1)
    state = torch.get_rng_state()

    def call(x):
        torch.set_rng_state(state)
        return differentiable_augmentation(x, [kind])

    assert torch.autograd.gradcheck(call, images, fast_mode=True)
    assert not torch.equal(drawn([kind]), drawn([kind], seed=1)), "each call draws anew"


def test_two_processes_draw_as_one(in_processes):
    everything = list(AUGMENTATIONS)
    whole = drawn(everything, IMAGES[:8])
    parts = in_processes(2, lambda rank: drawn(everything, IMAGES[rank:8:2]))
    for rank, part in enumerate(parts):
        torch.testing.assert_close(part, whole[rank::2], rtol=1e-6, atol=1e-6)  # means of the same numbers


def test_the_configuration_offers_these():
    field = LossConfig.__dataclass_fields__["augment"]
    assert field.metadata["choices"] == tuple(AUGMENTATIONS)
