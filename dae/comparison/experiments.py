"""The comparisons behind docs/evidence.md: two data sets, three latent types each."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Experiment:
    """A comparison: recipes/configs/evidence-<data>.yaml with `overrides`, described as `title` on `images`."""

    data: str
    images: str
    title: str
    overrides: tuple[str, ...]


IMAGES = {
    "digits": "scikit-learn's digits, 8x8, grey, 10 classes",
    "photos": "crops of the photographs inside the scikit-learn and scikit-image wheels, 8x8, colour, no labels",
}
TITLES = {
    "vq": "VQ + autoregressive Transformer",
    "kl": "KL + Diffusion Transformer (flow matching)",
    "gan": "GAN on a data-dependent latent + Gaussian mixture",
}
KL = "autoencoder.bottleneck=kl autoencoder.latent_channels=4"
SHARED = {
    "vq": "",
    "kl": f"{KL} prior.family=dit prior.width=32 prior.max_train_steps=240 prior.train_batch_size=64 prior.dropout=0 "
    "compare.prior_learning_rates=[1e-2,2e-2]",
    "gan": f"{KL} prior.family=mixture compare.prior_widths=[4] stage2.loss.adversarial=0.1 "
    "stage2.loss.discriminator_channels=8 stage2.loss.discriminator_layers=1 autoencoder.channel_multipliers=[1,2,2]",
}
KL_WEIGHTS = {  # the main one, a lower one for the baseline, and a higher one for all rate_arms
    ("digits", "kl"): ("1e-3", "3e-4", "3e-3"),
    ("photos", "kl"): ("3e-4", "1e-4", "1e-3"),
    ("digits", "gan"): ("3e-4", "1e-4", "1e-3"),
    ("photos", "gan"): ("1e-4", "3e-5", "3e-4"),
}


def _experiment(data: str, latent: str) -> Experiment:
    overrides = SHARED[latent].split()
    if (data, latent) in KL_WEIGHTS:
        own, low, high = KL_WEIGHTS[data, latent]
        overrides += [f"autoencoder.kl.kl_weight={own}", f"compare.rates=[{low},{high}]", f"compare.other_rates=[{high}]"]
    return Experiment(data, IMAGES[data], TITLES[latent], tuple(overrides))


EXPERIMENTS = {f"{data}-{latent}": _experiment(data, latent) for data in IMAGES for latent in TITLES}
