"""The whole generative model: class -> prior -> tokens -> decoder -> image."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dae.config import KernelsConfig, SamplingConfig
from dae.hub import fingerprint, require_model
from dae.models import ARPrior, Autoencoder, choose_kernels
from dae.sampling.ar import sample_tokens


def load_chain(output_dir: str | Path, device: Any = "cpu", kernels: KernelsConfig | None = None) -> tuple[Autoencoder, ARPrior]:
    """The autoencoder and the prior of a run, which compute by `kernels` (None: "auto" everywhere).

    Raises:
        FileNotFoundError: one of them is missing.
        ValueError: the latent has no tokens, or the prior was trained on another tokenizer's tokens.
    """
    output = Path(output_dir)
    autoencoder = Autoencoder.from_pretrained(require_model(output / "autoencoder", "train_dae"), device=device)
    if autoencoder.config.bottleneck != "vq":
        raise ValueError("this autoencoder's latent is continuous (KL); the prior that this version has models VQ tokens")
    prior = ARPrior.from_pretrained(require_model(output / "prior", "train_prior"), device=device)
    if prior.tokenizer != fingerprint(output / "autoencoder"):
        raise ValueError(
            f"{output / 'prior'} was trained on the tokens of another autoencoder than {output / 'autoencoder'}: "
            "encode the data again (recipes/encode.py) and train the prior again (recipes/train_prior.py)"
        )
    for model in (autoencoder, prior):
        choose_kernels(model, kernels or KernelsConfig())
    return autoencoder, prior


def balanced_labels(count: int, num_classes: int) -> Tensor:
    """[count]: 0, 1, ..., num_classes - 1, 0, 1, ...: each class as often as every other."""
    return torch.arange(count) % num_classes


def generate(autoencoder: Autoencoder, prior: ARPrior, labels_N: Tensor, settings: SamplingConfig, seed: int) -> Iterator[Tensor]:
    """Images [B, C, H, W] of the given classes, in batches of `settings.batch_size`, on the models' device, not clipped."""
    device = prior.head.weight.device
    generator = torch.Generator(device).manual_seed(seed)
    for labels in labels_N.split(settings.batch_size):
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
            yield autoencoder.decode_indices(tokens).sample
