"""Read a recipe's configuration with or without OmegaConf."""

import importlib.util
from pathlib import Path

from dae.config import Config, from_dict, load_config

CONFIGS = Path(__file__).parents[1] / "recipes" / "configs"


def read_config(path: str | Path, overrides: list[str]) -> Config:
    """Read a recipe's YAML file with `a.b=c` overrides; without OmegaConf fewer checks are made.

    Raises:
        FileNotFoundError: no such file.
        ValueError: an unknown key, or invalid YAML.
    """
    if importlib.util.find_spec("omegaconf"):
        return load_config(path, overrides)
    import yaml

    try:
        values = yaml.safe_load(Path(path).read_text())
        for text in overrides:
            key, equals, value = text.partition("=")
            if not equals:
                raise ValueError(f"expected an override `key=value`, got {text!r}")
            *sections, name = key.split(".")
            section = values
            for part in sections:
                section = section.setdefault(part, {})
            section[name] = yaml.safe_load(value)
        return from_dict(Config, values)
    except (yaml.YAMLError, AttributeError, TypeError) as error:
        raise ValueError(f"{path} with {overrides}: {' '.join(str(error).split())}") from error
