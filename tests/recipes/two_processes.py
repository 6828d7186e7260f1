"""Recipes one after another in the processes that torchrun started: `two_processes.py jobs.json`.

The file lists [recipe, configuration file, overrides]. One launch for several recipes, because most of a launch is imports.
"""

import importlib.util
import json
import sys
from pathlib import Path

from accelerate import Accelerator

from dae.config import load_config
from dae.training import end_training

RECIPES = Path(__file__).parents[2] / "recipes"

if __name__ == "__main__":
    for name, path, overrides in json.loads(Path(sys.argv[1]).read_text()):
        spec = importlib.util.spec_from_file_location(name, RECIPES / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        module.end_training = lambda accelerator: None  # it would close the process group
        getattr(module, "train" if name.startswith("train") else name)(load_config(path, overrides))
    end_training(Accelerator())
