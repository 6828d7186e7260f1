import pytest
import torch

from dae.data import augment


def test_strength_zero_draws_nothing_and_changes_nothing():
    images = torch.randn(4, 3, 5, 5)
    before = torch.get_rng_state()
    assert augment(images, random_flip=False, random_affine=0.0) is images
    assert torch.equal(torch.get_rng_state(), before)


def test_flip_mirrors_about_half_of_the_rows_and_leaves_the_others():
    torch.manual_seed(0)
    images = torch.randn(400, 1, 4, 4)
    flipped = augment(images, random_flip=True, random_affine=0.0)
    mirrored = (flipped == images.flip(3)).flatten(1).all(1)
    kept = (flipped == images).flatten(1).all(1)
    assert (mirrored ^ kept).all()
    assert 150 < mirrored.sum() < 250


@pytest.mark.parametrize("options", [{"random_flip": True, "random_affine": 0.7}, {"random_flip": False, "random_affine": 1.0}])
def test_the_result_does_not_depend_on_the_number_of_processes(options, processes):
    images = torch.randn(12, 2, 6, 6)
    torch.manual_seed(3)
    whole = augment(images, **options)
    assert not torch.equal(whole, images)
    for world in (2, 3):
        for rank in range(world):
            processes(rank, world)
            torch.manual_seed(3)
            assert torch.equal(augment(images[rank::world], **options), whole[rank::world])


def test_affine_moves_by_what_was_drawn(monkeypatch):
    monkeypatch.setattr("dae.data.augmentation.draw_rows", lambda draw, shape, **_: torch.tensor([[1.0, 0.5, 0.5, 0.5]]))
    images = torch.arange(64.0).view(1, 1, 8, 8)
    moved = augment(images, random_flip=False, random_affine=1.0)  # 12.5 % of 8 pixels is one pixel, in x only
    assert torch.allclose(moved[..., :-1], images[..., 1:], atol=1e-4)
    assert torch.allclose(moved[..., -1], images[..., -1], atol=1e-4)  # the border is repeated


def test_affine_keeps_the_range_the_type_and_a_constant_image():
    torch.manual_seed(0)
    images = torch.rand(16, 3, 9, 7) * 2 - 1
    moved = augment(images, random_flip=True, random_affine=1.0)
    assert moved.shape == images.shape and moved.dtype == images.dtype
    assert moved.min() >= -1 - 1e-6 and moved.max() <= 1 + 1e-6
    assert torch.allclose(augment(torch.ones(4, 1, 5, 5), random_flip=True, random_affine=1.0), torch.ones(4, 1, 5, 5))


def test_rotation_is_a_rotation_on_oblong_images(monkeypatch):
    monkeypatch.setattr("dae.data.augmentation.MAX_ANGLE", torch.pi / 2)
    monkeypatch.setattr("dae.data.augmentation.draw_rows", lambda draw, shape, **_: torch.tensor([[0.5, 0.5, 1.0, 0.5]]))
    images = torch.randn(1, 1, 5, 9)
    turned = augment(images, random_flip=False, random_affine=1.0)
    assert torch.allclose(turned[0, 0, :, 2:7], torch.rot90(images[0, 0, :, 2:7], -1), atol=1e-4) or torch.allclose(
        turned[0, 0, :, 2:7], torch.rot90(images[0, 0, :, 2:7], 1), atol=1e-4
    )


def test_bad_arguments_are_named():
    with pytest.raises(TypeError, match="uint8"):
        augment(torch.zeros(1, 1, 2, 2, dtype=torch.uint8), random_flip=True, random_affine=0.0)
    with pytest.raises(ValueError, match=r"\(1, 2, 2\)"):
        augment(torch.zeros(1, 2, 2), random_flip=True, random_affine=0.0)
    with pytest.raises(ValueError, match="-1"):
        augment(torch.zeros(1, 1, 2, 2), random_flip=True, random_affine=-1.0)
