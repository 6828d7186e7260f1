"""Available memory, checked before work that needs much of it."""

from __future__ import annotations

from pathlib import Path


def available_memory() -> int | None:
    """Bytes that this process can still allocate: free on the machine, and within its control group."""
    found = []
    for line in _lines("/proc/meminfo"):
        if line.startswith("MemAvailable:"):
            found.append(int(line.split()[1]) * 1024)
    for limit, used in (("memory.max", "memory.current"), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes")):
        values = [line for name in (limit, used) for line in _lines(f"/sys/fs/cgroup/{name}")]
        if len(values) == 2 and values[0].isdigit():
            found.append(int(values[0]) - int(values[1]))
    return min(found, default=None)


def require_memory(needed: int, what: str, remedy: str) -> None:
    """Raise ValueError if fewer than `needed` bytes are available."""
    available = available_memory()
    if available is not None and needed > available:
        raise ValueError(f"{what} need about {needed / 1e9:.1f} GB of memory, {available / 1e9:.1f} GB are free: {remedy}")


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []
