"""Euclidean distances by products, with a bound of their error, and by differences, which do not cancel; all in float64."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from dae_kernels.clouds import middle, power_of_two, sampled

MAX_NUMBERS = 1 << 23  # per array in memory: 64 MiB in float64
EPS, TINY = torch.finfo(torch.float64).eps, torch.finfo(torch.float64).tiny
SQUARABLE = 2.0**480  # distances between this and its inverse have squares with full precision in float64


class Frame:
    """Both clouds centred on a point of y and scaled by a power of two, to reduce cancellation and overflow in products.

    The square of a distance is |a|^2 + |b|^2 - 2 a.b there. Rounding of the shift, of D products and of their sums in any order
    moves it by at most (D + 4) eps (|a|^2 + |b|^2) (Higham 2002, section 3.1), of which 4 is for the shift; D + 8 leaves room for
    the rounding of the bound. `underflow` covers subnormal products.
    """

    def __init__(self, x_ND: Tensor, y_MD: Tensor) -> None:
        centre_D = middle(sampled(y_MD, None))
        a_ND, b_MD = x_ND - centre_D, y_MD - centre_D
        self.scale = power_of_two(torch.maximum(a_ND.abs().amax(), b_MD.abs().amax()))
        self.a_ND, self.b_MD = a_ND.mul_(self.scale), b_MD.mul_(self.scale)
        self.aa_N, self.bb_M = self.a_ND.square().sum(dim=1), self.b_MD.square().sum(dim=1)
        self.relative, self.underflow = (x_ND.shape[1] + 8) * EPS, 8 * (x_ND.shape[1] + 8) * TINY
        radius = (self.aa_N.amax().sqrt() + self.bb_M.amax().sqrt()) / self.scale
        self.radius = radius.clamp_max(torch.finfo(torch.float64).max)
        # In a frame of radius r products give the square of a distance beyond r / span to a relative 2^-20.
        self.span = (2.0**-21 / self.relative) ** 0.5

    def partial_squares(self, block: slice, error: float) -> Tensor:
        """[n, M]: squares less error times |b|^2, and less what depends on the row alone, |a|^2."""
        return torch.addmm(self.bb_M * (1 - error), self.a_ND[block], self.b_MD.T, alpha=-2.0)

    def squares(self, distances: Tensor) -> Tensor:
        """Squared distances in the unit of this frame, rounded up."""
        return (distances * self.scale).square() * (1 + 4 * EPS) + TINY


def comparable(x_ND: Tensor, y_MD: Tensor) -> tuple[Tensor, Tensor, Tensor | float]:
    """Both clouds times a power of two, and that power, so that squares neither overflow nor underflow if that is lossless."""
    largest = torch.maximum(x_ND.abs().amax(), y_MD.abs().amax())
    if 1 / SQUARABLE < largest < SQUARABLE:
        return x_ND, y_MD, 1.0
    scale = power_of_two(largest)
    if not all(torch.equal(cloud * scale / scale, cloud) for cloud in (x_ND, y_MD)):
        scale = torch.where(largest > 2.0**1022, 0.25, 1.0)  # no difference overflows at least
    return x_ND * scale, y_MD * scale, scale


def distances(x_BnD: Tensor, y_BmD: Tensor) -> Tensor:
    """[..., n, m] by differences; off by (D + 2) eps / 2 of themselves at most."""
    distance_Bnm = torch.cdist(x_BnD, y_BmD, compute_mode="donot_use_mm_for_euclid_dist")
    trusted = (distance_Bnm > 1 / SQUARABLE) & (distance_Bnm < SQUARABLE)
    if trusted.all():
        return distance_Bnm
    # Of what is left only equal points are at distance 0. The other squares are none of float64.
    left = ~trusted & (torch.cdist(x_BnD, y_BmD, p=float("inf")) != 0)
    index = left.nonzero()
    for part in index.split(rows_of(8 * x_BnD.shape[-1])):
        *batch, row, column = part.unbind(dim=1)
        difference_PD = x_BnD[*batch, row] - y_BmD[*batch, column]
        scale_P1 = power_of_two(difference_PD.abs().amax(dim=1, keepdim=True))
        distance_Bnm[*batch, row, column] = (difference_PD * scale_P1).square().sum(dim=1).sqrt() / scale_P1[:, 0]
    return distance_Bnm


def regions(frame: Frame, x_ND: Tensor, y_MD: Tensor, rows_U: Tensor, reach_U: Tensor) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Rows of x with the columns (rows of y) that hold all of y within a row's reach; None stands for all columns.

    Columns are listed if they are so close together, relative to the frame, that products resolve them in their own frame.
    """
    local_U = frame.span * reach_U <= frame.radius / 16
    for rows in rows_U[~local_U].split(rows_of(4 * len(y_MD))):
        if len(rows):
            yield rows, None
    rows_U, reach_U = rows_U[local_U], reach_U[local_U]
    while len(rows_U):
        centre_1D, radius = x_ND[rows_U[:1]], frame.span * reach_U[0]
        # By the triangle inequality; the margin is for rounding.
        held_U = distances(centre_1D, x_ND[rows_U])[0] + reach_U <= radius * (1 - 2.0**-20)
        yield rows_U[held_U], (distances(centre_1D, y_MD)[0] <= radius).nonzero()[:, 0]
        rows_U, reach_U = rows_U[~held_U], reach_U[~held_U]


def rows_of(width: int) -> int:
    """Number of rows of `width` numbers that fit into memory at once."""
    return max(1, MAX_NUMBERS // width)


def blocks(length: int, width: int) -> Iterator[slice]:
    """Slices of `length` rows of `width` numbers, each within the memory limit."""
    for start in range(0, length, rows_of(width)):
        yield slice(start, min(start + rows_of(width), length))
