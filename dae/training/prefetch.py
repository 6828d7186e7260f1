"""Batches on a GPU, the next one on its way while a step computes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dae.data.loader import TrainLoader

if TYPE_CHECKING:
    from dae.data.tensors import TensorLoader


@dataclass
class _Ahead:
    position: dict  # of the loader before this batch
    batch: dict[str, Any] = field(default_factory=dict)
    error: Exception | None = None  # in place of the batch


class Prefetcher:
    """The batches of a loader on a device; `fetch` begins with the next one before it is asked for.

    On CUDA the copy runs on a stream of its own, from the loader's pinned memory: the host does not wait for it, and neither does
    the step that computes meanwhile. The batch's values and order are the loader's.

    A batch that was fetched but not taken does not count: `state_dict` is the position after the last batch taken. An error in
    reading a batch is raised when that batch is taken, not by `fetch`.

    Args:
        loader: batches of named tensors; other values pass as they are.
        device: where the batches go.
    """

    def __init__(self, loader: TrainLoader, device: torch.device):
        self.loader, self.device = loader, device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._batches: Iterator[dict[str, Any]] = iter(loader)
        self._ahead: _Ahead | None = None

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return self

    def __next__(self) -> dict[str, Any]:
        ahead, self._ahead = self._ahead or self._read(), None
        if ahead.error is not None:
            raise ahead.error
        if self._stream is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_stream(self._stream)  # the device waits, not the host
            for column in ahead.batch.values():
                if isinstance(column, Tensor):
                    column.record_stream(current)  # its memory is reused after the work that reads it, not after the copy
        return ahead.batch

    def fetch(self) -> None:
        """Read the next batch and begin its copy, unless that is done."""
        self._ahead = self._ahead or self._read()

    def _read(self) -> _Ahead:
        position = self.loader.state_dict()
        try:
            batch = next(self._batches)
            with torch.cuda.stream(self._stream):  # None: no change
                return _Ahead(position, {name: self._to_device(column) for name, column in batch.items()})
        except Exception as error:
            return _Ahead(position, error=error)

    def _to_device(self, column: Any) -> Any:
        return column.to(self.device, non_blocking=True) if isinstance(column, Tensor) else column

    def state_dict(self) -> dict:
        """JSON-able position of the loader after the last batch taken."""
        return self.loader.state_dict() if self._ahead is None else self._ahead.position

    def load_state_dict(self, state: dict) -> None:
        """Continue after the batch at which `state` was taken. ValueError: as `TrainLoader.load_state_dict`."""
        self._ahead = None
        self.loader.load_state_dict(state)


def prefetched(loader: TrainLoader | TensorLoader, device: torch.device) -> TrainLoader | TensorLoader | Prefetcher:
    """A `Prefetcher` of the loader where that gains time: batches from the host's memory for a CUDA device; else the loader."""
    return Prefetcher(loader, device) if device.type == "cuda" and isinstance(loader, TrainLoader) else loader
