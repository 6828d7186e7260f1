"""Progress bars."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dae.distributed import rank

if TYPE_CHECKING:
    from tqdm import tqdm


def progress_bar(total: int | None, initial: int, description: str, shown: bool = True, **options: Any) -> tqdm:
    """tqdm with further `options`, on the first process alone, and there if `shown`."""
    from tqdm import tqdm

    options = {"disable": not shown or rank() != 0, "dynamic_ncols": True, "mininterval": 0.5} | options
    return tqdm(total=total, initial=initial, desc=description, **options)
