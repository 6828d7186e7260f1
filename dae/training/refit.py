"""Refit: stage 2 of the Decoupled Autoencoder on the latent of an autoencoder that exists already."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

from dae.config import Config
from dae.models import Autoencoder
from dae.models.diffusers_weights import CONFIG, WEIGHTS
from dae.models.latent import identify
from dae.training.autoencoder import build_autoencoder
from dae.training.initialization import load_autoencoder
from dae.training.stages import plan_stages

log = logging.getLogger(__name__)


def prepare_refit(config: Config) -> tuple[Config, Autoencoder]:
    """The configuration of the refit, with the architecture of the autoencoder at `init_from`, and that autoencoder.

    Raises:
        FileNotFoundError, ValueError: `init_from` is not given, is no autoencoder, or was made for other images than `data`.
    """
    if not config.init_from:
        raise ValueError(
            "init_from is not given: expected the autoencoder whose decoder is to be refitted, a folder of diffusers' "
            "AutoencoderKL or VQModel, the output folder of a run, or a saved autoencoder"
        )
    if config.stage2.codebook != "frozen":
        raise ValueError(f"stage2.codebook={config.stage2.codebook} would change the latent that a refit keeps: leave it out")
    source, crop = load_autoencoder(config.init_from, config.data.resolution), config.data.center_crop
    source.refuse_other_data(config.data.channels, config.data.resolution)
    known = source.latent.transform["center_crop"] if source.latent else None
    if known not in (None, crop):
        raise ValueError(
            f"data.center_crop={str(crop).lower()}: the images of the latent in {config.init_from} were prepared with "
            f"center_crop={str(known).lower()}, and so must those of its new decoder"
        )
    source.latent = identify(source, center_crop=crop)
    architecture = source.config
    if config.refit.decoder == "new":
        architecture = dataclasses.replace(architecture, decoder=config.autoencoder.decoder)
    return dataclasses.replace(config, method="refit", autoencoder=architecture), source


def build_refit(config: Config, source: Autoencoder) -> Autoencoder:
    """The autoencoder to train: the latent of `source`, and the decoder that `refit.decoder` says."""
    autoencoder = build_autoencoder(config, plan_stages(config)[0])
    autoencoder.latent, autoencoder.diffusers_config = source.latent, source.diffusers_config
    return autoencoder


def write_diffusers(autoencoder: Autoencoder, folder: Path) -> list[str]:
    """Write the folder for diffusers, with the scale that came with `init_from`; returns its files, below its parent folder.

    None, and a message in the log, where diffusers has no such network.
    """
    try:
        autoencoder.to_diffusers(folder)
    except ValueError as error:
        log.info("no folder for diffusers is written: %s", error)
        return []
    return [f"{folder.name}/{name}" for name in (CONFIG, WEIGHTS)]
