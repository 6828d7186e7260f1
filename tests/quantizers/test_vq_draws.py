"""Drawn codes depend on differences between features and codes alone: no origin and no scale shows."""

import pytest
import torch

from dae.config import VQConfig
from dae.quantizers.vq import VectorQuantizer


def drawn(codebook_KD, z_ND, temperature, seed=0):
    """Indices [N] of the features, each a pixel."""
    quantizer = VectorQuantizer(VQConfig(codebook_size=len(codebook_KD)), codebook_KD.shape[1])
    quantizer.codebook.copy_(codebook_KD)
    torch.manual_seed(seed)
    return quantizer.sample_indices(z_ND.T[None, :, None], temperature).flatten()


def lattice(rows, columns, seed):
    """Multiples of 1/64 below 8: shifts by up to 2^17 and powers of two are exact in float32."""
    return torch.randint(-512, 512, (rows, columns), generator=torch.Generator().manual_seed(seed)) / 64


CODES, Z = lattice(64, 4, 0), lattice(500, 4, 1)


@pytest.mark.parametrize("temperature", [1e-9, 0.5, 3.0])
def test_neither_shift_nor_scale_changes_a_draw(temperature):
    expected = drawn(CODES, Z, temperature)
    for shift in (1000.0, -(2.0**17)):
        assert torch.equal(drawn(CODES + shift, Z + shift, temperature), expected)
    for power in (-60, -30, 30, 60):  # squares from 1e-36 to 1e38, of which float32 holds the roots alone
        assert torch.equal(drawn(CODES * 2.0**power, Z * 2.0**power, temperature), expected)


def test_cold_draws_are_the_nearest_codes_far_from_the_origin():
    nearest = torch.cdist(Z.double(), CODES.double(), compute_mode="donot_use_mm_for_euclid_dist")
    index = drawn(CODES + 1000, Z + 1000, 1e-9)
    assert torch.equal(nearest.gather(1, index[:, None])[:, 0], nearest.amin(dim=1))  # of ties either


@pytest.mark.parametrize("temperature", [1e-40, 0.5, 1e40])
def test_features_that_are_codes_get_themselves(temperature):
    codes = CODES.unique(dim=0)
    assert torch.equal(drawn(codes, codes, temperature), torch.arange(len(codes)))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_features_that_are_not_finite_are_refused(value):
    with pytest.raises(ValueError, match="sample_indices needs finite features and codes"):
        drawn(CODES, Z.index_fill(0, torch.tensor([3]), value), 0.5)
    codes = CODES.clone()
    codes[5, 1] = value
    with pytest.raises(ValueError, match="sample_indices needs finite features and codes"):
        drawn(codes, Z, 0.5)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_code_that_is_not_finite_is_not_used_and_comes_back(value):
    quantizer = VectorQuantizer(VQConfig(codebook_size=64), 4)
    quantizer.codebook.copy_(CODES)
    quantizer.codebook[5, 1] = quantizer.average_sums[5, 1] = value
    features = Z.T[None, :, None]
    encoding = quantizer(features)
    assert encoding.latents.isfinite().all() and encoding.loss.isfinite() and not (encoding.indices == 5).any()
    quantizer.config.revive_threshold = 0.99
    for _ in range(3):
        quantizer.observe(quantizer(features))
        quantizer.update_codebook()
    assert quantizer.codebook.isfinite().all()
