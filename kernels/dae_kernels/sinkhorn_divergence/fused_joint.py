"""All transport problems of a divergence at once, in Triton: one launch per step of the schedule, two where columns are shared.

Problem 0 is x over y, 1 is y over x and, with debias, 2 is x over x and 3 y over y. Points of both clouds lie in one tensor
[N + M, D], as do their weights, and potentials are [1 or 2, N + M]: those across, and those of each cloud with itself.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dae_kernels.sinkhorn_divergence.fused import (
    LOG2_E,
    UPDATE_TILE,
    join,
    mean_tile,
    new_potential,
    precision,
    shares_to_fill,
    whole_potential,
    write_means,
)
from dae_kernels.tiles import cdiv


@triton.jit
def places(problem, N, M):
    """Of a problem: where the rows' and the columns' cloud begins, its number of rows and columns, and its potentials."""
    of_rows, own = problem % 2, problem // 2
    of_columns = tl.where(own == 1, of_rows, 1 - of_rows)
    rows, columns = tl.where(of_rows == 1, M, N), tl.where(of_columns == 1, M, N)
    return tl.cast(of_rows, tl.int64) * N, tl.cast(of_columns, tl.int64) * N, rows, columns, own


@triton.jit(do_not_specialize=["N", "M", "share", "d_end", "old_stride"])
def sinkhorn_step_kernel(
    z_ptr, log_w_ptr, old_ptr, new_ptr,
    N, M, share, d_end, old_stride, scale,
    D: tl.constexpr, P: tl.constexpr, FLAT: tl.constexpr, AVERAGE: tl.constexpr, WHOLE: tl.constexpr,
    INPUT_PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """New potentials of all problems from the old ones, averaged with these if AVERAGE. Grid (rows, shares, problems).

    Unless WHOLE, what `new_potential` has of a share of the columns, into new [shares, 1 or 2, N + M].
    """
    first, over, rows, columns, own = places(tl.program_id(2), N, M)
    if tl.program_id(0) * BLOCK_N >= rows:
        return
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    old_ptr += own.to(tl.int64) * old_stride
    f = new_potential(
        z_ptr + first * D, z_ptr + over * D, log_w_ptr + over, old_ptr + over,
        row, tl.program_id(1) * share, share, rows, columns, d_end, scale,
        D, P, FLAT, INPUT_PRECISION, BLOCK_N, BLOCK_M, BLOCK_D,
    )  # fmt: skip
    place = first + row
    if WHOLE:
        f = whole_potential(f, old_ptr + place, row < rows, scale, FLAT, AVERAGE)
    kinds = (tl.num_programs(2) + 1) // 2
    new_ptr += (tl.program_id(1).to(tl.int64) * kinds + own) * (N + M)
    tl.store(new_ptr + place, f, mask=row < rows)


@triton.jit(do_not_specialize=["N", "M", "d_end"])
def sinkhorn_slopes_kernel(
    z_ptr, log_w_ptr, old_ptr, new_ptr, out_ptr,
    N, M, d_end, scale,
    D: tl.constexpr, P: tl.constexpr, INPUT_PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """The derivatives of the costs of all problems by their rows, into out [1 or 2, N + M, D]. Grid (rows, columns, problems)."""
    first, over, rows, columns, own = places(tl.program_id(2), N, M)
    if tl.program_id(0) * BLOCK_N >= rows:
        return
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    kind = own.to(tl.int64) * (N + M)
    write_means(
        z_ptr + first * D, z_ptr + over * D, z_ptr + over * D, log_w_ptr + over, old_ptr + kind + over, new_ptr + kind + first,
        out_ptr + (kind + first) * D, row, tl.program_id(1) * BLOCK_E, rows, columns, D, d_end, scale,
        D, P, True, INPUT_PRECISION, BLOCK_N, BLOCK_M, BLOCK_D, BLOCK_E,
    )  # fmt: skip


def slopes_tile(p: int, D: int) -> dict[str, int]:
    """That of a derivative, with 4 warps for its half of the rows: with 8 a variant spilled on sm_100 with triton 3.7."""
    tile = mean_tile(p, D, True)
    return tile | {"num_warps": 4} if tile["BLOCK_N"] == 64 else tile


class TritonJoint:
    """The steps of the problems between two clouds, without reach.

    Args:
        z: [N + M, D], contiguous float32: the points of both.
        w: [N + M]: their weights.
        N: points of the first.
        p: the exponent of the cost.
        problems: 4 with debias, else 2.
    """

    def __init__(self, z: Tensor, w: Tensor, N: int, p: int, problems: int, shares: int | None = None) -> None:
        (size, D), tile = z.shape, UPDATE_TILE[p]
        M, self.z, self.w, self.log_w, self.p = size - N, z, w, w.log(), p
        rows, self.problems, self.kinds, self.size = max(N, M), problems, problems // 2, size
        self.clouds = z.split([N, M])
        blocks = cdiv(rows, tile["BLOCK_N"])
        shares = shares_to_fill(z.device, problems * blocks, rows) if shares is None else shares
        share = cdiv(cdiv(rows, tile["BLOCK_M"]), shares) * tile["BLOCK_M"]
        self.shares = cdiv(rows, share)
        self.run = sinkhorn_step_kernel[blocks, self.shares, problems]
        self.numbers = N, M, share, D
        self.constants = {"D": D, "P": p, "INPUT_PRECISION": precision()}
        self.options = {**self.constants, **tile, "WHOLE": self.shares == 1}
        self.part = self.log_w.new_empty(self.shares, self.kinds, size) if self.shares > 1 else None

    def step(self, old: Tensor, stride: int, new: Tensor, epsilon: float, flat: bool, average: bool) -> None:
        """The new potentials [kinds, N + M], or their average with the old ones; a stride of 0: one row for all kinds."""
        scale, part = LOG2_E / epsilon, self.part
        out = new if part is None else part
        self.run(self.z, self.log_w, old, out, *self.numbers, stride, scale, FLAT=flat, AVERAGE=average, **self.options)
        if part is not None:
            join(part, old, new, self.shares, self.kinds * self.size, scale, flat, average)

    def start(self) -> Tensor:
        """[N + M]: less half the squared norm, or 0 for p = 1."""
        return self.z.square().sum(dim=1) / -2 if self.p == 2 else torch.zeros_like(self.w)

    def solved(self, schedule: list[tuple[float, bool]]) -> Tensor:
        """The potentials after the schedule."""
        new, other = self.w.new_empty(self.kinds, self.size), self.w.new_empty(self.kinds, self.size)
        self.step(self.start(), 0, new, *schedule[0], False)
        for epsilon, flat in schedule:
            self.step(new, self.size, other, epsilon, flat, True)
            new, other = other, new
        return new

    def apart(self, potentials: Tensor) -> tuple[Tensor, ...]:
        """The potentials of the problems."""
        return potentials.view(-1).split([*self.numbers[:2]] * self.kinds)

    def slopes(self, old: Tensor, epsilon: float, flat: bool) -> tuple[Tensor, Tensor]:
        """The new potentials, and the derivatives [kinds, N + M, D] of the costs by the points."""
        new = torch.empty_like(old)
        self.step(old, self.size, new, epsilon, flat, False)
        N, M, _, D = self.numbers
        slopes, tile = self.z.new_empty(self.kinds, self.size, D), slopes_tile(self.p, D)
        sinkhorn_slopes_kernel[cdiv(max(N, M), tile["BLOCK_N"]), cdiv(D, tile["BLOCK_E"]), self.problems](
            self.z, self.log_w, old, new, slopes, N, M, D, LOG2_E / epsilon, **self.constants, **tile
        )
        return new, slopes
