"""What a process needs to know about the others.

Every random draw for the rows of a batch goes through `draw_rows`: it draws for the *global* batch and keeps the rows of
this process. So W processes with batch B/W see the same noise, dropout masks and hidden classes as one process with
batch B, and a run can be moved from one GPU to several without changing its result. Row i of the global batch belongs
to process i mod W, which is how `torch.utils.data.DistributedSampler` deals them out.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Callable

import torch
import torch.distributed as dist
from torch import Tensor


def rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


_alone = False


@contextmanager
def each_for_itself() -> Iterator[None]:
    """Inside the block the rows of `draw_rows` are a whole batch: for work that is dealt out batch by batch, not row by row."""
    global _alone
    before, _alone = _alone, True
    try:
        yield
    finally:
        _alone = before


def draw_rows(draw: Callable[..., Tensor], shape: tuple[int, ...] | torch.Size, **options) -> Tensor:
    """`draw(shape)` for the rows of this process, as one process would draw them for the whole batch.

    Args:
        draw: `torch.rand`, `torch.randn` or the like; called with the global shape and `options` (device, generator, ...).
        shape: shape of the local batch, rows first. All processes must call with the same shape and the same seed.
    """
    world = 1 if _alone else world_size()
    rows = draw((shape[0] * world, *shape[1:]), **options)
    return rows if world == 1 else rows[rank() :: world]


def sum_over_processes(x: Tensor) -> Tensor:
    """The sum of `x` over all processes, in place; without process group `x` itself."""
    if world_size() > 1:
        dist.all_reduce(x)
    return x


def in_global_order(x_B: Tensor) -> Tensor:
    """All rows of the global batch, in the order one process would have them."""
    world = world_size()
    if world == 1:
        return x_B
    parts = [torch.empty_like(x_B) for _ in range(world)]
    dist.all_gather(parts, x_B.contiguous())
    return torch.stack(parts, dim=1).flatten(0, 1)


def gather_objects(value: Any) -> list:
    """`value` (JSON-like) of every process, in order of rank."""
    if world_size() == 1:
        return [value]
    values = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def run_on_first_process(action: Callable[[], None]) -> None:
    """Run `action` on process 0 while the others wait; if it raises OSError there, every process raises it."""
    failure = None
    if rank() == 0:
        try:
            action()
        except OSError as error:
            failure = error
    described = None
    if failure is not None:
        numbered = failure.errno is not None
        described = (failure.errno, failure.strerror, failure.filename) if numbered else (str(failure),)
    described = gather_objects(described)[0]
    if failure is not None:
        raise failure
    if described is not None:
        raise OSError(*described)
