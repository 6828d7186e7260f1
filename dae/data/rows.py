"""torch data sets over `datasets` rows: images decoded, square, in [-1, 1]."""

from __future__ import annotations

import contextlib
import hashlib
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch.utils.data import Dataset, IterableDataset

from dae.data.columns import Labels
from dae.data.images import decode_image, read_bytes, to_square, to_tensor
from dae.data.skipping import BadRow, RowError, SkippedRows

if TYPE_CHECKING:
    import datasets

    from dae.data.survey import Survey


@dataclass
class RowDecoder:
    """Decodes a row to `{"image", "label", "row"}`; its errors name the row."""

    origin: str
    image_column: str
    labels: Labels
    resolution: int
    channels: int
    center_crop: bool
    folder: Path | None = None

    def decode(self, row: dict, number: int, where: str) -> dict:
        """Raises RowError."""
        with self.naming(row, number, where):
            label = self.label(row)
            image = to_square(decode_image(row[self.image_column], self.channels, self.folder), self.resolution, self.center_crop)
        return {"image": to_tensor(image), "label": label, "row": number}

    def label(self, row: dict) -> int:
        return 0 if self.labels.column is None else self.labels.number(row[self.labels.column])

    @contextlib.contextmanager
    def naming(self, row: dict, number: int, where: str) -> Iterator[None]:
        """Re-raise errors about a row as a RowError that names data set, split, row and, if there is one, file."""
        try:
            yield
        except (ValueError, OSError) as error:
            path = _path(row[self.image_column])
            of_content = not isinstance(error, OSError) or isinstance(error, FileNotFoundError)
            raise RowError(BadRow(self.origin, number, where, path, " ".join(str(error).split()), of_content)) from error

    def encoded(self, row: dict) -> bytes:
        """The encoded image of a row; for an array, bytes that identify it."""
        source = row[self.image_column]
        return repr(source).encode() if isinstance(source, list) else read_bytes(source, self.folder)

    def digest(self, row: dict, where: str) -> int:
        """63-bit digest of the encoded image of a row. RowError: its bytes cannot be read."""
        with self.naming(row, -1, where):
            return digest_bytes(self.encoded(row))

    def key(self, row: dict) -> int:
        """63-bit digest of path and bytes: identifies a bad row of a stream, whatever its position."""
        data = b""
        with contextlib.suppress(ValueError, OSError):
            data = self.encoded(row)
        return digest_bytes(repr(_path(row[self.image_column])).encode() + data)


def _path(source: Any) -> str | None:
    return source.get("path") if isinstance(source, dict) else None


def digest_bytes(data: bytes) -> int:
    """63-bit BLAKE2 digest."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big") >> 1


class ImageDataset(Dataset):
    """Map-style: `[i] -> {"image": float32 [C, R, R] in [-1, 1], "label": int, "row": i}`.

    Args:
        rows: the encoded rows.
        decoder: how to read a row.
        source_rows: each row's number in its original split, for messages.
        skipped: where bad rows are counted that loaders leave out; None raises at the first one.

    RowError: the image or the label of the row is bad; the message names data set, split and row.
    """

    def __init__(
        self,
        rows: datasets.Dataset,
        decoder: RowDecoder,
        source_rows: np.ndarray | None = None,
        skipped: SkippedRows | None = None,
    ):
        self.rows, self.decoder, self.skipped = rows, decoder, skipped
        self.source_rows = np.arange(len(rows)) if source_rows is None else source_rows
        self._bad: dict[int, BadRow] = {}  # found so far by this process
        self.survey: Survey | None = None  # made when rows spread over the set are first needed

    def _decode(self, row: dict, index: int) -> dict:
        source = int(self.source_rows[index])
        return self.decoder.decode(row, source, f"row {source}") | {"row": index}

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict:
        index = int(index)
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        index %= len(self)
        return self._decode(self.rows[index], index)

    def __getitems__(self, indices: Sequence[int]) -> list[dict]:
        columns = self.rows[[int(i) for i in indices]]
        rows = (dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True))
        return [self._decode(row, int(i)) for i, row in zip(indices, rows, strict=True)]

    def read(self, index: int) -> dict | BadRow:
        """Row `index`, or its BadRow."""
        if index not in self._bad:
            try:
                return self[index]
            except RowError as error:
                if not error.bad.of_content:
                    return error.bad
                self._bad[index] = error.bad
        return self._bad[index]

    def replace(self, index: int) -> tuple[dict | None, list[BadRow]]:
        """The first good row after the bad row `index`, cyclically, and the bad ones before it.

        It depends only on the rows: not on the seed, the batch, the process, the worker or what was read before.
        """
        bad: list[BadRow] = []
        for step in range(1, len(self)):
            row = self.read((index + step) % len(self))
            if isinstance(row, dict):
                return row, bad
            bad.append(row)
        return None, bad


class ImageStream(IterableDataset):
    """Iterable over the same dicts; `row` is a digest of the encoded image, because a stream has no row numbers.

    It resumes by rereading the epoch and discarding the used rows undecoded. The states of `datasets` would jump there,
    but do not save the shuffle buffer, so rows would be lost.

    Args:
        rows: the stream.
        decoder: how to read a row.
        held_out: digests of rows of another split, which are left out.
        skipped: where bad rows are counted that loaders leave out; None raises at the first one.

    RowError: the image or the label of a row is bad, or the stream fails.
    """

    def __init__(
        self,
        rows: datasets.IterableDataset,
        decoder: RowDecoder,
        held_out: frozenset[int] = frozenset(),
        skipped: SkippedRows | None = None,
    ):
        self.rows, self.decoder, self.held_out, self.skipped = rows, decoder, held_out, skipped
        self.survey: Survey | None = None  # made with their tables when such rows are first needed
        self.tables: dict[int, ImageDataset] = {}
        self._used = self._to_skip = 0

    @property
    def num_shards(self) -> int:
        return self.rows.num_shards

    def shuffled(self, seed: int, buffer_size: int, rank: int, world_size: int) -> ImageStream:
        """This process's share of the shuffled stream.

        `split_dataset_by_node` assigns whole shards if the number of shards is a multiple of `world_size`; else each
        process reads everything and keeps every `world_size`-th row. Each row goes to exactly one process, but the order
        depends on the number of processes.
        """
        from datasets.distributed import split_dataset_by_node

        rows = self.rows.shuffle(seed=seed, buffer_size=buffer_size)
        return ImageStream(split_dataset_by_node(rows, rank, world_size), self.decoder, self.held_out, self.skipped)

    def set_epoch(self, epoch: int) -> None:
        self.rows.set_epoch(epoch)
        self.load_state_dict({"used": 0})

    def state_dict(self) -> dict[str, int]:
        return {"used": self._used}

    def load_state_dict(self, state: dict[str, int]) -> None:
        # `_used` too: a worker reports its state before its first row, and that state may be saved.
        self._used = self._to_skip = state["used"]

    def __iter__(self) -> Iterator[dict]:
        for row in self.read():
            if isinstance(row, BadRow):
                raise RowError(row)
            yield row

    def read(self) -> Iterator[dict | BadRow]:
        """All rows, with a BadRow in place of each bad one."""
        to_skip, self._to_skip = self._to_skip, 0
        self._used = 0
        try:
            for row in unbroken(self.rows, self.decoder.origin):
                self._used += 1
                if self._used <= to_skip:
                    continue
                where = f"row {self._used - 1} of the stream of this process and worker"
                try:
                    digest = self.decoder.digest(row, where)
                    if digest not in self.held_out:
                        yield self.decoder.decode(row, digest, where)
                except RowError as error:
                    yield replace(error.bad, key=self.decoder.key(row))
        except RowError as error:  # the stream failed
            yield error.bad


def unbroken(rows: Iterable[dict], origin: str) -> Iterator[dict]:
    """The rows of a stream. RowError: reading it fails."""
    import pyarrow

    number, broken = 0, (OSError, ValueError, tarfile.TarError, pyarrow.ArrowException)
    try:
        for row in rows:
            number += 1
            yield row
    except broken as error:
        reason = f"the stream breaks off: {type(error).__name__}: {' '.join(str(error).split())}"
        raise RowError(BadRow(origin, number, f"after {number} rows", None, reason, of_content=False)) from error
