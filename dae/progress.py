"""Progress bars, and times in words."""

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


def duration(seconds: float) -> str:
    """Such as `1.5 s`, `42 s`, `12 min` or `2 h 30 min`."""
    if seconds < 100:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"
