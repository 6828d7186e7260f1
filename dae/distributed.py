"""Collectives over the processes of a run, and random draws that do not depend on the number of processes.

Every random draw for the rows of a batch uses `draw_rows`: it draws for the *global* batch and keeps this process's rows. So W
processes with batch B/W see the same noise, dropout masks and dropped labels as one process with batch B, and a run can move from
one GPU to several without changing its result. Row i of the global batch belongs to process i mod W, as in
`torch.utils.data.DistributedSampler`.

Every function here but `rank`, `world_size`, `draw_rows` and `as_single_process` is a collective: all processes must call it. An
error in one process is raised in all (`failing_together`, `run_on_first_process`); otherwise the others would hang in their next
collective.
"""

from __future__ import annotations

import builtins
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Callable

import torch
import torch.distributed as dist
from torch import Tensor
from torch._compile import _disable_dynamo


def rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


_alone = False
PLAIN = (  # errors that can be built from a message
    FileExistsError, FileNotFoundError, FloatingPointError, ImportError, IndexError, KeyError, MemoryError, NotImplementedError,
    OSError, PermissionError, RuntimeError, TimeoutError, TypeError, ValueError,
)  # fmt: skip


@contextmanager
def as_single_process() -> Iterator[None]:
    """Inside the block the functions here, except `rank` and `world_size`, act as in a single-process run.

    `draw_rows` draws for the local batch only, and collectives return without communicating: for work done by one process for
    all, or divided batch by batch.
    """
    global _alone
    before, _alone = _alone, True
    try:
        yield
    finally:
        _alone = before


def _processes() -> int:
    return 1 if _alone else world_size()


def draw_rows(draw: Callable[..., Tensor], shape: tuple[int, ...] | torch.Size, **options) -> Tensor:
    """This process's rows of `draw(global shape)`: W processes together get one process's draws for the whole batch.

    Not a collective: with different seeds or numbers of rows, draws are independent but differ from one process's.

    Args:
        draw: e.g. `torch.rand` or `torch.randn`; called with the global shape and `options` (device, generator, ...).
        shape: shape of the local batch, rows first.
    """
    world = _processes()
    rows = draw((shape[0] * world, *shape[1:]), **options)
    return rows if world == 1 else rows[rank() :: world]


def sum_over_processes(x: Tensor) -> Tensor:
    """Sum `x` over all processes, in place; without a process group, return `x`. Shape and dtype must agree."""
    return _in_place(x, dist.all_reduce)


def summed_with_gradients(x: Tensor) -> Tensor:
    """A new tensor, the sum of `x` over all processes, that is differentiable: with losses L_r of the processes, the gradient at
    each `x` is that of sum_r L_r. `x` itself in a single process. Its backward pass is a collective, too.
    """
    return x if _processes() == 1 else _summed(x)


@_disable_dynamo  # its compiler takes no collective of an autograd.Function; torch.compiler.disable imports it at once, a second
def _summed(x: Tensor) -> Tensor:
    return _Sum.apply(x)


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return sum_over_processes(x.clone(memory_format=torch.contiguous_format))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return sum_over_processes(gradient.clone(memory_format=torch.contiguous_format))


def from_first_process(x: Tensor) -> Tensor:
    """Broadcast process 0's `x`, in place. Shape and dtype must agree."""
    return _in_place(x, lambda reachable: dist.broadcast(reachable, src=0))


def _in_place(x: Tensor, collective: Callable[[Tensor], Any]) -> Tensor:
    if _processes() > 1:
        reachable = _reachable(x)
        collective(reachable)
        if reachable is not x:
            x.copy_(reachable)
    return x


def _reachable(x: Tensor) -> Tensor:
    """`x` as the process group needs it: on a GPU for NCCL, and contiguous."""
    return (x.cuda() if dist.get_backend() == "nccl" else x).contiguous()


def in_global_order(x_B: Tensor) -> Tensor:
    """All rows of the global batch in single-process order: row i of process 0, of process 1, ...

    The numbers of rows per process may differ, and be 0.

    ValueError: on every process, if the dtypes or the shapes of the rows differ.
    """
    if _processes() == 1:
        return x_B
    described = gather_objects((len(x_B), str(x_B.dtype), list(x_B.shape[1:])))
    if any(row[1:] != described[0][1:] for row in described):
        raise ValueError(f"expected rows of one dtype and shape in all processes, got {[row[1:] for row in described]}")
    counts = [row[0] for row in described]
    if (longest := max(counts)) == 0:
        return x_B
    padded = x_B.new_zeros(longest, *x_B.shape[1:])
    padded[: len(x_B)] = x_B
    padded = _reachable(padded)
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    held = torch.arange(longest)[:, None] < torch.tensor(counts)  # [row, process]
    return torch.stack(parts, dim=1)[held.to(padded.device)].to(x_B.device)


def gather_numbers(*numbers: int) -> list[tuple[int, ...]]:
    """The integers of every process, in order of rank; cheap enough for every step, unlike `gather_objects`."""
    if _processes() == 1:
        return [numbers]
    table = torch.zeros(world_size(), len(numbers), dtype=torch.int64)
    table[rank()] = torch.tensor(numbers)
    return [tuple(row) for row in sum_over_processes(table).tolist()]


def gather_objects(value: Any) -> list:
    """The `value` of every process, in order of rank; it must be picklable."""
    if _processes() == 1:
        return [value]
    values = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def agree(values: dict[str, Any]) -> None:
    """Check that all processes have equal `values`.

    ValueError: on every process, naming the unequal ones.
    """
    first, *others = gather_objects(values)
    for number, other in enumerate(others, start=1):
        differing = [key for key in first | other if first.get(key) != other.get(key)]
        if differing:
            shown = "; ".join(f"{key}: {first.get(key)!r} and {other.get(key)!r}" for key in differing[:3])
            raise ValueError(
                f"processes 0 and {number} must have the same and differ ({shown}): start all with one configuration, "
                "on the same data and file system"
            )


@contextmanager
def failing_together() -> Iterator[None]:
    """If one process raises in the block, all raise at its end. The block must not call collectives.

    The process that failed raises its own error, the others one of the same builtin type with the same message.
    """
    failure = None
    try:
        yield
    except Exception as error:  # raised below, after telling the others
        failure = error
    described = gather_objects(_described(failure))
    if failure is not None:
        raise failure
    for number, other in enumerate(described):
        if other is not None:
            raise _rebuilt(other, number)


def run_on_first_process(action: Callable[[], Any]) -> Any:
    """Run `action` on process 0 and return its picklable result on every process; if it raises, every process does.

    Process 0 runs it `as_single_process`, so it may call the functions of this module.
    """
    value = None
    with failing_together():
        if _alone or rank() == 0:
            with as_single_process():
                value = action()
    return gather_objects(value)[0]


def _described(error: Exception | None) -> tuple[str, tuple] | None:
    """Name and arguments of the nearest builtin type, from which every process can rebuild the error."""
    if error is None:
        return None
    if isinstance(error, OSError) and error.errno is not None:
        return "OSError", (error.errno, error.strerror, error.filename)  # OSError chooses its subclass by errno
    for kind in type(error).__mro__:
        if kind in PLAIN:
            return kind.__name__, (str(error),)
    return "RuntimeError", (f"{type(error).__name__}: {error}",)


def _rebuilt(described: tuple[str, tuple], number: int) -> Exception:
    name, arguments = described
    error = getattr(builtins, name)(*arguments)
    error.add_note(f"raised by process {number} of {world_size()}")
    return error
