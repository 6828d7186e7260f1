"""Batches: endless and exactly resumable for training, once and in order for evaluation."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset

from dae.data.rows import ImageStream
from dae.distributed import rank, world_size


class TrainLoader:
    """Shuffled batches of this process, epoch after epoch, without end; incomplete batches are left out.

    Map-style data: the order is a pure function of (seed, micro-step). Process r of W takes rows r, r + W, ... of the
    shuffled epoch, so the global batch of a step is the same set of rows for any W with the same global batch size, and
    row i of the global batch belongs to process i mod W.

    Streams (`ImageStream`): the order also depends on the number of processes and workers, which must stay the same when
    training is continued, and each process saves its own state. Processes pass the end of an epoch independently.

    Iterating again continues where the last iteration stopped. The global random state of torch is not touched.

    Args:
        dataset: map-style data set, or `ImageStream`.
        batch_size: rows a process and micro-step.
        seed: of the order.
        num_workers: processes that decode; a stream uses at most one for each of its shards.
        shuffle_buffer_size: rows in the shuffle buffer of a stream.

    Raises:
        ValueError: the data set is smaller than a global batch.
        TypeError: an iterable data set that is no `ImageStream`.
    """

    def __init__(self, dataset: Dataset, batch_size: int, *, seed: int, num_workers: int = 0, shuffle_buffer_size: int = 10000):
        for name, value, least in (("batch_size", batch_size, 1), ("num_workers", num_workers, 0), ("shuffle_buffer_size", shuffle_buffer_size, 1)):
            if value < least:
                raise ValueError(f"{name}: expected at least {least}, got {value}")
        self.dataset, self.batch_size, self.seed, self.num_workers = dataset, batch_size, seed, num_workers
        if isinstance(dataset, ImageStream):
            self._order: _MapOrder | _StreamOrder = _StreamOrder(self, shuffle_buffer_size)
        elif isinstance(dataset, IterableDataset):
            raise TypeError(f"TrainLoader: expected a map-style data set or an ImageStream, got {type(dataset).__name__}")
        else:
            self._order = _MapOrder(self)

    def __iter__(self) -> Iterator[Any]:
        return self._order.batches()

    def seek(self, micro_step: int) -> None:
        """Continue as if `micro_step` batches had been consumed. Map-style data only.

        Raises:
            TypeError: the data set is a stream.
            ValueError: `micro_step` is negative.
        """
        self._order.seek(micro_step)

    def state_dict(self) -> dict:
        """JSON-able state after the last batch that was handed out."""
        return self._order.state_dict()

    def load_state_dict(self, state: dict) -> None:
        """Continue after the batch at which `state` was taken.

        Raises:
            ValueError: the state belongs to another kind of data, or to a stream read with other settings.
        """
        self._order.load_state_dict(state)

    def _loader(self, dataset: Dataset, num_workers: int, **options) -> Any:
        from torchdata.stateful_dataloader import StatefulDataLoader

        return StatefulDataLoader(
            dataset,
            self.batch_size,
            drop_last=True,
            num_workers=num_workers,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # else the loader draws from torch's global generator at each epoch
            **options,
        )


class _MapOrder:
    def __init__(self, loader: TrainLoader):
        from torchdata.stateful_dataloader.sampler import StatefulDistributedSampler

        self.loader, self.micro_step = loader, 0
        rows, world = len(loader.dataset), world_size()
        self.batches_per_epoch = rows // (loader.batch_size * world)
        if self.batches_per_epoch == 0:
            raise ValueError(
                f"the training set has {rows} rows, fewer than one global batch of {loader.batch_size * world} "
                f"(batch_size {loader.batch_size} x {world} processes); make the batch smaller"
            )
        self.sampler = StatefulDistributedSampler(loader.dataset, world, rank(), shuffle=True, seed=loader.seed, drop_last=True)

    def batches(self) -> Iterator[Any]:
        loader = self.loader._loader(
            self.loader.dataset,
            self.loader.num_workers,
            sampler=self.sampler,
            persistent_workers=self.loader.num_workers > 0,
        )
        while True:
            epoch, consumed = divmod(self.micro_step, self.batches_per_epoch)
            self.sampler.set_epoch(epoch)
            self.sampler.load_state_dict({"yielded": consumed * self.loader.batch_size})
            for batch in loader:
                self.micro_step += 1
                yield batch

    def seek(self, micro_step: int) -> None:
        if micro_step < 0:
            raise ValueError(f"micro_step: expected at least 0, got {micro_step}")
        self.micro_step = micro_step

    def state_dict(self) -> dict:
        return {"micro_step": self.micro_step}

    def load_state_dict(self, state: dict) -> None:
        if set(state) != {"micro_step"}:
            raise ValueError(f"expected the state of map-style data, {{'micro_step': n}}, got the keys {sorted(state)}")
        self.seek(state["micro_step"])


class _StreamOrder:
    def __init__(self, loader: TrainLoader, shuffle_buffer_size: int):
        self.loader, self.epoch, self.micro_step = loader, 0, 0
        self.stream = loader.dataset.shuffled(loader.seed, shuffle_buffer_size, rank(), world_size())
        self.settings = {
            "seed": loader.seed,
            "batch_size": loader.batch_size,
            "num_workers": min(loader.num_workers, self.stream.num_shards),
            "shuffle_buffer_size": shuffle_buffer_size,
            "rank": rank(),
            "world_size": world_size(),
        }
        self._running: Any = None  # the loader of the current epoch, once it runs
        self._position: dict | None = None  # the state to continue it from

    def batches(self) -> Iterator[Any]:
        self.load_state_dict(self.state_dict())
        while True:
            self.stream.set_epoch(self.epoch)
            started_afresh, count = self._position is None, 0
            self._running = self.loader._loader(self.stream, self.settings["num_workers"])
            if self._position is not None:
                self._running.load_state_dict(self._position)
            for batch in self._running:
                self.micro_step += 1
                count += 1
                yield batch
            if started_afresh and count == 0:
                raise ValueError(
                    f"an epoch of the stream gives process {self.settings['rank']} not one batch of {self.loader.batch_size} rows; "
                    "make the batch smaller or use fewer workers"
                )
            self.epoch, self._position, self._running = self.epoch + 1, None, None

    def seek(self, micro_step: int) -> None:
        raise TypeError("a stream cannot seek to a step: save state_dict() and give it to load_state_dict()")

    def state_dict(self) -> dict:
        position = self._position if self._running is None else self._running.state_dict()
        return {"micro_step": self.micro_step, "epoch": self.epoch, "settings": dict(self.settings), "position": position}

    def load_state_dict(self, state: dict) -> None:
        missing = {"micro_step", "epoch", "settings", "position"} - set(state)
        if missing:
            raise ValueError(f"expected the state of a stream; it lacks {sorted(missing)}")
        changed = [f"{k}: {state['settings'].get(k)!r} -> {v!r}" for k, v in self.settings.items() if state["settings"].get(k) != v]
        if changed:
            raise ValueError(f"a stream can only be continued with the settings it was saved with; changed: {', '.join(changed)}")
        self.micro_step, self.epoch, self._position, self._running = state["micro_step"], state["epoch"], state["position"], None


def evaluation_batches(dataset: Dataset, batch_size: int, limit: int | None = None, num_workers: int = 0) -> Iterator[Any]:
    """All rows, or the first `limit`, in order and on each process; the last batch may be short.

    Args:
        dataset: map-style data set or `ImageStream`, which is read by at most one worker to keep its order.
        batch_size: rows a batch.
        limit: number of rows at most.
        num_workers: processes that decode.

    Raises:
        ValueError: `batch_size` or `limit` below 1.
    """
    if batch_size < 1 or (limit is not None and limit < 1):
        raise ValueError(f"expected batch_size and limit of at least 1, got {batch_size} and {limit}")
    if isinstance(dataset, IterableDataset):
        num_workers = min(num_workers, 1)
        if limit is not None:
            dataset = _Head(dataset, limit)
    elif limit is not None and limit < len(dataset):
        dataset = Subset(dataset, range(limit))
    return iter(DataLoader(dataset, batch_size, num_workers=num_workers, generator=torch.Generator()))


class _Head(IterableDataset):
    def __init__(self, dataset: IterableDataset, limit: int):
        self.dataset, self.limit = dataset, limit

    def __iter__(self) -> Iterator[Any]:
        return islice(self.dataset, self.limit)
