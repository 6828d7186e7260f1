"""The decoder family: what makes each member weak, and the layers it is made of."""

import pytest
import torch
from torch import nn

from dae.config import AutoencoderConfig, DecoderConfig
from dae.models import PatchDiscriminator
from dae.models.decoders import build_decoder
from dae.models.layers import Dropout, GroupNorm, ResidualBlock, SelfAttention2d


def make(family, resolution=8, channels=2, **changes):
    config = AutoencoderConfig(base_channels=8, channel_multipliers=[1, 2, 2], latent_channels=5, num_blocks=1)
    config.decoder = DecoderConfig(family, **changes)
    torch.manual_seed(0)
    return build_decoder(config, channels, resolution)


def size(module):
    return sum(p.numel() for p in module.parameters())


def blocks(module):
    return sum(isinstance(m, ResidualBlock) for m in module.modules())


def test_linear_is_linear_and_local():
    decoder = make("linear").double()
    assert size(decoder) == 5 * 2 * 4 * 4 + 2
    z, y = torch.randn(2, 3, 5, 2, 3, dtype=torch.float64).unbind(0)
    origin = decoder(torch.zeros_like(z))
    torch.testing.assert_close(origin, decoder.bias.view(1, 2, 1, 1).expand_as(origin), rtol=0, atol=0)
    combined = decoder(2 * z - 3 * y) - origin
    torch.testing.assert_close(combined, 2 * (decoder(z) - origin) - 3 * (decoder(y) - origin), rtol=1e-12, atol=1e-14)
    moved = z.clone()
    moved[:, :, 1, 2] += 1
    changed = (decoder(moved) != decoder(z)).any(0).any(0)
    assert changed[4:8, 8:12].all() and changed.sum() == 16  # its own patch and no other
    patch = torch.einsum("nd,dcij->ncij", z[:, :, 1, 2], decoder.weight) + decoder.bias.view(1, 2, 1, 1)
    torch.testing.assert_close(decoder(z)[:, :, 4:8, 8:12], patch, rtol=1e-12, atol=1e-14)


def test_capacities():
    full = make("full")
    assert blocks(full) == 3 * 2
    assert size(make("dropout")) == size(full)
    assert size(make("narrow", width_factor=1.0)) == size(full)
    narrow = [size(make("narrow", width_factor=w)) for w in (0.25, 0.5, 0.75)]
    assert size(make("linear")) < narrow[0] < narrow[1] < narrow[2] < size(full)
    for count in (0, 1, 2):
        shallow = make("shallow", num_blocks=count)
        assert blocks(shallow) == 3 * count and shallow(torch.randn(1, 5, 2, 2)).shape == (1, 2, 8, 8)
    assert size(make("shallow", num_blocks=2)) == size(full)


def test_shallow_without_blocks_adapts_the_width():
    config = AutoencoderConfig(base_channels=4, channel_multipliers=[1, 2, 4], latent_channels=3)
    config.decoder = DecoderConfig("shallow", num_blocks=0)
    decoder = build_decoder(config, 1, 8)
    assert blocks(decoder) == 0 and decoder(torch.randn(2, 3, 2, 2)).shape == (2, 1, 8, 8)
    assert decoder.conv_out.in_channels == 4


def test_dropout_drops_in_training_only():
    decoder, z = make("dropout", dropout=0.5), torch.randn(2, 5, 2, 2)
    full = make("full")
    full.load_state_dict(decoder.state_dict())
    assert torch.equal(decoder.eval()(z), full.eval()(z))
    decoder.train()
    assert not torch.equal(decoder(z), decoder(z))
    for other in ("full", "narrow", "shallow", "linear"):
        deterministic = make(other).train()
        assert torch.equal(deterministic(z), deterministic(z))


@pytest.mark.parametrize("channelwise", [False, True])
def test_dropout_layer(channelwise):
    layer, x = Dropout(0.25, channelwise).train(), torch.full((50, 40, 3, 3), 3.0)
    torch.manual_seed(0)
    y = layer(x)
    assert set(y.unique().tolist()) == {0.0, 4.0}  # kept entries are scaled by 1 / (1 - p)
    whole = (y == 0).flatten(2)
    assert torch.equal(whole.all(2), whole.any(2)) == channelwise
    draws = 50 * 40 * (1 if channelwise else 9)
    rate = (y == 0).float().mean().item()
    assert abs(rate - 0.25) < 4 * (0.25 * 0.75 / draws) ** 0.5
    assert layer.eval()(x) is x
    for p in (-0.1, 1.0, float("nan")):
        with pytest.raises(ValueError, match="dropout probability"):
            Dropout(p)


@pytest.mark.parametrize("channels", [1, 4, 12, 33, 64, 96])
def test_group_norm_takes_any_width(channels):
    norm = GroupNorm(channels)
    assert channels % norm.num_groups == 0 and norm.num_groups <= 32
    assert norm(torch.randn(2, channels, 3, 3)).isfinite().all()


def test_self_attention_is_attention_over_positions():
    torch.manual_seed(0)
    layer, x = SelfAttention2d(6).double(), torch.randn(2, 6, 3, 5, dtype=torch.float64)
    q, k, v = layer.qkv(layer.norm(x)).flatten(2).chunk(3, dim=1)  # [B, C, HW]
    weights = (q.mT @ k / 6**0.5).softmax(-1)
    expected = x + layer.out((v @ weights.mT).view(2, 6, 3, 5))
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("layers, side", [(0, 4), (1, 4), (2, 2), (3, 1)])
def test_discriminator_shapes(layers, side):
    critic = PatchDiscriminator(3, channels=8, num_layers=layers)
    assert critic(torch.randn(2, 3, 8, 8)).shape == (2, 1, side, side)


def test_a_verdict_does_not_depend_on_the_batch():
    critic, x = PatchDiscriminator(1, channels=8).double().train(), torch.randn(4, 1, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(critic(x)[:1], critic(x[:1]), rtol=1e-12, atol=1e-14)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in critic.modules())
