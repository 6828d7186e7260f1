"""Mean and covariance of a stream of points, merged exactly across batches and processes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor

from dae_kernels.checks import FLOAT_DTYPES, check_tensors


class GaussianStatistics:
    """Mean and covariance of a stream of points, in float64, without keeping the points.

    Batches are merged by

        d = m_B - m_A,   n = n_A + n_B,   m = m_A + d n_B / n,   M2 = M2_A + M2_B + d d^T n_A n_B / n

    where M2 is the sum of outer products of deviations from the mean, so the covariance is exact to rounding however far
    the mean is from zero and however the rows are split into batches or processes. Memory is O(D^2).

    Source: Chan, Golub and LeVeque, "Updating Formulae and a Pairwise Algorithm for Computing Sample Variances", 1979.
    """

    def __init__(self) -> None:
        self.count = 0
        self._moments: tuple[Tensor, Tensor] | None = None  # mean [D] and M2 [D, D]

    def update(self, x: Tensor) -> Self:
        """Add points [N, D] (N may be 0), detached; returns itself.

        TypeError: not a floating point tensor. ValueError: not [N, D], or another D than before.
        """
        check_tensors("GaussianStatistics", x=x)
        if x.dtype not in FLOAT_DTYPES:
            raise TypeError(f"GaussianStatistics needs floating point points, got {x.dtype}")
        if x.dim() != 2 or x.shape[1] == 0:
            raise ValueError(f"GaussianStatistics needs points [N, D], D >= 1, got {list(x.shape)}")
        batch = GaussianStatistics()
        if len(x):
            batch.count = len(x)
            batch._moments = mean_and_scatter(x.detach())
        return self.merge(batch)

    def merge(self, other: GaussianStatistics) -> Self:
        """Merge the statistics of `other`; returns itself. ValueError: another dimension D. TypeError: another class."""
        if not isinstance(other, GaussianStatistics):
            raise TypeError(f"expected GaussianStatistics to merge, got {type(other).__name__}; points are added by update")
        if other._moments is None:
            return self
        theirs, their_scatter = other._moments
        if self._moments is None:
            self.count, self._moments = other.count, (theirs.clone(), their_scatter.clone())
            return self
        mean, scatter = self._moments
        if theirs.is_meta and not mean.is_meta:
            raise ValueError("GaussianStatistics needs points with values, got meta tensors, which have none")
        if len(mean) != len(theirs):
            raise ValueError(f"expected {len(mean)} features per row, got {len(theirs)}; use one feature extractor for all rows")
        count, difference = self.count + other.count, theirs.to(mean.device) - mean
        between = torch.outer(difference, difference) * (self.count * other.count / count)
        self._moments = mean + difference * (other.count / count), scatter + their_scatter.to(mean.device) + between
        self.count = count
        return self

    def all_reduce(self, summed: Callable[[Tensor], Tensor]) -> Self:
        """Combine the statistics of all processes; returns itself.

        Every process, with or without points, must call it once: a second call would count each point once per process.
        Memory stays O(D^2) for any number of processes; to merge in another way, gather `state()`. Sums are read on the
        host, so fake tensors and torch.export are not supported.

        Args:
            summed: returns the sum over all processes of a tensor (int64, float64), which it must not change.

        Raises:
            ValueError: in every process, if processes have points of different dimensions.
        """
        dimension = 0 if self._moments is None else len(self._moments[0])
        # Cauchy-Schwarz is an equality only if all D are equal: (sum D)^2 = (number) (sum D^2).
        members, total, squares = summed(whole([int(dimension > 0), dimension, dimension**2])).tolist()
        if members * squares != total**2:
            raise ValueError(f"expected one feature dimension in all processes, got {dimension} here; use one feature extractor")
        if members == 0:
            return self
        if self._moments is None:
            mean = torch.zeros(total // members, dtype=torch.float64, device="cpu")
            scatter = torch.outer(mean, mean)
        else:
            mean, scatter = self._moments
        count = int(summed(whole(self.count)))
        common_mean = summed(mean * (self.count / count))
        offset = mean - common_mean
        self._moments = common_mean, summed(scatter + torch.outer(offset, offset) * self.count)
        self.count = count
        return self

    def state(self) -> Tensor:
        """float64 [1 + D + D D]: count, mean and M2 in one tensor, to gather or to store. ValueError: no points yet."""
        mean, scatter = self._known(1, "a mean", "call update first")
        return torch.cat([mean.new_tensor([self.count]), mean, scatter.flatten()])

    @classmethod
    def from_state(cls, state: Tensor) -> Self:
        """Restore from `state()`. ValueError: not a valid state. TypeError: not a tensor."""
        check_tensors("GaussianStatistics.from_state", state=state)
        D = math.isqrt(state.numel())  # of 1 + D + D^2
        if state.dim() != 1 or D < 1 or len(state) != 1 + D + D * D or state.dtype != torch.float64:
            raise ValueError(f"expected a state, float64 [1 + D + D D], got {state.dtype} {list(state.shape)}")
        count = state[0].item()
        if not (1 <= count < math.inf and count == math.floor(count)):
            raise ValueError(f"expected a state with a whole count of at least 1, got {count}")
        statistics = cls()
        statistics.count = int(count)
        statistics._moments = state[1 : 1 + D].clone(), state[1 + D :].reshape(D, D).clone()
        return statistics

    @property
    def mean(self) -> Tensor:
        """float64 [D]. ValueError: no points yet."""
        return self._known(1, "a mean", "call update first")[0]

    @property
    def covariance(self) -> Tensor:
        """float64 [D, D], the unbiased estimate M2 / (n - 1). ValueError: fewer than 2 points."""
        return self._known(2, "a covariance", "add rows")[1] / (self.count - 1)

    def _known(self, rows: int, what: str, remedy: str) -> tuple[Tensor, Tensor]:
        if self._moments is None or self.count < rows:
            raise ValueError(f"expected at least {rows} row{'s' * (rows > 1)} for {what}, got {self.count}; {remedy}")
        return self._moments


def whole(numbers: int | list[int]) -> Tensor:
    """int64 tensor on the CPU, independent of torch's default device."""
    return torch.tensor(numbers, dtype=torch.int64, device="cpu")


def mean_and_scatter(x_ND: Tensor) -> tuple[Tensor, Tensor]:
    """float64 mean [D] and sum of outer products of deviations from it [D, D]; differentiable."""
    x_ND = x_ND.double()
    mean_D = x_ND.mean(dim=0)
    deviation_ND = x_ND - mean_D
    return mean_D, deviation_ND.T @ deviation_ND
