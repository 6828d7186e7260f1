"""Noise on latents and masked latents: what they do in training, to which family, and over several processes."""

import copy

import pytest
import torch

from dae.config import AutoencoderConfig, DecoderConfig, load_config
from dae.models.corruption import channel_moments, corrupted
from dae.models.decoders import build_decoder

FAMILIES = ("full", "linear", "overlap", "narrow", "shallow", "dropout")  # projection: without images a constant


def latents(batch=64, channels=3, side=8, dtype=torch.float32):
    z = torch.randn(batch, channels, side, side, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return (z * torch.tensor([0.1, 1.0, 30.0]).view(-1, 1, 1) + torch.tensor([5.0, 0.0, -2.0]).view(-1, 1, 1)).to(dtype)


def test_noise_is_relative_to_each_channel():
    z = latents()
    torch.manual_seed(0)
    noise = corrupted(z, 0.5, 0.0) - z
    count = z[:, 0].numel()
    std = z.double().std((0, 2, 3), correction=0)
    found = noise.double().std((0, 2, 3)) / std
    assert ((found - 0.5).abs() < 0.5 * 4 / (2 * count) ** 0.5).all()  # four standard errors of an estimated deviation
    assert (noise.double().mean((0, 2, 3)).abs() < 4 * 0.5 * std / count**0.5).all()
    torch.testing.assert_close(channel_moments(z)[1], std, rtol=1e-9, atol=0)  # float64 loses (mean / std)^2 = 2500 of its digits


def test_masked_positions_hold_the_mean_in_all_channels():
    z = latents()
    torch.manual_seed(0)
    out = corrupted(z, 0.0, 0.25)
    changed = out != z
    share = changed[:, 0].double().mean().item()
    assert torch.equal(changed.any(1), changed.all(1)) and abs(share - 0.25) < 4 * (0.25 * 0.75 / z[:, 0].numel()) ** 0.5
    mean = z.double().mean((0, 2, 3)).float()
    torch.testing.assert_close(out.movedim(1, -1)[changed[:, 0]], mean.expand(int(changed[:, 0].sum()), -1), rtol=1e-6, atol=1e-6)


def test_gradients_pass_the_moments():
    z = latents(2, 3, 2, torch.float64).requires_grad_()

    def f(z):
        torch.manual_seed(3)
        return corrupted(z, 0.7, 0.4)

    assert torch.autograd.gradcheck(f, (z,))
    # A latent c times as large is corrupted c times as much: larger latents gain nothing.
    torch.testing.assert_close(f(7 * z), 7 * f(z), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_constant_and_narrow_latents(dtype):
    z = torch.full((2, 3, 2, 2), 1.5, dtype=dtype, requires_grad=True)
    out = corrupted(z, 1.0, 0.5)
    out.float().square().sum().backward()
    assert out.dtype == dtype and torch.equal(out, z) and z.grad.isfinite().all()


@pytest.mark.parametrize("family", FAMILIES)
def test_any_family_is_corrupted_in_training_alone(family):
    config = AutoencoderConfig(base_channels=8, latent_channels=3)
    config.decoder = DecoderConfig(family, dropout=0.0)
    torch.manual_seed(0)
    plain = build_decoder(config, 1, 16)
    config.decoder.latent_noise, config.decoder.latent_mask = 0.3, 0.2
    torch.manual_seed(0)
    decoder, z = build_decoder(config, 1, 16), latents(4)
    assert plain.state_dict().keys() == decoder.state_dict().keys()  # so the weights go from one to the other
    assert torch.equal(decoder.eval()(z), plain.eval()(z))
    for module in (decoder, copy.deepcopy(decoder)):
        torch.manual_seed(1)
        out = module.train()(z)
        torch.manual_seed(1)
        assert torch.equal(out, plain.train()(corrupted(z, 0.3, 0.2))) and not torch.equal(out, plain(z))
    before = torch.get_rng_state()
    plain(z)
    assert torch.equal(before, torch.get_rng_state())  # without corruption nothing is drawn


def test_the_compiler_keeps_the_hook():
    config = AutoencoderConfig(base_channels=8, latent_channels=3, decoder=DecoderConfig("linear", latent_mask=0.5))
    decoder, z = build_decoder(config, 1, 16).train(), latents(4)
    mean = decoder(z.mean((0, 2, 3), keepdim=True))
    torch._dynamo.reset()
    out = torch.compile(decoder, backend="aot_eager")(z)
    hidden = (out.unfold(2, 2, 2).unfold(3, 2, 2) - mean[:, :, None, None]).abs().amax((1, 4, 5)) < 1e-4
    assert abs(hidden.float().mean().item() - 0.5) < 4 * (0.25 / hidden.numel()) ** 0.5


def test_two_processes_corrupt_as_one(in_processes):
    z = latents(6, dtype=torch.float64)

    def run(part):
        part = part.clone().requires_grad_()
        torch.manual_seed(5)
        out = corrupted(part, 0.6, 0.3)
        (gradient,) = torch.autograd.grad(out.square().sum(), part)
        return out.detach(), gradient

    whole, gradient = run(z)
    for rank, (out, own) in enumerate(in_processes(2, lambda rank: tuple(x.tolist() for x in run(z[rank::2])))):
        torch.testing.assert_close(torch.tensor(out, dtype=torch.float64), whole[rank::2], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(torch.tensor(own, dtype=torch.float64), gradient[rank::2], rtol=1e-10, atol=1e-10)


def test_the_knobs_have_bounds():
    for override in ("latent_noise=-1", "latent_mask=1", "latent_mask=-0.1"):
        with pytest.raises(ValueError, match=f"auxiliary_decoder.{override.split('=')[0]}: expected"):
            load_config(None, [f"auxiliary_decoder.{override}"])
