"""Discriminator on frozen features: what it reads, what it trains and saves, and on which weights it insists."""

import pytest
import torch
from safetensors.torch import load_file
from timm_stand_in import real_weights, write_folder
from tiny_training import GAN, autoencoder_training, weights

from dae.config import load_config
from dae.losses import gradient_penalty
from dae.models import FeatureDiscriminator, PatchDiscriminator
from dae.models.pretrained import weights_sha256
from dae.training.initialization import load_discriminator
from dae.training.stages import plan_stages

IMAGES = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
FEATURES = (*GAN, "stage2.loss.discriminator=features", "stage2.loss.discriminator_features=stages",
            "stage2.loss.discriminator_heads=2")  # fmt: skip


def test_heads_have_as_many_logits_each(timm):
    stages = FeatureDiscriminator("stages", 8, num_heads=3)
    assert stages.layers == [0, 1, 2] and [len(head.halving) for head in stages.heads] == [2, 1, 0]
    assert stages(IMAGES).shape == (2, 3 * 2 * 2)
    tokens = FeatureDiscriminator("timm:tokens", 8, num_heads=2, spectral_norm=True)
    assert tokens.layers == [0, 2] and tokens(IMAGES[:, :1]).shape == (2, 2 * 4 * 4)
    with pytest.raises(ValueError, match=r"loss.discriminator_heads=4: tokens has 3 layers; expected at most as many"):
        FeatureDiscriminator("tokens", 8, num_heads=4)


def test_spectral_norm_is_of_every_convolution_of_the_heads(timm):
    plain, bounded = (FeatureDiscriminator("stages", 8, 3, spectral_norm=on) for on in (False, True))
    convolutions = sum(isinstance(module, torch.nn.Conv2d) for module in plain.modules())
    assert sum("original" in name for name, _ in bounded.named_parameters()) == convolutions == 3 * 3 + 3


def test_the_network_is_frozen_and_no_part(timm):
    discriminator = FeatureDiscriminator("tokens", 8, 2)
    before = weights_sha256(discriminator.backbone)
    assert not any(name.startswith("backbone.") for name in discriminator.state_dict())
    discriminator.train().requires_grad_(True)
    assert not discriminator.backbone.training and not any(p.requires_grad for p in discriminator.backbone.parameters())
    images = IMAGES.clone().requires_grad_()
    discriminator(images).sum().backward()
    assert images.grad.abs().sum() > 0 and all(p.grad is not None for p in discriminator.parameters())
    assert weights_sha256(discriminator.backbone) == before
    moved = discriminator.to("meta")
    assert moved.backbone.mean.is_meta and all(p.is_meta for p in moved.backbone.parameters()), "it moves with the heads"


def test_r1_through_attention(timm):
    """The gradient penalty needs second derivatives, which fused attention has none of."""
    discriminator = FeatureDiscriminator("tokens", 8, 2)
    for head in discriminator.heads:
        for norm in head.norms:
            norm.impl = "reference"
    gradient_penalty(discriminator, IMAGES).backward()
    without = [name for name, p in discriminator.named_parameters() if p.grad is None or p.grad.abs().sum() == 0]
    assert all(name.endswith(("conv_out.bias", "norms.1.bias")) for name in without), "a constant has no gradient"


def test_saved_and_loaded(timm, tmp_path):
    torch.manual_seed(0)
    folder = write_folder(tmp_path / "network", "tokens")
    discriminator = FeatureDiscriminator(str(folder), 8, 2, spectral_norm=True).eval()
    discriminator.save_pretrained(tmp_path / "saved")
    assert not any("backbone." in name for name in load_file(tmp_path / "saved" / "model.safetensors"))
    again = FeatureDiscriminator.from_pretrained(tmp_path / "saved")
    assert torch.equal(again(IMAGES), discriminator(IMAGES))
    write_folder(tmp_path / "network", "tokens", seed=1)  # other weights under the same name
    with pytest.raises(ValueError, match=r"has other weights \(SHA-256 \w+\.\.\.\) than those on which these heads were trained"):
        FeatureDiscriminator.from_pretrained(tmp_path / "saved")
    patch = PatchDiscriminator(3, 8, 1).eval()
    patch.save_pretrained(tmp_path / "patch")
    assert torch.equal(PatchDiscriminator.from_pretrained(tmp_path / "patch")(IMAGES), patch(IMAGES))


def test_start_from_a_saved_one(timm, tmp_path):
    torch.manual_seed(0)
    given = FeatureDiscriminator("stages", 8, 2)
    given.save_pretrained(tmp_path / "run" / "autoencoder" / "discriminator")
    for place in ("run", "run/autoencoder", "run/autoencoder/discriminator"):
        new = FeatureDiscriminator("stages", 8, 2)
        load_discriminator(new, str(tmp_path / place))
        assert all(torch.equal(a, b) for a, b in zip(given.parameters(), new.parameters(), strict=True))
    training = autoencoder_training(*FEATURES, f"stage2.loss.discriminator_init={tmp_path / 'run'}", which=1)
    assert torch.equal(training.adversary.discriminator.heads[0].conv_in.weight, given.heads[0].conv_in.weight)
    with pytest.raises(ValueError, match="holds a 'FeatureDiscriminator', expected a 'PatchDiscriminator'"):
        load_discriminator(PatchDiscriminator(3), str(tmp_path / "run"))
    with pytest.raises(ValueError, match=r"loss.discriminator_init=.* is a discriminator of another architecture .*: give loss"):
        load_discriminator(FeatureDiscriminator("stages", 4, 2), str(tmp_path / "run"))


@pytest.mark.parametrize(
    "options",
    [[], ["spectral_norm=true"], ["lecam=0.1", "r1=1.0", "r1_every=2"], ["augment=[color,translation,cutout]"],
     ["discriminator_features=tokens", "r1=1.0", "r1_every=1", "adversarial_loss=non_saturating"]],
    ids=" ".join,
)  # fmt: skip
def test_the_heads_train_in_a_stage(timm, options):
    training = autoencoder_training(*FEATURES, *(f"stage2.loss.{option}" for option in options), which=1)
    discriminator = training.adversary.discriminator
    network = weights_sha256(discriminator.backbone)
    before, _ = weights(training)
    for number in range(4):
        training.step(number)
    after, _ = weights(training)
    still = [key for key, value in before.items() if key.startswith("discriminator/") and torch.equal(value, after[key])]
    # A logit's singular vector has one entry, and hinge within its margins gives a head's last bias no gradient.
    assert all(before[key].numel() == 1 or key.endswith("backbone_sha256") for key in still)
    assert weights_sha256(discriminator.backbone) == network
    assert not torch.equal(before["model/decoder.conv_out.weight"], after["model/decoder.conv_out.weight"])
    optimised = {id(p) for group in training.state.optimizers["discriminator_optimizer"].param_groups for p in group["params"]}
    assert optimised == {id(p) for p in discriminator.parameters()}
    assert not any("backbone." in key for key in after)


def test_resumed_on_other_weights(timm, tmp_path):
    folder = write_folder(tmp_path / "network", "stages")
    options = (*FEATURES, f"stage2.loss.discriminator_features={folder}")
    tensors, _ = autoencoder_training(*options, which=1).state.pack()
    same = autoencoder_training(*options, which=1)
    same.adversary.discriminator.load_state_dict(tensors["discriminator"])
    write_folder(folder, "stages", seed=1)
    other = autoencoder_training(*options, which=1)
    with pytest.raises(ValueError, match="has other weights"):
        other.adversary.discriminator.load_state_dict(tensors["discriminator"])


def test_refused_before_training(timm, tmp_path):
    config = load_config(None, ["stage2.loss.adversarial=1", "stage2.loss.discriminator=features"])
    with pytest.raises(ValueError, match=r"^stage2.loss.discriminator=features needs loss.discriminator_features: a pretrained"):
        plan_stages(config)
    with pytest.raises(ValueError, match=r"^save_discriminator=true: no stage trains a discriminator; give"):
        plan_stages(load_config(None, ["save_discriminator=true"]))
    with pytest.raises(ValueError, match=r"^stage2.loss.discriminator_features=a.b is not read by discriminator=patch: set"):
        plan_stages(load_config(None, ["stage2.loss.discriminator_features=a.b"]))
    with pytest.raises(
        ValueError, match=r"^stage2.loss.discriminator_init=a/b: the stage trains no discriminator; give stage2.l"
    ):
        plan_stages(load_config(None, ["stage2.loss.discriminator_init=a/b"]))
    folder = write_folder(tmp_path / "a", "stages")
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"^loss.discriminator_features=.* holds no model.safetensors"):
        FeatureDiscriminator(str(folder))
    with pytest.raises(
        ValueError, match=r"stage2.loss.augment: expected one of \['color', .*, got 'colour'; did you mean 'color'"
    ):
        load_config(None, ["stage2.loss.augment=[colour]"])


def test_on_a_real_network():
    discriminator = FeatureDiscriminator(str(real_weights()), 8, 4)
    assert discriminator.layers == [0, 1, 2, 4] and discriminator(IMAGES).shape == (2, 4 * 7 * 7)
