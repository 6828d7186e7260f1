"""The whole generative model: class -> prior -> tokens or latent -> decoder -> image."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dae.config import KernelsConfig, SamplingConfig
from dae.hub import CONFIG, fingerprint, require_model
from dae.models import ARPrior, Autoencoder, DiT, GaussianMixturePrior, choose_kernels
from dae.precision import own_arithmetic
from dae.sampling.ar import sample_tokens
from dae.sampling.flow import sample_latents

Prior = ARPrior | DiT | GaussianMixturePrior
PRIORS = {kind.__name__: kind for kind in (ARPrior, DiT, GaussianMixturePrior)}


def load_chain(
    output_dir: str | Path,
    device: Any = "cpu",
    kernels: KernelsConfig | None = None,
    torch_dtype: torch.dtype | None = None,
) -> tuple[Autoencoder, Prior]:
    """The autoencoder and the prior of a run, which compute by `kernels` (None: "auto") and in `torch_dtype` (None: float32).

    Raises:
        FileNotFoundError: one of them is missing.
        ValueError: the prior was trained on another autoencoder's latent.
    """
    output, options = Path(output_dir), {"device": device, "torch_dtype": torch_dtype}
    autoencoder = Autoencoder.from_pretrained(require_model(output / "autoencoder", "train_dae"), **options)
    prior = prior_class(require_model(output / "prior", "train_prior")).from_pretrained(output / "prior", **options)
    if prior.tokenizer != fingerprint(output / "autoencoder"):
        what = "tokens" if isinstance(prior, ARPrior) else "latents"
        raise ValueError(
            f"{output / 'prior'} was trained on the {what} of another autoencoder than {output / 'autoencoder'}: "
            "encode the data again (recipes/encode.py) and train the prior again (recipes/train_prior.py)"
        )
    for model in (autoencoder, prior):
        choose_kernels(model, kernels or KernelsConfig())
    return autoencoder, prior


def prior_class(folder: Path) -> type[Prior]:
    """The class of the prior saved in `folder`; of a damaged one any, whose `from_pretrained` says what is wrong."""
    try:
        return PRIORS[json.loads((folder / CONFIG).read_text())["_class_name"]]
    except (ValueError, TypeError, KeyError):
        return ARPrior


def knows_classes(prior: Prior) -> bool:
    """Whether it can be asked for a class; a Gaussian mixture cannot."""
    return not isinstance(prior, GaussianMixturePrior)


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

    A Gaussian mixture ignores the classes and guidance; temperature, top_k and top_p are settings of a prior over tokens.
    """
    device = prior.device
    generator = torch.Generator(device).manual_seed(seed)
    for labels in labels_N.split(settings.batch_size):
        if isinstance(prior, ARPrior):
            tokens = sample_tokens(
                prior,
                labels.to(device),
                cfg_scale=settings.cfg_scale,
                temperature=settings.temperature,
                top_k=settings.top_k,
                top_p=settings.top_p,
                generator=generator,
            )
            with torch.inference_mode():
                images = autoencoder.decode_indices(tokens).sample
        else:
            latents = draw_latents(prior, labels.to(device), settings, generator)
            with torch.inference_mode():
                images = autoencoder.decode(latents.to(autoencoder.dtype)).sample
        yield images


def draw_latents(
    prior: DiT | GaussianMixturePrior, labels_B: Tensor, settings: SamplingConfig, generator: torch.Generator
) -> Tensor:
    """Latents [B, D, h, w] of the given classes."""
    if isinstance(prior, GaussianMixturePrior):
        return prior.sample(len(labels_B), generator)
    steps, scale = settings.num_inference_steps, settings.cfg_scale
    return sample_latents(prior, labels_B, num_inference_steps=steps, cfg_scale=scale, generator=generator)
