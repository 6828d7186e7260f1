"""Residual and grouped vector quantization: what each quantizer sees, the index of all, gradients, codebooks.

Tolerances: values of single operations agree to float32's rounding of a few terms, 1e-6 (bfloat16 rounds to 4e-3: 1e-2);
sums over a batch, and products with the peer's differently ordered matrices, to 1e-5; gradients that pass through them to 1e-4.
"""

import pytest
import torch

from dae.config import AutoencoderConfig, load_config
from dae.models import Autoencoder
from dae.quantizers import GroupedQuantizer, ResidualQuantizer, VectorQuantizer
from dae.quantizers.tokens import digits_of

D, K = 6, 5
KINDS = {"rvq": ResidualQuantizer, "gvq": GroupedQuantizer}


def configured(name, count=3, **vq):
    config = AutoencoderConfig(bottleneck=name, latent_channels=D)
    config.vq.codebook_size = K
    config.rvq.num_quantizers = config.gvq.groups = count
    for key, value in vq.items():
        setattr(config.vq, key, value)
    return config


def make(name, count=3, **vq):
    torch.manual_seed(0)
    return KINDS[name].build(configured(name, count, **vq))


def features(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rows(z):
    return z.movedim(1, -1).flatten(0, -2)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_by_hand(name, dtype):
    quantizer, z = make(name), features(2, D, 3, 4).to(dtype)
    out = quantizer(z)
    digits = digits_of(out.indices, [K] * 3).flatten(0, -2)
    codebooks, point = [q.codebook for q in quantizer.quantizers], rows(z).float()
    if name == "rvq":
        residual, wanted, loss = point, torch.zeros_like(point), 0.0
        for q in range(3):
            chosen = torch.cdist(residual, codebooks[q]).argmin(1)
            assert torch.equal(chosen, digits[:, q])
            loss += 0.25 * (residual - codebooks[q][chosen]).square().mean()
            residual, wanted = residual - codebooks[q][chosen], wanted + codebooks[q][chosen]
    else:
        parts = [torch.cdist(x, c).argmin(1) for x, c in zip(point.chunk(3, 1), codebooks, strict=True)]
        assert torch.equal(torch.stack(parts, 1), digits)
        codes = [c[i] for c, i in zip(codebooks, parts, strict=True)]
        wanted = torch.cat(codes, 1)
        loss = sum(0.25 * (x - c).square().mean() for x, c in zip(point.chunk(3, 1), codes, strict=True))
    torch.testing.assert_close(rows(out.latents), wanted.to(dtype), rtol=1e-2 if dtype == torch.bfloat16 else 1e-6, atol=1e-6)
    torch.testing.assert_close(out.loss, loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(quantizer.lookup(out.indices).to(dtype), out.latents)


@pytest.mark.parametrize("name", KINDS)
def test_straight_through_once(name):
    quantizer, z, cotangent = make(name), features(2, D, 3, 3).requires_grad_(), features(2, D, 3, 3, seed=2)
    assert torch.equal(torch.autograd.grad(quantizer(z).latents, z, cotangent)[0], cotangent)


def test_more_quantizers_leave_less():
    errors = []
    for count in (1, 2, 4):
        quantizer, z = make("rvq", count), features(40, D, 4, 4)
        quantizer.initialize_codebook(z, torch.Generator().manual_seed(0))
        errors.append((quantizer(z).latents - z).square().mean().item())
    assert errors[0] > 1.2 * errors[1] > 1.2**2 * errors[2]


@pytest.mark.parametrize("name", KINDS)
def test_codebooks_follow_what_each_quantizer_sees(name):
    """As separate quantizers would, fed by hand; and a dead code of the second comes back."""
    quantizer, z = make(name, 2, revive_threshold=0.0, ema_decay=0.5), features(8, D, 4, 4)
    torch.manual_seed(0)
    channels = D if name == "rvq" else D // 2
    alone = [VectorQuantizer(configured(name, revive_threshold=0.0, ema_decay=0.5).vq, channels) for _ in range(2)]
    for _ in range(3):
        seen = z
        for q, one in enumerate(alone):
            part = one(seen if name == "rvq" else z.chunk(2, 1)[q])
            one.observe(part)
            seen = seen - part.latents.detach() if name == "rvq" else seen
        out = quantizer(z)
        quantizer.observe(out)
        for one in alone:
            one.update_codebook()
        quantizer.update_codebook()
    for q, one in zip(quantizer.quantizers, alone, strict=True):
        torch.testing.assert_close(q.codebook, one.codebook)

    lively = make(name, 2, revive_threshold=0.3, ema_decay=0.5)
    lively.quantizers[1].codebook[2] = 1e4
    for seed in range(10):
        lively.observe(lively(features(8, D, 4, 4, seed=seed)))
        lively.update_codebook()
    assert lively.quantizers[1].codebook.abs().max() < 100


@pytest.mark.parametrize("name", KINDS)
def test_two_processes_are_one(name, in_processes):
    z = features(6, D, 3, 3)

    def body(rank):
        quantizer = make(name)
        mine = z if rank is None else z[rank::2]
        torch.manual_seed(5)
        for _ in range(3):
            quantizer.observe(quantizer(mine))
            quantizer.update_codebook()
        return [q.codebook.clone() for q in quantizer.quantizers]

    one, two = in_processes(2, body)
    for a, b, c in zip(one, two, body(None), strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, c)


@pytest.mark.parametrize("name", KINDS)
def test_an_autoencoder_with_it(name, tmp_path):
    config = load_config(None, [f"autoencoder.bottleneck={name}", "autoencoder.latent_channels=6", "autoencoder.base_channels=8"])
    model = Autoencoder(config.autoencoder, 1, 8).eval()
    images = torch.rand(2, 1, 8, 8) * 2 - 1
    model.save_pretrained(tmp_path)
    again = Autoencoder.from_pretrained(tmp_path)
    with torch.no_grad():
        encoding = again.encode(images)
        assert torch.equal(encoding.indices, model.encode(images).indices)
        torch.testing.assert_close(again.decode_indices(encoding.indices).sample, again.decode(encoding.latents).sample)
    again.freeze_latent()
    for call in (lambda: again.bottleneck.observe(encoding), again.bottleneck.update_codebook):
        with pytest.raises(RuntimeError, match="the latent is frozen: its codebooks take no updates"):
            call()


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: make("gvq", 4), "autoencoder.gvq.groups=4 does not divide autoencoder.latent_channels=6"),
        (
            lambda: make("rvq", 32),
            "rvq.num_quantizers=32 of autoencoder.vq.codebook_size=5: .* codes are more than",
        ),
        (lambda: make("rvq", metric="cosine"), "rvq takes autoencoder.vq.metric=l2 .* got cosine and ste"),
        (lambda: make("rvq", gradient="rotation"), "rvq takes .* got l2 and rotation"),
    ],
)
def test_refusals(make, words):
    with pytest.raises(ValueError, match=words) as caught:
        make()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", KINDS)
def test_peer(name):
    """Codes, losses and the gradient of both as vector-quantize-pytorch has them, from equal codebooks."""
    package, options = (
        pytest.importorskip("vector_quantize_pytorch"),
        {"codebook_size": K, "commitment_weight": 0.25, "rotation_trick": False},
    )
    if name == "rvq":
        peer = package.ResidualVQ(dim=D, num_quantizers=3, **options)
        layers = list(peer.layers)
    else:
        peer = package.GroupedResidualVQ(dim=D, groups=3, num_quantizers=1, **options)
        layers = [each.layers[0] for each in peer.rvqs]
    ours, z = make(name), features(2, D, 4, 4)
    for mine, theirs in zip(ours.quantizers, layers, strict=True):
        theirs._codebook.embed.data[0] = mine.codebook
    cotangent, found = features(2, D, 4, 4, seed=2), []
    mine, theirs = z.clone().requires_grad_(), z.clone().requires_grad_()
    latents, indices, losses = peer.train()(rows(theirs)[None], freeze_codebook=True)
    out = ours(mine)
    assert torch.equal(digits_of(out.indices, [K] * 3).flatten(0, -2), indices.movedim(0, -1).reshape(-1, 3))
    for codes, loss in ((rows(out.latents), out.loss), (latents[0], losses.sum())):
        found.append((codes, loss, (codes * rows(cotangent)).sum() + loss))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-5, atol=1e-6)
    wanted, got = torch.autograd.grad(found[1][2], theirs)[0], torch.autograd.grad(found[0][2], mine)[0]
    if name == "rvq":  # theirs passes the decoder's gradient straight through each of the three; Lee et al. 2022 do so once
        wanted = wanted - 2 * cotangent
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)  # which cancels three times the cotangent, of up to 4
