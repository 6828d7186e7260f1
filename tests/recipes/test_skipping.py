"""A run over images of which some cannot be decoded: stopped anywhere and resumed it ends as if nothing had happened."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

SMALL = ("data.channels=3", "data.max_skipped=9", "stage1.max_train_steps=6", "stage2.max_train_steps=4", "checkpointing_steps=3")
SMALL += ("data.validation_size=9", "data.shuffle_buffer_size=8")
BAD = ("a/0.png", "b/1.png", "c/50.png")


@pytest.fixture(scope="module")
def spoiled(image_folder, tmp_path_factory):
    root = Path(shutil.copytree(image_folder, tmp_path_factory.mktemp("spoiled") / "set"))
    for name in BAD:
        file = root / name
        file.write_bytes(file.read_bytes()[:-60])
    return root


class Killed(BaseException):
    pass


@pytest.fixture
def kill_at(monkeypatch):
    """`kill_at(n)`: the next recipe dies before its n-th update, once."""

    def arm(updates):
        left = iter(range(updates))

        def step(self, *args, original=torch.optim.AdamW.step, **kwargs):
            if next(left, None) is None:
                monkeypatch.undo()
                raise Killed
            return original(self, *args, **kwargs)

        monkeypatch.setattr(torch.optim.AdamW, "step", step)

    return arm


def listed(folder):
    lines = map(json.loads, (folder / "skipped.jsonl").read_text().splitlines())
    return {(Path(line["path"]).parent.name + "/" + Path(line["path"]).name, line["row"], line["reason"]) for line in lines}


@pytest.mark.parametrize("streaming", ["false", "true"])
def test_killed_and_resumed(spoiled, tmp_path, run, kill_at, history, streaming, capsys):
    settings = (*SMALL, f"data.dataset_name={spoiled}", f"data.streaming={streaming}", "data.on_error=skip")
    workers = "data.num_workers=0" if streaming == "true" else "data.num_workers=1"  # a stream must keep its number
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    run("train_dae", whole, *settings)
    assert "that cannot be decoded w" in capsys.readouterr().out
    kill_at(5)
    with pytest.raises(Killed):
        run("train_dae", broken, *settings)
    run("train_dae", broken, *settings, workers, "resume_from_checkpoint=latest")
    names = [str(path.relative_to(whole)) for path in whole.rglob("*.safetensors")]
    assert len(names) > 4
    for name in names:
        a, b = load_file(whole / name), load_file(broken / name)
        assert [key for key, value in a.items() if not torch.equal(value, b[key])] == [], name
    assert history(whole / "autoencoder") == history(broken / "autoencoder")
    assert listed(whole) == listed(broken) and {name for name, *_ in listed(whole)} <= set(BAD)


def test_what_raised_is_resumed_with_skip_and_encode_says_what_it_leaves_out(spoiled, tmp_path, run, capsys):
    settings = (*SMALL, f"data.dataset_name={spoiled}")
    with pytest.raises(ValueError, match=r"\.png\): cannot decode.*data\.on_error=skip"):
        run("train_dae", tmp_path, *settings)
    run("train_dae", tmp_path, *settings, "data.on_error=skip", "resume_from_checkpoint=latest")
    capsys.readouterr()
    run("encode", tmp_path, *settings, "data.on_error=skip", "data.num_workers=1")
    said = capsys.readouterr().out
    train, held_out = map(int, re.search(r"(\d+) training and (\d+) held-out images;", said).groups())
    assert train + held_out == 96 - len(BAD) and f"3 rows that cannot be decoded were left out ({tmp_path}" in said
    assert {name for name, *_ in listed(tmp_path)} == set(BAD)


DRIVER = """
import multiprocessing, os, runpy, signal, sys, threading, time
checkpoint, *sys.argv = sys.argv[1:]
def kill():
    while not os.path.exists(checkpoint):
        time.sleep(0.05)
    os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
threading.Thread(target=kill, daemon=True).start()
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_a_dead_worker_is_one_line(tiny, spoiled, tmp_path):
    """torch's signal handler raises wherever the main process is."""
    recipe = str(Path(__file__).parents[2] / "recipes" / "train_dae.py")
    arguments = [str(tmp_path / "autoencoder" / "checkpoint-3"), recipe, *tiny, *SMALL, f"output_dir={tmp_path}"]
    arguments += [f"data.dataset_name={spoiled}", "data.on_error=skip", "data.num_workers=1", "stage1.max_train_steps=3000"]
    done = subprocess.run([sys.executable, "-c", DRIVER, *arguments], capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr[-3000:]
    last = done.stderr.replace("\r", "\n").strip().splitlines()[-1]
    assert last.startswith("train_dae.py: error: DataLoader worker") and "lower data.num_workers" in last
