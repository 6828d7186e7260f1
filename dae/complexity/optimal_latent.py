"""The best latent for a family of generators: an encoder trained to minimise D^G(P_f(x), P_x)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self, cast

import torch
from torch import Tensor, nn

from dae.complexity.distances import Distance
from dae.complexity.estimate import Estimate, check_cloud, check_seeds
from dae.complexity.families import SOLVERS, GeneratorFamily, LinearMaps, MLPs, Shape, check_count, check_family
from dae.complexity.fitting import Fitting, Generator, generated_by
from dae.complexity.generator_distance import estimate_of, fit_trial
from dae.complexity.linear import principal_axes
from dae.precision import own_arithmetic
from dae.progress import with_progress


@dataclass(frozen=True)
class OptimalLatent:
    """Result of `optimal_latent`.

    `estimate` is of D^G(P_z, P_x) with z = f(x), on held-out rows, one value per seed (for linear maps with "frechet" by the
    moments of all rows, see `generator_distance`).
    """

    encoder: nn.Module  # data [B, ...] -> codes [B, *latent_shape], of the best seed on the selection rows
    generator: nn.Module  # codes -> data, of the same seed
    codes: Tensor  # [N, *latent_shape], of all rows of the data, in order
    estimate: Estimate


@own_arithmetic(gradients=True)
def optimal_latent(
    data: Tensor,
    family: GeneratorFamily,
    distance: str | Distance = "reconstruction",
    *,
    latent_dim: int | Sequence[int],
    encoder: GeneratorFamily | None = None,
    seeds: Sequence[int] = (0, 1, 2),
    progress: bool = False,
    **options,
) -> OptimalLatent:
    """Train an encoder f and a generator g together, so that the latent z = f(x) minimises the generator-induced distance.

        inf over f of D^G(P_f(x), P_x) = inf over f and g of D(P_g(f(x)), P_x)

    With the paired reconstruction error this is the autoencoder, and PCA if both are linear: by the identity an autoencoder is
    the best latent for its own decoder. If both are linear and the distance is "reconstruction" or "frechet" the solution is
    computed; with heldout=0 it is exact. Otherwise it is trained and an upper bound.

    A bound on the generator alone, such as a Lipschitz constant, has no effect while the encoder can scale its codes: bound the
    encoder too.

    Args:
        data: [N, ...], floating, finite.
        family: of the generators.
        distance: as in `generator_distance`.
        latent_dim: number of values of a code, or its shape, such as (4, 8, 8) for `ConvDecoders`.
        encoder: family of the encoders, from the data's shape to the latent's. None: `LinearMaps()`, optimal for the
            reconstruction error, if the generators are linear maps, and `MLPs(width=128)` otherwise.
        seeds, progress: as in `generator_distance`.
        options: its `steps`, `batch_size`, `learning_rate`, `heldout` and `measure_limit`.

    Raises:
        TypeError, ValueError, FloatingPointError: as `generator_distance`.

    Source: Hu et al. 2023, arXiv 2307.08283.
    """
    check_cloud("data", data)
    if (data == data[:1]).all():
        raise ValueError(f"data: expected points that differ, got {len(data)} equal ones: there is nothing to encode")
    check_family("family", family)
    if encoder is not None:
        check_family("encoder", encoder)
    seeds = check_seeds(seeds)
    latent_shape = tuple(latent_dim) if isinstance(latent_dim, Sequence) else (latent_dim,)
    if not latent_shape:
        raise ValueError("expected latent_dim as an int or the shape of a code with at least one axis, such as (4, 8, 8), got ()")
    for size in latent_shape:
        check_count("latent_dim", size)
    if encoder is None:
        encoder = LinearMaps() if isinstance(family, LinearMaps) else MLPs(width=128)
    both, fitting = Autoencoders(encoder, family, latent_shape), Fitting.of(options)
    trials = [fit_trial(data, data, both, distance, seed, fitting) for seed in with_progress(seeds, str(both), progress)]
    # Critics give no score: take the first.
    best = cast(Generator, min(trials, key=lambda trial: 0.0 if trial.score is None else trial.score).generator)
    found = FittedEncoder(best)
    with torch.no_grad():
        codes = generated_by(found, data.to(best.latent_scale.dtype))
    return OptimalLatent(found, FittedDecoder(best), codes, estimate_of(trials, seeds, both, distance))


@dataclass(frozen=True)
class Autoencoders(GeneratorFamily):
    """g after f with f from `encoder` and g from `decoder`: a family of maps from the data to the data."""

    encoder: GeneratorFamily
    decoder: GeneratorFamily
    latent_shape: Shape

    nested = False

    @property
    def knob(self) -> str:  # type: ignore[override]  # read only: it is the decoder's
        return self.decoder.knob

    @property
    def capacity(self) -> float:
        return self.decoder.capacity

    @property
    def learning_rate(self) -> float:  # type: ignore[override]
        return min(self.encoder.learning_rate, self.decoder.learning_rate)

    def build(self, latent_shape: Shape, data_shape: Shape) -> nn.Module:
        encoder = self.encoder.build(latent_shape, self.latent_shape)
        return nn.Sequential(encoder, self.decoder.build(self.latent_shape, data_shape))

    def constrain_(self, module: nn.Module) -> None:
        for family, half in zip((self.encoder, self.decoder), cast(nn.Sequential, module), strict=True):
            family.constrain_(half)

    def rescaled(self, ratio: float) -> Self:
        # The codes are divided by the scale of the encoder's input, so the encoder is unchanged.
        return dataclasses.replace(self, decoder=self.decoder.rescaled(ratio))

    def best(self, latents: Tensor, data: Tensor, distance: str) -> nn.Module | None:
        """The best pair of linear maps: PCA, shrunk by the product of the norms if that is below 1.

        For W = G F of rank <= k and norm <= p, both E|x - W x|^2 and W_2^2 are at least
        sum_{i <= k} max(1 - p, 0)^2 l_i + sum_{i > k} l_i, with equality for W = min(p, 1) V V^T of the first k axes V.
        """
        encoder, decoder = self.encoder, self.decoder
        if not (isinstance(encoder, LinearMaps) and isinstance(decoder, LinearMaps) and distance in SOLVERS):
            return None
        mean_D = data.flatten(1).double().mean(dim=0)
        K = math.prod(self.latent_shape)
        axes_DK = principal_axes(data.flatten(1))[1][:, :K]
        axes_DK = nn.functional.pad(axes_DK, (0, K - axes_DK.shape[1]))  # more values per code than in the data
        shrunk = min(1.0, encoder.max_norm * decoder.max_norm)
        gain = min(encoder.max_norm, max(1.0, shrunk / decoder.max_norm))
        codes = data.new_empty(1, *self.latent_shape)
        return nn.Sequential(
            encoder.member(latents, codes, gain * axes_DK.T, -gain * axes_DK.T @ mean_D),
            decoder.member(codes, data, shrunk / gain * axes_DK, mean_D),
        )

    def start(self, latents: Tensor, data: Tensor) -> nn.Module:
        best = self.best(latents, data, "reconstruction")
        return super().start(latents, data) if best is None else best

    def __str__(self) -> str:
        return f"{self.decoder}; encoded by {self.encoder}"


class FittedEncoder(nn.Module):
    """The encoder of a fitted autoencoder, in the unit of the data."""

    def __init__(self, autoencoder: Generator):
        super().__init__()
        self.autoencoder = autoencoder

    def forward(self, data: Tensor) -> Tensor:
        encoder, _ = cast(nn.Sequential, self.autoencoder.inner)
        return encoder(self.autoencoder.standard_latents(data)) * self.autoencoder.latent_scale


class FittedDecoder(FittedEncoder):
    """The decoder of a fitted autoencoder."""

    def forward(self, codes: Tensor) -> Tensor:
        _, decoder = cast(nn.Sequential, self.autoencoder.inner)
        return decoder(codes / self.autoencoder.latent_scale) * self.autoencoder.data_scale + self.autoencoder.data_center
