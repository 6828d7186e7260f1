"""Read a configuration from YAML, `a.b=c` overrides or dictionaries, check it, compare it and write it."""

from __future__ import annotations

import copy
import dataclasses
import difflib
import fnmatch
import functools
import glob
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

from dae.config.knobs import BOUNDS, leaves, sections
from dae.config.presets import PRESETS
from dae.config.schema import Config

log = logging.getLogger(__name__)

# Earlier key to today's, in the same section; files, overrides, saved models and checkpoints may hold the earlier one.
_announced: set[str] = set()  # earlier keys that were warned of
RENAMED = {"prior.augmented_copies": "prior.num_augmentations", "kernels.perceptual_tap": "kernels.lpips"}


def load_config(path: str | Path | None = None, overrides: list[str] | tuple = ()) -> Config:
    """Defaults, then the preset that a later layer names, then the YAML file, then `a.b=c` overrides.

    Checked for names, types, choices and bounds.

    Knobs of type str take the text literally: `output_dir=2024_01_15` and `0123` are not numbers, `#` does not start a comment
    in an override, and quotes around a whole override are removed. `~` at the start of a path is the home directory.

    Raises:
        FileNotFoundError: the file does not exist; the message suggests the nearest name.
        ValueError: an unknown key (the message names the nearest one), a wrong type, or a value that is not allowed.
    """
    layers = []
    if path is not None:
        path = Path(path).expanduser()
        if not path.is_file():
            raise FileNotFoundError(f"no configuration file {str(path)!r}{nearest_sibling(path)}")
        layers.append((str(path), _read_yaml(path)))
    loaded = _merge(Config, layers + _parsed(overrides))
    if loaded.push_to_hub and not loaded.hub_model_id:  # would fail only after training
        raise ValueError("push_to_hub=true needs hub_model_id=<user>/<name>")
    return loaded


def with_overrides(config: Config, overrides: list[str] | tuple) -> Config:
    """A copy of `config` with `a.b=c` overrides, checked as by `load_config`. ValueError: as there."""
    return _merge(config, _parsed(overrides))


def nearest_sibling(path: Path) -> str:
    """Hint for a missing `path`: `; did you mean '<path>'?` with the nearest name in its folder, or an empty string.

    If its folder is missing too, the first missing part is compared.
    """
    missing = path
    while missing.parent != missing and not missing.parent.is_dir():
        missing = missing.parent
    try:
        names = sorted(entry.name for entry in missing.parent.iterdir())
    except OSError:
        return ""
    near = difflib.get_close_matches(missing.name, names, 1)
    return f"; did you mean {str(missing.with_name(near[0]))!r}?" if near else ""


def _read_yaml(path: Path) -> Any:
    from omegaconf import OmegaConf

    try:
        layer = OmegaConf.load(path)
        text = path.read_text(encoding="utf-8")
        texts, verbatim = yaml_texts(text), yaml_texts(text, null=False)
    except Exception as error:  # errors of PyYAML and OmegaConf share no public base class
        raise ValueError(f"{path} is not valid YAML: {error}") from error
    for key, type_ in _text_knobs().items():
        value, written = _look_up(texts, key), _look_up(verbatim, key)
        if isinstance(value, list):
            value = written  # in a list of strings `null` is a name
        elif value is None and isinstance(written, str) and type_ == "str":
            raise ValueError(f"{path}: {key}: expected text, got {written or 'nothing'}, which is null in YAML: put it in quotes")
        if isinstance(value, str) or (isinstance(value, list) and all(isinstance(each, str) for each in value)):
            OmegaConf.update(layer, key, [value] if type_ == "List[str]" and isinstance(value, str) else value)
    return layer


def _look_up(tree: Any, key: str) -> Any:
    for part in key.split("."):
        tree = tree.get(part) if isinstance(tree, dict) else None
    return tree


def _parsed(overrides: list[str] | tuple) -> list[tuple[str, Any]]:
    from omegaconf import OmegaConf

    layers, text_knobs = [], _text_knobs()
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or override.startswith("-"):
            raise ValueError(f"expected an override `key=value`, got {override!r}")
        try:
            if (type_ := text_knobs.get(key)) is not None:
                layer = OmegaConf.create()
                OmegaConf.update(layer, key, _as_text(value, type_))
            else:
                layer = OmegaConf.from_dotlist([override])
        except Exception as error:  # as in _read_yaml
            raise ValueError(f"override {override!r} cannot be parsed: {str(error).splitlines()[0]}") from error
        layers.append((f"override {override!r}", layer))
    return layers


@functools.cache
def _text_knobs() -> dict[str, str]:
    """Types of the string knobs, by key."""
    types = {row.key: row.type for row in describe() if row.type in ("str", "Optional[str]", "List[str]")}
    return types | {old: types[new] for old, new in RENAMED.items() if new in types}


def _as_text(value: str, type_: str) -> str | list[str] | None:
    """Parse an override of a string knob; a list is `[a, b]` as in YAML, or its only element."""
    if type_ == "List[str]" and value.startswith("["):
        return yaml_texts(value, null=False)
    if value == "" and type_ == "List[str]":
        return []
    if type_ == "Optional[str]" and value in ("", "null"):
        return None
    text = value[1:-1] if len(value) > 1 and value[0] == value[-1] and value[0] in "'\"" else value
    return [text] if type_ == "List[str]" else text


def yaml_texts(text: str, null: bool = True) -> Any:
    """Parse YAML with every scalar as literal text, except merge keys and, with `null`, null."""
    import yaml

    kept = ("tag:yaml.org,2002:merge", *["tag:yaml.org,2002:null"] * null)
    resolvers = {first: [r for r in each if r[0] in kept] for first, each in yaml.SafeLoader.yaml_implicit_resolvers.items()}
    loader = type("TextLoader", (yaml.SafeLoader,), {"yaml_implicit_resolvers": resolvers})
    return yaml.load(text, Loader=loader)


@functools.cache
def _defaults() -> Any:
    from omegaconf import OmegaConf

    return OmegaConf.structured(Config)  # five times slower than copying it


def _merge(base: Any, layers: list[tuple[str, Any]]) -> Config:
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    config, source = copy.deepcopy(_defaults()) if base is Config else OmegaConf.structured(base), "defaults"
    for source, layer in _preset(layers) + layers:
        if not OmegaConf.is_dict(layer):
            raise ValueError(f"{source}: expected `key: value` pairs at the top level")
        _rename_keys(layer, source)
        _reject_unknown_keys(layer, Config, source)
        try:
            config.merge_with(layer)
        except OmegaConfBaseException as error:
            key = getattr(error, "full_key", None) or "?"
            raise ValueError(f"{source}: wrong type at {key}: {str(error).splitlines()[0]}") from error
    try:
        loaded = cast(Config, OmegaConf.to_object(config))
    except OmegaConfBaseException as error:
        raise ValueError(f"{source}: {str(error).splitlines()[0]}") from error
    _reject_wrong_values(loaded)
    _expand_home(loaded)
    _reject_output_inside_input(loaded)
    return loaded


def _preset(layers: list[tuple[str, Any]]) -> list[tuple[str, Any]]:
    """The layer below all others: the values of the preset that the last of them names. A wrong name is an error of its knob."""
    from omegaconf import OmegaConf

    given = [(source, cast(dict, OmegaConf.to_container(layer))) for source, layer in layers if OmegaConf.is_dict(layer)]
    inner: list[Any] = [values.get("autoencoder") for _, values in given]
    naming = [i for i, section in enumerate(inner) if isinstance(section, dict) and "preset" in section]
    if not naming or not isinstance(name := inner[naming[-1]]["preset"], str) or name not in PRESETS:
        return []
    values = {"autoencoder": PRESETS[name].values}
    for below, layer in given[: naming[-1]]:
        if others := [key for key in _keys(values) if _look_up(layer, key) not in (None, _look_up(values, key))]:
            log.warning(
                "%s: %s has other values and keeps them: %s; for the whole preset take a file without them",
                given[naming[-1]][0], below, ", ".join(others),
            )  # fmt: skip
    return [(f"autoencoder.preset={name}", OmegaConf.create(values))]


def _keys(tree: dict, prefix: str = "") -> Iterator[str]:
    """Dotted keys of all values."""
    for key, value in tree.items():
        yield from _keys(value, f"{prefix}{key}.") if isinstance(value, dict) else [f"{prefix}{key}"]


def _rename_keys(layer: Any, source: str) -> None:
    """Rename keys of earlier versions in place, with a warning."""
    from omegaconf import OmegaConf

    for old, new in RENAMED.items():
        (section, _, name), today = old.rpartition("."), new.rpartition(".")[2]
        values = OmegaConf.select(layer, section) if section else layer
        if OmegaConf.is_dict(values) and name in values:
            if today in values:
                raise ValueError(f"{source}: {old!r} is the earlier name of {new!r}, which is given too: leave it out")
            if old not in _announced:  # once per process: a recipe reads the configurations of several runs
                _announced.add(old)
                log.warning("%s: %s is now called %s", source, old, new)
            values[today] = values._get_node(name)
            del values[name]


def _renamed_fields(schema: type) -> dict[str, str]:
    """A section's renamed fields: earlier name to today's."""
    knob_of = {leaf.key: leaf for leaf in leaves(Config())}
    return {
        old.rpartition(".")[2]: knob_of[new].field.name for old, new in RENAMED.items() if type(knob_of[new].section) is schema
    }


def _reject_unknown_keys(layer: Any, schema: type, source: str, prefix: str = "") -> None:
    names, inner = [f.name for f in dataclasses.fields(schema)], sections(schema)
    for key in map(str, layer):
        name = f"{prefix}{key}"
        if key not in names:
            here, everywhere = [*(prefix + each for each in names), *(row.key for row in describe(schema, prefix))], list(knobs())
            by_leaf = [known for known in everywhere if known.rsplit(".", 1)[-1] == key]
            near = by_leaf or difflib.get_close_matches(name, here + everywhere, 1, 0.0)
            likeness = [difflib.SequenceMatcher(None, known, name).ratio() for known in near]
            nearest = near[likeness.index(max(likeness))]
            elsewhere = prefix and not nearest.startswith(prefix)  # its section was found: then what the section has is said too
            has = f"; {prefix[:-1]} has {', '.join(names)}" if elsewhere else ""
            raise ValueError(f"{source}: unknown key {name!r}; the nearest one is {nearest!r}{has}")
        if key in inner:
            if not hasattr(value := layer._get_node(key), "keys"):
                raise ValueError(f"{source}: {name} is a section, expected `{name}.<key>`")
            _reject_unknown_keys(value, inner[key], source, f"{name}.")


LARGEST = (2 - 2**-23) * 2.0**127  # of float32, the models' dtype


def _reject_wrong_values(config: Config) -> None:
    for name, _, f, value, *_ in leaves(config):
        bounds, choices = f.metadata["bounds"], f.metadata["choices"]
        elements = value if isinstance(value, list) else [] if value is None else [value]
        for chosen in value if isinstance(value, list) else [value]:
            if choices and chosen not in choices:
                near = difflib.get_close_matches(str(chosen), map(str, choices), 1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise ValueError(f"{name}: expected one of {list(choices)}, got {chosen!r}{hint}")
        if any(isinstance(each, float) and not abs(each) <= LARGEST for each in elements):
            raise ValueError(f"{name}: expected a finite number of 32 bits, got {value!r}")
        if any(not BOUNDS[kind][1](each, bound) for each in elements for kind, bound in bounds.items()):
            expected = " and ".join(BOUNDS[kind][0].format(bound) for kind, bound in bounds.items())
            raise ValueError(f"{name}: expected {expected}, got {value!r}")
        if str(f.type) in ("str", "List[str]") and not all(isinstance(each, str) and each for each in elements):
            raise ValueError(f"{name}: expected text, got {value!r}")


def _expand_home(config: Config) -> None:
    for _, section, f, value, *_ in leaves(config):
        if f.metadata["path"] and value:
            expanded = [os.path.expanduser(each) for each in value] if isinstance(value, list) else os.path.expanduser(value)
            setattr(section, f.name, expanded)


def _reject_output_inside_input(config: Config) -> None:
    output, data = Path(config.output_dir).resolve(), config.data
    read = [("train_files", name) for name in data.train_files] or [("dataset_name", data.dataset_name)]
    for key, name in read + [("validation_files", name) for name in data.validation_files]:
        if _is_read_with(output, name):
            raise ValueError(
                f"output_dir={config.output_dir!r} lies in the folder of the images, data.{key}={name!r}: samples would become "
                "images of the data; choose an output_dir outside"
            )


IMAGES_WRITTEN = ("samples/grid.png", "samples/png/000000_class0.png", "measure/pictures-pca.png", "latent/map.png")


def _is_read_with(output: Path, name: str) -> bool:
    """Whether images written to `output` would be read as part of the folder or glob `name`."""
    path = Path(name)
    if path.exists() or not glob.has_magic(name):
        return path.is_dir() and path.resolve() in (output, *output.parents)
    pattern = Path(os.path.realpath(name)).parts
    pattern = pattern[: pattern.index("**")] if "**" in pattern else pattern
    pattern = tuple(glob.escape(part) if Path(*pattern[: i + 1]).exists() else part for i, part in enumerate(pattern))
    written = [(output / image).parts for image in IMAGES_WRITTEN]
    return any(len(pattern) <= len(parts) and all(map(fnmatch.fnmatchcase, parts, pattern)) for parts in written)


def save_config(config: Config, path: str | Path) -> None:
    """Write the resolved configuration as YAML; `load_config` of the file gives the same configuration."""
    from omegaconf import OmegaConf

    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")  # readers see the old file or the new one
    temporary.write_text(OmegaConf.to_yaml(OmegaConf.create(dataclasses.asdict(config))))
    os.replace(temporary, path)


def from_dict(schema: type, values: dict) -> Any:
    """Build the dataclass `schema` from nested dictionaries (inverse of `dataclasses.asdict`), also with earlier keys.

    ValueError: an unknown key, or a section where a value is expected.
    """
    names, inner, renamed = [f.name for f in dataclasses.fields(schema)], sections(schema), _renamed_fields(schema)
    values = {renamed.get(name, name): value for name, value in values.items()}
    if unknown := sorted(values.keys() - set(names)):
        raise ValueError(f"{schema.__name__} has no field {unknown[0]!r}; it has {sorted(names)}")
    for name, value in values.items():
        if (name in inner) != isinstance(value, dict):
            expected = "a section" if name in inner else "a value"
            raise ValueError(f"{schema.__name__}.{name}: expected {expected}, got {value!r}")
    return schema(**{name: from_dict(inner[name], value) if name in inner else value for name, value in values.items()})


class Difference(NamedTuple):
    """A knob that differs between two configurations."""

    key: str
    first: Any
    second: Any

    def __str__(self) -> str:
        return f"{self.key}: {self.first!r} -> {self.second!r}"


def config_differences(a: Any, b: Any, prefix: str = "") -> list[Difference]:
    """The knobs that differ between two configurations of one class."""
    pairs = zip(leaves(a, prefix), leaves(b, prefix), strict=True)
    return [Difference(x.key, x.value, y.value) for x, y in pairs if x.value != y.value]


@dataclass
class Row:
    """A row of `describe`; role, run and encoding as in `dae.config.knobs.knob`, after inheritance."""

    key: str
    type: str
    default: Any
    help: str
    role: str | None
    run: str | None
    encoding: str | None


def describe(schema: type = Config, prefix: str = "") -> list[Row]:
    """One row per knob: dotted name, type, default, meaning, role and run."""
    rows = []
    for key, _, f, value, role, run in leaves(schema(), prefix):
        choices = " | ".join("null" if choice is None else str(choice) for choice in f.metadata["choices"])
        help_text = f.metadata["help"] + (f" [{choices}]" if choices else "")
        rows.append(Row(key, str(f.type), value, help_text, role, run, f.metadata["encoding"]))
    return rows


@functools.cache
def knobs(schema: type = Config) -> dict[str, Row]:
    """The rows of `describe` by key."""
    return {row.key: row for row in describe(schema)}
