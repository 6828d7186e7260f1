"""VQ with cosine codes, rotated gradients, trained codes, and SimVQ.

Tolerances: values of single operations agree to float32's rounding of a few terms, 1e-6 (bfloat16 rounds to 4e-3: 1e-2);
sums over a batch, and products with the peer's differently ordered matrices, to 1e-5; gradients that pass through them to 1e-4.
"""

import pytest
import torch
import torch.nn.functional as F

from dae.config import VQConfig, load_config
from dae.models import Autoencoder
from dae.quantizers import GradientVectorQuantizer, SimVectorQuantizer, VectorQuantizer

D, K = 4, 9


def make(kind=VectorQuantizer, **changes):
    torch.manual_seed(0)
    return kind(VQConfig(codebook_size=K, **changes), D)


def features(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rows(z):
    return z.movedim(1, -1).flatten(0, -2)


KINDS = [VectorQuantizer, GradientVectorQuantizer, SimVectorQuantizer]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_nearest_code_and_lookup(kind, metric):
    quantizer, z = make(kind, metric=metric), features(2, D, 4, 4)
    quantizer.initialize_codebook(features(3, D, 4, 4, seed=2), torch.Generator().manual_seed(0))
    out = quantizer(z)
    point, codes = quantizer.placed(rows(z)), quantizer.codes()
    assert torch.equal(out.indices.flatten(), torch.cdist(point, codes).argmin(1))
    torch.testing.assert_close(quantizer.lookup(out.indices), out.latents)
    if metric == "cosine":
        torch.testing.assert_close(codes.norm(dim=1), torch.ones(K))
        torch.testing.assert_close(out.latents.norm(dim=1), torch.ones(2, 4, 4))
        assert torch.equal(quantizer(3 * z).indices, out.indices), "lengths do not count"


def test_cosine_averages_stay_on_the_sphere():
    """Codes follow unit vectors, and a dead one moves onto one."""
    quantizer = make(metric="cosine", ema_decay=0.5, revive_threshold=0.5)
    for seed in range(20):
        quantizer.observe(quantizer(5 * features(2, D, 4, 4, seed=seed)))
        quantizer.update_codebook()
        torch.testing.assert_close(quantizer.codebook.norm(dim=1), torch.ones(K))
    quantizer.sample_indices(5 * features(1, D, 2, 2), 0.5)


@pytest.mark.parametrize("kind", KINDS)
def test_rotated_gradient(kind):
    """|code| / |z| times the rotation that takes z to its code."""
    quantizer, z = make(kind, gradient="rotation"), features(1, D, 1, 1).double().requires_grad_()
    out = quantizer(z)
    code, x = quantizer.lookup(out.indices).double().flatten(), z.detach().flatten()
    e, q = x / x.norm(), code / code.norm()
    w = (e + q) / (e + q).norm()
    rotation = torch.eye(D).double() - 2 * torch.outer(w, w) + 2 * torch.outer(q, e)
    jacobian = torch.stack([torch.autograd.grad(v, z, retain_graph=True)[0].flatten() for v in out.latents.flatten()])
    torch.testing.assert_close(jacobian, code.norm() / x.norm() * rotation, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("metric", ["l2", "cosine"])
@pytest.mark.parametrize("kind", [GradientVectorQuantizer, SimVectorQuantizer])
def test_the_codes_are_trained_by_the_loss(kind, metric):
    quantizer, z = make(kind, metric=metric, commitment_weight=0.25), features(2, D, 4, 4).requires_grad_()
    out = quantizer(z)
    codes = rows(quantizer.lookup(out.indices))
    torch.testing.assert_close(out.loss, 1.25 * (quantizer.placed(rows(z)) - codes).square().mean())
    before = (quantizer.placed(rows(z.detach())) - codes.detach()).square().mean()
    optimizer = torch.optim.SGD(quantizer.parameters(), lr=0.05)
    for _ in range(50):
        optimizer.zero_grad()
        quantizer(z.detach()).loss.backward()
        optimizer.step()
    after = (quantizer.placed(rows(z.detach())) - rows(quantizer.lookup(quantizer(z).indices))).square().mean()
    assert after < (0.9 if metric == "l2" else 1.0) * before
    assert len(list(quantizer.parameters())) == 1


def test_dead_codes_of_a_trained_codebook_come_back_and_stay():
    """A revived code has an average count: with the next updates it is used, and does not move again."""
    quantizer = make(GradientVectorQuantizer, revive_threshold=0.2, ema_decay=0.9)
    with torch.no_grad():
        quantizer.codebook[3] = 1e4  # never the nearest
    z = features(8, D, 4, 4)
    for _ in range(30):
        quantizer.observe(quantizer(z))
        quantizer.update_codebook()
        if quantizer.codebook[3].abs().max() < 1e3:
            break
    assert torch.isin(quantizer.codebook[3], z).all(), "it is one of the latents"
    place = quantizer.codebook[3].clone()
    for _ in range(5):
        quantizer.observe(quantizer(z))
        quantizer.update_codebook()
    assert torch.equal(quantizer.codebook[3], place) and (quantizer(z).indices == 3).any()


def test_simvq_moves_every_code():
    quantizer, z = make(SimVectorQuantizer), features(1, D, 1, 1)
    before, basis = quantizer.codes().detach().clone(), quantizer.basis.clone()
    quantizer(z).loss.backward()
    torch.optim.SGD(quantizer.parameters(), lr=1.0).step()
    assert (quantizer.codes() - before).abs().amax(1).min() > 1e-4 and torch.equal(quantizer.basis, basis)


@pytest.mark.parametrize("gradient", ["ste", "rotation"])
def test_peer_simvq(gradient):
    peer = pytest.importorskip("vector_quantize_pytorch").SimVQ(D, K, channel_first=True, rotation_trick=gradient == "rotation")
    ours = make(SimVectorQuantizer, gradient=gradient, commitment_weight=0.25)
    with torch.no_grad():
        ours.basis.copy_(peer.frozen_codebook)
        ours.map.weight.copy_(peer.code_transform.weight)
    compare(ours, peer, ours.map.weight, peer.code_transform.weight)


@pytest.mark.parametrize("metric", ["l2", "cosine"])
@pytest.mark.parametrize("gradient", ["ste", "rotation"])
def test_peer_vq(metric, gradient):
    """Codes and indices, of a trained codebook in l2 and of one that follows averages on the sphere."""
    module, trained = pytest.importorskip("vector_quantize_pytorch"), metric == "l2"
    ours = make(GradientVectorQuantizer if trained else VectorQuantizer, gradient=gradient, metric=metric)
    peer = module.VectorQuantize(
        D, K, learnable_codebook=trained, ema_update=not trained, accept_image_fmap=True, commitment_weight=1.0,
        rotation_trick=gradient == "rotation", use_cosine_sim=metric == "cosine",
    )  # fmt: skip
    with torch.no_grad():
        ours.codebook.copy_(peer._codebook.embed[0])
    peer.eval()
    z = features(2, D, 3, 3)
    latents, indices, _ = peer(z)
    out = ours(z)
    assert torch.equal(out.indices, indices)
    torch.testing.assert_close(out.latents, latents, rtol=1e-5, atol=1e-6)


def compare(ours, peer, mine, theirs):
    z, cotangent = features(2, D, 3, 3), features(2, D, 3, 3, seed=5)
    a, b = z.clone().requires_grad_(), z.clone().requires_grad_()
    out, (latents, indices, loss) = ours(a), peer(b)
    assert torch.equal(out.indices, indices)
    torch.testing.assert_close(out.latents, latents, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(out.loss, loss, rtol=1e-5, atol=1e-6)
    found = torch.autograd.grad((out.latents * cotangent).sum() + out.loss, [a, mine])
    wanted = torch.autograd.grad((latents * cotangent).sum() + loss, [b, theirs])
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["vq_gradient", "simvq"])
@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_saved_and_loaded_and_frozen(tmp_path, name, metric):
    config = load_config(
        None, [f"autoencoder.bottleneck={name}", f"autoencoder.vq.metric={metric}", "autoencoder.base_channels=8"]
    )
    torch.manual_seed(0)
    model = Autoencoder(config.autoencoder, 1, 8)
    images = torch.rand(2, 1, 8, 8) * 2 - 1
    model.eval().save_pretrained(tmp_path / "model")
    again = Autoencoder.from_pretrained(tmp_path / "model", torch_dtype=torch.bfloat16)
    indices = again.encode(images.bfloat16()).indices
    assert again.decode_indices(indices).sample.isfinite().all()
    model.freeze_latent()
    assert not [p for p in model.bottleneck.parameters() if p.requires_grad]
    with pytest.raises(RuntimeError, match="the latent is frozen"):
        model.bottleneck.observe(model.encode(images))


def test_a_cosine_code_is_compared_on_the_sphere():
    quantizer = make(metric="cosine")
    z = features(1, D, 2, 2)
    assert torch.equal(quantizer.sample_indices(z, 1e-6), quantizer(z).indices)
    assert F.cosine_similarity(rows(quantizer(z).latents), rows(z)).min() > 0
