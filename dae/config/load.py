"""Read a configuration from YAML, `a.b=c` overrides or dictionaries, check it, compare it and write it."""

from __future__ import annotations

import dataclasses
import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dae.config.schema import Config


def load_config(path: str | Path | None = None, overrides: list[str] | tuple = ()) -> Config:
    """Defaults, then the YAML file, then `a.b=c` overrides, checked for names, types, choices and least values.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: an unknown key (the message names the nearest one), a wrong type, or a value that is not allowed.
    """
    from omegaconf import OmegaConf

    layers = []
    if path is not None:
        if not Path(path).is_file():
            raise FileNotFoundError(f"no configuration file {str(path)!r}")
        try:
            layers.append((str(path), OmegaConf.load(path)))
        except Exception as error:  # as in _parsed
            raise ValueError(f"{path} is not valid YAML: {error}") from error
    loaded = _merge(Config, layers + _parsed(overrides))
    if loaded.push_to_hub and not loaded.hub_model_id:  # it would fail after the training
        raise ValueError("push_to_hub=true needs hub_model_id=<user>/<name>")
    return loaded


def with_overrides(config: Config, overrides: list[str] | tuple) -> Config:
    """A copy of `config` with `a.b=c` overrides, checked as by `load_config`. ValueError: as there."""
    return _merge(config, _parsed(overrides))


def _parsed(overrides: list[str] | tuple) -> list[tuple[str, Any]]:
    from omegaconf import OmegaConf

    layers = []
    for override in overrides:
        if "=" not in override or override.startswith("-"):
            raise ValueError(f"expected an override `key=value`, got {override!r}")
        try:
            layers.append((f"override {override!r}", OmegaConf.from_dotlist([override])))
        except Exception as error:  # PyYAML's family of errors has no common public base with OmegaConf's
            raise ValueError(f"override {override!r} cannot be parsed: {str(error).splitlines()[0]}") from error
    return layers


def _merge(base: Any, layers: list[tuple[str, Any]]) -> Config:
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    config, source = OmegaConf.structured(base), "defaults"
    for source, layer in layers:
        if not OmegaConf.is_dict(layer):
            raise ValueError(f"{source}: expected `key: value` pairs at the top level")
        _reject_unknown_keys(layer, Config, source)
        if layer.get("mixed_precision") is False:  # YAML 1.1 reads a bare `no` as false
            layer.mixed_precision = "no"
        try:
            config.merge_with(layer)
        except OmegaConfBaseException as error:
            key = getattr(error, "full_key", None) or "?"
            raise ValueError(f"{source}: wrong type at {key}: {str(error).splitlines()[0]}") from error
    try:
        loaded = OmegaConf.to_object(config)
    except OmegaConfBaseException as error:
        raise ValueError(f"{source}: {str(error).splitlines()[0]}") from error
    _reject_wrong_values(loaded)
    return loaded


def _reject_unknown_keys(layer: Any, schema: type, source: str, prefix: str = "") -> None:
    sections = {f.name: f.default_factory for f in dataclasses.fields(schema)}
    for key in layer:
        name = f"{prefix}{key}"
        if str(key) not in sections:
            leaves = [row.key for row in describe(schema, prefix)] + [prefix + s for s in sections]
            everywhere = [row.key for row in describe(Config)]
            by_leaf = [k for k in everywhere if k.rsplit(".", 1)[-1] == str(key)]
            near = by_leaf or difflib.get_close_matches(name, leaves + everywhere, 1, 0.0)
            raise ValueError(f"{source}: unknown key {name!r}; the nearest one is {near[0]!r}")
        value = layer._get_node(key)
        factory = sections[str(key)]
        if factory is not dataclasses.MISSING and dataclasses.is_dataclass(section := factory()):
            if not hasattr(value, "keys"):
                raise ValueError(f"{source}: {name} is a section, expected `{name}.<key>`")
            _reject_unknown_keys(value, type(section), source, f"{name}.")


def _reject_wrong_values(section: Any, prefix: str = "") -> None:
    for f in dataclasses.fields(section):
        value = getattr(section, f.name)
        if dataclasses.is_dataclass(value):
            _reject_wrong_values(value, f"{prefix}{f.name}.")
        elif (choices := f.metadata.get("choices")) and value not in choices:
            near = difflib.get_close_matches(str(value), map(str, choices), 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"{prefix}{f.name}: expected one of {list(choices)}, got {value!r}{hint}")
        elif (least := f.metadata.get("least")) is not None and value is not None:
            values = value if isinstance(value, list) else [value]
            if any(not v >= least for v in values):  # so written, it refuses NaN
                raise ValueError(f"{prefix}{f.name}: expected at least {least}, got {value!r}")


def save_config(config: Config, path: str | Path) -> None:
    """Write the resolved configuration as YAML; `load_config` of the file gives the same configuration."""
    from omegaconf import OmegaConf

    Path(path).write_text(OmegaConf.to_yaml(OmegaConf.structured(config)))


def from_dict(schema: type, values: dict) -> Any:
    """The dataclass `schema` from plain nested dictionaries (`dataclasses.asdict` undone); unknown keys raise ValueError."""
    fields = {f.name: f for f in dataclasses.fields(schema)}
    if unknown := sorted(set(values) - set(fields)):
        raise ValueError(f"{schema.__name__} has no field {unknown[0]!r}; it has {sorted(fields)}")
    sections = {
        name: type(section)
        for name, f in fields.items()
        if f.default_factory is not dataclasses.MISSING and dataclasses.is_dataclass(section := f.default_factory())
    }
    for name, value in values.items():
        if (name in sections) != isinstance(value, dict):
            expected = "a section" if name in sections else "a value"
            raise ValueError(f"{schema.__name__}.{name}: expected {expected}, got {value!r}")
    return schema(**{k: from_dict(sections[k], v) if k in sections else v for k, v in values.items()})


def differing_keys(a: Any, b: Any, prefix: str = "") -> list[str]:
    """`key: value in a -> value in b` for each leaf in which two configurations of one class differ."""
    rows = []
    for f in dataclasses.fields(a):
        x, y = getattr(a, f.name), getattr(b, f.name)
        if dataclasses.is_dataclass(x):
            rows += differing_keys(x, y, f"{prefix}{f.name}.")
        elif x != y:
            rows.append(f"{prefix}{f.name}: {x!r} -> {y!r}")
    return rows


@dataclass
class Row:
    key: str
    type: str
    default: Any
    help: str


def describe(schema: type = Config, prefix: str = "", defaults: Any = None) -> list[Row]:
    """One row for each leaf key: dotted name, type, default and meaning."""
    defaults = schema() if defaults is None else defaults
    rows = []
    for f in dataclasses.fields(schema):
        value = getattr(defaults, f.name)
        if dataclasses.is_dataclass(value):
            rows += describe(type(value), f"{prefix}{f.name}.", value)
            continue
        choices = f.metadata.get("choices")
        help_text = f.metadata["help"] + (f" [{' | '.join('null' if c is None else str(c) for c in choices)}]" if choices else "")
        rows.append(Row(f"{prefix}{f.name}", str(f.type), value, help_text))
    return rows
