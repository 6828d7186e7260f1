"""The small classifier: accuracy, features, reproducibility, files."""

import re

import pytest
import torch
from safetensors.torch import save_file

from dae.metrics import (
    Classifier,
    accuracy,
    equal_count_frechet,
    extract_features,
    frechet_distance,
    predict,
    rotation_task,
    train_classifier,
)


@pytest.fixture(scope="module")
def trained(digits):
    images, labels, _, _ = digits
    return train_classifier(images, labels, 10, steps=200, seed=0, progress=False, name="digits")


def quick(digits, **options):
    images, labels, _, _ = digits
    return train_classifier(images[:200], labels[:200], 10, **{"steps": 3, "seed": 0, "progress": False, **options})


def same_weights(a, b):
    b = b.state_dict()
    return all(torch.equal(tensor, b[name]) for name, tensor in a.state_dict().items())


@pytest.mark.parametrize("steps", range(1, 12))
def test_any_number_of_steps(steps):
    """Five steps once divided by zero: a fifth of them is a warm-up of one step, from its start to its start."""
    images = torch.zeros(4, 1, 8, 8)
    classifier = train_classifier(images, torch.arange(4) % 2, 2, steps=steps, seed=0, progress=False)
    assert all(tensor.isfinite().all() for tensor in classifier.state_dict().values())


def test_held_out_accuracy(trained, digits):
    # A quarter of the steps of the shipped configuration; chance is 0.1.
    assert accuracy(trained, *digits[2:]) >= 0.97


def test_features_separate_what_the_frechet_distance_must_separate(trained, digits):
    train, _, heldout, _ = digits
    features = extract_features(trained, train)
    assert features.shape == (len(train), trained.feature_dim) and features.dtype == torch.float32
    floor = equal_count_frechet(features, extract_features(trained, heldout), seed=0).mean
    blurred = torch.nn.functional.avg_pool2d(heldout, 3, 1, padding=1, count_include_pad=False)
    noisy = heldout + 0.4 * torch.randn(heldout.shape, generator=torch.Generator().manual_seed(0))
    for worse in (blurred, noisy, heldout.roll(1, 3), digits[2][digits[3] < 5].repeat(2, 1, 1, 1)):
        distance = equal_count_frechet(features, extract_features(trained, worse), count=len(heldout) // 2, seed=0).mean
        assert distance > 2 * floor


def test_features_are_standardised(trained, digits):
    features = extract_features(trained, digits[0])
    # Variance 1 over the jittered batches: plain images are near it. Before standardisation they span a factor of 100.
    assert ((features.var(0) > 0.3) & (features.var(0) < 3)).all()
    raw = trained.standardise.running_var
    assert raw.max() > 30 * raw.min()


def test_one_seed_one_classifier_bit_by_bit(digits):
    first = quick(digits)
    assert same_weights(first, quick(digits))
    assert first.identifier == quick(digits).identifier
    assert not same_weights(first, quick(digits, seed=1))


def test_global_random_state_neither_matters_nor_changes(digits):
    torch.manual_seed(1)
    first = quick(digits)
    torch.manual_seed(2)
    before = torch.random.get_rng_state()
    assert same_weights(first, quick(digits))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_training_works_without_gradients_switched_on(digits):
    with torch.no_grad():
        assert same_weights(quick(digits), quick(digits))


def test_the_batch_does_not_matter(trained, digits):
    x = digits[2][:7]
    whole = extract_features(trained, x)
    # Convolutions may sum in another order for another batch; float32 features of order 1.
    torch.testing.assert_close(extract_features(trained, x, batch_size=2), whole, rtol=1e-4, atol=1e-5)
    assert torch.equal(predict(trained, x, 3), predict(trained, x, 7))
    assert predict(trained, x, 3).dtype == torch.int64


def test_helpers_accept_no_images_and_leave_the_mode_alone(trained, digits):
    none = digits[2][:0]
    assert extract_features(trained, none).shape == (0, trained.feature_dim)
    assert predict(trained, none).shape == (0,)
    fresh = Classifier(1, 10).train()
    before = extract_features(fresh, digits[2][:9])
    assert fresh.training
    assert torch.equal(extract_features(fresh, digits[2][:9]), before), "running statistics moved"


@pytest.mark.parametrize(("channels", "side", "patch"), [(1, (8, 8), 1), (3, (9, 13), 1), (3, (40, 33), 2), (4, (8, 8), 8)])
def test_any_resolution_and_channels(channels, side, patch):
    classifier = Classifier(channels, 5, patch=patch).eval()
    x = torch.rand(2, channels, *side)
    assert classifier(x).shape == (2, 5)
    assert classifier.features(x).shape == (2, classifier.feature_dim)
    assert classifier.feature_dim <= 64


@pytest.mark.parametrize(("side", "patch"), [(8, 1), (31, 1), (32, 2), (64, 4), (256, 8)])
def test_patch_follows_the_resolution(side, patch):
    images = torch.rand(2, 1, side, side)
    classifier = train_classifier(images, torch.tensor([0, 1]), 2, steps=1, seed=0, progress=False)
    assert classifier.patch == patch


def test_save_and_load(trained, digits, tmp_path):
    path = tmp_path / "classifier.safetensors"
    trained.save(path)
    loaded = Classifier.load(path)
    assert same_weights(trained, loaded)
    assert loaded.identifier == trained.identifier
    assert not loaded.training
    assert torch.equal(extract_features(loaded, digits[2]), extract_features(trained, digits[2]))


def test_save_keeps_the_architecture(tmp_path):
    Classifier(3, 7, width=8, patch=2, name="photos").save(tmp_path / "c")
    loaded = Classifier.load(tmp_path / "c")
    assert (loaded.channels, loaded.num_classes, loaded.width, loaded.patch, loaded.name) == (3, 7, 8, 2, "photos")


def test_identifier_is_of_name_and_weights(trained):
    assert re.fullmatch(r"digits-classifier-[0-9a-f]{12}", trained.identifier)
    other = Classifier(1, 10, name="digits")
    assert other.identifier != trained.identifier
    before = other.identifier
    with torch.no_grad():
        other.to_logits.bias[0] += 1
    assert other.identifier != before


def test_load_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match="no classifier file"):
        Classifier.load(tmp_path / "missing")
    (tmp_path / "text").write_text("not safetensors")
    with pytest.raises(ValueError, match="not a safetensors file"):
        Classifier.load(tmp_path / "text")
    save_file({"x": torch.zeros(1)}, str(tmp_path / "other"))
    with pytest.raises(ValueError, match=r"expected 'dae-classifier-1' in the metadata"):
        Classifier.load(tmp_path / "other")


def test_rotation_task():
    images = torch.rand(3, 2, 4, 4)
    rotated, labels = rotation_task(images)
    assert rotated.shape == (12, 2, 4, 4)
    assert labels.tolist() == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3
    for image, label, original in zip(rotated, labels.tolist(), images.repeat(4, 1, 1, 1), strict=True):
        assert torch.equal(image.rot90(-label, (1, 2)), original)
    with pytest.raises(ValueError, match="square images, got 4 x 5"):
        rotation_task(torch.rand(1, 1, 4, 5))


def test_errors(digits):
    images, labels = digits[0][:20], digits[1][:20]
    train = lambda *a, **o: train_classifier(*a, **{"steps": 1, "seed": 0, "progress": False, **o})  # noqa: E731
    with pytest.raises(TypeError, match=r"labels: expected int64 in a dense tensor, got torch\.int32"):
        train(images, labels.int(), 10)
    with pytest.raises(TypeError, match=r"images: .* got torch\.int16"):
        train(images.short(), labels, 10)
    with pytest.raises(ValueError, match=r"labels: expected shape \(20,\), one label an image, got \(19,\)"):
        train(images, labels[1:], 10)
    with pytest.raises(ValueError, match="labels: expected 0 to 2, got"):
        train(images, labels, 3)
    with pytest.raises(ValueError, match=r"at least 1 step .* got 0 and 128"):
        train(images, labels, 10, steps=0)
    with pytest.raises(ValueError, match="batch_size of at least 2, got 1 and 1"):
        train(images, labels, 10, batch_size=1)
    with pytest.raises(ValueError, match="images: expected at least 2, got 1"):
        train(images[:1], labels[:1], 10)
    with pytest.raises(ValueError, match="at least 1"):
        Classifier(0, 10)
    with pytest.raises(ValueError, match="patch at most 8"):
        Classifier(1, 10, patch=9)
    classifier = Classifier(1, 10)
    for wrong in (torch.rand(2, 3, 8, 8), torch.rand(2, 1, 8, 7)):
        with pytest.raises(ValueError, match=r"x: expected \[N, 1, H, W\], H and W at least 8"):
            classifier(wrong)
    with pytest.raises(ValueError, match="at least 1, got none"):
        accuracy(classifier, images[:0], labels[:0])


def test_frechet_distance_of_the_features_is_finite(trained, digits):
    assert 0 < frechet_distance(extract_features(trained, digits[2][:180]), extract_features(trained, digits[2][180:])) < 64
