"""Rows that cannot be decoded: a record of each, and the list, count and budget of skipped ones."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from dae.files import append_line

LISTED_AS = "skipped.jsonl"  # in the output folder
SHOWN = 5  # skipped rows in the log; the list has all
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class BadRow:
    """A row without a usable image or label. A value, not an exception, because loader workers return it.

    Attributes:
        origin: data set and split.
        key: identifies it within the origin: its number, or in a stream a digest of path and bytes.
        where: its place, as messages put it.
        path: its file, if it has one.
        reason: one line.
        of_content: the row itself is bad; otherwise reading it failed (disk, network), and it is never skipped.
    """

    origin: str
    key: int
    where: str
    path: str | None
    reason: str
    of_content: bool = True

    def __str__(self) -> str:
        return f"{self.origin}, {self.where}{f' ({self.path})' if self.path else ''}: {self.reason}"


class RowError(ValueError):
    """The image or the label of a row is bad; the message names data set, split, row, file and reason."""

    def __init__(self, bad: BadRow):
        self.bad = bad
        remedy = "; repair or remove it, or leave such rows out by data.on_error=skip" if bad.of_content else ""
        super().__init__(f"{bad}{remedy}")


class SkippedRows:
    """The rows that `data.on_error=skip` has left out so far, by all processes of a run.

    Args:
        max_skipped: the budget: a share of `rows` if below 1, else a number.
        rows: size of the data set; for a stream of unknown size, the rows read so far.
        known: whether `rows` is the full size.
    """

    def __init__(self, max_skipped: float, rows: int, known: bool = True):
        self.max_skipped, self.rows, self.known = max_skipped, rows, known
        self.fingerprint: str | None = None  # of the data; lines with another fingerprint are ignored
        self.file: Path | None = None
        self._found: dict[tuple[str, int], BadRow] = {}

    def __len__(self) -> int:
        return len(self._found)

    def list_in(self, folder: str | Path) -> None:
        """From now on list the rows in `folder`/skipped.jsonl, and count those listed there already.

        ValueError: the listed rows exceed the budget, which may have been larger then.
        """
        self.file = Path(folder) / LISTED_AS
        before, self._found = self._found, {}
        self.add(before.values())
        self._found |= self._listed()
        if self.known or self.max_skipped >= 1:  # a share means nothing for a stream that has just begun
            self._require_budget()

    def add(self, rows: Iterable[BadRow]) -> None:
        """Count and list the new ones among `rows`.

        Raises:
            RowError: reading a row failed for reasons outside of it.
            ValueError: the rows exceed the budget.
        """
        rows = list(rows)
        if passing := [row for row in rows if not row.of_content]:
            raise RowError(passing[0])
        new = {(row.origin, row.key): row for row in rows if (row.origin, row.key) not in self._found}
        if new:
            self._found |= self._listed()  # by other processes
            new = {key: row for key, row in new.items() if key not in self._found}
        if not new:
            return
        for number, row in enumerate(new.values(), len(self) + 1):
            if self.file is not None:
                self.file.parent.mkdir(parents=True, exist_ok=True)
                line = {"data": self.fingerprint, "split": row.origin, "row": row.key, "path": row.path, "reason": row.reason}
                append_line(self.file, json.dumps(line))
            if number <= SHOWN:
                log.info("left out: %s%s", row, "; further ones only in the list" if number == SHOWN else "")
        self._found |= new
        self._require_budget()

    def _require_budget(self) -> None:
        share = self.max_skipped < 1
        if len(self) > (self.max_skipped * self.rows if share else self.max_skipped):
            limit = f"data.max_skipped={self.max_skipped:g}" + (f" of {self.rows:,} rows" if share else "")
            listed = f"; all are listed in {self.file}" if self.file else ""
            last = list(self._found.values())[-1]
            rows = "1 row" if len(self) == 1 else f"{len(self)} rows"
            raise ValueError(f"{rows} cannot be decoded, {limit} may be left out. The last one: {last}{listed}")

    def lines(self) -> list[str]:
        """Lines for the data table; empty if no row was skipped."""
        count, first = len(self), next(iter(self._found.values()), None)
        line = f"{count:,} {'row' if count == 1 else 'rows'} that cannot be decoded, {'as ' if count > 1 else ''}{first}"
        return [line] if count else []

    def describe(self) -> str:
        """A recipe's last line on skipped rows; empty if there are none."""
        rows = "1 row that cannot be decoded was" if len(self) == 1 else f"{len(self)} rows that cannot be decoded were"
        return f"; {rows} left out ({self.file})" if self._found else ""

    def _listed(self) -> dict[tuple[str, int], BadRow]:
        found = {}
        lines = self.file.read_text().splitlines() if self.file is not None and self.file.is_file() else []
        for row in (json.loads(line) for line in lines if line.endswith("}")):  # a crash may leave a partial line
            if row["data"] == self.fingerprint:
                bad = BadRow(row["split"], row["row"], f"row {row['row']}", row["path"], row["reason"])
                found[bad.origin, bad.key] = bad
        return found
