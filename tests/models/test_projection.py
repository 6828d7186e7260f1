"""The decoder that is solved for each batch: its solution, its gradient, what it stores, and several processes."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F

from dae.config import AutoencoderConfig, DecoderConfig, VQConfig, load_config
from dae.models import Autoencoder
from dae.models.decoders import LinearDecoder
from dae.models.projection import ProjectionDecoder, solve_ridge
from dae.training import EMA, plan_stages

D, FACTOR, CHANNELS = 3, 2, 2
P = CHANNELS * FACTOR**2


def batch(images=4, side=3, dtype=torch.float64, seed=0):
    """Latents, and images that are a linear map of them and more."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(images, D, side, side, generator=generator, dtype=torch.float64) + 1
    x = torch.randn(images, CHANNELS, FACTOR * side, FACTOR * side, generator=generator, dtype=torch.float64)
    return z.to(dtype), x.to(dtype) + F.interpolate(z[:, :CHANNELS], scale_factor=FACTOR).to(dtype)


def rows(z, x):
    return z.movedim(1, -1).flatten(0, 2), F.pixel_unshuffle(x, FACTOR).movedim(1, -1).flatten(0, 2)


def objective(z_ND, x_NP, weight, bias, ridge):
    return (x_NP - z_ND @ weight - bias).square().sum(1).mean() + ridge * weight.square().sum()


def test_the_solution_is_least_squares_without_ridge():
    z_ND, x_NP = rows(*batch())
    weight, bias = solve_ridge(z_ND, x_NP, 0.0)
    ones = torch.cat([z_ND, torch.ones(len(z_ND), 1, dtype=z_ND.dtype)], dim=1)
    best = torch.linalg.lstsq(ones, x_NP).solution
    # Normal equations lose cond(z)^2, here below 10, of float64's digits.
    torch.testing.assert_close(torch.cat([weight, bias[None]]), best, rtol=1e-12, atol=1e-12)
    for ridge in (1e-2, 1e-4, 1e-6):  # the difference is O(ridge): d W / d ridge = -(cov + ridge)^-1 W
        shrunk, _ = solve_ridge(z_ND, x_NP, ridge)
        least = torch.linalg.eigvalsh(torch.cov(z_ND.T, correction=0))[0]
        assert 0 < (shrunk - weight).norm() <= ridge / least * weight.norm()


def test_the_solution_is_the_minimum():
    (z_ND, x_NP), ridge = rows(*batch()), 0.3
    weight, bias = (each.requires_grad_() for each in solve_ridge(z_ND, x_NP, ridge))
    for gradient in torch.autograd.grad(objective(z_ND, x_NP, weight, bias, ridge), (weight, bias)):
        assert gradient.abs().max() < 1e-13  # sums of some ten terms of order one


def test_the_gradient_is_that_of_finite_differences_and_of_the_envelope():
    (z_ND, x_NP), ridge = rows(*batch(2, 2)), 0.2
    z_ND.requires_grad_()
    assert torch.autograd.gradcheck(lambda z, x: solve_ridge(z, x, ridge), (z_ND, x_NP.requires_grad_()))
    # Of the infimum itself the derivative is the partial one at the minimum: what W does then has no part in it.
    (total,) = torch.autograd.grad(objective(z_ND, x_NP, *solve_ridge(z_ND, x_NP, ridge), ridge), z_ND)
    fixed = [each.detach() for each in solve_ridge(z_ND, x_NP, ridge)]
    (partial,) = torch.autograd.grad(objective(z_ND, x_NP, *fixed, ridge), z_ND)
    torch.testing.assert_close(total, partial, rtol=1e-10, atol=1e-14)


def test_other_losses_are_differentiated_through_the_solution():
    """An L1 loss is not stationary at the solution, so that a decoder without the solution's gradient fails here."""
    decoder = ProjectionDecoder(D, CHANNELS, FACTOR, 0.1).double().train()
    z, x = batch(2, 2)
    assert torch.autograd.gradcheck(lambda z: (decoder(z, x) - x).abs().mean(), (z.requires_grad_(),))
    (whole,) = torch.autograd.grad((decoder(z, x) - x).abs().mean(), z)
    (partial,) = torch.autograd.grad((decoder.eval()(z) - x).abs().mean(), z)
    assert (whole - partial).norm() > 0.01 * whole.norm()


def test_no_linear_decoder_that_is_fitted_does_better():
    z, x = batch(8, dtype=torch.float32)
    decoder = ProjectionDecoder(D, CHANNELS, FACTOR, 1e-8).train()
    best = (decoder(z, x) - x).square().mean().item()
    torch.manual_seed(0)
    fitted = LinearDecoder(D, CHANNELS, FACTOR)
    optimizer = torch.optim.LBFGS(fitted.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        value = (fitted(z) - x).square().mean()
        value.backward()
        return value

    optimizer.step(loss)
    reached = loss().item()
    # Ridge costs at most ridge |W|^2, float32 of a mean its epsilon.
    assert best <= reached * (1 + torch.finfo(torch.float32).eps) + 1e-8 * decoder.weight.square().sum().item()
    assert best > 0.8 * reached  # one bias a channel, not a pixel: the same to a few per cent


@pytest.mark.parametrize("kind", ["constant", "few"])
def test_degenerate_batches(kind):
    channels = {"constant": D, "few": 9}[kind]
    z = {"constant": torch.full((2, D, 2, 2), 0.7), "few": torch.randn(1, 9, 2, 2)}[kind].requires_grad_()
    x = torch.rand(len(z), CHANNELS, 4, 4)
    decoder = ProjectionDecoder(channels, CHANNELS, FACTOR, 1e-8).train()
    sample = decoder(z, x)
    (sample - x).abs().mean().backward()
    assert sample.isfinite().all() and z.grad.isfinite().all()
    mean = F.pixel_shuffle(F.pixel_unshuffle(x, FACTOR).mean((0, 2, 3), keepdim=True).expand(len(x), -1, 2, 2), FACTOR)
    if kind == "constant":
        torch.testing.assert_close(sample, mean, rtol=1e-6, atol=1e-6)
    else:  # four positions, nine channels: interpolated up to the ridge
        torch.testing.assert_close(sample, x, rtol=0, atol=1e-5)
    broken = decoder(torch.full_like(z, math.nan), x)
    assert broken.isnan().all()  # and no LinAlgError: the log's check says at which step


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_changes_nothing(dtype):
    z, x = batch(dtype=torch.float32)
    decoder = ProjectionDecoder(D, CHANNELS, FACTOR, 0.1).train()
    exact = decoder(z, x)
    with torch.autocast("cpu", dtype):
        assert torch.equal(decoder(z, x), exact)
    assert torch.equal(decoder.to(dtype)(z, x), exact)  # narrow stored weights: the solution is not


def test_evaluation_decodes_with_the_last_solution():
    decoder, (z, x), (others, _) = (
        ProjectionDecoder(D, CHANNELS, FACTOR, 0.1),
        batch(dtype=torch.float32),
        batch(2, 5, torch.float32),
    )
    trained = decoder.train()(z, x)
    torch.testing.assert_close(decoder.eval()(z, x), trained, rtol=1e-5, atol=1e-6)  # weights of float32
    weight = decoder.weight.view(D, CHANNELS, FACTOR, FACTOR)
    patches = F.conv_transpose2d(others, weight, stride=FACTOR) + F.pixel_shuffle(
        decoder.bias.view(1, P, 1, 1).expand(2, P, 5, 5), FACTOR
    )
    torch.testing.assert_close(decoder(others), patches, rtol=1e-5, atol=1e-6)
    assert decoder.train()(others).shape == patches.shape and torch.equal(decoder(others), decoder.eval()(others))
    assert not [p for p in decoder.parameters() if p.requires_grad] and not decoder(others).requires_grad
    average = EMA(decoder, 0.5)  # (1 + n) / (10 + n) of the solution before
    before = decoder.weight.clone()
    decoder.train()(*batch(seed=1, dtype=torch.float32))
    average.update(decoder)
    torch.testing.assert_close(average.average.weight, 0.1 * before + 0.9 * decoder.weight)


def test_two_processes_solve_as_one(in_processes):
    z, x = batch(6)

    def run(z, x):
        z, decoder = z.clone().requires_grad_(), ProjectionDecoder(D, CHANNELS, FACTOR, 0.1).double().train()
        (gradient,) = torch.autograd.grad((decoder(z, x) - x).abs().sum(), z)
        return decoder.weight, gradient

    weight, gradient = run(z, x)
    for rank, (theirs, own) in enumerate(in_processes(2, lambda r: tuple(t.tolist() for t in run(z[r::2], x[r::2])))):
        torch.testing.assert_close(torch.tensor(theirs, dtype=torch.float64), weight.detach(), rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(torch.tensor(own, dtype=torch.float64), gradient[rank::2], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("architecture", ["conv", "ldm", "vit"])
@pytest.mark.parametrize("family", ["overlap", "projection"])
def test_it_needs_no_more_of_an_architecture_than_its_factor(family, architecture):
    config = AutoencoderConfig(architecture=architecture, base_channels=8, latent_channels=D, vq=VQConfig(codebook_size=8))
    config.decoder = DecoderConfig(family)
    config.vit.patch_size, config.vit.width, config.vit.depth = 2, 16, 1
    torch.manual_seed(0)
    model, images = Autoencoder(config, 1, 8).train(), torch.rand(4, 1, 8, 8) * 2 - 1
    output = model(images)
    output.sample.square().mean().backward()
    assert output.sample.shape == images.shape and all(p.grad is not None for p in model.encoder.parameters())
    again = Autoencoder.from_config(model.to_config()).eval()
    again.load_state_dict(model.eval().state_dict())
    other = torch.rand(2, 1, 4, 12)
    assert torch.equal(again(other).sample, model(other).sample) and again(other).sample.shape == other.shape


def test_refusals():
    frozen = r"projection is solved, not trained, and the latent is frozen: nothing would learn; choose full"
    for method, stage in (("dae", "stage2"), ("joint_finetuned", "finetune")):
        with pytest.raises(ValueError, match=f"{stage}: autoencoder.decoder.family={frozen}"):
            plan_stages(load_config(None, [f"method={method}", "autoencoder.decoder.family=projection"]))
    with pytest.raises(ValueError, match="cuda_graphs=true excludes the projection decoder of stage1"):
        plan_stages(load_config(None, ["auxiliary_decoder.family=projection", "cuda_graphs=true"]))
    plan_stages(load_config(None, ["auxiliary_decoder.family=projection"]))
    plan_stages(load_config(None, ["method=joint", "autoencoder.decoder.family=projection"]))


def test_the_compiler_takes_the_solution():
    z, x = batch(dtype=torch.float32)
    eager = ProjectionDecoder(D, CHANNELS, FACTOR, 0.1).train()
    compiled = copy.deepcopy(eager)
    torch._dynamo.reset()
    z.requires_grad_()
    gradients = []
    for run, module in ((eager, eager), (torch.compile(compiled, backend="aot_eager"), compiled)):
        sample = run(z, x)
        gradients.append(torch.autograd.grad((sample - x).abs().mean(), z)[0])
        assert module.weight.abs().sum() > 0
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-5, atol=1e-7)
    assert torch.equal(compiled.weight, eager.weight)
