"""Start training from the weights of a trained model: `init_from`, `prior.init_from`, `loss.discriminator_init`."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TypeVar

from dae.config import config_differences
from dae.hub import CONFIG, PretrainedModel, load_weights, misfit
from dae.models import Autoencoder, FeatureDiscriminator, PatchDiscriminator, Prior
from dae.models.diffusers_weights import is_diffusers_folder
from dae.priors import family_of
from dae.training.stages import DISCRIMINATOR

log = logging.getLogger(__name__)
Model = TypeVar("Model", bound=PretrainedModel)


def load_encoder(autoencoder: Autoencoder, source: str) -> None:
    """Copy encoder and bottleneck, with its codebook, from the autoencoder at `source`.

    Args:
        source: as of `load_autoencoder`.

    Raises:
        FileNotFoundError: there is no saved autoencoder.
        ValueError: it has another architecture; the message names the tensors, and the knobs that differ.
    """
    given = load_autoencoder(source, autoencoder.resolution)
    for part in ("encoder", "bottleneck"):
        weights, own = getattr(given, part).state_dict(), getattr(autoencoder, part)
        if text := misfit(weights, own.state_dict()):
            name = f"the {part} of init_from={source}"
            raise ValueError(f"{name} is a checkpoint of another architecture ({text}){_settings_of(given, autoencoder)}")
        own.load_state_dict(weights)


def _settings_of(given: Autoencoder, wanted: Autoencoder) -> str:
    """What to set for an autoencoder like the given one, in words; empty if no knob differs."""
    found = [f"data.channels={given.image_channels}"] if given.image_channels != wanted.image_channels else []
    for key, value, _ in config_differences(given.config, wanted.config, "autoencoder."):
        if not key.startswith(("autoencoder.decoder.", "autoencoder.preset")):  # neither makes an encoder
            found.append(f"{key}={value}")
    return f"; for its architecture set {', '.join(found)}" if found else ""


def load_decoder(autoencoder: Autoencoder, source: str) -> bool:
    """Copy the decoder of the same architecture from `source`: that of the saved model, or of its stage 1.

    Returns:
        Whether there is one; without, the decoder stays as it was and the log says so.
    """
    own = autoencoder.decoder.state_dict()
    stage1 = Path(source) / "autoencoder" / "stage1"
    if not stage1.is_dir():
        stage1 = Path(source) / "stage1"
    for place in (source, str(stage1)) if stage1.is_dir() else (source,):
        weights = load_autoencoder(place, autoencoder.resolution).decoder.state_dict()
        if {name: w.shape for name, w in weights.items()} == {name: w.shape for name, w in own.items()}:
            load_weights(autoencoder.decoder, weights, place)
            return True
    log.info(
        "init_from=%s has no %s decoder of this size: training starts with a new one", source, autoencoder.config.decoder.family
    )
    return False


def load_autoencoder(source: str, resolution: int | None = None) -> Autoencoder:
    """An autoencoder of ours, or of diffusers.

    Args:
        source: output folder of a run, folder of a saved autoencoder, repository of the Hub with one, or folder of diffusers'
            AutoencoderKL or VQModel, or of a pipeline that has one.
        resolution: of the images, for diffusers' models, which take any.

    FileNotFoundError, ValueError: as `Autoencoder.from_pretrained` and `Autoencoder.from_diffusers`.
    """
    if is_diffusers_folder(source):
        return Autoencoder.from_diffusers(source, resolution=resolution)
    return load_trained(Autoencoder, source)


def load_prior(prior: Prior, source: str) -> None:
    """Copy the weights of the prior at `source`.

    Buffers stay: they hold the scale of this run's latent. So does the embedding of the classes where their number differs.

    Raises:
        FileNotFoundError, ValueError: as `load_encoder`; a Gaussian mixture is fitted and starts from nothing.
    """
    if family_of(prior).fitted:
        raise ValueError(f"prior.init_from={source}: a Gaussian mixture is fitted at once, whatever it starts from; leave it out")
    given = load_trained(type(prior), source, "prior")
    own, weights = prior.state_dict(), given.state_dict()
    kept = {name for name, _ in prior.named_buffers()} & own.keys()
    if given.num_classes != prior.num_classes:
        kept |= {name for name in own if name.startswith("class_embedding.")}
        log.info(
            "prior.init_from=%s knows %d classes, the data have %d: they start new", source, given.num_classes, prior.num_classes
        )
    load_weights(prior, {name: own[name] if name in kept else w for name, w in weights.items()}, f"prior.init_from={source}")


def load_discriminator(discriminator: PatchDiscriminator | FeatureDiscriminator, source: str) -> None:
    """Copy the weights of the discriminator at `source`, which `save_discriminator` saved.

    Args:
        source: its folder, the output folder of its run (the one of the last stage), or a repository of the Hub.

    Raises:
        FileNotFoundError, ValueError: as `load_encoder`; another kind, or heads on another frozen network.
    """
    inside = [Path(source) / "autoencoder" / DISCRIMINATOR, Path(source) / DISCRIMINATOR]
    place = next((str(folder) for folder in inside if (folder / CONFIG).is_file()), source)
    _, _, weights = discriminator.read_pretrained(place)
    if text := misfit(weights, discriminator.state_dict()):
        raise ValueError(
            f"loss.discriminator_init={source} is a discriminator of another architecture ({text}): give loss.discriminator, its "
            "discriminator_* and spectral_norm the values of the run that saved it, or leave discriminator_init out"
        )
    discriminator.load_state_dict(weights)


def load_trained(model: type[Model], source: str, name: str = "autoencoder") -> Model:
    """Load a `model` from the folder of a run, from a folder of its own, or from a repository of the Hub."""
    inside = Path(source) / name
    return model.from_pretrained(str(inside) if (inside / CONFIG).is_file() else source)
