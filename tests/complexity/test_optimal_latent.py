"""The autoencoder identity: the infimum over latents and generators is that over encoders and generators."""

import pytest
import torch

from dae.complexity.families import ConvDecoders, LinearMaps, LipschitzNetworks, MLPs
from dae.complexity.generator_distance import generator_distance
from dae.complexity.optimal_latent import optimal_latent


def correlated(N=300, D=6, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(N, D, generator=generator) @ torch.randn(D, D, generator=generator) + 4
    return x.to(dtype)


def variances(x):
    return torch.linalg.eigvalsh(torch.cov(x.T, correction=0)).flip(0)


@pytest.mark.parametrize("k", [1, 3, 6, 8])
def test_linear_maps_reach_the_error_of_pca(k):
    x = correlated()
    found = optimal_latent(x, LinearMaps(), latent_dim=k, heldout=0)
    expected = variances(x)[k:].sum().item() / 6
    assert found.estimate.value == pytest.approx(expected, rel=1e-9, abs=1e-12)
    assert found.estimate.bound == "exact" and found.codes.shape == (300, k)
    torch.testing.assert_close((found.generator(found.codes) - x).square().mean().item(), expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found.encoder(x), found.codes)


def test_frechet_leaves_the_tail():
    x = correlated()
    tail = torch.linalg.eigvalsh(torch.cov(x.T)).flip(0)[2:].sum().item()
    found = optimal_latent(x, LinearMaps(), "frechet", latent_dim=2, heldout=0).estimate
    assert found.value == pytest.approx(tail, rel=1e-6)  # roots of eigenvalues that are 0 to rounding


@pytest.mark.parametrize(("coder", "decoder"), [(0.5, 0.8), (0.5, 10.0), (10.0, 0.5), (4.0, 0.1)])
def test_bounded_linear_maps_shrink_by_the_product_of_their_norms(coder, decoder):
    x = correlated()
    product = min(1.0, coder * decoder)
    expected = ((1 - product) ** 2 * variances(x)[:2].sum() + variances(x)[2:].sum()).item() / 6
    found = optimal_latent(x, LinearMaps(decoder), latent_dim=2, encoder=LinearMaps(coder), heldout=0)
    assert found.estimate.value == pytest.approx(expected, rel=1e-9)
    for module, inputs, norm in ((found.encoder, x, coder), (found.generator, found.codes, decoder)):
        jacobian = torch.func.jacrev(lambda row, module=module: module(row[None])[0])(inputs[0])
        assert torch.linalg.matrix_norm(jacobian, 2) <= norm * (1 + 1e-12)


def test_no_other_latent_is_better():
    x = correlated(dtype=torch.float32)
    best = optimal_latent(x, LinearMaps(), latent_dim=2, heldout=0).estimate.value
    for z in (x[:, :2], torch.randn(300, 2, generator=torch.Generator().manual_seed(1)), x.square()[:, :2]):
        assert generator_distance(z, x, LinearMaps(), "reconstruction", heldout=0).value > best
    principal = torch.linalg.svd(x - x.mean(dim=0), full_matrices=False)[0][:, :2]
    same = generator_distance(principal, x, LinearMaps(), "reconstruction", heldout=0).value
    assert same == pytest.approx(best, rel=1e-5)  # float32


def test_training_comes_near_to_pca():
    """No encoder betters the linear one for linear generators."""
    x = correlated(400, 4, torch.float32)
    best = optimal_latent(x, LinearMaps(), latent_dim=2, heldout=0, seeds=(0,)).estimate.value
    found = optimal_latent(
        x, LinearMaps(), latent_dim=2, encoder=MLPs(32, 1), heldout=0, seeds=(0,), steps=150, learning_rate=0.04
    ).estimate
    assert best * (1 - 1e-5) < found.value < 1.1 * best
    assert found.bound == "upper"


def test_a_curve_needs_one_value():
    """One value tells the place on a curve, which no linear map can."""
    angle = 3 * torch.rand(500, 1, generator=torch.Generator().manual_seed(0))
    x = torch.cat([angle.cos(), angle.sin()], dim=1)
    linear = optimal_latent(x, LinearMaps(), latent_dim=1).estimate
    able = optimal_latent(x, MLPs(32, 1), latent_dim=1, steps=200, seeds=(0, 1))
    assert able.estimate.value < 0.2 * linear.value
    assert len(able.estimate.values) == 2 and able.codes.shape == (500, 1)
    assert "MLPs" in able.estimate.family and able.estimate.counts == (200, 250)


def test_unpaired_and_bounded():
    x = correlated(200, 3, torch.float32)
    found = optimal_latent(
        x, LipschitzNetworks(0.5, 8, 1), "energy", latent_dim=2, encoder=LinearMaps(1.0), steps=10, batch_size=64, seeds=(0,)
    )
    z = found.codes.detach()
    assert (torch.pdist(z) <= torch.pdist(x) * (1 + 1e-5)).all()  # float32
    assert (torch.pdist(found.generator(z).detach()) <= 0.5 * torch.pdist(z) + 1e-5).all()


def test_images():
    x = torch.randn(30, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    found = optimal_latent(x, ConvDecoders(0.5, 8), latent_dim=(2, 2, 2), steps=2, seeds=(0,))
    assert found.codes.shape == (30, 2, 2, 2) and found.generator(found.codes).shape == x.shape


def test_the_same_seeds_give_the_same_latent():
    x = correlated(60, 3, torch.float32)
    first, second = (optimal_latent(x, MLPs(4, 1), latent_dim=1, steps=3, seeds=(5,)) for _ in range(2))
    assert first.estimate == second.estimate and torch.equal(first.codes, second.codes)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"latent_dim": 0}, ValueError, "latent_dim >= 1"),
        ({"latent_dim": (2, 0)}, ValueError, "latent_dim >= 1"),
        ({"latent_dim": 1.5}, TypeError, "latent_dim as an int"),
        ({"family": ConvDecoders()}, ValueError, "convolutional decoders map"),
        ({"distance": "reconstrution"}, ValueError, "did you mean 'reconstruction'"),
        ({"data": torch.full((5, 2), torch.nan)}, ValueError, "NaN"),
        ({"data": torch.ones(5, 2)}, ValueError, "data: expected points that differ, got 5 equal ones"),
        ({"data": torch.ones(1, 2)}, ValueError, "data: expected at least 2 points"),
        ({"latent_dim": ()}, ValueError, r"latent_dim .* got \(\)"),
        ({"family": "linear"}, TypeError, "family as a GeneratorFamily.* got 'linear'"),
        ({"family": LinearMaps}, TypeError, r"got the class LinearMaps; call it: LinearMaps\(\)"),
        ({"encoder": "x"}, TypeError, "encoder as a GeneratorFamily.* got 'x'"),
    ],
)
def test_bad_input(changes, error, message):
    with pytest.raises(error, match=message):
        optimal_latent(**{"data": correlated(), "family": MLPs(4, 1), "latent_dim": 2} | changes)
