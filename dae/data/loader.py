"""Data loaders: endless and exactly resumable for training, one ordered pass for evaluation."""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, default_collate

from dae.data.rows import ImageDataset, ImageStream
from dae.data.skipping import BadRow, RowError, SkippedRows
from dae.data.survey import spread_rows, table_of_stream
from dae.distributed import rank, world_size
from dae.memory import require_memory


class MapStyle(Protocol):
    """A data set with indexed rows."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Any: ...


AnyDataset = MapStyle | ImageStream


class TrainLoader:
    """Endless shuffled mini-batches for this process; incomplete ones are dropped.

    Map-style data: the order is a pure function of (seed, micro-step). Process r of W takes rows r, r + W, ... of the
    shuffled epoch, so the global batch of a step is the same set of rows for any W with the same global batch size, and
    row i of the global batch belongs to process i mod W.

    Streams (`ImageStream`): the order also depends on the number of processes and workers, which must stay the same on
    resume, and each process saves its own state. Processes pass the end of an epoch independently.

    Iterating again continues where the last iteration stopped. torch's global random state is not touched.

    Args:
        dataset: map-style data set, or `ImageStream`.
        batch_size: rows per process and micro-step.
        seed: for the order.
        num_workers: decoding processes; a stream uses at most one per shard.
        shuffle_buffer_size: rows in the shuffle buffer of a stream.

    Raises:
        ValueError: the data set is smaller than a global batch.
        TypeError: an iterable data set other than `ImageStream`.
    """

    def __init__(
        self, dataset: AnyDataset, batch_size: int, *, seed: int, num_workers: int = 0, shuffle_buffer_size: int = 10000
    ):
        minima = {"batch_size": (batch_size, 1), "num_workers": (num_workers, 0), "shuffle_buffer_size": (shuffle_buffer_size, 1)}
        for name, (value, minimum) in minima.items():
            if value < minimum:
                raise ValueError(f"{name}: expected at least {minimum}, got {value}")
        self._order: _MapOrder | _StreamOrder
        if isinstance(dataset, ImageStream):
            self._order = _StreamOrder(dataset, batch_size, seed, num_workers, shuffle_buffer_size)
        elif isinstance(dataset, IterableDataset):
            raise TypeError(f"TrainLoader: expected a map-style data set or an ImageStream, got {type(dataset).__name__}")
        else:
            self._order = _MapOrder(dataset, batch_size, seed, num_workers)

    @property
    def rows(self) -> int | None:
        """Rows of the data set; None of a stream."""
        return len(self._order.dataset) if isinstance(self._order, _MapOrder) else None

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
        """JSON-able state after the last yielded batch."""
        return self._order.state_dict()

    def load_state_dict(self, state: dict) -> None:
        """Continue after the batch at which `state` was taken.

        ValueError: the state belongs to another kind of data, or to a stream read with other settings.
        """
        self._order.load_state_dict(state)


Item = tuple[dict | None, list[BadRow]]  # a row, and the bad rows before it


class _Rows(Dataset):
    """Rows of map-style data for a loader. Bad rows are values, as exceptions from workers print long tracebacks.

    With `replaced`, for training, a good row replaces each bad one, so that batches stay full.
    """

    def __init__(self, dataset: MapStyle, replaced: bool):
        self.dataset, self.replaced = dataset, replaced

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, indices: list[int]) -> list[Item]:
        if not isinstance(self.dataset, ImageDataset):
            return [(self.dataset[i], []) for i in indices]
        try:
            return [(row, []) for row in self.dataset.__getitems__(indices)]
        except RowError:  # at least one is bad
            return [self._item(self.dataset, int(i)) for i in indices]

    def _item(self, dataset: ImageDataset, index: int) -> Item:
        row = dataset.read(index)
        if isinstance(row, dict):
            return row, []
        if not self.replaced or dataset.skipped is None or not row.of_content:
            return None, [row]
        good, bad = dataset.replace(index)
        return good, [row, *bad]


class _Stream(IterableDataset):
    """Rows of a stream for a loader; bad ones are passed over. `forever`: a failure is repeated to fill its batch."""

    def __init__(self, stream: ImageStream, forever: bool):
        self.stream, self.forever = stream, forever

    def state_dict(self) -> dict[str, int]:
        return self.stream.state_dict()

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.stream.load_state_dict(state)

    def __iter__(self) -> Iterator[Item]:
        bad: list[BadRow] = []
        for row in self.stream.read():
            if isinstance(row, dict):
                yield row, bad
                bad = []
            elif self.stream.skipped is not None and row.of_content:
                bad.append(row)
            else:
                yield None, [row]
                while self.forever:
                    yield None, [row]
        if bad and not self.forever:
            yield None, bad


def _collate(items: list[Item]) -> tuple[dict | None, list[BadRow]]:
    rows = [row for row, _ in items if row is not None]
    return default_collate(rows) if rows else None, [each for _, bad in items for each in bad]


def _usable(loader: DataLoader, skipped: SkippedRows | None, full: bool) -> Iterator[dict]:
    """The batches without their bad rows, which this process counts or raises.

    RuntimeError: a worker died.
    """
    batches = iter(loader)
    while True:
        try:
            batch, bad = next(batches)
        except StopIteration:
            return
        except (OSError, EOFError) as error:
            if loader.num_workers == 0:
                raise
            raise RuntimeError(f"DataLoader worker lost ({type(error).__name__}: {error}).") from error
        if bad:
            if skipped is None:
                raise RowError(bad[0])
            skipped.add(bad)
        if batch is not None:
            yield batch
        elif full:
            raise ValueError(f"not one row of the training set can be decoded. The first one: {bad[0]}")


def _options(num_workers: int) -> dict[str, Any]:
    """Options of every DataLoader; with its own generator it does not draw from torch's global one."""
    return {"num_workers": num_workers, "collate_fn": _collate, "generator": torch.Generator()}


class _MapOrder:
    """Position of map-style data: one number."""

    def __init__(self, dataset: MapStyle, batch_size: int, seed: int, num_workers: int):
        rows, self.rank, self.world_size = len(dataset), rank(), world_size()
        if rows < batch_size * self.world_size:
            raise ValueError(
                f"the training set has {rows} rows, fewer than one global batch of {batch_size * self.world_size} "
                f"(batch size {batch_size} x {self.world_size} processes); make the batch smaller"
            )
        self.dataset, self.batch_size, self.seed, self.num_workers = dataset, batch_size, seed, num_workers
        self.micro_step = 0

    def batches(self) -> Iterator[Any]:
        options = {"pin_memory": torch.cuda.is_available(), **_options(self.num_workers)}
        while True:
            expected = self.micro_step
            loader = DataLoader(_Rows(self.dataset, True), batch_sampler=self._row_numbers(expected), **options)
            for batch in _usable(loader, getattr(self.dataset, "skipped", None), full=True):
                self.micro_step = expected = self.micro_step + 1
                yield batch
                if self.micro_step != expected:  # `seek` was called: drop prefetched batches
                    break

    def _row_numbers(self, micro_step: int) -> Iterator[list[int]]:
        """Endless row numbers per micro-step for this process, as DistributedSampler assigns them."""
        rows = len(self.dataset)
        per_epoch = rows // (self.batch_size * self.world_size)
        epoch, consumed = divmod(micro_step, per_epoch)
        for seed in itertools.count(self.seed + epoch):
            order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed))[self.rank :: self.world_size]
            yield from (batch.tolist() for batch in order.split(self.batch_size)[consumed:per_epoch])
            consumed = 0

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
    """Position of a stream: the epoch, and the number of rows that each worker has used of it."""

    def __init__(self, stream: ImageStream, batch_size: int, seed: int, num_workers: int, shuffle_buffer_size: int):
        self.stream = stream.shuffled(seed, shuffle_buffer_size, rank(), world_size())
        self.settings = {
            "seed": seed,
            "batch_size": batch_size,
            "num_workers": min(num_workers, self.stream.num_shards),
            "shuffle_buffer_size": shuffle_buffer_size,
            "rank": rank(),
            "world_size": world_size(),
        }
        self.epoch = self.micro_step = 0
        self.position: dict | None = None  # where in the epoch the next loader starts
        self.running: Any = None  # the running loader of the current epoch

    def batches(self) -> Iterator[Any]:
        self._stop()
        while True:
            self.stream.set_epoch(self.epoch)
            loader = self._loader()
            if self.position is not None:
                loader.load_state_dict(self.position)
            self.running, before = loader, self.micro_step
            try:
                for batch in _usable(loader, self.stream.skipped, full=True):
                    self.micro_step += 1
                    yield batch
                    if self.running is not loader:  # `load_state_dict` was called
                        break
            except GeneratorExit:
                if self.running is loader:
                    self._stop()  # ends the workers now rather than at garbage collection
                raise
            if self.running is not loader:
                continue
            if self.position is None and self.micro_step == before:
                raise ValueError(
                    f"an epoch of the stream gives process {self.settings['rank']} not one batch of "
                    f"{self.settings['batch_size']} rows; make the batch smaller or use fewer workers"
                )
            self.epoch, self.position, self.running = self.epoch + 1, None, None

    def _loader(self) -> Any:
        from torchdata.stateful_dataloader import StatefulDataLoader

        options = {"drop_last": True, "pin_memory": torch.cuda.is_available(), **_options(self.settings["num_workers"])}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "'set_vital' is deprecated")  # torchdata 0.11 under torch 2.13
            return StatefulDataLoader(_Stream(self.stream, True), self.settings["batch_size"], **options)

    def _stop(self) -> None:
        if self.running is not None:
            self.position, self.running = self.running.state_dict(), None

    def seek(self, micro_step: int) -> None:
        raise TypeError("a stream cannot seek to a step: save state_dict() and give it to load_state_dict()")

    def state_dict(self) -> dict:
        position = self.position if self.running is None else self.running.state_dict()
        return {"micro_step": self.micro_step, "epoch": self.epoch, "settings": dict(self.settings), "position": position}

    def load_state_dict(self, state: dict) -> None:
        missing = {"micro_step", "epoch", "settings", "position"} - set(state)
        if missing:
            raise ValueError(f"expected the state of a stream; it lacks {sorted(missing)}")
        saved = state["settings"]
        changed = [f"{key}: {saved.get(key)!r} -> {value!r}" for key, value in self.settings.items() if saved.get(key) != value]
        if changed:
            raise ValueError(f"a stream can only be continued with the settings it was saved with; changed: {', '.join(changed)}")
        self.micro_step, self.epoch = state["micro_step"], state["epoch"]
        self.position, self.running = copy.deepcopy(state["position"]), None


def evaluation_batches(dataset: AnyDataset, batch_size: int, limit: int | None = None, num_workers: int = 0) -> Iterator[Any]:
    """Batches of all rows, or of `limit` rows spread over the set, in order and on each process; the last may be short.

    With `data.on_error=skip` bad rows are dropped, not replaced, so that nothing is measured or encoded twice.

    Args:
        dataset: map-style data set, or `ImageStream` (read by at most one worker, to keep its order).
        batch_size: rows per batch.
        limit: maximum number of rows.
        num_workers: decoding processes.

    ValueError: `batch_size` or `limit` below 1.
    """
    if batch_size < 1 or (limit is not None and limit < 1):
        raise ValueError(f"expected batch_size and limit of at least 1, got {batch_size} and {limit}")
    chosen = None
    if limit is not None:
        if isinstance(dataset, ImageStream):
            table = table_of_stream(dataset, limit)
            dataset = dataset if table is None else table
        elif isinstance(dataset, ImageDataset) and limit < len(dataset):
            chosen = spread_rows(dataset, limit)
        elif limit < len(dataset):
            chosen = [i * len(dataset) // limit for i in range(limit)]
    return _once(dataset, batch_size, num_workers, chosen)


def _once(dataset: AnyDataset, batch_size: int, num_workers: int, chosen: list[int] | None = None) -> Iterator[dict]:
    """Batches of the rows in order, or of the `chosen` rows of map-style data."""
    rows: Dataset
    if isinstance(dataset, ImageStream):
        rows, num_workers = _Stream(dataset, False), min(num_workers, 1)
    else:
        rows = _Rows(dataset, False) if chosen is None else Subset(_Rows(dataset, False), chosen)
    return _usable(DataLoader(rows, batch_size, **_options(num_workers)), getattr(dataset, "skipped", None), full=False)


def in_memory(
    dataset: AnyDataset,
    limit: int,
    *,
    seed: int,
    batch_size: int,
    num_workers: int = 0,
    as_bytes: bool = False,
    knob: str = "evaluation.max_images",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Images [N, C, H, W] and labels [N] of all rows, or of `limit` rows chosen by seed (in a stream by content).

    float32 in [-1, 1]; with `as_bytes` the decoded uint8 x, where x / 127.5 - 1 is the float value.

    ValueError: not enough memory (noticed for a stream only when nearly full); lower `knob`.
    """
    size = None if isinstance(dataset, ImageStream) else len(dataset)
    if size is not None and size > limit:
        chosen = torch.randperm(size, generator=torch.Generator().manual_seed(seed))[:limit].tolist()
        batches = _once(dataset, batch_size, num_workers, chosen)
    else:
        batches = evaluation_batches(dataset, batch_size, limit=limit, num_workers=num_workers)
    bytes_per_value = 2 if as_bytes else 6  # parts, whole, float32
    images, labels, held = [], [], 0
    for batch in batches:
        x = batch["image"]
        if size is None or not held:
            count, so_far = (held + len(x), ", read of the stream so far,") if size is None else (min(limit, size), "")
            what = f"{count:,} images of {'x'.join(map(str, x.shape[1:]))}{so_far}"
            require_memory((count * bytes_per_value - held) * x[0].numel(), what, f"lower {knob}")
        held += len(x)
        images.append(((x + 1) * 127.5).round().byte())
        labels.append(batch["label"])
    whole = torch.cat(images)
    images.clear()
    return whole if as_bytes else whole.float().div_(127.5).sub_(1), torch.cat(labels)
