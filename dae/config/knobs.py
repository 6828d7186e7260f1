"""Metadata of a configuration knob: meaning, allowed values, and what depends on it."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Iterator
from dataclasses import field
from typing import Any, Callable, NamedTuple

# What a knob affects when configurations are compared: on resume, between arms, between trials.
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
    weight: bool = False,
    **bounds: float,
) -> Any:
    """A dataclass field with its meaning (shown by `--help`) and its allowed values (checked on loading).

    Args:
        default: value if none is configured.
        help: meaning and unit.
        choices: allowed values; empty for any.
        path: whether it may be a path, so that a leading `~` is the home directory.
        role: one of `ROLES`, by default the section's; None has no special treatment.
        run: which run depends on it, `autoencoder` or `prior`, by default the section's; None means both.
        encoding: its name in the fingerprint of cached encodings, if their augmentations depend on it.
        weight: whether it weights a term of a loss, so that preflight sees that the term trains something.
        bounds: those of `BOUNDS`, named as in pydantic: `ge`, `le` inclusive, `gt`, `lt` exclusive; per element for lists.
    """
    metadata = {"help": help, "choices": choices, "path": path, "bounds": bounds, "role": role, "run": run, "encoding": encoding}
    metadata["weight"] = weight
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def section(kind: Callable[[], Any], help: str, role: str | None = None, run: str | None = None) -> Any:
    """A group of knobs.

    Args:
        kind: constructor with defaults.
        role, run: for knobs that set none.
    """
    return field(default_factory=kind, metadata={"help": help, "role": role, "run": run})


class Leaf(NamedTuple):
    """A knob in a configuration: its dotted key, its section and field, its value, and its inherited role and run."""

    key: str
    section: Any
    field: dataclasses.Field
    value: Any
    role: str | None
    run: str | None


def leaves(config: Any, prefix: str = "", role: str | None = None, run: str | None = None) -> Iterator[Leaf]:
    """The knobs of a configuration or a section, in order of definition."""
    for f in dataclasses.fields(config):
        key, value = f"{prefix}{f.name}", getattr(config, f.name)
        own = f.metadata["role"] or role, f.metadata["run"] or run
        if dataclasses.is_dataclass(value):
            yield from leaves(value, f"{key}.", *own)
        else:
            yield Leaf(key, config, f, value, *own)


def sections(schema: type) -> dict[str, type]:
    """The classes of a section's sub-sections by name."""
    made = {f.name: f.default_factory() for f in dataclasses.fields(schema) if f.default_factory is not dataclasses.MISSING}
    return {name: type(value) for name, value in made.items() if dataclasses.is_dataclass(value)}
