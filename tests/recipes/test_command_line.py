"""The recipes as processes: exit codes, and the last line that a user reads."""

import json
import runpy
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

RECIPES = Path(__file__).parents[2] / "recipes"


def last_line(done):
    return done.stderr.strip().splitlines()[-1]


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("train_dae", ["stage1.learning_rte=1"], ["unknown key 'stage1.learning_rte'", "'stage1.learning_rate'"]),
        ("train_dae", ["--plan", "H1000"], ["--plan: unknown GPU 'H1000'", "expected one of A10, ", "did you mean H100?"]),
        ("train_prior", ["--plan", "abacus"], ["--plan: unknown GPU 'abacus'", "no name for this machine"]),
        ("encode", ["data.resolution=eight"], ["wrong type at data.resolution", "eight"]),
        ("train_prior", ["--config", "/nowhere.yaml"], ["no configuration file '/nowhere.yaml'"]),
        ("sample", ["output_dir=/nowhere/run"], ["/nowhere/run/autoencoder", "recipes/train_dae.py"]),
        ("evaluate", ["method=dea"], ["method: expected one of", "'dea'", "did you mean 'dae'?"]),
        ("report", ["output_dir=/nowhere/run"], ["/nowhere/run/samples/samples.npz", "recipes/sample.py"]),
    ],
)  # fmt: skip
def test_user_error_is_one_line(tmp_path, monkeypatch, capsys, name, arguments, words):
    monkeypatch.setattr(sys, "argv", [str(RECIPES / f"{name}.py"), f"output_dir={tmp_path / 'run'}", *arguments])
    monkeypatch.delenv("DAE_TRACEBACK", raising=False)
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(sys.argv[0], run_name="__main__")
    assert caught.value.code == 2
    shown = capsys.readouterr().err
    assert shown.startswith(f"{name}.py: error: ") and shown.count("\n") == 1 and all(word in shown for word in words), shown
    assert not (tmp_path / "run").exists()


def test_exit_code_and_help(script):
    done = script("train_dae", "stage1.learning_rte=1")
    assert done.returncode == 2 and done.stdout == ""
    assert last_line(done).startswith("train_dae.py: error: ") and "'stage1.learning_rate'" in last_line(done)
    shown = script("sample", "--help").stdout
    assert "DAE_TRACEBACK=1" in shown and "sampling.cfg_scale" in shown


@pytest.mark.slow
def test_file_size_limit_then_resume(tmp_path, script, run, tiny):
    """The real thing instead of a patched fsync: the kernel refuses to write more than so many bytes into a file."""
    options = [*tiny, f"output_dir={tmp_path}"]
    done = script("train_dae", *options, limit_bytes=20_000)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    line = last_line(done)
    assert (
        "could not save" in line and str(tmp_path / "autoencoder") in line and "free space or choose another output_dir" in line
    )
    assert not list(tmp_path.rglob(".*")) and not list(tmp_path.rglob("checkpoint-*"))
    run("train_dae", tmp_path, "resume_from_checkpoint=latest")
    assert load_file(tmp_path / "autoencoder" / "model.safetensors")


@pytest.mark.slow
def test_every_process_says_why(tmp_path, script, tiny):
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    done = script("train_dae", *tiny, f"output_dir={tmp_path / 'run'}", "stage1.train_batch_size=1000", launcher=launcher)
    assert done.returncode != 0 and not (tmp_path / "run").exists()
    assert "train_dae.py: error in process 0 of 2: the training set has 1437 rows" in done.stderr
    assert "2000" in done.stderr and "process 1 of 2" in done.stderr


def test_log_is_valid_json(chain):
    for line in (chain / "prior" / "logs" / "history.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
