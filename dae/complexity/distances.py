"""Distances by name, with data-dependent parameters; the values are those of dae_kernels."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from dae_kernels import energy_distance, frechet_distance, mmd, sinkhorn_divergence, sliced_wasserstein
from torch import Tensor

from dae.complexity.families import check_count, check_positive
from dae.metrics.validation import check_values
from dae.precision import own_arithmetic

PLAIN = ("reconstruction", "sliced_wasserstein", "sinkhorn", "mmd", "energy", "frechet")
ADVERSARIAL = ("js", "kl", "reverse_kl", "chi2", "hellinger", "wgan_gp", "wgan_sn")
POINTS_FOR_SCALE = 512


@dataclass(frozen=True)
class Distance:
    """A distance of two clouds, or of paired points, for fitting a generator.

    Args:
        name: name of the distance.
        function: (generated [N, D], data [M, D], generator of its randomness) -> scalar, differentiable in the first.
        convention: one line: squared or root, the cost, parameters, bias.
        paired: row n of the generated belongs to row n of the data.
        full_batch: mini-batches would bias it strongly, so every step uses all rows.
        pairwise: its time is proportional to the number of pairs of points.
        solvable: families may have a closed form under this name (`GeneratorFamily.best`); False for custom functions.
        of_moments: a smooth function of means and covariances, whose finite-sample bias a jackknife removes.
    """

    name: str
    function: Callable[[Tensor, Tensor, torch.Generator], Tensor]
    convention: str
    paired: bool = False
    full_batch: bool = False
    pairwise: bool = False
    solvable: bool = False
    of_moments: bool = False

    @own_arithmetic(gradients=None)
    def __call__(self, generated: Tensor, data: Tensor, generator: torch.Generator) -> Tensor:
        """The distance of [N, ...] and [M, ...], flattened."""
        return self.function(generated.flatten(1), data.flatten(1), generator)


def check_name(name: str) -> None:
    """ValueError for an unknown distance, with the nearest known one. TypeError: not a string."""
    if not isinstance(name, str):
        raise TypeError(f"expected a distance as its name or a Distance, got {type(name).__name__}")
    known = PLAIN + ADVERSARIAL
    if name not in known:
        nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
        hint = f"did you mean {nearest[0]!r}? " if nearest else ""
        raise ValueError(f"unknown distance {name!r}: {hint}known are {', '.join(known)}")


@own_arithmetic(gradients=False)
def make_distance(
    name: str, data: Tensor, *, num_projections: int = 128, blur: float | None = None, bandwidths: tuple[float, ...] | None = None
) -> Distance:
    """A non-adversarial distance by name, with scales taken from the data unless given.

        reconstruction      mean over rows and values of (x - g(z))^2; paired
        sliced_wasserstein  root of the mean over directions of W_2^2 of the projections
        sinkhorn            debiased, p = 2: about W_2^2 / 2; blur = r / 10
        mmd                 squared, unbiased, a sum of Gaussian kernels of bandwidths r / 2, r and 2 r
        energy              2 E|x - y| - E|x - x'| - E|y - y'|
        frechet             W_2^2 of the Gaussians with the same means and covariances

    where r is the median distance between points of the data, at most 512 of them, evenly spaced.

    Args:
        name: one of these.
        data: [N, ...], floating.
        num_projections: directions of sliced_wasserstein.
        blur, bandwidths: for sinkhorn and mmd, in the unit of the data.

    Raises:
        ValueError: an unknown or adversarial name; a length that is not positive.
        TypeError: a name that is not a string, data that are not floating, or a length that is no number.
    """
    check_name(name)
    check_values("data", data, "a floating torch.Tensor [N, ...]", "torch.as_tensor(data).float() makes one")
    check_count("num_projections", num_projections)
    for what, length in (("blur", blur), *(("a bandwidth", length) for length in bandwidths or ())):
        if length is not None:
            check_positive(what, length)
    if bandwidths is not None and len(bandwidths) == 0:
        raise ValueError("expected at least one bandwidth, or None to take them from the data, got none")
    if name in ADVERSARIAL:
        raise ValueError(f"{name} is a critic's: call dae.complexity.adversarial.adversarial_distance, or generator_distance")
    if name == "reconstruction":
        convention = "mean squared error a value, paired rows"
        return Distance(name, lambda x, y, _: (x - y).square().mean(), convention, paired=True, solvable=True)
    if name == "frechet":
        convention = "squared, W_2^2 of Gaussians, cost |x - y|^2"
        options = {"full_batch": True, "solvable": True, "of_moments": True}
        return Distance(name, lambda x, y, _: frechet_distance(x, y), convention, **options)
    if name == "sliced_wasserstein":
        cost = sliced_wasserstein.convention.cost  # type: ignore[attr-defined]
        return Distance(
            name,
            lambda x, y, generator: sliced_wasserstein(x, y, p=2, num_projections=num_projections, generator=generator),
            f"root, p=2, cost {cost}, {num_projections} directions; finite samples bias it upwards",
        )
    function: Callable[[Tensor, Tensor], Tensor]
    if name == "sinkhorn":
        length = typical_distance(data) / 10 if blur is None else blur
        convention = f"squared, cost |x - y|^2 / 2, blur {length:.4g}, debiased; finite samples bias it upwards"
        function = functools.partial(sinkhorn_divergence, p=2, blur=length)
    elif name == "mmd":
        lengths = bandwidths or tuple(typical_distance(data) * factor for factor in (0.5, 1.0, 2.0))
        listed = ", ".join(f"{length:.4g}" for length in lengths)
        convention = f"squared, sum of Gaussian kernels of bandwidths {listed}; unbiased in finite samples, so it may be negative"
        function = functools.partial(mmd, bandwidths=lengths)
    else:
        function = energy_distance
        convention = "squared, cost |x - y|, 2 E|x - y| - E|x - x'| - E|y - y'|; finite samples bias it upwards"
    return Distance(name, lambda x, y, _: function(x, y), convention, pairwise=True)


def typical_distance(data: Tensor) -> float:
    """Median distance between different points, of at most 512, evenly spaced; 1 if all are equal."""
    step = -(-len(data) // POINTS_FOR_SCALE)
    distances = torch.pdist(data[::step].flatten(1).double())
    distances = distances[distances > 0]
    return distances.median().item() if len(distances) else 1.0
