"""The whole generative model: class -> prior -> tokens or latent -> decoder -> image."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dae.config import KernelsConfig, SamplingConfig
from dae.hub import CONFIG, require_model
from dae.models import Autoencoder, Prior, choose_kernels
from dae.models.latent import brief, identities
from dae.precision import own_arithmetic
from dae.priors import PRIORS, family_of


def load_chain(
    output_dir: str | Path,
    device: Any = "cpu",
    kernels: KernelsConfig | None = None,
    torch_dtype: torch.dtype | None = None,
) -> tuple[Autoencoder, Prior]:
    """Load the autoencoder and the prior of a run, with these `kernels` (None: "auto") and `torch_dtype` (None: float32).

    Raises:
        FileNotFoundError: one of them is missing.
        ValueError: the prior was trained on another autoencoder's latent.
    """
    output, options = Path(output_dir), {"device": device, "torch_dtype": torch_dtype}
    autoencoder = Autoencoder.from_pretrained(require_model(output / "autoencoder", "train_dae"), **options)
    prior = prior_class(require_model(output / "prior", "train_prior")).from_pretrained(output / "prior", **options)
    if prior.tokenizer not in (known := identities(output / "autoencoder")):
        what = "tokens" if family_of(prior).discrete else "latents"
        raise ValueError(
            f"{output / 'prior'} was trained on the {what} of another autoencoder than {output / 'autoencoder'} (latent "
            f"{brief(prior.tokenizer)}, not {brief(known[0])}): encode the data again (recipes/encode.py) and train the "
            "prior again (recipes/train_prior.py)"
        )
    for model in (autoencoder, prior):
        choose_kernels(model, kernels or KernelsConfig())
    return autoencoder, prior


def prior_class(folder: Path) -> type[Prior]:
    """The class of the prior saved in `folder`; if its config is damaged any class, as `from_pretrained` reports the damage."""
    classes = {family.model.__name__: family.model for family in PRIORS.values()}
    try:
        return classes[json.loads((folder / CONFIG).read_text())["_class_name"]]
    except (ValueError, TypeError, KeyError):
        return next(iter(classes.values()))


def knows_classes(prior: Prior) -> bool:
    """Whether it can be conditioned on a class; priors that are fitted at once cannot."""
    return not family_of(prior).fitted


@own_arithmetic(gradients=False)
def balanced_labels(count: int, num_classes: int, classes: Sequence[int] = ()) -> Tensor:
    """[count]: each class as often as every other, in turn: 0, 1, ..., num_classes - 1, 0, 1, ...; or of `classes` alone.

    Raises:
        ValueError: one of `classes` is not in 0..num_classes - 1.
    """
    if unknown := [c for c in classes if not 0 <= c < num_classes]:
        raise ValueError(f"sampling.classes: the prior knows the classes 0..{num_classes - 1}, got {unknown[0]}")
    chosen = torch.tensor(classes) if classes else torch.arange(num_classes)
    return chosen[torch.arange(count) % len(chosen)]


def generate(autoencoder: Autoencoder, prior: Prior, labels_N: Tensor, settings: SamplingConfig, seed: int) -> Iterator[Tensor]:
    """Images [B, C, H, W] of the given classes, in batches of `settings.batch_size`, on the models' device, not clipped.

    Of the settings, those count that the prior's family reads (`PriorFamily.sampling_knobs`); a Gaussian mixture reads none, and
    ignores the classes.
    """
    family, device = family_of(prior), prior.device
    generator = torch.Generator(device).manual_seed(seed)
    for labels in labels_N.split(settings.batch_size):
        drawn = family.sample(prior, labels.to(device), settings, generator)
        with torch.inference_mode():
            decoding = autoencoder.decode_indices(drawn) if family.discrete else autoencoder.decode(drawn.to(autoencoder.dtype))
        yield decoding.sample
