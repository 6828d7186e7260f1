"""Mean and covariance of a stream of points, merged across batches and processes without loss."""

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
        self._mean: Tensor | None = None
        self._scatter: Tensor | None = None

    def update(self, x: Tensor) -> Self:
        """Add points [N, D] (N may be 0), without their gradient; returns itself.

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
            batch._mean, batch._scatter = mean_and_scatter(x.detach())
        return self.merge(batch)

    def merge(self, other: GaussianStatistics) -> Self:
        """Add the points that `other` has seen; returns itself. ValueError: another dimension D. TypeError: another class."""
        if not isinstance(other, GaussianStatistics):
            raise TypeError(f"expected GaussianStatistics to merge, got {type(other).__name__}; points are added by update")
        if other.count == 0:
            return self
        if other._mean.is_meta and self.count and not self._mean.is_meta:
            raise ValueError("GaussianStatistics needs points with values, got meta tensors, which have none")
        if self.count == 0:
            self.count, self._mean, self._scatter = other.count, other._mean.clone(), other._scatter.clone()
            return self
        if len(self._mean) != len(other._mean):
            raise ValueError(
                f"expected {len(self._mean)} features per row, got {len(other._mean)}; use one feature extractor for all rows"
            )
        count = self.count + other.count
        difference = other._mean.to(self._mean.device) - self._mean
        self._mean = self._mean + difference * (other.count / count)
        self._scatter = (
            self._scatter
            + other._scatter.to(self._mean.device)
            + torch.outer(difference, difference) * (self.count * other.count / count)
        )
        self.count = count
        return self

    def all_reduce(self, summed: Callable[[Tensor], Tensor]) -> Self:
        """Make this the statistics of the points of all processes; returns itself.

        Every process must call it, once: a second call would count each point once for each process. A process without
        points takes part. Memory stays O(D^2) whatever the number of processes; to merge in another way, gather `state()`.
        Sums are read on the host: fake tensors have none to read, and torch.export cannot trace this.

        Args:
            summed: returns the sum over all processes of a tensor (int64, float64), which it must not change.

        Raises:
            ValueError: in every process, where the processes have points of different dimensions.
        """
        dimension = 0 if self._mean is None else len(self._mean)
        # Where all D are equal, and only there, Cauchy-Schwarz holds with equality: (sum D)^2 = (number) (sum D^2).
        members, total, squares = summed(whole([int(dimension > 0), dimension, dimension**2])).tolist()
        if members * squares != total**2:
            raise ValueError(f"expected one feature dimension in all processes, got {dimension} here; use one feature extractor")
        if members == 0:
            return self
        mean = torch.zeros(total // members, dtype=torch.float64, device="cpu") if self._mean is None else self._mean
        scatter = torch.outer(mean, mean) * 0 if self._scatter is None else self._scatter
        count = int(summed(whole(self.count)))
        common_mean = summed(mean * (self.count / count))
        offset = mean - common_mean
        self._scatter = summed(scatter + torch.outer(offset, offset) * self.count)
        self._mean, self.count = common_mean, count
        return self

    def state(self) -> Tensor:
        """float64 [1 + D + D D]: count, mean and M2 in one tensor, to gather or to store. ValueError: no points yet."""
        mean = self.mean
        return torch.cat([mean.new_tensor([self.count]), mean, self._scatter.flatten()])

    @classmethod
    def from_state(cls, state: Tensor) -> Self:
        """The statistics whose `state()` this is. ValueError: it cannot be one. TypeError: not a tensor."""
        check_tensors("GaussianStatistics.from_state", state=state)
        D = math.isqrt(state.numel())  # of 1 + D + D^2
        if state.dim() != 1 or D < 1 or len(state) != 1 + D + D * D or state.dtype != torch.float64:
            raise ValueError(f"expected a state, float64 [1 + D + D D], got {state.dtype} {list(state.shape)}")
        count = state[0].item()
        if not (1 <= count < math.inf and count == math.floor(count)):
            raise ValueError(f"expected a state with a whole count of at least 1, got {count}")
        statistics = cls()
        statistics.count = int(count)
        statistics._mean, statistics._scatter = state[1 : 1 + D].clone(), state[1 + D :].reshape(D, D).clone()
        return statistics

    @property
    def mean(self) -> Tensor:
        """float64 [D]. ValueError: no points yet."""
        if self.count < 1:
            raise ValueError("expected at least 1 row for a mean, got 0; call update first")
        return self._mean

    @property
    def covariance(self) -> Tensor:
        """float64 [D, D], the unbiased estimate M2 / (n - 1). ValueError: fewer than 2 points."""
        if self.count < 2:
            raise ValueError(f"expected at least 2 rows for a covariance, got {self.count}; add rows")
        return self._scatter / (self.count - 1)


def whole(numbers: int | list[int]) -> Tensor:
    """int64 on the CPU, whatever device torch has for a default."""
    return torch.tensor(numbers, dtype=torch.int64, device="cpu")


def mean_and_scatter(x_ND: Tensor) -> tuple[Tensor, Tensor]:
    """float64 mean [D] and sum of outer products of deviations from it [D, D]; differentiable."""
    x_ND = x_ND.double()
    mean_D = x_ND.mean(dim=0)
    deviation_ND = x_ND - mean_D
    return mean_D, deviation_ND.T @ deviation_ND
