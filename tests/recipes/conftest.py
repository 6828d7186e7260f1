"""Recipes called as functions, on chains so small that one trains in seconds."""

import functools
import importlib.util
import io
import json
import os
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from dae.config import load_config
from dae.hub import PretrainedModel
from dae.models import Autoencoder

RECIPES = Path(__file__).parents[2] / "recipes"
FUNCTIONS = {"train_dae": "train", "train_prior": "train"}  # of the other recipes it has the recipe's name
TINY = Path(__file__).with_name("tiny.yaml")


@functools.cache
def load_recipe(name):
    spec = importlib.util.spec_from_file_location(f"recipe_{name}", RECIPES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Page(HTMLParser):
    """Fails where tags do not close in order; collects tags with their attributes, and words."""

    def __init__(self, html):
        super().__init__()
        self.html, self.open, self.tags, self.texts = html, [], [], []
        self.feed(html)
        self.close()
        assert self.open == []
        self.words = "".join(self.texts)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)

    def values(self, tag, attribute):
        return [a[attribute] for t, a in self.tags if t == tag and attribute in a]


def make_config(output_dir, *overrides):
    return load_config(TINY, [f"output_dir={output_dir}", *overrides])


def call(name, output_dir, *overrides):
    """Run a recipe in this process, as its script does."""
    return getattr(load_recipe(name), FUNCTIONS.get(name, name))(make_config(output_dir, *overrides))


# Test modules cannot import each other under --import-mode=importlib, so helpers come as fixtures.
@pytest.fixture(scope="session")
def recipe():
    return load_recipe


@pytest.fixture(scope="session")
def configure():
    return make_config


@pytest.fixture(scope="session")
def tiny():
    """Arguments of a script."""
    return ["--config", str(TINY)]


@pytest.fixture(scope="session")
def read_page():
    """`read_page(path)`: .html, .words, .tags, .values(tag, attribute) of a page whose tags close in order."""
    return lambda path: Page(Path(path).read_text())


@pytest.fixture
def run():
    return call


class Killed(BaseException):
    """The power cable. No handler of errors may catch it."""


@pytest.fixture
def kill(monkeypatch):
    """`kill(before_update=n)` or `kill(saving=folder)`: the next recipe dies there, once."""

    def arm(before_update=None, saving=None):
        if before_update is not None:
            count = iter(range(before_update))

            def step(self, *args, original=torch.optim.AdamW.step, **kwargs):
                if next(count, None) is None:
                    monkeypatch.undo()
                    raise Killed
                return original(self, *args, **kwargs)

            monkeypatch.setattr(torch.optim.AdamW, "step", step)
        else:

            def save(self, folder, *args, original=PretrainedModel.save_pretrained, **kwargs):
                if Path(folder).name == saving:
                    monkeypatch.undo()
                    raise Killed
                return original(self, folder, *args, **kwargs)

            monkeypatch.setattr(PretrainedModel, "save_pretrained", save)

    arm.Killed = Killed
    return arm


@pytest.fixture(autouse=True)
def fresh_accelerate():
    """Accelerate remembers the first Accelerator of a process; a test must not see that of the one before."""
    from accelerate.state import AcceleratorState, GradientState

    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """Files that `datasets` converts go to a folder of the test run."""
    import datasets

    datasets.disable_progress_bars()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def made_once(tmp_path_factory):
    """`made_once(name, recipes, *overrides)`: a folder that these recipes filled, once for all workers of pytest-xdist."""

    def make(name, recipes, *overrides):
        from filelock import FileLock

        root = tmp_path_factory.getbasetemp()
        root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root
        folder = root / name / "run"
        with FileLock(root / f"{name}.lock"):
            if not (root / f"{name}.done").exists():
                shutil.rmtree(folder, ignore_errors=True)
                for each in recipes:
                    call(each, folder, *overrides)
                (root / f"{name}.done").touch()
        return folder

    return make


@pytest.fixture(scope="session")
def chain(made_once):
    """The folder of a whole chain on the digits. For reading only: `copied_chain` is for tests that change something."""
    return made_once("chain", ("train_dae", "encode", "train_prior", "sample", "evaluate", "report"))


@pytest.fixture
def copied_chain(chain, tmp_path):
    return Path(shutil.copytree(chain, tmp_path / "copy"))


@pytest.fixture(scope="session")
def script():
    """`script(name, *arguments)`: a recipe as its own process; `limit_bytes` is the size that no file may exceed."""

    def start(name, *arguments, launcher=(sys.executable,), limit_bytes=None, **environment):
        def limit():
            import resource

            resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, limit_bytes))

        return subprocess.run(
            [*launcher, str(RECIPES / f"{name}.py"), *arguments],
            capture_output=True, text=True, cwd=RECIPES.parent,
            env=os.environ | {"OMP_NUM_THREADS": "1"} | environment, preexec_fn=limit if limit_bytes else None,
        )  # fmt: skip

    return start


@pytest.fixture(scope="session")
def history():
    """Rows of a log, without the clock."""

    def read(folder):
        rows = [json.loads(line) for line in (Path(folder) / "logs" / "history.jsonl").read_text().splitlines()]
        return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]

    return read


@pytest.fixture(scope="session")
def contents():
    """Bytes of every file below a folder, by relative path."""

    def read(folder):
        return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file()}

    return read


@pytest.fixture(scope="session")
def picture():
    """`picture(seed, width, height)`: PNG of random colours, smooth enough to learn something from."""

    def draw(seed, width, height):
        coarse = np.random.default_rng(seed).integers(0, 256, (3, 3, 3), dtype=np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(coarse).resize((width, height), Image.Resampling.BILINEAR).save(buffer, "PNG")
        return buffer.getvalue()

    return draw


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory, picture):
    """RGB pictures of several shapes in one folder a class: 3 classes of 32."""
    root = tmp_path_factory.mktemp("pictures")
    for number in range(96):
        folder = root / "abc"[number % 3]
        folder.mkdir(exist_ok=True)
        (folder / f"{number}.png").write_bytes(picture(number, 16 + number % 5, 20 - number % 3))
    return root


@pytest.fixture(scope="session")
def same_log():
    """Two logs have the same rows; their numbers differ by the relative tolerance of the split at most.

    What is measured on held-out images moves in steps, image by image, where a latent lies between two codes.
    """

    def compare(rows, others, train=1e-4, validation=1e-4):
        assert [(r["step"], r["stage"], r["split"]) for r in rows] == [(r["step"], r["stage"], r["split"]) for r in others]
        for row, other in zip(rows, others, strict=True):
            measured = [key for key, value in row.items() if isinstance(value, float)]
            keys = (
                ["loss", "lr"] if row["split"] == "train" else measured
            )  # the rest of a training row is of its last batch alone
            tolerance = {"train": train, "validation": validation}[row["split"]]
            assert keys and [other[key] for key in keys] == pytest.approx([row[key] for key in keys], rel=tolerance), (row, other)

    return compare


@pytest.fixture(scope="session")
def assert_frozen():
    """`assert_frozen(folder, steps)`: the latent of these checkpoints of stage 2 is that of the switch, bit by bit."""

    def check(folder, steps):
        switch = load_file(folder / "stage1" / "model.safetensors")
        latent = {key: value for key, value in switch.items() if not key.startswith("decoder.")}
        assert {"encoder.conv_in.weight", "encoder.conv_out.bias"} <= latent.keys()
        weights = [load_file(folder / f"checkpoint-{step}" / "model.safetensors") for step in steps]
        for later in (*weights, load_file(folder / "model.safetensors")):
            assert {key for key in later if not key.startswith("decoder.")} == latent.keys()
            assert [key for key, value in latent.items() if not torch.equal(later[key], value)] == []
        assert not torch.equal(weights[0]["decoder.conv_in.weight"], weights[-1]["decoder.conv_in.weight"])
        first, last = (Autoencoder.from_pretrained(path) for path in (folder / "stage1", folder))
        generator = torch.Generator().manual_seed(0)
        images = torch.rand(64, first.image_channels, first.resolution, first.resolution, generator=generator) * 2 - 1
        with torch.no_grad():
            first, last = first.encode(images), last.encode(images)
        assert torch.equal(first.latents, last.latents)
        assert (first.indices is None and last.indices is None) or torch.equal(first.indices, last.indices)

    return check
