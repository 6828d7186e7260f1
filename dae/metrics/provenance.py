"""Versions of the measuring software."""

from __future__ import annotations

import platform
from importlib.metadata import version

import dae


def versions() -> dict[str, str]:
    """Versions that affect a metric's value, for `metrics.json`: python, dae, torch, torchmetrics, numpy, scipy."""
    packages = ("torch", "torchmetrics", "numpy", "scipy")
    return {"python": platform.python_version(), "dae": dae.__version__, **{name: version(name) for name in packages}}
