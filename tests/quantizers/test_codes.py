"""Quantizers without a table of codes: FSQ, LFQ, BSQ; the nearest point of a grid, its number, gradients and entropies.

Tolerances: values of single operations agree to float32's rounding of a few terms, 1e-6 (bfloat16 rounds to 4e-3: 1e-2);
sums over a batch, and products with the peer's differently ordered matrices, to 1e-5; gradients that pass through them to 1e-4.
"""

import itertools
import math

import pytest
import torch

from dae.config import BSQConfig, FSQConfig, LFQConfig, load_config
from dae.models import Autoencoder
from dae.quantizers import BinarySphericalQuantizer, FiniteScalarQuantizer, LookupFreeQuantizer
from dae.quantizers.tokens import digits_of, entropy_loss, grouped, number_of

LEVELS = [8, 5, 2, 3]
MAKERS = {
    "fsq": lambda: FiniteScalarQuantizer(FSQConfig(levels=LEVELS), 4),
    "lfq": lambda: LookupFreeQuantizer(LFQConfig(inverse_temperature=0.5), 4),
    "bsq": lambda: BinarySphericalQuantizer(BSQConfig(inverse_temperature=3.0), 4),
}


def features(*shape, seed=1):
    return 2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rows(z):
    return z.movedim(1, -1).flatten(0, -2)


def all_codes(quantizer, K):
    return rows(quantizer.lookup(torch.arange(K).view(1, K, 1)))


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_codes_and_their_numbers(name, dtype):
    quantizer, z = MAKERS[name](), features(3, 4, 5, 6).to(dtype)
    out = quantizer(z)
    K = math.prod(LEVELS) if name == "fsq" else 16
    codes = all_codes(quantizer, K)
    assert len(codes.unique(dim=0)) == K, "each index is another code"
    assert (
        out.latents.dtype == out.features.dtype == dtype and out.indices.shape == (3, 5, 6) and out.indices.dtype == torch.int64
    )
    torch.testing.assert_close(
        out.latents, quantizer.lookup(out.indices).to(dtype), rtol=1e-6 if dtype != torch.bfloat16 else 1e-2, atol=1e-6
    )
    again = quantizer(quantizer.lookup(out.indices) * (10 if name != "fsq" else 1))
    assert name == "fsq" or torch.equal(again.indices, out.indices)
    packed = quantizer.pack(out)
    assert packed.dtype == torch.int32 and torch.equal(packed.long(), out.indices.flatten(1))
    empty = quantizer(z[:0])
    assert empty.indices.shape == (0, 5, 6) and torch.isfinite(empty.loss)


@pytest.mark.parametrize("name", ["lfq", "bsq"])
def test_the_nearest_code(name):
    quantizer, z = MAKERS[name](), features(2, 4, 3, 3)
    out = quantizer(z)
    point = rows(z) if name == "lfq" else torch.nn.functional.normalize(rows(z), dim=-1)
    assert torch.equal(out.indices.flatten(), torch.cdist(point, all_codes(quantizer, 16)).argmin(1))


def test_fsq_by_the_paper():
    """Levels are spread over [-1, 1], each is reached, none beyond, and z = 0 is in the middle."""
    quantizer = MAKERS["fsq"]()
    z = torch.linspace(-8, 8, 4001).expand(4, -1).reshape(1, 4, -1, 1)
    latents = rows(quantizer(z).latents)
    for d, levels in enumerate(LEVELS):
        wanted = (torch.arange(levels) - levels // 2) / (levels // 2)
        torch.testing.assert_close(latents[:, d].unique(), wanted.float(), rtol=0, atol=1e-6)
        assert (latents[:, d].diff() >= -1e-6).all(), "a larger feature is no lower level"
    assert quantizer(torch.zeros(1, 4, 1, 1)).latents.abs().max() == 0


@pytest.mark.parametrize("name", MAKERS)
def test_straight_through_gradient(name):
    """Rounding has the gradient of the identity; what comes before it keeps its own."""
    quantizer, z = MAKERS[name](), features(2, 4, 3, 3).double().requires_grad_()
    cotangent = features(2, 4, 3, 3, seed=2).double()
    (found,) = torch.autograd.grad(quantizer(z).latents, z, cotangent)
    if name == "lfq":
        wanted = cotangent
    elif name == "bsq":
        (wanted,) = torch.autograd.grad(torch.nn.functional.normalize(z, dim=1), z, cotangent)
    else:
        levels = torch.tensor(LEVELS).view(1, 4, 1, 1).double()
        half, offset = (levels - 1) * 1.001 / 2, 0.5 * (1 - levels % 2)
        (wanted,) = torch.autograd.grad((half * torch.tanh(z + torch.atanh(offset / half))) / (levels // 2), z, cotangent)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["lfq", "bsq"])
@pytest.mark.parametrize("diversity", [0.0, 0.7])
def test_entropies_are_those_of_a_table_of_all_codes(name, diversity):
    """Given a latent, exactly. Of the batch, the sum over bits, which bounds that of the codes from above."""
    quantizer, z = MAKERS[name](), features(3, 4, 2, 2).double().requires_grad_()
    quantizer.config.entropy_weight, quantizer.config.diversity = 1.0, diversity
    if name == "lfq":
        quantizer.config.commitment_weight = 0.0
    loss = quantizer(z).loss
    point = rows(z) if name == "lfq" else torch.nn.functional.normalize(rows(z), dim=-1)
    square = (point[:, None] - all_codes(quantizer, 16).double()).square().sum(-1)
    p = (-quantizer.config.inverse_temperature * square).softmax(-1)
    given = torch.special.entr(p).sum(-1).mean()
    bits = digits_of(torch.arange(16), [2] * 4).double()
    ones = (p @ bits).mean(0)
    of_bits = (torch.special.entr(ones) + torch.special.entr(1 - ones)).sum()
    torch.testing.assert_close(loss, given - diversity * of_bits, rtol=1e-9, atol=1e-9)
    assert torch.special.entr(p.mean(0)).sum() <= of_bits
    found, wanted = (torch.autograd.grad(x, z, retain_graph=True)[0] for x in (loss, given - diversity * of_bits))
    torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-8)


def test_entropies_of_sure_latents():
    sure = 1e4 * torch.tensor([[1.0, -1.0], [-1.0, 1.0]])
    assert entropy_loss(sure, 0.0) == 0
    torch.testing.assert_close(entropy_loss(sure, 1.0), torch.tensor(-2 * math.log(2)))


def test_two_processes_have_the_entropy_and_gradient_of_one(in_processes):
    logits = features(6, 5).double()

    def body(rank):
        mine = logits[rank::2].clone().requires_grad_()
        loss = entropy_loss(mine, 1.0) if rank is not None else None
        (gradient,) = torch.autograd.grad(loss, mine)
        return loss.item(), gradient

    whole = logits.clone().requires_grad_()
    loss = entropy_loss(whole, 1.0)
    (wanted,) = torch.autograd.grad(loss, whole)
    found = in_processes(2, body)
    # A process's loss is of its own rows in the first term; the processes' mean is the whole one, and so is its gradient.
    assert sum(part[0] for part in found) / 2 == pytest.approx(loss.item(), rel=1e-12)
    gradient = torch.empty_like(wanted)
    for rank, (_, part) in enumerate(found):
        gradient[rank::2] = part / 2
    torch.testing.assert_close(gradient, wanted, rtol=1e-12, atol=1e-12)


def test_memory_does_not_grow_with_the_number_of_codes():
    """No tensor of the forward and backward pass has more entries than the features."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        entries = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            for each in out if isinstance(out, tuple | list) else [out]:
                if isinstance(each, torch.Tensor):
                    self.entries = max(self.entries, each.numel())
            return out

    for make in (lambda: LookupFreeQuantizer(LFQConfig(), 18), lambda: BinarySphericalQuantizer(BSQConfig(), 18)):
        z = features(2, 18, 4, 4).requires_grad_()
        with Largest() as largest:
            out = make()(z)
            (out.latents.sum() + out.loss).backward()
        assert 0 < largest.entries <= 2 * z.numel()  # int64 digits beside


def test_numbers_and_digits():
    radix = [3, 2, 7]
    numbers = torch.arange(42)
    digits = digits_of(numbers, radix)
    assert [tuple(d) for d in digits.tolist()] == [(a, b, c) for c, b, a in itertools.product(range(7), range(2), range(3))]
    assert torch.equal(number_of(digits, radix), numbers)


@pytest.mark.parametrize(
    "radix, wanted",
    [([2] * 10, (1024,)), ([2] * 14, (2**14,)), ([2] * 18, (2**9, 2**9)), ([8, 5, 5, 5], (1000,)),
     ([8, 8, 8, 5, 5, 5], (512, 125)),
     ([1024, 1024], (1024, 1024)), ([2] * 24, (2**8,) * 3), ([4096, 5, 5], (4096, 25))],
)  # fmt: skip
def test_digits_of_a_prior(radix, wanted):
    """In order, so that the digits of a group are those of the number."""
    found = grouped(radix)
    assert found == wanted and math.prod(found) == math.prod(radix)


@pytest.mark.parametrize(
    "make, words",
    [
        (
            lambda: FiniteScalarQuantizer(FSQConfig(levels=[5, 5]), 3),
            "fsq.levels has 2 entries, one for each channel.*expected 3",
        ),
        (lambda: FiniteScalarQuantizer(FSQConfig(levels=[5, 1]), 2), "at least 2 levels a channel"),
        (lambda: FiniteScalarQuantizer(FSQConfig(levels=[4096] * 6), 6), "codes are more than the 4,611,686,018,427,387,904"),
        (lambda: LookupFreeQuantizer(LFQConfig(), 63), "autoencoder.latent_channels: 9,223,372,036,854,775,808 codes are more"),
        (lambda: MAKERS["bsq"]()(torch.zeros(1, 3, 2, 2)), r"needs features \[B, 4, h, w\], got \[1, 3, 2, 2\]"),
        (lambda: FiniteScalarQuantizer.check_rates([2.0]), "cannot be swept by one number"),
        (lambda: LookupFreeQuantizer.check_rates([2.5]), "whole numbers from 1 to 62"),
        (lambda: load_config(None, ["autoencoder.fsq.levels=[1,5]"]), "autoencoder.fsq.levels.*at least 2"),
    ],
)
def test_refusals(make, words):
    with pytest.raises(ValueError, match=words) as caught:
        make()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name, channels", [("fsq", 4), ("lfq", 6), ("bsq", 6)])
def test_an_autoencoder_with_it(tmp_path, name, channels):
    overrides = [f"autoencoder.bottleneck={name}", f"autoencoder.latent_channels={channels}", "autoencoder.base_channels=8"]
    config = load_config(None, overrides)
    torch.manual_seed(0)
    model = Autoencoder(config.autoencoder, 1, 8)
    images = torch.rand(2, 1, 8, 8) * 2 - 1
    out = model(images)
    (out.sample.square().mean() + out.encoding.loss).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    model.eval().save_pretrained(tmp_path / "model")
    again = Autoencoder.from_pretrained(tmp_path / "model")
    with torch.no_grad():
        encoding = again.encode(images)
        assert torch.equal(encoding.indices, model.encode(images).indices)
        torch.testing.assert_close(again.decode_indices(encoding.indices).sample, again.decode(encoding.latents).sample)


def test_peer_fsq():
    peer = pytest.importorskip("vector_quantize_pytorch").FSQ([8, 5, 5, 3])  # it refuses two levels
    ours, z = FiniteScalarQuantizer(FSQConfig(levels=[8, 5, 5, 3]), 4), features(2, 4, 6, 6)
    mine, theirs = z.clone().requires_grad_(), z.clone().requires_grad_()
    out = ours(mine)
    latents, indices = peer(theirs)
    torch.testing.assert_close(out.latents, latents, rtol=1e-6, atol=1e-6)
    assert torch.equal(out.indices, indices.long())
    cotangent = features(2, 4, 6, 6, seed=3)
    out.latents.backward(cotangent)
    latents.backward(cotangent)
    torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("spherical", [False, True])
def test_peer_lfq(spherical):
    """Per-latent entropy and commitment of the peer, which makes a table of all codes; that of the batch is not one of bits."""
    lfq = pytest.importorskip("vector_quantize_pytorch").LFQ
    tau = 0.9
    peer = lfq(
        dim=4, codebook_size=16, entropy_loss_weight=0.3, diversity_gamma=0.0, commitment_loss_weight=0.0, spherical=spherical
    )
    config = {"entropy_weight": 0.3, "diversity": 0.0, "inverse_temperature": tau}
    if spherical:
        ours = BinarySphericalQuantizer(BSQConfig(**config), 4)
    else:
        ours = LookupFreeQuantizer(LFQConfig(**config, commitment_weight=0.0), 4)
    z = features(2, 4, 3, 3)
    mine, theirs = z.clone().requires_grad_(), z.clone().requires_grad_()
    out = ours(mine)
    peer.train()
    result = peer(theirs, inv_temperature=tau)
    torch.testing.assert_close(out.latents, result.quantized, rtol=1e-5, atol=1e-6)
    bits = digits_of(out.indices, [2] * 4)
    assert torch.equal(number_of(bits.flip(-1), [2] * 4), result.indices.long()), "the peer's first channel is its highest bit"
    torch.testing.assert_close(out.loss, result.entropy_aux_loss, rtol=1e-5, atol=1e-6)
    (out.latents.sum() + out.loss).backward()
    (result.quantized.sum() + result.entropy_aux_loss).backward()
    torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-5)
