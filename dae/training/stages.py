"""Which stages a method trains: the whole difference between the Decoupled Autoencoder and its baselines."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass

from dae.config import Config, DecoderConfig, StageConfig
from dae.models import Autoencoder
from dae.models.architectures import architecture_of
from dae.quantizers import BOTTLENECKS, bottleneck_class

DISCRIMINATOR = "discriminator"  # folder of a saved one, beside the model that was trained with it


@dataclass
class Stage:
    name: str
    decoder: DecoderConfig
    latent_frozen: bool  # encoder and bottleneck stay as the previous stage left them
    config: StageConfig
    keeps_decoder: bool = False  # keep the weights of the previous stage's decoder instead of initialising new ones
    learns_codebook: bool = False  # though the latent is frozen: the encoder alone stays

    @property
    def trains_decoder_alone(self) -> bool:
        return self.latent_frozen and not self.learns_codebook

    def freeze(self, autoencoder: Autoencoder) -> None:
        """Freeze what the stage does not train."""
        if self.latent_frozen:
            autoencoder.freeze_latent(codebook=not self.learns_codebook)


def plan_stages(config: Config) -> list[Stage]:
    """The stages of `config.method`; all methods train for the same total number of steps.

    dae (Hu et al. 2023): encoder and bottleneck with the weak auxiliary decoder, then the real decoder on the frozen latent; with
    a pretrained encoder (`autoencoder.encoder`) the second stage alone. Variants of public re-implementations are
    `auxiliary_decoder.keep`, where stage 2 goes on with the decoder of stage 1, and `stage2.codebook=trainable`.
    joint: one stage with the real decoder; optimised as stage 1 is, with the losses of stage 2 (an adversarial loss starts
    when it would start in stage 2). joint_dropout: the same with channel dropout in the decoder. joint_finetuned: joint for
    the steps of stage 1, then its decoder goes on alone, on the frozen latent. weak: joint, but with the auxiliary decoder.
    refit: stage 2 alone, on the latent of another autoencoder.

    Raises:
        ValueError: a stage has no reconstruction loss, or a decoder or codebook that it cannot train or keep; a discriminator is
            too deep for the images, has no network to look through or is to be saved and there is none; or attention is asked for
            at a resolution that no level has.
    """
    stages = _stages(config)
    for stage in stages:
        loss = stage.config.loss
        if (
            loss.l1 == loss.l2 == loss.charbonnier == loss.perceptual == 0
        ):  # the adversarial weight, a ratio of gradients, would be 0, too
            section = "stage2" if stage.name != "stage1" else "stage1"
            raise ValueError(
                f"{section}.loss: l1, l2, charbonnier, perceptual are all 0, which trains nothing; give one a weight"
            )
        if stage.learns_codebook and not bottleneck_class(config.autoencoder).learns_codebook:
            known = ", ".join(name for name, kind in BOTTLENECKS.items() if kind.learns_codebook)
            raise ValueError(
                f"stage2.codebook=trainable: autoencoder.bottleneck={config.autoencoder.bottleneck} learns no codebook; leave it "
                f"frozen, or choose one of {known}"
            )
        if stage.decoder.family == "projection":
            _check_projection(config, stage)
        if loss.adversarial > 0 and loss.discriminator == "features" and not loss.discriminator_features:
            raise ValueError(
                f"{stage.name}.loss.discriminator=features needs loss.discriminator_features: a pretrained network by its name "
                "in timm, or a folder with config.json and model.safetensors"
            )
        if loss.discriminator == "patch" and loss.discriminator_features:
            raise ValueError(
                f"{stage.name}.loss.discriminator_features={loss.discriminator_features} is not read by discriminator=patch: "
                f"set {stage.name}.loss.discriminator=features, or leave it out"
            )
        if loss.adversarial == 0 and loss.discriminator_init:
            raise ValueError(
                f"{stage.name}.loss.discriminator_init={loss.discriminator_init}: the stage trains no discriminator; give "
                f"{stage.name}.loss.adversarial a weight, or leave it out"
            )
        if loss.adversarial > 0 and loss.discriminator == "patch" and config.data.resolution >> loss.discriminator_layers < 1:
            most = config.data.resolution.bit_length() - 1
            raise ValueError(
                f"{stage.name}.loss.discriminator_layers={loss.discriminator_layers} halve data.resolution="
                f"{config.data.resolution} to less than a pixel: expected at most {most}"
            )
    if config.save_discriminator and all(stage.config.loss.adversarial == 0 for stage in stages):
        raise ValueError("save_discriminator=true: no stage trains a discriminator; give stage2.loss.adversarial a weight")
    architecture_of(config.autoencoder).check(config.autoencoder, config.data.resolution)
    return stages


def saved_discriminators(config: Config) -> dict[str, str]:
    """Folders within that of the run where `save_discriminator` puts discriminators, by the names of their stages."""
    if not config.save_discriminator:
        return {}
    *earlier, last = plan_stages(config)
    folders = {stage.name: f"{stage.name}/{DISCRIMINATOR}" for stage in earlier} | {last.name: DISCRIMINATOR}
    return {stage.name: folders[stage.name] for stage in (*earlier, last) if stage.config.loss.adversarial > 0}


def _check_projection(config: Config, stage: Stage) -> None:
    if stage.latent_frozen:
        raise ValueError(
            f"{stage.name}: autoencoder.decoder.family=projection is solved, not trained, and the latent is frozen: nothing "
            "would learn; choose full, or another family"
        )
    if config.cuda_graphs:
        raise ValueError(
            f"cuda_graphs=true excludes the projection decoder of {stage.name}, whose linear systems no graph has been recorded "
            "with; leave cuda_graphs out"
        )


def _stages(config: Config) -> list[Stage]:
    one, two = config.stage1, config.stage2
    decoder = config.autoencoder.decoder
    if config.method == "refit":
        return [Stage("stage2", decoder, True, two)]
    second = functools.partial(Stage, latent_frozen=True, config=two, learns_codebook=two.codebook == "trainable")
    if config.autoencoder.encoder:
        if config.method != "dae":
            raise ValueError(
                f"method={config.method} trains an encoder, autoencoder.encoder={config.autoencoder.encoder} is frozen: set "
                "method=dae"
            )
        if config.auxiliary_decoder.keep:
            raise ValueError(
                f"auxiliary_decoder.keep=true: with autoencoder.encoder={config.autoencoder.encoder} there is no stage 1 whose "
                "decoder could be kept; leave it out"
            )
        return [second("stage2", decoder)]
    if config.method == "dae":
        if (weak := config.auxiliary_decoder).keep and not {weak.family, decoder.family} <= {"full", "dropout"}:
            raise ValueError(
                f"auxiliary_decoder.keep=true: auxiliary_decoder.family={weak.family} and autoencoder.decoder.family="
                f"{decoder.family} are not the same network: expected full or dropout for both"
            )
        first = Stage("stage1", weak.without_keep(), False, one)
        return [first, second("stage2", decoder, keeps_decoder=weak.keep)]
    loss = dataclasses.replace(two.loss, adversarial_start=one.max_train_steps + two.loss.adversarial_start)
    if config.method == "joint_finetuned":
        joint = Stage("joint", decoder, False, dataclasses.replace(one, loss=loss))
        return [joint, second("finetune", decoder, keeps_decoder=True)]
    if config.method == "joint_dropout":
        decoder = DecoderConfig(family="dropout", dropout=config.auxiliary_decoder.dropout)
    elif config.method == "weak":
        decoder = config.auxiliary_decoder.without_keep()
    steps = one.max_train_steps + two.max_train_steps
    return [Stage("joint", decoder, False, dataclasses.replace(one, max_train_steps=steps, loss=loss))]
