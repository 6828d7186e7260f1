"""The latent cache: posteriors come back as they were, and give samples and statistics of the right kind."""

import pytest
import torch

from dae.config import load_config
from dae.data import TrainLoader
from dae.data.cache import Fingerprint, LatentCache, PosteriorDataset, transform_fingerprint
from dae.quantizers import latent_statistics, sample_posteriors

FINGERPRINT = Fingerprint("autoencoder-1", "data-1", "plain")


def make(rows=7, augmentations=3, channels=2) -> PosteriorDataset:
    generator = torch.Generator().manual_seed(rows)
    return PosteriorDataset(torch.randn(rows, augmentations, 2 * channels, 2, 2, generator=generator), torch.arange(rows) % 3)


def save(folder):
    cache = LatentCache(make(), make(4, 1), num_classes=3, latent_size=2, fingerprint=FINGERPRINT, latent_channels=2)
    cache.save(folder)
    return cache


def test_round_trip(tmp_path):
    cache = save(tmp_path)
    loaded = LatentCache.load(tmp_path, FINGERPRINT)
    assert (loaded.latent_channels, loaded.num_classes, loaded.latent_size, loaded.fingerprint) == (2, 3, 2, FINGERPRINT)
    for before, after in ((cache.train, loaded.train), (cache.validation, loaded.validation)):
        assert torch.equal(before.values_NC, after.values_NC) and after.values_NC.dtype == torch.float32
        assert torch.equal(before.labels_N, after.labels_N)
    batch = next(iter(TrainLoader(loaded.train, 4, seed=0)))
    assert torch.equal(batch["moments"], cache.train.values_NC[batch["row"]]) and batch["moments"].shape == (4, 3, 4, 2, 2)


def test_stale_missing_and_damaged(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no latent cache in .*recipes/encode\.py"):
        LatentCache.load(tmp_path, FINGERPRINT)
    save(tmp_path)
    with pytest.raises(ValueError, match=r"latent cache .* is stale: it was made with another tokenizer and augmentation"):
        LatentCache.load(tmp_path, Fingerprint("autoencoder-2", "data-1", "other"))
    file = tmp_path / "moments.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"latent cache .* is damaged.*recipes/encode\.py"):
        LatentCache.load(tmp_path, FINGERPRINT)


def test_codes_have_no_temperature_where_there_are_none():
    """Of a KL latent the copies do not depend on prior.code_temperature; of VQ they do."""
    for bottleneck, same in (("kl", True), ("vq", False)):
        seen = {
            transform_fingerprint(
                load_config(
                    None, [f"autoencoder.bottleneck={bottleneck}", "prior.num_augmentations=2", f"prior.code_temperature={t}"]
                )
            )
            for t in (0.0, 0.5)
        }
        assert (len(seen) == 1) == same


def test_samples_have_the_moments_of_the_posterior():
    """20,000 draws: the mean of each value within 5 standard errors, its variance within 5 of sqrt(2 / n)."""
    mean, log_variance = torch.tensor([-1.0, 2.0]), torch.tensor([-2.0, 1.0])
    moments = torch.cat([mean, log_variance]).view(1, 4, 1, 1).expand(20000, -1, -1, -1)
    torch.manual_seed(0)
    drawn = sample_posteriors(moments).flatten(1)
    deviation = (0.5 * log_variance).exp()
    assert ((drawn.mean(0) - mean).abs() < 5 * deviation / 20000**0.5).all()
    assert ((drawn.var(0) / log_variance.exp() - 1).abs() < 5 * (2 / 20000) ** 0.5).all()
    torch.manual_seed(0)
    assert torch.equal(sample_posteriors(moments).flatten(1), drawn)


def test_statistics_are_those_of_the_samples():
    """By hand: one channel, two posteriors N(-1, 4) and N(3, 0): mean 1, variance 4 + (4 + 0) / 2."""
    moments = torch.tensor([[-1.0, 4.0], [3.0, 0.0]])
    moments[:, 1] = moments[:, 1].log().clamp(min=-30)  # what the bottleneck clamps to
    mean, std = latent_statistics(moments.view(2, 1, 2, 1, 1))
    assert mean.item() == 1.0 and std.item() == pytest.approx(6**0.5, rel=1e-6)
    assert mean.dtype == std.dtype == torch.float32


def test_statistics_of_a_diverged_autoencoder():
    moments = torch.zeros(3, 1, 2, 1, 1)
    moments[1, 0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"expected finite, positive.*autoencoder"):
        latent_statistics(moments)
