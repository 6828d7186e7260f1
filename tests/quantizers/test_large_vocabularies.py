"""Vocabularies that no table holds: the whole chain counts, caches and predicts their codes digit by digit."""

import math

import pytest
import torch

from dae.config import PriorConfig, load_config
from dae.data.cache import TokenCache
from dae.diagnostics.report_card import code_length, encode_images
from dae.evaluation.reconstruction import describe_latent
from dae.metrics import CodebookUsage, code_entropy_rate
from dae.models import ARPrior
from dae.quantizers import bottleneck_class
from dae.quantizers.tokens import digits_of
from dae.sampling import sample_tokens
from dae.training.engine import LocalEngine
from dae.training.in_memory import encode, train_autoencoder, train_prior
from dae.training.rehearsal import rehearse_chain

LARGE = {  # 2^40 codes each
    "rvq": ["autoencoder.vq.codebook_size=32", "autoencoder.rvq.num_quantizers=8", "autoencoder.latent_channels=4"],
    "gvq": ["autoencoder.vq.codebook_size=32", "autoencoder.gvq.groups=8", "autoencoder.latent_channels=8"],
    "lfq": ["autoencoder.latent_channels=40"],
    "fsq": ["autoencoder.latent_channels=10", f"autoencoder.fsq.levels={[16] * 10}"],
}
TINY = ["autoencoder.base_channels=4", "stage1.max_train_steps=2", "stage2.max_train_steps=2", "stage1.train_batch_size=8"]
TINY += ["stage2.train_batch_size=8", "prior.width=8", "prior.depth=1", "prior.num_heads=2", "prior.max_train_steps=2"]
TINY += ["prior.train_batch_size=8", "prior.token_noise=0.5", "autoencoder.vq.kmeans_iterations=1"]


@pytest.mark.parametrize("name", LARGE)
def test_the_chain(name, tmp_path):
    config = load_config(None, [f"autoencoder.bottleneck={name}", *LARGE[name], *TINY])
    assert bottleneck_class(config.autoencoder).num_codes(config.autoencoder) == 2**40
    rehearse_chain(config, 2, 16, LocalEngine(torch.device("cpu"), "no"))
    images = torch.rand(16, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    autoencoder = train_autoencoder(images, config)
    made = encode(autoencoder, (images, torch.arange(16) % 2), (images[:8], torch.arange(8) % 2), 2, config)
    assert made.train.values_NC.dtype == torch.int64 and made.train.values_NC.max() >= 2**32
    made.save(tmp_path / "tokens")
    cache = TokenCache.load(tmp_path / "tokens", made.fingerprint)
    assert torch.equal(cache.train.values_NC, made.train.values_NC) and math.prod(cache.factors) == 2**40
    prior = train_prior(cache, config)
    tokens = sample_tokens(prior, torch.tensor([0, 1]))
    with torch.no_grad():
        assert autoencoder.decode_indices(tokens).sample.isfinite().all()
    found = describe_latent(autoencoder, {"indices": cache.train.values_NC})["codebook"]
    assert 0 < found["usage"] <= 1 and found["entropy"] <= 40
    encoded = encode_images(autoencoder, images)
    assert all(math.isfinite(bits) for bits in code_length(autoencoder, encoded, encoded, 0).values())


def test_usage_by_digits():
    factors = (2**10,) * 4
    digits = torch.tensor([[0, 5, 5, 5], [1, 5, 6, 5]])
    indices = (digits * 1024 ** torch.arange(4)).sum(-1)
    usage = CodebookUsage(2**40, factors).update(indices[:1]).update(indices[1:])
    assert usage.usage == 6 / 4096 and usage.entropy == pytest.approx(2.0, rel=1e-14) and usage.counts.sum() == 8
    assert code_entropy_rate(indices[:, None], 2**40, factors) == usage.entropy
    with pytest.raises(ValueError, match=r"expected 0 to 1099511627775, got 0 to 1099511627776"):
        usage.update(torch.tensor([0, 2**40]))
    for wrong in (None, (2**10,) * 3, (2**40,)):
        with pytest.raises(ValueError, match="1,099,511,627,776 codes are too many for a table; expected factors"):
            CodebookUsage(2**40, wrong)


def test_noise_reaches_the_lowest_digit():
    """A float32 draw has 24 bits: one draw for all digits of 2^40 codes would leave the lowest at 0."""
    factors = (2**10,) * 4
    prior = ARPrior(
        PriorConfig(width=8, depth=1, num_heads=2, token_noise=0.999),
        vocab_size=2**40,
        sequence_length=64,
        num_classes=1,
        factors=factors,
    )
    noisy = prior.corrupt(torch.zeros(8, 64, dtype=torch.int64))
    assert all(len(digit.unique()) > 200 for digit in digits_of(noisy, factors).flatten(0, 1).T)
