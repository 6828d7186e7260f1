"""Choose the rows to hold out or look at first, by content and spread over the whole set.

A row is identified by the digest of its encoded image, so the choice survives renamed files, shuffled rows and another number of
processes, and hardly changes when rows are added; copies of a held-out image are never trained on. The price is reading all bytes
once.
"""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np

from dae.data.rows import ImageDataset, ImageStream, RowDecoder, digest_bytes, unbroken
from dae.data.skipping import RowError
from dae.progress import progress_bar

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset
    from tqdm import tqdm

UNREADABLE = -1  # digest of an unreadable row, which is never chosen
LOCAL = (1 << 35, 2_000_000)  # bytes and rows to read of a stream of local files: minutes
REMOTE = (1 << 30, 100_000)  # and of one over a network
PARTS = 64  # places at which a longer stream is read


@dataclass
class Survey:
    """Digest and label (0 if none) of each row read.

    Attributes:
        counts: rows read per place of a long stream; None if all rows were read.
    """

    digests_N: np.ndarray
    labels_N: np.ndarray
    counts: list[int] | None = None

    def __len__(self) -> int:
        return len(self.digests_N)

    def order(self) -> np.ndarray:
        """An order of the rows whose every prefix is spread over the set; without duplicates and unreadable rows.

        The r-th of the N_c images of class c, by digest, is placed at (r + 1/2) / N_c: each prefix has its share of each
        class, to within a row, and is as random within a class as the digests are. Ties go by digest.
        """
        by_digest = np.lexsort((self.labels_N, self.digests_N))  # of copies with different labels keep the smallest
        digests, first = np.unique(self.digests_N[by_digest], return_index=True)
        rows = by_digest[first[digests != UNREADABLE]]
        _, classes = np.unique(self.labels_N[rows], return_inverse=True)
        within = np.lexsort((np.arange(len(rows)), classes))  # by class, then digest
        sizes = np.bincount(classes)
        rank = np.empty(len(rows))
        rank[within] = np.arange(len(rows)) - (np.cumsum(sizes) - sizes)[classes[within]]
        return rows[np.lexsort((np.arange(len(rows)), (rank + 0.5) / sizes[classes]))]


def choose_held_out(survey: Survey, size: int, origin: str) -> np.ndarray:
    """Rows to hold out: `size`, at most a tenth, and a class's last image only if nothing else is left.

    ValueError: there is only one image.
    """
    order = survey.order()
    if len(order) < 2:
        raise ValueError(
            f"{origin} has {len(order)} rows, too few to hold some out (copies of an image count once); set validation_split"
        )
    size = max(1, min(size, len(order) // 10))
    _, classes = np.unique(survey.labels_N, return_inverse=True)
    images = np.unique(np.array([survey.digests_N, classes])[:, survey.digests_N != UNREADABLE], axis=1)  # and their classes
    taken: list[int] = []
    passed: list[int] = []
    left = np.bincount(images[1], minlength=classes.max() + 1)
    for row in order:
        if len(taken) == size:
            break
        of = images[1, slice(*np.searchsorted(images[0], survey.digests_N[row] + np.arange(2)))]  # copies may be in several
        alone = (left[of] == 1).any()
        (passed if alone else taken).append(row)
        left[of] -= not alone
    return np.array(taken + passed)[:size]


def stratified_split(rows: int, size: int, labels: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Training rows and held-out rows, both ascending; stratified by `labels` if each class is large enough.

    Args:
        rows: number of rows.
        size: how many to hold out; 1 <= size < rows.
        labels: [rows] integers, or None.
    """
    from sklearn.model_selection import train_test_split

    if labels is not None:
        counts = np.unique(labels, return_counts=True)[1]
        if counts.min() < 2 or min(size, rows - size) < len(counts):
            labels = None
    train, held_out = train_test_split(np.arange(rows), test_size=size, random_state=0, stratify=labels)
    return np.sort(train), np.sort(held_out)


def survey_table(rows: Dataset, decoder: RowDecoder) -> Survey:
    """Survey a table. Threads read each image once, in about a tenth of the time of decoding."""
    digests: list[int] = []
    labels: list = []
    column = decoder.labels.column
    with ThreadPoolExecutor(8) as pool, _bar(decoder, len(rows)) as bar:
        for start in range(0, len(rows), 256):
            batch = rows[start : start + 256]
            images = [{decoder.image_column: image} for image in batch[decoder.image_column]]
            digests += (digest for digest, _ in pool.map(lambda row: _digest(row, decoder), images))
            labels += batch[column] if column else [0] * len(images)
            bar.update(len(images))
    return _survey(digests, labels)


def survey_stream(rows: IterableDataset, decoder: RowDecoder) -> Survey:
    """Survey a stream: all rows or, beyond the limits, the first rows of parts spread over it."""
    limits = LOCAL if decoder.folder is not None else REMOTE
    digests, labels, ended = _read(rows, decoder, *limits)
    if ended:
        return _survey(digests, labels)
    read = [_read(part, decoder, *(limit // PARTS for limit in limits)) for part in _parts(rows)]
    counts = [len(digests) for digests, _, _ in read]
    return _survey([each for part, _, _ in read for each in part], [each for _, part, _ in read for each in part], counts)


def read_rows(rows: IterableDataset, decoder: RowDecoder, survey: Survey, digests: list[int]) -> ImageDataset:
    """The rows of a surveyed stream with these digests, in this order, as a table in memory."""
    import datasets

    places = [rows] if survey.counts is None else [islice(*pair) for pair in zip(_parts(rows), survey.counts, strict=True)]
    wanted, found = set(digests), {}
    for number, row in enumerate(row for place in places for row in unbroken(place, decoder.origin)):
        if (digest := int(survey.digests_N[number])) in wanted:
            wanted.remove(digest)
            found[digest] = number, row
            if not wanted:
                break
    numbers, kept = zip(*(found[digest] for digest in digests), strict=True)
    columns = {name: [row[name] for row in kept] for name in kept[0]}
    table = datasets.Dataset.from_dict(columns, features=rows.features)
    return ImageDataset(table, decoder, np.array(numbers))


def spread_rows(dataset: ImageDataset, limit: int) -> list[int]:
    """Ascending numbers of `limit` rows spread over the set; the first rows of a sorted set are all of one class."""
    dataset.survey = dataset.survey or survey_table(dataset.rows, dataset.decoder)
    return sorted(dataset.survey.order()[:limit].tolist())


def table_of_stream(stream: ImageStream, limit: int) -> ImageDataset | None:
    """`limit` rows spread over a stream, as a table cached on the stream; None if it has no more."""
    if limit not in stream.tables:
        stream.survey = survey = stream.survey or survey_stream(stream.rows, stream.decoder)
        ordered = survey.digests_N[survey.order()]
        digests = ordered[~np.isin(ordered, list(stream.held_out))][:limit].tolist()
        if survey.counts is None and len(digests) < limit:
            return None
        stream.tables[limit] = read_rows(stream.rows, stream.decoder, survey, digests)
        stream.tables[limit].skipped = stream.skipped
    return stream.tables[limit]


def _survey(digests: list[int], labels: list, counts: list[int] | None = None) -> Survey:
    labels = [label if label is not None else 0 for label in labels]  # a row without a label is bad in any case
    return Survey(np.array(digests, np.int64), np.array(labels), counts)


def _digest(row: dict, decoder: RowDecoder) -> tuple[int, int]:
    """Digest and size in bytes of a row's encoded image. RowError: reading it failed, though it may exist."""
    try:
        with decoder.naming(row, UNREADABLE, "a row"):
            data = decoder.encoded(row)
    except RowError as error:
        if not error.bad.of_content:
            raise
        return UNREADABLE, 0
    return digest_bytes(data), len(data)


def _read(rows: Iterable[dict], decoder: RowDecoder, most_bytes: int, most_rows: int) -> tuple[list[int], list, bool]:
    """Digests and labels of the first rows, and whether these are all rows."""
    digests: list[int] = []
    labels: list = []
    total, column = 0, decoder.labels.column
    with _bar(decoder) as bar:
        for row in unbroken(rows, decoder.origin):
            if total >= most_bytes or len(digests) >= most_rows:
                return digests, labels, False
            digest, size = _digest(row, decoder)
            digests.append(digest)
            labels.append(row[column] if column else 0)
            total += size
            bar.update()
    return digests, labels, True


def _bar(decoder: RowDecoder, total: int | None = None) -> tqdm:
    return progress_bar(total, 0, f"survey of {decoder.origin}", unit="row", delay=5)


def _parts(rows: IterableDataset) -> list[IterableDataset]:
    """Up to `PARTS` parts of a stream: its files, or row groups of its parquet files."""
    rows = rows if rows.num_shards >= PARTS else rows.reshard()
    count = min(PARTS, rows.num_shards)
    return [rows.shard(num_shards=count, index=i) for i in range(count)]
