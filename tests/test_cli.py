"""Which errors are messages to the user, and which are bugs that must keep their traceback."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tqdm import tqdm

from dae import cli
from dae.config import Config
from dae.models import Autoencoder


def purpose(config):
    raise ValueError("too small: make it larger")


def elsewhere(config):
    Autoencoder(config.autoencoder, 1, 9)


def disk(config):
    Path("/nowhere/at/all").read_text()


def with_progress(config):
    bar = tqdm(range(3), desc="progress")
    next(iter(bar))
    raise ValueError("after one of three")


def arithmetic(config):
    return config.seed + None


def conversion(config):
    return int("many")


def library(config):
    torch.zeros(2, 3) @ torch.zeros(2, 3)


def memory(config):
    torch.empty(2**50)


def gpu_memory(config):
    raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2.00 GiB.")


def numpy_memory(config):
    np.empty(2**50, np.uint8)


def key(config):
    return {}["missing"]


@pytest.fixture
def from_command_line(monkeypatch):
    monkeypatch.setattr(sys, "argv", [str(Path(__file__)), "autoencoder.base_channels=8"])
    monkeypatch.delenv("DAE_TRACEBACK", raising=False)
    return lambda recipe: cli.main(recipe, "A recipe.")


@pytest.mark.parametrize(
    ("recipe", "words"),
    [(purpose, "too small: make it larger"), (elsewhere, "data.resolution=9 is not divisible"), (disk, "'/nowhere/at/all'")],
)
def test_messages(from_command_line, capsys, recipe, words):
    with pytest.raises(SystemExit) as caught:
        from_command_line(recipe)
    assert caught.value.code == 2
    shown = capsys.readouterr().err
    assert shown.startswith("test_cli.py: error: ") and words in shown and shown.count("\n") == 1


@pytest.mark.parametrize("recipe", [memory, gpu_memory, numpy_memory])
def test_memory_that_ran_out_is_no_bug(from_command_line, capsys, recipe):
    with pytest.raises(SystemExit) as caught:
        from_command_line(recipe)
    assert caught.value.code == 2
    shown = capsys.readouterr().err
    assert "allocate" in shown and "Memory ran out: lower train_batch_size" in shown and shown.count("\n") == 1


def test_interrupted(from_command_line, capsys):
    def interrupted(config):
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as caught:
        from_command_line(interrupted)
    assert caught.value.code == 130
    assert capsys.readouterr().err == "test_cli.py: interrupted; resume_from_checkpoint=latest continues a training\n"


def test_message_stands_below_the_progress_bar(from_command_line, capsys):
    with pytest.raises(SystemExit):
        from_command_line(with_progress)
    *_, bar, message = capsys.readouterr().err.splitlines()
    assert "progress" in bar and message == "test_cli.py: error: after one of three"


@pytest.mark.parametrize(
    ("recipe", "kind"), [(arithmetic, TypeError), (conversion, ValueError), (library, RuntimeError), (key, KeyError)]
)
def test_bugs(from_command_line, capsys, recipe, kind):
    with pytest.raises(kind):
        from_command_line(recipe)
    assert capsys.readouterr().err == ""


def test_traceback_on_request(from_command_line, monkeypatch):
    monkeypatch.setenv("DAE_TRACEBACK", "1")
    with pytest.raises(ValueError, match="too small"):
        from_command_line(purpose)


def test_process_is_named(from_command_line, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "3")
    with pytest.raises(SystemExit):
        from_command_line(purpose)
    assert "error in process 3 of 4: too small" in capsys.readouterr().err


def test_recipe_gets_the_configuration(from_command_line):
    seen = []
    from_command_line(seen.append)
    assert isinstance(seen[0], Config) and seen[0].autoencoder.base_channels == 8


def test_plan_instead_of_the_recipe(from_command_line, monkeypatch, capsys):
    def plan(config, gpu):
        return [f"{gpu or 'here'} {config.autoencoder.base_channels}", "second line"]

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", [str(Path(__file__)), *arguments])
        cli.main(arithmetic, "A recipe.", plan)
        return capsys.readouterr().out

    assert run("autoencoder.base_channels=8", "--plan") == run("--plan", "autoencoder.base_channels=8") == "here 8\nsecond line\n"
    assert run("--plan", "H100", "autoencoder.base_channels=16") == "H100 16\nsecond line\n"
    with pytest.raises(TypeError):
        run()
    monkeypatch.setenv("RANK", "1")
    assert run("--plan") == ""
