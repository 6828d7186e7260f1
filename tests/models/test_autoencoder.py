"""Encoder, bottleneck and decoder together: shapes, the frozen latent, and what is refused."""

import dataclasses

import pytest
import torch

from dae.config import AutoencoderConfig, DecoderConfig, KernelsConfig, KLConfig, OptimizationConfig, VQConfig
from dae.models import Autoencoder, choose_kernels
from dae.training import build_optimizer

FAMILIES = ("full", "linear", "overlap", "projection", "narrow", "shallow", "dropout")


def test_the_knob_offers_what_is_built():
    (family,) = (f for f in dataclasses.fields(DecoderConfig) if f.name == "family")
    assert set(FAMILIES) == set(family.metadata["choices"])
    with pytest.raises(ValueError, match=r"decoder family: expected one of .*'projection'.*, got 'deep'"):
        make(decoder=DecoderConfig("deep"))


def make(channels=1, resolution=8, train=False, **changes) -> Autoencoder:
    settings = {"base_channels": 8, "channel_multipliers": [1, 2], "latent_channels": 4, "vq": VQConfig(codebook_size=16)}
    torch.manual_seed(0)
    return Autoencoder(AutoencoderConfig(**settings | changes), channels, resolution).train(train)


def pictures(batch=3, channels=1, height=8, width=8, seed=1):
    return torch.rand(batch, channels, height, width, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.mark.parametrize("bottleneck", ["vq", "kl"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "channels, resolution, multipliers, attention",
    [(1, 8, [1, 2], []), (3, 20, [1, 2, 1], [5, 10]), (3, 7, [1], [7]), (1, 6, [2, 1], [6])],
)
def test_shapes(bottleneck, family, channels, resolution, multipliers, attention):
    model = make(
        channels,
        resolution,
        channel_multipliers=multipliers,
        attention_resolutions=attention,
        bottleneck=bottleneck,
        decoder=DecoderConfig(family),
    )
    images, size = pictures(2, channels, resolution, resolution), resolution >> (len(multipliers) - 1)
    output = model(images)
    assert model.latent_size == size and output.sample.shape == images.shape
    assert output.encoding.latents.shape == output.encoding.features.shape == (2, 4, size, size)
    assert output.encoding.loss.shape == ()
    if bottleneck == "vq":
        assert output.encoding.indices.shape == (2, size, size) and output.encoding.indices.dtype == torch.int64
    else:
        assert output.encoding.indices is None


def test_attention_sits_where_it_is_asked_for():
    count = lambda model: sum("SelfAttention2d" in type(m).__name__ for m in model.modules())  # noqa: E731
    assert count(make()) == 0
    assert count(make(attention_resolutions=[4])) == 1 + 2  # num_blocks in the encoder, one more in the decoder
    assert count(make(attention_resolutions=[4, 8], num_blocks=2)) == 4 + 6


def test_other_sizes_than_trained_and_an_empty_batch():
    model = make(channel_multipliers=[1, 2, 2], resolution=8)
    for height, width in ((4, 12), (20, 8)):
        images = pictures(2, 1, height, width)
        assert model(images).sample.shape == images.shape
    assert model.encode(pictures(0)).indices.shape == (0, 2, 2)


@pytest.mark.parametrize(
    "changes, resolution, message",
    [
        ({"channel_multipliers": [1, 2, 2]}, 10, r"data.resolution=10 is not divisible. The nearest that are: 8, 12"),
        ({"channel_multipliers": []}, 8, "channel_multipliers is empty"),
        ({"bottleneck": "vqq"}, 8, "expected 'vq' or .* or 'identity', got 'vqq'"),
        ({"vq": VQConfig(codebook_size=0)}, 8, "codebook_size must be positive"),
        ({"decoder": DecoderConfig("tiny")}, 8, "decoder family: expected one of"),
        ({"decoder": DecoderConfig("narrow", width_factor=0)}, 8, "width_factor"),
        ({"decoder": DecoderConfig("narrow", width_factor=1.5)}, 8, "width_factor"),
        ({"decoder": DecoderConfig("shallow", num_blocks=3)}, 8, r"num_blocks of a shallow decoder lies in 0\.\.2"),
        ({"decoder": DecoderConfig("dropout", dropout=1.0)}, 8, "dropout probability"),
    ],
)
def test_architectures_that_are_refused(changes, resolution, message):
    with pytest.raises(ValueError, match=message):
        make(resolution=resolution, **changes)


def test_images_that_are_refused():
    model = make()
    with pytest.raises(ValueError, match=r"expected images \[B, 1, H, W\], got \[2, 3, 8, 8\]"):
        model.encode(pictures(2, 3))
    with pytest.raises(ValueError, match="expected images"):
        model.encode(pictures()[0])
    with pytest.raises(ValueError, match=r"divisible by 2, got \[8, 7\]"):
        model.encode(pictures(2, 1, 8, 7))
    with pytest.raises(ValueError, match=r"data.channels=3 and data.resolution=8"):
        model.refuse_other_data(3, 8)
    model.refuse_other_data(1, 8)


def test_decode_and_decode_indices_agree():
    model, images = make(), pictures()
    encoding = model.encode(images)
    sample = model.decode(encoding.latents).sample
    assert torch.equal(sample, model(images).sample)
    assert torch.equal(model.decode_indices(encoding.indices).sample, sample)
    assert torch.equal(model.decode_indices(encoding.indices.flatten(1)).sample, sample)  # raster order
    assert not torch.equal(model.decode_indices(encoding.indices.mT.flatten(1)).sample, sample)
    assert model.decode_indices(torch.empty(0, 16, dtype=torch.int64)).sample.shape == (0, 1, 8, 8)


@pytest.mark.parametrize("indices", [torch.full((1, 4, 4), 16), torch.full((1, 16), -1)])
def test_indices_outside_the_codebook(indices):
    with pytest.raises(ValueError, match=r"indices must lie in 0\.\.15"):
        make().decode_indices(indices)


def test_rasters_of_another_length():
    for length in (5, 8, 32):
        with pytest.raises(ValueError, match=f"expected 16 indices an image in raster order, got {length}"):
            make().decode_indices(torch.zeros(1, length, dtype=torch.int64))
    with pytest.raises(ValueError, match="bottleneck=kl has no indices, its latent is continuous"):
        make(bottleneck="kl").decode_indices(torch.zeros(1, 16, dtype=torch.int64))


def test_kl_encodes_the_mean_or_a_sample():
    model, images = make(bottleneck="kl"), pictures()
    mean = model.encode(images)
    assert torch.equal(mean.latents, mean.features) and torch.equal(mean.latents, model.encode(images).latents)
    torch.manual_seed(5)
    one = model.encode(images, sample_posterior=True).latents
    two = model.encode(images, sample_posterior=True).latents
    torch.manual_seed(5)
    again = model.encode(images, sample_posterior=True).latents
    assert torch.equal(one, again) and not torch.equal(one, two) and not torch.equal(one, mean.latents)
    model.eval()
    assert torch.equal(model(images).encoding.latents, mean.latents)  # samples in training only
    model.train()
    assert not torch.equal(model(images).encoding.latents, mean.latents)


@pytest.mark.parametrize("family, kernels", [("full", "auto"), ("dropout", "auto"), ("linear", "auto"), ("linear", "triton")])
def test_gradient_checkpointing_gives_equal_gradients(family, kernels):
    """Also of random layers: the recomputation draws the same mask."""
    gradients = []
    for enabled in (False, True):
        size = {"channel_multipliers": [1], "num_blocks": 1} if kernels == "triton" else {"attention_resolutions": [4]}
        model = make(train=True, bottleneck="kl", decoder=DecoderConfig(family), **size)
        choose_kernels(model, KernelsConfig(group_norm_silu=kernels))
        model.enable_gradient_checkpointing(enabled)
        torch.manual_seed(3)
        output = model(pictures())
        (output.sample.square().mean() + output.encoding.loss).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert gradient is not None and torch.equal(gradient, gradients[1][name]), name


def test_gradient_checkpointing_recomputes(monkeypatch):
    import dae.models.layers as module

    calls = []
    monkeypatch.setattr(module, "checkpoint", lambda f, x, **options: calls.append(f) or f(x))
    model = make(train=True)
    model.enable_gradient_checkpointing()
    model(pictures())
    assert len(calls) == 4, "two levels of the encoder and two of the decoder"
    model.eval()(pictures())
    assert len(calls) == 4


def latent_side(model):
    parts = {f"encoder.{k}": v for k, v in model.encoder.state_dict().items()}
    return {k: v.clone() for k, v in (parts | {f"bottleneck.{k}": v for k, v in model.bottleneck.state_dict().items()}).items()}


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("bottleneck", ["vq", "kl"])
def test_a_frozen_latent_never_moves(bottleneck, compiled):
    """Stage 2 changes the decoder and not one bit of the encoder, the bottleneck, or the latents."""
    model = make(train=True, bottleneck=bottleneck, kl=KLConfig(kl_weight=0.1))
    fixed = pictures(4, seed=9)
    model.freeze_latent()
    model.replace_decoder(DecoderConfig("dropout"))
    with torch.no_grad():
        latents, sides = model.encode(fixed).latents.clone(), latent_side(model)
    decoder = model.decoder
    decode = torch.compile(decoder, backend="aot_eager") if compiled else decoder
    settings = OptimizationConfig(learning_rate=0.1, adam_weight_decay=0.5)
    optimizer = build_optimizer(model, settings)  # over the whole model: nothing frozen may slip in
    assert sum(len(g["params"]) for g in optimizer.param_groups) == len(list(decoder.parameters()))
    before = {k: v.clone() for k, v in decoder.state_dict().items()}
    for step in range(4):
        model.train()
        assert decoder.training and not model.encoder.training and not model.bottleneck.training
        images = pictures(4, seed=step)
        encoding = model.encode(images, sample_posterior=True)
        loss = (decode(encoding.latents) - images).square().mean() + encoding.loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert any(not torch.equal(v, before[k]) for k, v in decoder.state_dict().items())
    with torch.no_grad():
        assert torch.equal(model.encode(fixed).latents, latents)
    for name, tensor in latent_side(model).items():
        assert torch.equal(tensor, sides[name]), name
    assert all(p.grad is None for p in model.encoder.parameters())


def test_a_frozen_codebook_takes_no_updates():
    model = make(train=True)
    encoding = model.encode(pictures())
    model.bottleneck.observe(encoding)
    model.freeze_latent()
    for forbidden in (
        lambda: model.bottleneck.observe(encoding),
        model.bottleneck.update_codebook,
        lambda: model.bottleneck.initialize_codebook(encoding.features, torch.Generator()),
    ):
        with pytest.raises(RuntimeError, match="frozen"):
            forbidden()


def test_freezing_keeps_the_mode():
    model = make(train=True)
    model.freeze_latent()
    assert model.training and model.decoder.training
    model.eval().freeze_latent()
    assert not model.training and not model.decoder.training


def test_replace_decoder():
    model = make(train=True, decoder=DecoderConfig("linear"))
    model.enable_gradient_checkpointing()
    sides = latent_side(model)
    torch.manual_seed(1)
    model.eval().replace_decoder(DecoderConfig("dropout", dropout=0.25))
    assert model.config.decoder.family == "dropout" and model.to_config()["autoencoder"]["decoder"]["dropout"] == 0.25
    assert not model.decoder.training and model.decoder.gradient_checkpointing
    assert all(torch.equal(v, sides[k]) for k, v in latent_side(model).items())
    one = model.decoder.conv_in.weight.clone()
    torch.manual_seed(1)
    model.replace_decoder(model.config.decoder)
    assert torch.equal(model.decoder.conv_in.weight, one)  # the seed decides
    model.replace_decoder(model.config.decoder)
    assert not torch.equal(model.decoder.conv_in.weight, one)  # and it is fresh
    rebuilt = Autoencoder.from_config(model.to_config())
    assert rebuilt.state_dict().keys() == model.state_dict().keys()


def test_replace_decoder_leaves_the_given_configuration_alone():
    config = AutoencoderConfig(base_channels=8, latent_channels=4)
    before = dataclasses.asdict(config)
    Autoencoder(config, 1, 8).replace_decoder(DecoderConfig("linear"))
    assert dataclasses.asdict(config) == before
