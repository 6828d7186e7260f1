"""Data sets in the sense of torch over the rows of `datasets`: decoded, square, in [-1, 1]."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from torch.utils.data import Dataset, IterableDataset

from dae.data.columns import Labels
from dae.data.images import decode_image, read_bytes, to_square, to_tensor

if TYPE_CHECKING:
    import datasets


@dataclass
class RowDecoder:
    """From an encoded row to `{"image", "label", "row"}`; knows how to name the row when it is bad."""

    origin: str
    image_column: str
    labels: Labels
    resolution: int
    channels: int
    center_crop: bool
    folder: Path | None = None

    def label(self, row: dict, where: str) -> int:
        if self.labels.column is None:
            return 0
        try:
            return self.labels.number(row[self.labels.column])
        except ValueError as error:
            raise ValueError(f"{self.origin}, {where}: {error}") from error

    def decode(self, row: dict, number: int, where: str) -> dict:
        label = self.label(row, where)
        with self.naming(row, where):
            image = to_square(decode_image(row[self.image_column], self.channels, self.folder), self.resolution, self.center_crop)
        return {"image": to_tensor(image), "label": label, "row": number}

    @contextlib.contextmanager
    def naming(self, row: dict, where: str) -> Iterator[None]:
        """Errors about the image of a row name the data set, the split, the row and, if there is one, the file."""
        try:
            yield
        except (ValueError, OSError) as error:
            source = row[self.image_column]
            path = source.get("path") if isinstance(source, dict) else None
            kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
            raise kind(f"{self.origin}, {where}{f' ({path})' if path else ''}: {error}") from error

    def encoded(self, row: dict) -> bytes:
        """The bytes of the image of a row; of an array something that identifies it."""
        source = row[self.image_column]
        return repr(source).encode() if isinstance(source, list) else read_bytes(source, self.folder)


def digest_bytes(data: bytes) -> int:
    """63 bits that identify the image of a row wherever it stands in a stream."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big") >> 1


class ImageDataset(Dataset):
    """Map-style: `[i] -> {"image": float32 [C, R, R] in [-1, 1], "label": int, "row": i}`.

    Args:
        rows: the encoded rows.
        decoder: how to read a row.
        source_rows: for each row its number in the split it was taken from, which messages name.

    Raises:
        ValueError: the image or the label of the row is bad; the message names data set, split and row.
    """

    def __init__(self, rows: datasets.Dataset, decoder: RowDecoder, source_rows: np.ndarray | None = None):
        self.rows, self.decoder, self.source_rows = rows, decoder, source_rows

    def _decode(self, row: dict, index: int) -> dict:
        source = index if self.source_rows is None else int(self.source_rows[index])
        return self.decoder.decode(row, index, f"row {source}")

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict:
        index = int(index)
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        index %= len(self)
        return self._decode(self.rows[index], index)

    def __getitems__(self, indices: list[int]) -> list[dict]:
        columns = self.rows[[int(i) for i in indices]]
        rows = (dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True))
        return [self._decode(row, int(i)) for i, row in zip(indices, rows, strict=True)]


class ImageStream(IterableDataset):
    """Iterable: the same dicts, in which `row` is a digest of the encoded image, because a stream has no row numbers.

    A stream continues by reading its epoch again and throwing away the rows that were used, without decoding them. The
    states of `datasets` would jump there, but they forget what lay in the shuffle buffer: rows would be lost.

    Args:
        rows: the stream.
        decoder: how to read a row.
        held_out: digests of rows that belong to another split and are left out.
    """

    def __init__(self, rows: datasets.IterableDataset, decoder: RowDecoder, held_out: frozenset[int] = frozenset()):
        self.rows, self.decoder, self.held_out = rows, decoder, held_out
        self._used = self._to_skip = 0

    @property
    def num_shards(self) -> int:
        return self.rows.num_shards

    def shuffled(self, seed: int, buffer_size: int, rank: int, world_size: int) -> ImageStream:
        """The share of one process in the shuffled stream.

        `split_dataset_by_node` deals out whole shards where the number of shards is a multiple of `world_size`; else each
        process reads everything and keeps every `world_size`-th row. Each row goes to exactly one process, but the order
        depends on the number of processes.
        """
        from datasets.distributed import split_dataset_by_node

        rows = self.rows.shuffle(seed=seed, buffer_size=buffer_size)
        return ImageStream(split_dataset_by_node(rows, rank, world_size), self.decoder, self.held_out)

    def set_epoch(self, epoch: int) -> None:
        self.rows.set_epoch(epoch)
        self.load_state_dict({"used": 0})

    def state_dict(self) -> dict[str, int]:
        return {"used": self._used}

    def load_state_dict(self, state: dict[str, int]) -> None:
        # `_used` too: a worker reports its state once before its first row, and that state may be saved.
        self._used = self._to_skip = state["used"]

    def __iter__(self) -> Iterator[dict]:
        to_skip, self._to_skip = self._to_skip, 0
        self._used = 0
        for row in self.rows:
            self._used += 1
            if self._used <= to_skip:
                continue
            where = f"row {self._used - 1} of the stream of this process and worker"
            with self.decoder.naming(row, where):
                digest = digest_bytes(self.decoder.encoded(row))
            if digest not in self.held_out:
                yield self.decoder.decode(row, digest, where)
