"""constraints-oldest.txt holds pyproject's lower bounds, so that `make test-oldest` runs what pyproject promises."""

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOT_RUN = {"decoupled-autoencoder", "ruff", "mypy"}  # the project itself, and what `make test` alone runs


def test_the_oldest_versions_are_the_lower_bounds():
    version = pytest.importorskip("packaging.version").Version
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    required = [*project["dependencies"], *(each for name in ("photos", "peers", "test") for each in extras[name])]
    parts = [re.match(r"([\w-]+)(?:\[[^\]]*\])?(?:>=([\d.]+))?", each).groups() for each in required]
    bounds = {name.lower(): version(least) for name, least in parts if name not in NOT_RUN}
    lines = (ROOT / "constraints-oldest.txt").read_text().splitlines()
    pinned = dict(line.lower().split("==") for line in lines if not line.startswith("#"))
    assert {name: version(each) for name, each in pinned.items()} == bounds
