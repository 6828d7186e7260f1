"""mixture: Gaussian mixture over a continuous latent, fitted at once; its bits per image and its sampler."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dae.config import Config, PriorConfig, SamplingConfig
from dae.distributed import as_single_process
from dae.memory import require_memory
from dae.metrics import bits_back
from dae.models import Autoencoder, GaussianMixturePrior
from dae.priors.family import PriorFamily, latent_shape
from dae.quantizers import sample_posteriors
from dae.seeding import seed_for

if TYPE_CHECKING:
    from dae.data.cache import EncodedDataset, EncodingCache


class Mixture(PriorFamily[GaussianMixturePrior]):
    """Gaussian mixture over a continuous latent."""

    name, model, discrete, fitted = "mixture", GaussianMixturePrior, False, True
    criterion = "bits_per_image"
    size_knob = "num_components"
    title, tags = "Gaussian mixture prior", ("gaussian-mixture", "image-generation")
    usage = "autoencoder.decode(prior.sample(len(labels))).sample"
    noun = "a Gaussian mixture"
    learned = "a mixture of {components} Gaussians, the prior, was fitted to such latents"

    def build(self, settings: PriorConfig, cache: EncodingCache) -> GaussianMixturePrior:
        return GaussianMixturePrior(settings, **latent_shape(cache))

    def fit(self, prior: GaussianMixturePrior, cache: EncodingCache, config: Config) -> None:
        """Fit it to one posterior sample of every encoding of every training image."""
        with torch.random.fork_rng(devices=[]), as_single_process():
            torch.manual_seed(seed_for(config.seed, "prior", "posterior"))
            latents = sample_posteriors(cache.train.values_NC.flatten(0, 1))
        prior.fit(latents, seed_for(config.seed, "prior", "fit") % 2**32)  # scikit-learn takes 32 bits

    @torch.no_grad()
    def score(self, prior: GaussianMixturePrior, encoded: EncodedDataset, config: Config) -> float:
        """Code length of the latent, see `dae.metrics.bits_back`; of `evaluation.max_images` at most."""
        device, limit, rows = prior.means.device, config.evaluation.max_images, torch.arange(len(encoded))
        if len(rows) > limit:  # not the first ones, which may be of one class
            generator = torch.Generator().manual_seed(seed_for(config.seed, "prior", "bits"))
            rows = torch.randperm(len(rows), generator=generator)[:limit]
        mean, log_variance = encoded.values_NC[rows, 0].to(device).chunk(2, dim=1)
        generator = torch.Generator(device).manual_seed(seed_for(config.seed, "prior", "likelihood"))
        return bits_back(mean, log_variance, lambda x: torch.cat([prior.log_prob(part) for part in x.split(256)]), generator)

    def sample(
        self, prior: GaussianMixturePrior, labels_B: Tensor, settings: SamplingConfig, generator: torch.Generator
    ) -> Tensor:
        return prior.sample(len(labels_B), generator)

    def require_rows(self, config: Config, autoencoder: Autoencoder, rows: int | None) -> None:
        settings = config.prior
        encodings = None if rows is None else rows * (1 + settings.num_augmentations)
        if encodings is not None and encodings < max(2, settings.num_components):
            raise ValueError(
                f"prior.num_components={settings.num_components}: there are only {encodings} encodings to fit them to; "
                "ask for fewer components, or give more images"
            )
        values = autoencoder.config.latent_channels * autoencoder.latent_size**2
        what = f"the covariances of {settings.num_components} components over {values:,} values of a latent"
        require_memory(4 * settings.num_components * values**2, what, "lower prior.num_components or the size of the latent")

    def resized(self, settings: PriorConfig, size: int) -> list[str]:
        return [f"prior.num_components={size}"]
