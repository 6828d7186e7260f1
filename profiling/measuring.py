"""Shared by the profiling scripts: arguments, modules of operations, times, memory, and the machine's description."""

import argparse
import ctypes
import datetime
import importlib.metadata
import importlib.util
import json
import os
import platform
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch


def measuring_parser(description: str | None) -> argparse.ArgumentParser:
    """A parser with --device and --json whose help begins with `description`."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="append one JSON object per line to this file, as soon as it is measured")
    return parser


def load_module(path: Path) -> ModuleType:
    """Import a file of profiling/bench/ or profiling/aot/, which are not packages."""
    spec: Any = importlib.util.spec_from_file_location(f"{path.parent.name}_{path.stem}", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # torch.compile imports it by its name
    spec.loader.exec_module(module)
    return module


def machine(device: torch.device, *packages: str) -> dict[str, Any]:
    """Hardware, threads, versions (None: not installed) and the command, for each row of measurements."""
    cpu = f"{platform.machine().replace('_', '-')} CPU, {os.cpu_count()} cores"
    installed = {name: next((found.version for found in importlib.metadata.distributions(name=name)), None) for name in packages}
    # Drop absolute paths, which say where it ran, not what.
    words = [Path(word).name if Path(word).is_absolute() else word for word in sys.argv[1:]]
    return {
        "hardware": f"{torch.cuda.get_device_name(device)}, {cpu}" if device.type == "cuda" else cpu,
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), "cuda": torch.version.cuda or torch.version.hip} | installed,
        "command": " ".join([f"python profiling/{Path(sys.argv[0]).name}", *words]),
    }


def now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def append_row(file: Path | None, row: dict[str, Any]) -> None:
    """Append the row to a file of JSON lines, if given."""
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("a") as lines:
            lines.write(json.dumps(row) + "\n")


def quantiles(samples: Sequence[float]) -> dict[str, float]:
    """The median with the 20 % and 80 % quantiles."""
    low, *_, high = statistics.quantiles(samples, n=5, method="inclusive") if len(samples) > 1 else [*samples, *samples]
    return {"p20": low, "median": statistics.median(samples), "p80": high}


def synchronize(device: torch.device) -> None:
    """Wait for the device, if it is a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def recorded_event(device: torch.device) -> torch.cuda.Event | None:
    """An event recorded in the GPU's stream; None on other devices."""
    if device.type != "cuda":
        return None
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def growth(device: torch.device) -> Callable[[], int] | None:
    """Peak bytes allocated since this call, as a function; None if unavailable."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        return lambda: torch.cuda.max_memory_allocated() - before
    if sys.platform == "linux" and os.access("/proc/self/clear_refs", os.W_OK):
        ctypes.CDLL(None).malloc_trim(0)  # freed memory still held by the process would hide new allocations
        before = resident_bytes("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        return lambda: resident_bytes("VmHWM") - before
    return None


def resident_bytes(field: str) -> int:
    """Memory of this process from /proc: "VmRSS" is current, "VmHWM" the peak."""
    found = [row for row in Path("/proc/self/status").read_text().splitlines() if row.startswith(field + ":")]
    return 1024 * int(found[0].split()[1])
