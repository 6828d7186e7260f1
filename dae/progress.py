"""Progress bars."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dae.distributed import rank

if TYPE_CHECKING:
    from tqdm import tqdm


def progress_bar(total: int, initial: int, description: str, shown: bool = True) -> tqdm:
    """tqdm, if it is to be shown, on the first process."""
    from tqdm import tqdm

    options = {"disable": not shown or rank() != 0, "dynamic_ncols": True, "mininterval": 0.5}
    return tqdm(total=total, initial=initial, desc=description, **options)
