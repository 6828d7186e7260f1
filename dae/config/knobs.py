"""What a knob of the configuration carries beside its default: meaning, allowed values, and what depends on it."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Iterator
from dataclasses import field
from typing import Any, Callable, NamedTuple

# How a knob counts when configurations are compared: of a run and its resumption, of arms, of trials.
ROLES = {
    "free": "nothing that is computed depends on it: it may change when a run is resumed",
    "judging": "samples and metrics depend on it, no training does: free to change on resuming, but part of a trial",
    "place": "where the data are: if their content is known to be the same it may change",
    "batch": "compared as the batch of all processes together",
    "length": "may change while the stage, or a later one, is not at its end",
    "arm": "what the arms of a comparison may differ in",
    "second stage": "what the second stage alone may do in a comparison",
}
BOUNDS: dict[str, tuple[str, Callable[[Any, Any], bool]]] = {
    "ge": ("at least {}", operator.ge),
    "le": ("at most {}", operator.le),
    "gt": ("more than {}", operator.gt),
    "lt": ("less than {}", operator.lt),
}


def knob(
    default: Any,
    help: str,
    choices: tuple = (),
    path: bool = False,
    role: str | None = None,
    run: str | None = None,
    encoding: str | None = None,
    **bounds: float,
) -> Any:
    """A dataclass field that carries its meaning (shown by `--help`) and which values it takes (checked on loading).

    Args:
        default: value where nothing is configured.
        help: meaning and unit.
        choices: the values it takes; empty for any.
        path: whether it may name a file or folder, so that a leading `~` is the home directory.
        role: one of `ROLES`, else that of its section; None is compared like anything else.
        run: the one of the runs `autoencoder` and `prior` that depends on it, else that of its section; None is both.
        encoding: its name in the fingerprint of cached encodings, whose augmentations depend on it.
        bounds: of `BOUNDS`, as pydantic calls them: `ge` and `le` inclusive, `gt` and `lt` exclusive; of each element of a list.
    """
    metadata = {"help": help, "choices": choices, "path": path, "bounds": bounds, "role": role, "run": run, "encoding": encoding}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def section(kind: Callable[[], Any], help: str, role: str | None = None, run: str | None = None) -> Any:
    """A group of knobs.

    Args:
        kind: makes one with its defaults.
        role, run: of all its knobs that have none of their own.
    """
    return field(default_factory=kind, metadata={"help": help, "role": role, "run": run})


class Leaf(NamedTuple):
    """A knob in a configuration: its dotted key, its section and field there, its value, and the role and run it inherits."""

    key: str
    section: Any
    field: dataclasses.Field
    value: Any
    role: str | None
    run: str | None


def leaves(config: Any, prefix: str = "", role: str | None = None, run: str | None = None) -> Iterator[Leaf]:
    """The knobs of a configuration or of a section of it, in the order of their definition."""
    for f in dataclasses.fields(config):
        key, value = f"{prefix}{f.name}", getattr(config, f.name)
        own = f.metadata["role"] or role, f.metadata["run"] or run
        if dataclasses.is_dataclass(value):
            yield from leaves(value, f"{key}.", *own)
        else:
            yield Leaf(key, config, f, value, *own)


def sections(schema: type) -> dict[str, type]:
    """The classes of a section's own sections by name."""
    made = {f.name: f.default_factory() for f in dataclasses.fields(schema) if f.default_factory is not dataclasses.MISSING}
    return {name: type(value) for name, value in made.items() if dataclasses.is_dataclass(value)}
