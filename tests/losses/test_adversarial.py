"""GAN losses by their formulae, LeCam, R1, spectral normalisation, and a discriminator that really trains."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from tiny_training import TINY, autoencoder_training, weights

from dae.config import LossConfig, load_config
from dae.losses import GAN_LOSSES, LeCam, discriminator_loss, generator_loss, gradient_penalty, reconstruction_loss
from dae.models import PatchDiscriminator
from dae.training.adversary import build_discriminator

REAL, FAKE = torch.tensor([2.0, 0.5, -1.0]), torch.tensor([-2.0, 0.0, 3.0])
GAN = ("stage2.loss.adversarial=0.1", "stage2.loss.discriminator_channels=8", "stage2.loss.discriminator_learning_rate=3e-3")


def test_formulae():
    log_sigmoid = F.logsigmoid
    wanted = {
        "hinge": (0.5 * ((1 - REAL).clamp(min=0).mean() + (1 + FAKE).clamp(min=0).mean()), -FAKE.mean()),
        "non_saturating": (-0.5 * (log_sigmoid(REAL).mean() + log_sigmoid(-FAKE).mean()), -log_sigmoid(FAKE).mean()),
        "least_squares": (0.5 * ((REAL - 1).square().mean() + FAKE.square().mean()), 0.5 * (FAKE - 1).square().mean()),
    }
    assert set(wanted) == set(GAN_LOSSES)
    for kind, (discriminator, generator) in wanted.items():
        torch.testing.assert_close(discriminator_loss(REAL, FAKE, kind), discriminator)
        torch.testing.assert_close(generator_loss(FAKE, kind), generator)
    for call in (lambda: discriminator_loss(REAL, FAKE, "wgan"), lambda: generator_loss(FAKE, "wgan")):
        with pytest.raises(ValueError, match=r"expected a loss of \('hinge', 'non_saturating', 'least_squares'\), got 'wgan'"):
            call()


def test_charbonnier():
    a, b = torch.tensor([0.0, 1.0], requires_grad=True), torch.tensor([0.0, 4.0])
    loss = reconstruction_loss(a, b, LossConfig(l2=0, charbonnier=2.0))
    torch.testing.assert_close(loss, torch.tensor(2 * (1e-3 + (9 + 1e-6) ** 0.5) / 2))
    (gradient,) = torch.autograd.grad(loss, a)
    assert gradient[0] == 0 and gradient[1] == pytest.approx(-1, rel=1e-6), "smooth at 0"


def test_r1_of_a_linear_discriminator():
    """|w|^2 for D(x) = w . x, whose derivative by w is 2 w."""
    w = torch.randn(12, requires_grad=True, generator=torch.Generator().manual_seed(0))
    images = torch.randn(5, 3, 2, 2)
    penalty = gradient_penalty(lambda x: x.flatten(1) @ w, images)
    torch.testing.assert_close(penalty, w.square().sum())
    torch.testing.assert_close(torch.autograd.grad(penalty, w)[0], 2 * w)


def test_lecam_by_hand():
    lecam = LeCam(decay=0.5)
    first = lecam(REAL, FAKE)
    a_real, a_fake = REAL.mean(), FAKE.mean()
    torch.testing.assert_close(first, (REAL - a_fake).square().mean() + (FAKE - a_real).square().mean())
    torch.testing.assert_close(lecam.averages, torch.stack([a_real, a_fake]))
    second = lecam(REAL + 2, FAKE)
    torch.testing.assert_close(second, (REAL + 2 - a_fake).square().mean() + (FAKE - a_real).square().mean())
    torch.testing.assert_close(lecam.averages, torch.stack([a_real + 1, a_fake]))


def test_lecam_of_two_processes(in_processes):
    def body(rank):
        lecam = LeCam()
        loss = lecam(REAL[:2] + rank, FAKE[:2])
        return loss.item(), lecam.averages

    (one, averages), (two, others) = in_processes(2, body)
    assert torch.equal(averages, others)
    whole = LeCam()
    loss = whole(torch.cat([REAL[:2], REAL[:2] + 1]), FAKE[:2].repeat(2))
    assert (one + two) / 2 == pytest.approx(loss.item(), rel=1e-6)
    torch.testing.assert_close(averages, whole.averages)


def test_spectral_norm_bounds_each_convolution():
    """To 5 %, what 50 steps of power iteration leave where the two largest singular values are near each other."""
    torch.manual_seed(0)
    discriminator = PatchDiscriminator(3, 8, 2, spectral_norm=True)
    for _ in range(50):
        discriminator(torch.randn(2, 3, 32, 32))
    discriminator.eval()
    for conv in (discriminator.conv_in, *discriminator.convs, discriminator.conv_out):
        assert torch.linalg.matrix_norm(conv.weight.detach().flatten(1), 2).item() == pytest.approx(1, rel=0.05)


@pytest.mark.parametrize(
    "options",
    [
        *([f"stage2.loss.adversarial_loss={kind}"] for kind in GAN_LOSSES),
        ["stage2.loss.lecam=0.1"],
        ["stage2.loss.r1=1.0", "stage2.loss.r1_every=2"],
        ["stage2.loss.spectral_norm=true"],
        ["stage2.gradient_accumulation_steps=2", "stage2.loss.lecam=0.1", "stage2.loss.r1=1.0", "stage2.loss.r1_every=1"],
    ],
    ids=lambda options: " ".join(option.removeprefix("stage2.") for option in options),
)
def test_the_discriminator_trains(options):
    """Each of its tensors moves, also before the decoder hears of it; and it learns to tell real from generated."""
    training = autoencoder_training(*GAN, "stage2.loss.adversarial_start=3", *options, which=1)
    before, _ = weights(training)
    for number in range(3):
        training.step(number)
    after, _ = weights(training)
    ours = {key: value for key, value in before.items() if key.startswith("discriminator/")}
    still = {key for key, value in ours.items() if torch.equal(value, after[key])}
    # One output has a singular vector of one entry; and while all logits are within hinge's margins, its bias has gradient 0.
    assert all(ours[key].numel() == 1 and "conv_out" in key for key in still)
    for number in range(3, 20):
        training.step(number)
    assert all(value.isfinite().all() for value in weights(training)[0].values())
    images = training.next_batch()["image"]
    sample, _ = training.reconstruct(images)
    real, fake = (training.adversary.discriminator(x).mean() for x in (images, sample.detach()))
    assert real > fake


def test_a_new_option_changes_the_step_and_off_changes_nothing():
    def losses(*options):
        training = autoencoder_training(*GAN, *options, which=1)
        for number in range(4):
            training.step(number)
        return weights(training)[0]

    plain = losses()
    same = losses("stage2.loss.r1_every=3", "stage2.loss.adversarial_ramp=0", "stage2.loss.lecam=0")
    assert all(torch.equal(plain[key], same[key]) for key in plain)
    for option in ("lecam=0.5", "r1=1.0", "adversarial_loss=least_squares", "adversarial_ramp=9"):
        other = losses(f"stage2.loss.{option}")
        changed = "model/decoder.conv_out.weight" if "ramp" in option else "discriminator/conv_in.weight"
        assert not torch.equal(plain[changed], other[changed]), option


def test_start_and_ramp():
    ramp = ("stage2.loss.adversarial=0.8", "stage2.loss.adversarial_start=10", "stage2.loss.adversarial_ramp=4")
    training = autoencoder_training(*ramp, "stage2.loss.discriminator_channels=8", which=1)
    assert [training.adversary.weight(n) for n in (0, 9, 10, 11, 12, 13, 14, 99)] == pytest.approx(
        [0, 0, 0.2, 0.4, 0.6, 0.8, 0.8, 0.8]
    )


def test_kernels_are_chosen_where_the_discriminator_is(monkeypatch):
    """A kernel that runs on the GPU alone must not be refused because the network was made on the CPU."""
    asked = []
    monkeypatch.setattr("dae.models.kernels.triton_refusal", lambda device: asked.append(device.type))
    config = load_config(TINY, [*GAN, "kernels.group_norm_silu=triton"])
    build_discriminator(config, config.stage2.loss, torch.device("meta"))
    assert asked and set(asked) == {"meta"}


def test_the_configuration_offers_these_losses():
    field = next(f for f in dataclasses.fields(LossConfig) if f.name == "adversarial_loss")
    assert field.metadata["choices"] == GAN_LOSSES


def test_the_same_images_in_both_terms():
    """The discriminator's step sees the batch and the reconstructions of the decoder's step."""
    training = autoencoder_training(*GAN, which=1)
    seen = []
    training.adversary.discriminator.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].detach().clone()))
    training.step(0)
    generator_fake, real, fake = seen
    assert torch.equal(generator_fake, fake) and not torch.equal(real, fake)


def test_resumed_with_all_of_it():
    """A checkpoint holds LeCam's averages and the power iterations."""
    options = (*GAN, "stage2.loss.lecam=0.1", "stage2.loss.spectral_norm=true")
    training = autoencoder_training(*options, which=1)
    training.step(0)
    tensors, _ = training.state.pack()
    assert tensors["lecam"].keys() == {"averages", "started"} and any("_u" in key for key in tensors["discriminator"])
