"""Progress bars."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from dae.distributed import rank

if TYPE_CHECKING:
    from tqdm import tqdm

Item = TypeVar("Item")


def progress_bar(total: int | None, initial: int, description: str, shown: bool = True, **options: Any) -> tqdm:
    """tqdm with further `options`; visible only on the first process, and if `shown`."""
    from tqdm import tqdm

    options = {"disable": not shown or rank() != 0, "dynamic_ncols": True, "mininterval": 0.5} | options
    return tqdm(total=total, initial=initial, desc=description, **options)


def with_progress(items: Sequence[Item], description: str, shown: bool = True) -> Iterator[Item]:
    """Iterate over the items, with a `progress_bar` if `shown`."""
    if not shown:
        yield from items
        return
    with progress_bar(len(items), 0, description) as bar:
        for item in items:
            yield item
            bar.update()
