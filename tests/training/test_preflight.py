"""Preflight notices what does not train, in one line with a remedy, lets what trains pass, and changes nothing."""

import functools

import pytest
import torch
from tiny_training import GAN, TINY

import dae.training.autoencoder as stages_module
import dae.training.preflight as preflight_module
from dae.config import load_config
from dae.data import TrainLoader
from dae.data.cache import Fingerprint
from dae.models import Autoencoder, PatchDiscriminator
from dae.priors import prior_family
from dae.training import plan_stages
from dae.training.adversary import Adversary
from dae.training.autoencoder import StageTraining, build_autoencoder
from dae.training.encodings import build_cache, cache_class
from dae.training.preflight import preflight_autoencoder, preflight_prior, weights_of_losses
from dae.training.probe import ProbeEngine

CPU = torch.device("cpu")
KL = ("autoencoder.bottleneck=kl", "autoencoder.kl.kl_weight=1e-4")
TOKENS = torch.randint(16, (40, 2, 16), generator=torch.Generator().manual_seed(0))
MOMENTS = torch.randn(40, 2, 8, 4, 4, generator=torch.Generator().manual_seed(0))


def noise(count=40, channels=1):
    return torch.rand(count, channels, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1


def configured(*overrides):
    return load_config(TINY, ["preflight=true", "autoencoder.vq.kmeans_iterations=2", *overrides])


def autoencoder(*overrides, images=None):
    config = configured(*overrides)
    data = [{"image": image} for image in (noise() if images is None else images)]
    preflight_autoencoder(config, lambda stage, purpose: TrainLoader(data, stage.config.train_batch_size, seed=3), CPU)


def prior(*overrides, values=TOKENS, change=lambda prior: None):
    config = configured(*overrides)
    untrained = build_autoencoder(config, plan_stages(config)[0])
    parts = [cache_class(untrained.bottleneck).dataset(values, torch.arange(len(values)) % 3)] * 2
    cache, family = build_cache(untrained, *parts, 3, Fingerprint("", "", "")), prior_family(config)
    torch.manual_seed(0)
    made = family.build(config.prior, cache)
    change(made)
    before = {name: value.clone() for name, value in made.state_dict().items()}
    loader = functools.partial(TrainLoader, cache.train, config.prior.train_batch_size, seed=1)
    preflight_prior(config, family, made, loader, CPU)
    assert all(torch.allclose(value, before[name], 0, 0, equal_nan=True) for name, value in made.state_dict().items()), (
        "a copy was trained"
    )


HEALTHY = {
    "vq": (),
    "gradient codes": ("autoencoder.bottleneck=vq_gradient",),
    "simvq": ("autoencoder.bottleneck=simvq",),
    "rvq": ("autoencoder.bottleneck=rvq",),
    "gvq": ("autoencoder.bottleneck=gvq",),
    "fsq": ("autoencoder.bottleneck=fsq",),
    "lfq": ("autoencoder.bottleneck=lfq",),
    "bsq": ("autoencoder.bottleneck=bsq",),
    "kl": KL,
    "gan": (*GAN, "stage2.loss.adversarial_start=3", "stage2.loss.adversarial_ramp=2", "stage2.loss.l1=0.5"),
    "every loss": (*GAN, "stage2.loss.lecam=0.1", "stage2.loss.r1=1", "stage2.loss.charbonnier=1"),
    "least squares, bf16": (*GAN, "stage2.loss.adversarial_loss=least_squares", "mixed_precision=bf16"),
    "joint": ("method=joint", *GAN, "stage2.loss.adversarial_loss=non_saturating"),
    "fp16, gan": ("mixed_precision=fp16", *GAN),
    "finetuned, linear": ("method=joint_finetuned", "autoencoder.decoder.family=linear"),
    "warm-up, accumulation, no rate": ("stage1.lr_warmup_steps=100000", "stage1.gradient_accumulation_steps=3",
                                       "stage2.learning_rate=0"),
    "overlap, noise, masks": ("auxiliary_decoder.family=overlap", "auxiliary_decoder.latent_noise=0.5",
                              "auxiliary_decoder.latent_mask=0.3", "stage2.codebook=trainable"),
    "projection": ("auxiliary_decoder.family=projection",),
    "identity": ("autoencoder.bottleneck=identity",),
    "kept decoder": ("auxiliary_decoder.family=dropout", "auxiliary_decoder.keep=true"),
    "ldm": ("autoencoder.architecture=ldm", *KL),
    "vit": ("autoencoder.architecture=vit", "autoencoder.vit.width=16", "autoencoder.vit.patch_size=2", *KL),
}  # fmt: skip


@pytest.mark.parametrize("name", HEALTHY)
def test_what_trains_passes(name, caplog):
    caplog.set_level("INFO")
    state = torch.get_rng_state()
    autoencoder(*HEALTHY[name])
    assert torch.equal(torch.get_rng_state(), state)
    (line,) = (message for message in caplog.messages if message.startswith("preflight: "))
    assert "tensors as they should be" in line


@pytest.mark.parametrize(
    "overrides",
    [
        ["prior.z_loss=1e-4", "prior.token_noise=0.1", "prior.dropout=0.1"],
        ["autoencoder.bottleneck=rvq", "prior.label_smoothing=0.1"],
        [*KL],
        [*KL, "prior.depth=3", "prior.lr_warmup_steps=10000", "mixed_precision=bf16"],
        [*KL, "prior.family=mixture"],
    ],
)
def test_a_prior_that_trains_passes(overrides):
    prior(*overrides, values=MOMENTS if KL[0] in overrides else TOKENS)


def refused(match, call, *overrides, **options):
    with pytest.raises(ValueError, match=match) as caught:
        call(*overrides, **options)
    assert "\n" not in str(caught.value) and "preflight=false" in str(caught.value)
    call("preflight=false", *overrides, **options)


def test_it_can_be_left_out():
    autoencoder("preflight=false", images=torch.zeros(40, 1, 8, 8))


def patched(monkeypatch, owner, name, wrapper):
    original = getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *args, **options: wrapper(original, *args, **options))


def test_a_tensor_without_gradient(monkeypatch):
    def freeze(original, config, stage):
        made = original(config, stage)
        next(made.encoder.parameters()).requires_grad_(False)
        return made

    patched(monkeypatch, preflight_module, "build_autoencoder", freeze)
    refused(r"stage1: model\.encoder\.\S+ is to train and did not move: it takes no gradient", autoencoder)


def test_parts_that_no_loss_reaches(monkeypatch):
    def detached(original, self, images):
        output = original(self, images)
        output.sample = self.decoder(output.encoding.latents.detach())
        output.encoding.loss = output.encoding.loss.detach()
        return output

    patched(monkeypatch, Autoencoder, "forward", detached)
    refused(r"stage1: .*(reaches no optimiser|no loss reaches it)", autoencoder)


def test_a_frozen_part_that_is_trained(monkeypatch):
    def thawed(original, self, *args, **options):
        original(self, *args, **options)
        if self.stage.latent_frozen:
            self.autoencoder.encoder.requires_grad_(True)
            self.state.optimizers["optimizer"].param_groups[0]["params"].extend(self.autoencoder.encoder.parameters())

    def encoding(original, self, images):
        if not self.stage.latent_frozen:
            return original(self, images)
        with torch.enable_grad():
            found = self.autoencoder.encode(images)
        return self.model(found.latents), found

    patched(monkeypatch, StageTraining, "__init__", thawed)
    patched(monkeypatch, StageTraining, "reconstruct", encoding)
    refused(r"stage2: \d+ tensors, such as model\.encoder\.\S+, are frozen and moved", autoencoder)


def test_a_frozen_codebook_that_is_updated(monkeypatch):
    def update(original, self):
        original(self)
        self.autoencoder.bottleneck.codebook += 1e-3

    patched(monkeypatch, StageTraining, "update_codebook", update)
    refused(r"stage2: model\.bottleneck\.codebook is frozen and moved", autoencoder)


def test_a_codebook_that_nothing_updates(monkeypatch):
    patched(monkeypatch, StageTraining, "update_codebook", lambda original, self: None)
    refused(r"stage1: the codebook is learned from the latents and did not move", autoencoder)


def test_a_discriminator_that_no_optimiser_steps(monkeypatch):
    def others(original, self, optimizers):
        original(self, list(optimizers)[:1])

    patched(monkeypatch, ProbeEngine, "step", others)
    refused(r"stage2: 10 tensors, such as discriminator\.\S+, are to train and did not move", autoencoder, *GAN)


def test_a_discriminator_in_no_optimiser(monkeypatch):
    def another(original, module, *args):
        return original(PatchDiscriminator(1, 8, 2) if isinstance(module, PatchDiscriminator) else module, *args)

    patched(monkeypatch, stages_module, "build_optimizer", another)
    refused(
        r"stage2: .*discriminator\.\S+, are to train and did not move: it is in no optimiser|stage2.*no optimiser",
        autoencoder,
        *GAN,
    )


def test_a_discriminator_without_gradient(monkeypatch):
    def nothing(original, self, images, sample, number):
        return original(self, images, sample, number).detach().requires_grad_()

    patched(monkeypatch, Adversary, "discriminator_term", nothing)
    refused(r"stage2: 10 tensors, such as discriminator\.\S+, are .*: no loss reaches it", autoencoder, *GAN)


@pytest.mark.parametrize(
    ("knob", "method", "wrapper"),
    [
        ("adversarial=0.1", "generator_term", lambda original, self, *args: original(self, *args).detach()),
        ("adversarial=0.1", "weight", lambda original, self, number: 0.0),
        ("r1=1", "penalised", lambda original, self, number: False),
    ],
)
def test_a_loss_that_reaches_no_optimiser(monkeypatch, knob, method, wrapper):
    patched(monkeypatch, Adversary, method, wrapper)
    refused(rf"stage2: the loss of stage2\.loss\.{knob} reaches no optimiser", autoencoder, *GAN, f"stage2.loss.{knob}")


def test_a_lecam_that_is_detached(monkeypatch):
    from dae.losses import LeCam

    patched(monkeypatch, LeCam, "forward", lambda original, self, real, fake: original(self, real.detach(), fake.detach()))
    refused(r"stage2: the loss of stage2\.loss\.lecam=0\.1 reaches no optimiser", autoencoder, *GAN, "stage2.loss.lecam=0.1")


def test_one_of_two_reconstruction_losses_is_lost(monkeypatch):
    def without_l1(original, sample, images, loss):
        return original(sample, images, type(loss)(l2=loss.l2)) + loss.l1 * (sample.detach() - images).abs().mean()

    patched(monkeypatch, stages_module, "reconstruction_loss", without_l1)
    refused(r"stage1: the loss of stage1\.loss\.l1=0\.5 reaches no optimiser", autoencoder, "stage1.loss.l1=0.5")


def test_the_bottleneck_loss_is_detached(monkeypatch):
    def detached(original, self, features, *args):
        encoding = original(self, features, *args)
        encoding.loss = encoding.loss.detach()
        return encoding

    from dae.quantizers import GaussianBottleneck

    patched(monkeypatch, GaussianBottleneck, "forward", detached)
    refused(r"stage1: the loss of GaussianBottleneck\.kl_weight=0\.0001 reaches no optimiser", autoencoder, *KL)


def test_everything_is_detached(monkeypatch):
    patched(monkeypatch, stages_module, "reconstruction_loss", lambda original, sample, *rest: original(sample.detach(), *rest))
    refused(r"stage1: the loss of stage1\.loss\.l2=1 reaches no optimiser", autoencoder)
    patched(monkeypatch, StageTraining, "backward", lambda original, self, loss: original(self, loss.detach()))
    refused(r"stage1: a loss depends on no parameter that is trained", autoencoder)


@pytest.mark.parametrize(
    ("images", "match"),
    [
        (noise()[:1].expand(40, -1, -1, -1), "all 80 images of the first batches are equal"),
        (noise()[:, :, :1, :1].expand(-1, -1, 8, 8), "each of the 80 images of the first batches is one colour"),
    ],
)
def test_batches_without_variance(images, match):
    refused(f"stage1: {match}.*data.image_column", autoencoder, images=images)


def test_encodings_without_variance():
    refused("prior: all 80 encodings of the first batches are equal", prior, values=TOKENS[:1].expand(40, -1, -1) * 0 + 3)


def test_dead_codes(monkeypatch):
    def far(original, self, features, generator):
        original(self, features, generator)
        codes = self.codebook.clone()
        codes[1:] += 1e3
        self._set_codes(torch.ones(len(codes), dtype=torch.bool), codes)

    from dae.quantizers import VectorQuantizer

    patched(monkeypatch, VectorQuantizer, "initialize_codebook", torch.no_grad()(far))
    refused(r"stage1: 1,280 latents of the first batches use 1 of 16 codes.*codes are dead.*stage1.learning_rate or", autoencoder)


def test_a_latent_out_of_range(monkeypatch):
    def scaled(original, self, images):
        mean, log_variance = original(self, images).chunk(2, 1)
        return torch.cat([1e6 * mean, log_variance], 1)

    from dae.models.conv import ConvEncoder

    patched(monkeypatch, ConvEncoder, "forward", scaled)
    refused("stage1: the standard deviations of the latent's channels reach from", autoencoder, *KL)


@pytest.mark.parametrize("factor", [0.0, 1e-3, 1e3, float("nan"), float("inf")])
def test_a_latent_that_the_prior_is_not_scaled_for(factor):
    def change(made):
        made.latent_std[2] *= factor

    refused("prior: .*(deviation of|not finite)", prior, *KL, values=MOMENTS, change=change)


def test_a_block_of_the_prior_that_no_gradient_reaches():
    def change(made):
        made.blocks[0].register_forward_hook(lambda module, args, output: args[0])

    refused(r"prior: .*model\.blocks\.0\.\S+, are to train and did not move", prior, change=change)


def test_the_loss_is_not_finite(monkeypatch):
    images = noise()
    images[:, :, 0, 0] = torch.nan
    where = r"arises in model\.encoder\.\S+ \(Conv2d\), whose input is not finite already, in rows 0, 1"
    refused(f"stage1: the loss or its gradient is not finite .*{where}", autoencoder, images=images)


def test_16_bits_that_lose_the_loss(monkeypatch):
    """fp16 on a CPU, which the recipes refuse: the smallest number is 6e-8, and a gradient of 1e-12 needs more than the scale."""
    monkeypatch.setattr("dae.training.preflight.DTYPES", {"fp16": torch.float16, "no": torch.float16})
    monkeypatch.setattr("dae.training.preflight.LOSS_SCALES", (1.0,))
    small = [f"stage{i}.loss.l2=1e-12" for i in (1, 2)]
    refused(
        r"stage1: in fp16 the gradient of \d+ tensors, such as \S+, is exactly zero, in float32 it is not", autoencoder, *small
    )


def test_16_bits_that_overflow(monkeypatch):
    monkeypatch.setattr("dae.training.preflight.DTYPES", {"fp16": torch.float16, "no": torch.float16})
    broken = functools.partial(autoencoder, images=noise() * 1e5)
    refused(r"stage1: in fp16 the loss or its gradient is not finite, first in model\.\S+ .*, in float32 it is", broken)


def test_an_adversarial_loss_that_never_starts_is_said(caplog):
    autoencoder(*GAN, "stage2.loss.adversarial_start=100")
    assert any("stage2: the adversarial loss has its weight from step 100 on, the stage ends at 6" in m for m in caplog.messages)


def test_weights_are_found_by_their_meaning():
    """A new loss whose knob's help begins otherwise would not be looked at."""
    config = configured("stage2.loss.lecam=0.5", "stage2.loss.r1=2")
    assert dict(weights_of_losses(config.stage2.loss)) == {"l2": 1.0, "lecam": 0.5, "r1": 2.0}
    assert dict(weights_of_losses(config.autoencoder.kl)) == {"kl_weight": 1e-6}
    assert dict(weights_of_losses(config.prior)) == {}
