"""constraints-oldest.txt holds pyproject's lower bounds, so that `make test-oldest` runs what pyproject promises."""

import re
import tomllib
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PINNED = [line for line in (ROOT / "constraints-oldest.txt").read_text().splitlines() if not line.startswith("#")]
NOT_RUN = {"decoupled-autoencoder", "ruff", "mypy"}  # the project itself, and what `make test` alone runs


def test_the_oldest_versions_are_the_lower_bounds():
    version = pytest.importorskip("packaging.version").Version
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    required = [*project["dependencies"], *(each for name in ("photos", "peers", "test") for each in extras[name])]
    parts = [re.match(r"([\w-]+)(?:\[[^\]]*\])?(?:>=([\d.]+))?", each).groups() for each in required]
    bounds = {name.lower(): version(least) for name, least in parts if name not in NOT_RUN}
    assert {name: version(each) for name, each in (line.lower().split("==") for line in PINNED)} == bounds


def test_the_oldest_versions_install_together():
    """What each package of an oldest version (those installed here) needs of the others, their oldest versions are."""
    requirements = pytest.importorskip("packaging.requirements")
    name_of = pytest.importorskip("packaging.utils").canonicalize_name
    pinned = {name_of(name): each for name, each in (line.split("==") for line in PINNED)}
    seen = 0
    for name, each in pinned.items():
        try:
            package = distribution(name)
        except PackageNotFoundError:
            continue
        if package.version != each:
            continue
        for needed in map(requirements.Requirement, package.requires or ()):
            if (needed.marker is None or needed.marker.evaluate({"extra": ""})) and name_of(needed.name) in pinned:
                seen += 1
                assert needed.specifier.contains(pinned[name_of(needed.name)]), f"{name} {each} needs {needed}"
    assert seen  # datasets needs huggingface_hub
