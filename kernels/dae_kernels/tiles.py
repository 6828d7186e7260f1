"""Arithmetic of launches, and tile sizes and warps from measurements, by GPU generation and shape.

They stand in the table `tiles.json` in an operation's folder.
profiling/tune_kernels.py writes the tables; nothing is tuned at run time. A table:

    {"made": {"sm_90": {...what its tiles were measured with...}},
     "tiles": {"sm_90": [{"kernel": "search", "when": {"exact": true}, "sizes": {"D": 64}, "tile": {"BLOCK_N": 128, ...}}, ...]}}
"""

from __future__ import annotations

import functools
import json
import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

FOLDER = Path(__file__).parent
FILE = "tiles.json"


@functools.cache
def generation(device: torch.device) -> str | None:
    """ "sm_90", "gfx942" and the like; None where there is no GPU."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return None
    properties: Any = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return str(properties.gcnArchName).split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


@functools.cache
def processors(device: torch.device) -> int:
    """How many SMs (AMD: compute units) a GPU has; where none is, those of an H100, for tracing and tests."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return 132
    return torch.cuda.get_device_properties(device).multi_processor_count


def next_power_of_2(n: int) -> int:
    """The least power of two that is not below n >= 1. Triton's own functions take 5 us of the host."""
    return 1 << (n - 1).bit_length()


def cdiv(n: int, size: int) -> int:
    """n / size, rounded up."""
    return -(-n // size)


LARGEST = {"num_warps": 32, "num_stages": 16}  # of a tile; of a block 2^16


def measured_tile(
    operation: str, gpu: str | None, kernel: str, when: Mapping[str, Any], sizes: Mapping[str, int], names: tuple[str, ...]
) -> dict[str, int] | None:
    """The measured tile of the nearest shape, or None: the launcher then goes by its rule.

    Args:
        operation: whose folder has the table.
        gpu: the generation.
        kernel: which kernel of the operation.
        when: what an entry must agree with (layout, dtype, precision).
        sizes: what it may differ in: the least sum of |log2(size / measured size)| wins, the first of a tie.
        names: of what a tile of this operation consists of; a table with others is damaged.
    """
    found, least = None, math.inf
    for entry in entries(operation, gpu, names) if gpu else ():
        if entry["kernel"] == kernel and entry["when"] == when and entry["sizes"].keys() == sizes.keys():
            away = sum(abs(math.log2(size / entry["sizes"][name])) for name, size in sizes.items())
            if away < least:
                found, least = entry["tile"], away
    return found


@functools.cache
def entries(operation: str, gpu: str, names: tuple[str, ...]) -> tuple[dict[str, Any], ...]:
    """The table's entries of a GPU generation; none, with one warning that names the table, if it is damaged or of another."""
    path = FOLDER / operation / FILE
    if not path.exists():
        return ()
    shown = f"{path.parent.name}/{path.name}"
    try:
        tables = json.loads(path.read_text())["tiles"]
        of_gpu = tuple(checked(entry, names) for entry in tables.get(gpu, ()))
        others = ", ".join(sorted(tables))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())
        warnings.warn(f"{shown} is damaged ({type(error).__name__}: {reason:.80}): ignored, tiles go by rule", RuntimeWarning, 2)
        return ()
    if not of_gpu:
        warnings.warn(
            f"{shown} has tiles of {others or 'no GPU'}, not of this {gpu}: ignored, tiles go by rule", RuntimeWarning, 2
        )
    return of_gpu


def checked(entry: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    """ValueError, KeyError, TypeError or AttributeError unless it is an entry of a table."""
    for part in ("sizes", "tile"):
        for name, size in entry[part].items():
            if type(size) is not int or size < 1 or (name.startswith(("BLOCK", "TILE", "num_warps")) and size & (size - 1)):
                raise ValueError(f"{part} with {name}={size!r}")
    if not isinstance(entry["kernel"], str) or not isinstance(entry["when"], dict):
        raise TypeError(f"an entry with kernel {entry['kernel']!r}")
    if set(entry["tile"]) != set(names):
        raise KeyError(f"a tile of {', '.join(entry['tile'])}, expected {', '.join(names)}")
    for name, size in entry["tile"].items():
        if size > LARGEST.get(name, 2**16):
            raise ValueError(f"tile with {name}={size}")
    return entry
