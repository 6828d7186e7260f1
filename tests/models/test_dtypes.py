"""Every module in every dtype: it runs, keeps its dtype, is off by roundings alone, and what must not be rounded is not."""

import copy
import math

import pytest
import torch

from dae.config import AutoencoderConfig, DecoderConfig, KLConfig, PriorConfig, SamplingConfig, VQConfig
from dae.losses import PerceptualLoss, flow_matching_loss
from dae.models import ARPrior, Autoencoder, DiT, GaussianMixturePrior, PatchDiscriminator
from dae.models.decoders import build_decoder
from dae.quantizers import GaussianBottleneck, VectorQuantizer
from dae.sampling import generate, log_likelihood, sample_latents, sample_tokens
from dae.training import EMA

DTYPES = [torch.float16, torch.bfloat16, torch.float64]
FAMILIES = ("linear", "overlap", "projection", "full", "narrow", "shallow", "dropout")
CLASSES, CHANNELS, SIZE, K = 3, 4, 4, 16
LABELS = torch.tensor([0, 2, 1, 3])  # the last: no class


def architecture(bottleneck="kl", **options):
    return AutoencoderConfig(
        bottleneck=bottleneck, base_channels=8, channel_multipliers=(1, 2), latent_channels=CHANNELS, attention_resolutions=(4,),
        vq=VQConfig(codebook_size=K), **options,
    )  # fmt: skip


def prior_config(**options):
    return PriorConfig(width=32, depth=2, num_heads=2, **options)


def shaken(module):
    """With parameters that are nowhere 0, as those of adaLN-zero start."""
    for parameter in module.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return module


def autoencoder(bottleneck):
    model = shaken(Autoencoder(architecture(bottleneck), 1, 8))
    return model, (torch.rand(4, 1, 8, 8),), {"kl": lambda m, x: m(x).sample, "vq": lambda m, x: m.encode(x).features}[bottleneck]


def decoder(family):
    options = DecoderConfig(family=family, dropout=0.2, width_factor=0.5)
    return build_decoder(architecture(decoder=options), 1, 8), (torch.randn(4, CHANNELS, SIZE, SIZE),), None


def tokens():
    return torch.randint(K, (4, SIZE**2 - 1))


def latent_prior(kind, **options):
    return kind(prior_config(**options), latent_channels=CHANNELS, latent_size=SIZE, num_classes=CLASSES)


def dit():
    model = shaken(latent_prior(DiT))
    model.set_latent_statistics(torch.tensor([1.001, -2.003, 0.5, 3.0]), torch.tensor([0.1003, 5.007, 1.0, 0.3]))
    return model


def ar():
    return ARPrior(prior_config(), vocab_size=K, sequence_length=SIZE**2, num_classes=CLASSES)


def mixture():
    model = latent_prior(GaussianMixturePrior, num_components=2)
    model.means.normal_()
    return model


MODULES = {
    "autoencoder, kl": lambda: autoencoder("kl"),
    "autoencoder, vq": lambda: autoencoder("vq"),
    **{f"{name} decoder": lambda name=name: decoder(name) for name in FAMILIES},
    "discriminator": lambda: (PatchDiscriminator(1, channels=8), (torch.rand(4, 1, 16, 16),), None),
    "perceptual": lambda: (PerceptualLoss(), (torch.rand(1, 3, 16, 16), torch.rand(1, 3, 16, 16)), None),
    "ar, logits": lambda: (shaken(ar()), (LABELS, tokens()), None),
    "ar, loss": lambda: (
        shaken(ar()), (LABELS, tokens(), torch.randint(K, (4, SIZE**2))), lambda m, c, x, y: m(c, x, targets_BT=y)
    ),
    "dit": lambda: (dit(), (torch.randn(4, CHANNELS, SIZE, SIZE), torch.rand(4), LABELS), None),
}  # fmt: skip
LOSSES = ("perceptual", "ar, loss")  # at least float32


def cast(values, dtype):
    return [x.to(dtype) if x.is_floating_point() else x for x in values]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", MODULES)
def test_modules(name, dtype):
    torch.manual_seed(0)
    module, operands, call = MODULES[name]()
    call = call or (lambda m, *x: m(*x))
    low, operands = copy.deepcopy(module).to("cpu", dtype).eval(), cast(operands, dtype)
    exact = module.eval().double()
    for parameter, rounded in zip(exact.parameters(), low.parameters(), strict=True):
        parameter.data.copy_(rounded)
    leaves = [x.requires_grad_() for x in operands if x.is_floating_point()]
    out, true = call(low, *operands), call(exact, *cast([x.detach() for x in operands], torch.float64))
    assert out.dtype == (torch.promote_types(dtype, torch.float32) if name in LOSSES else dtype)
    # Each module rounds its result and its sum with the residual, by eps / 2 of it at most; errors of either sign add in
    # quadrature, and these networks pass them on about as they are.
    assert (out.double() - true).norm() <= math.sqrt(len(list(low.modules()))) * torch.finfo(dtype).eps * true.norm()
    (out.float() * torch.randn(out.shape)).sum().backward()
    unused = "decoder." if name == "autoencoder, vq" else ()
    trained = [p for n, p in low.named_parameters() if p.requires_grad and not n.startswith(unused)]
    for x in leaves + trained:
        assert x.grad is not None and x.grad.dtype == dtype and x.grad.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_codes_and_their_images(dtype):
    """The nearest code of what the encoder gives, in a codebook of float32, of which the latents are roundings."""
    torch.manual_seed(0)
    model = Autoencoder(architecture("vq"), 1, 8).to(dtype).train()
    encoding = model.encode(torch.rand(4, 1, 8, 8).to(dtype))
    z, codes = encoding.features.movedim(1, -1).double(), model.bottleneck.codebook
    assert codes.dtype == torch.float32 and encoding.features.dtype == encoding.latents.dtype == dtype
    assert torch.equal(encoding.indices, (z[..., None, :] - codes.double()).square().sum(-1).argmin(-1))
    assert torch.equal(encoding.latents.movedim(1, -1), codes[encoding.indices].to(dtype))
    by_index, by_latent = model.decode_indices(encoding.indices).sample, model.decode(encoding.latents).sample
    assert torch.equal(by_index, by_latent) and by_index.dtype == dtype
    assert encoding.loss.dtype == torch.promote_types(dtype, torch.float32)
    model.replace_decoder(DecoderConfig(family="linear"))
    assert model(torch.rand(1, 1, 8, 8).to(dtype)).sample.dtype == dtype


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_posteriors(dtype):
    torch.manual_seed(0)
    features = torch.randn(4, 2 * CHANNELS, 3, 3).to(dtype).requires_grad_()
    encoding = GaussianBottleneck(KLConfig(kl_weight=1.0))(features, True)
    mean, log_variance = features.chunk(2, dim=1)
    assert {encoding.latents.dtype, encoding.features.dtype, encoding.log_variance.dtype} == {dtype}
    assert torch.equal(encoding.features, mean) and torch.equal(encoding.log_variance, log_variance)
    mean, log_variance = mean.double(), log_variance.double()
    expected = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum((1, 2, 3)).mean()
    torch.testing.assert_close(encoding.loss.double(), expected, rtol=1e-5, atol=0)  # computed in float32 at least
    (encoding.latents.float().sum() + encoding.loss).backward()
    assert features.grad.isfinite().all() and features.grad.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_averages_of_codes_do_not_stall(dtype):
    """A quantizer that was cast is the one of float32 to the bit, over many small steps."""
    torch.manual_seed(0)
    quantizer = VectorQuantizer(VQConfig(codebook_size=K, ema_decay=0.9999), CHANNELS)
    cast_quantizer = copy.deepcopy(quantizer).to(dtype)
    start = quantizer.codebook.clone()
    for step in range(20):
        z = (3 + torch.randn(8, CHANNELS, 4, 4)).to(dtype)
        for each, features in ((quantizer, z.float()), (cast_quantizer, z)):
            torch.manual_seed(step)
            each.observe(each(features))
            each.update_codebook()
    for name, buffer in quantizer.named_buffers():
        assert torch.equal(cast_quantizer.get_buffer(name), buffer)
    assert not torch.equal(start, quantizer.codebook)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_averages_of_weights_do_not_stall(dtype):
    module = torch.nn.Linear(8, 8).to(dtype)
    wide = copy.deepcopy(module).to(torch.promote_types(dtype, torch.float32))
    averages = [EMA(each, decay=0.9999) for each in (module, wide)]
    for step in range(120):
        for each, average in zip((module, wide), averages, strict=True):
            with torch.no_grad():
                for parameter in each.parameters():
                    parameter.fill_(1 + step / 128)
            average.update(each)
    for parameter, expected in zip(*(each.average.parameters() for each in averages), strict=True):
        assert torch.equal(parameter, expected)
    before = [p.clone() for p in module.parameters()]
    with averages[0].swapped_in(module):
        assert torch.equal(module.weight, averages[0].average.weight.to(dtype)) and module.weight.dtype == dtype
    assert all(torch.equal(p, b) for p, b in zip(module.parameters(), before, strict=True))


CASTS = {
    "to": lambda m: m.to(torch.bfloat16),
    "to a device": lambda m: m.to("cpu", torch.float16),
    "half": lambda m: m.half(),
    "bfloat16": lambda m: m.bfloat16(),
    "double": lambda m: m.double(),
    "type": lambda m: m.type(torch.float16),
    "twice": lambda m: m.half().double().bfloat16().float(),
}
WITH_BUFFERS = {
    "vq": lambda: Autoencoder(architecture("vq"), 1, 8),
    "ar": ar,
    "dit": dit,
    "mixture": mixture,
}


@pytest.mark.parametrize("way", CASTS)
@pytest.mark.parametrize("name", WITH_BUFFERS)
def test_statistics_and_tables_survive_a_cast(name, way):
    """Also as part of another module, and when they are cast back."""
    torch.manual_seed(0)
    model = WITH_BUFFERS[name]()
    before = {n: b.clone() for n, b in model.named_buffers()}
    CASTS[way](torch.nn.ModuleDict({"inner": model}))
    assert before
    for n, buffer in model.named_buffers():
        assert torch.equal(buffer.float(), before[n]) and buffer.dtype in (torch.float32, torch.float64)
        assert buffer.dtype == torch.float32 or name != "vq"


@pytest.mark.parametrize("name", WITH_BUFFERS)
def test_saved_and_loaded_in_a_dtype(tmp_path, name):
    torch.manual_seed(0)
    model = WITH_BUFFERS[name]()
    model.save_pretrained(tmp_path / "whole")
    model.half().save_pretrained(tmp_path / "half")
    kind, expected = type(model), model.state_dict()
    for folder, dtype in (("whole", torch.float16), ("half", torch.float16), ("half", None)):
        loaded = kind.from_pretrained(tmp_path / folder, torch_dtype=dtype)
        for parameter in loaded.parameters():
            assert parameter.dtype == (dtype or torch.float32)
        for key, value in loaded.state_dict().items():
            assert torch.equal(value.to(expected[key].dtype), expected[key])
    other = kind.from_config(model.to_config()).bfloat16()
    other.load_state_dict(expected)
    for n, buffer in other.named_buffers():
        assert torch.equal(buffer, model.get_buffer(n))
    for wrong in (torch.int64, "float16", torch.float8_e4m3fn):
        with pytest.raises(TypeError, match="torch_dtype: expected one of torch"):
            kind.from_pretrained(tmp_path / "whole", torch_dtype=wrong)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["ar", "dit", "mixture"])
def test_sampling(kind, dtype):
    """Classes to images by models of any dtype, and of two."""
    torch.manual_seed(0)
    prior = {"ar": ar, "dit": dit, "mixture": mixture}[kind]().eval()
    decoding = Autoencoder(architecture("vq" if kind == "ar" else "kl"), 1, 8).eval()
    settings = SamplingConfig(num_samples=4, batch_size=3, cfg_scale=2.0, num_inference_steps=2, top_k=5)
    for first, second in ((dtype, dtype), (torch.float32, dtype)):
        [one, two] = generate(decoding.to(dtype), prior.to(second if kind == "mixture" else first), LABELS, settings, seed=0)
        assert one.dtype == two.dtype == dtype and one.isfinite().all() and (len(one), len(two)) == (3, 1)
    if kind == "ar":
        assert sample_tokens(prior.to(dtype), LABELS, temperature=0.5).max() < K
    if kind == "dit":
        assert sample_latents(prior.to(dtype), LABELS, num_inference_steps=1).dtype == dtype


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_flow_of_a_cast_model(dtype):
    """Loss, likelihood and their draws are of float32 at least; what the model rounds is what they are off by."""
    torch.manual_seed(0)
    low = dit().to(dtype).eval()
    exact = copy.deepcopy(low).double()
    x = torch.randn(4, CHANNELS, SIZE, SIZE).to(dtype)
    values = []
    for model, latents in ((low, x), (exact, x.double())):
        likelihood = log_likelihood(model, latents, LABELS, num_steps=4, num_probes=2, generator=torch.Generator().manual_seed(0))
        values.append(likelihood)
        loss = flow_matching_loss(model, model.normalise(latents), LABELS, generator=torch.Generator().manual_seed(0))
        assert likelihood.dtype == loss.dtype == torch.promote_types(latents.dtype, torch.float32) and loss.isfinite()
        loss.backward()
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    # Nats of 64 dimensions, each with a velocity whose eight evaluations round as in test_modules.
    bound = 8 * math.sqrt(len(list(low.modules()))) * torch.finfo(dtype).eps * values[1].abs()
    assert ((values[0].double() - values[1]).abs() <= bound).all()
