"""What a session on a GPU is made of: bars, parts and their commands, failing tests named at once, compilation beforehand.

The scripts run on a CPU at their smallest; lines that only a GPU would write are made up here.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dae.config import load_config

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("checks", "kernels", "step", "chain")
SCRIPT = ROOT / "profiling" / "gpu_session.sh"


@pytest.fixture
def module(monkeypatch):
    """`module(name)`: a script of profiling/ as a module."""
    monkeypatch.syspath_prepend(ROOT / "profiling")
    return importlib.import_module


def row(panel, impl, phase, ms, run="1", **more):
    op, shape, dtype = panel
    common = {"for_op": op, "shape": shape, "dtype": dtype, "impl": impl, "phase": phase, "status": "ok", "run": run}
    return common | {"ms": {"median": ms}, "gb_per_s": 100 / ms, "extra_bytes": 1} | more


def states(bars, rows):
    return {bar.name: (words, state) for bar, words, state in bars.judged(rows, bars.all_bars())}


def one(found, *parts):
    (result,) = [value for name, value in found.items() if all(part in name for part in parts)]
    return result


def test_bars_met_not_met_and_missing(module):
    bars = module("bars")
    norm, codes, entropy = bars.LARGE_NORM, bars.SEARCHES[64], bars.LARGE_ENTROPY
    rows = [
        row(norm, "copy", "forward", 1.0),
        row(norm, "triton", "forward", 1.25),  # 80 % of the copy
        row(norm, "triton", "backward", 2.0),  # 50 %
        row(norm, "compile", "forward", 1.85),  # 1.48 x
        row(codes, "triton, fast", "forward", 1.0),
        row(codes, "triton, exact", "forward", 1.25),
        row(codes, "flash-kmeans", "forward", 9.0) | {"status": "not run: TritonError: out of | resources", "ms": None},
        row(entropy, "triton", "both", 1.0),
        row(entropy, "Liger", "both", 2.0),
        row(entropy, "cut-cross-entropy", "forward", 9.0) | {"status": "not installed: cut_cross_entropy", "ms": None},
    ]
    found = states(bars, rows)
    assert one(found, "[8,128,256,256]", "forward: share") == ("80 %", "met")
    assert one(found, "[8,128,256,256]", "backward: share") == ("50 %", "not met")
    assert one(found, "[8,128,256,256]", "forward: speed beside torch.compile") == ("1.48 x", "not met")
    assert one(found, "exact", "D=64") == ("1.25 x", "met")  # the bar itself
    words, state = one(found, "D=64", "flash-kmeans")
    assert state == "not measured" and words == "flash-kmeans: not run: TritonError: out of / resources"
    assert one(found, "65,536", "Liger") == ("2 x", "met")
    assert one(found, "cut-cross-entropy") == ("cut-cross-entropy: not installed: cut_cross_entropy", "not measured")
    assert one(found, "sinkhorn")[1] == "not measured"
    assert sum(state == "met" for _, state in found.values()) == 3


def test_bars_are_ratios_of_one_run(module):
    """The last run that has both; two halves of two runs are no ratio."""
    bars = module("bars")
    fast, peer = "triton, fast", "flash-kmeans"
    first = [row(bars.SEARCHES[8], fast, "forward", 1.0, "1"), row(bars.SEARCHES[8], peer, "forward", 3.0, "1")]
    halves = [row(bars.SEARCHES[8], fast, "forward", 9.0, "2"), row(bars.SEARCHES[8], peer, "forward", 9.0, "3")]
    assert one(states(bars, first + halves), "D=8 ", "flash-kmeans") == ("3 x", "met")
    assert one(states(bars, halves), "D=8 ", "flash-kmeans")[1] == "not measured"
    other = [row((*bars.SEARCHES[8][:2], "float32"), case, "forward", 1.0) for case in (fast, peer)]
    assert one(states(bars, other), "D=8 ", "flash-kmeans")[1] == "not measured"


def test_bars_of_steps_checks_and_chains(module):
    bars = module("bars")
    times = {"ours, contiguous": 73.0, "ours, channels_last, compiled": 50.0, "diffusers, contiguous": 162.0}
    steps = [{"step": name, "ms": {"median": ms}, "peak_bytes": ms} for name, ms in times.items()]
    steps.append({"step": "diffusers, contiguous, compiled", "status": "not run: RuntimeError: no"})
    step = {"config": "imagenet256 mixed_precision=bf16", "steps": steps}
    exact = [
        {"family": family, "impl": "triton", "precision": "exact", "wrong": wrong}
        for family, wrong in zip(bars.FAMILIES, (0, 0, 2, 0), strict=True)
    ]
    ends = {"tests": 9, "passed": 8, "failed": 1, "skipped": 0, "interrupted": False}
    chain = [{"chain": "digits", "recipe": recipe, "status": 0} for recipe in bars.CHAINS["digits"]]
    chain += [{"chain": "photos-kl", "recipe": "train_dae", "status": 1}]
    host = [
        {"op": "mmd", "phase": "forward", "us": {"median": 70.0}, "beside_us": 14.0},
        {"op": "group_norm_silu", "phase": "forward", "us": {"median": 12.0}, "beside_us": 12.0},
        {"op": "group_norm_silu", "phase": "forward real", "us": {"median": 61.0}},
    ]
    found = states(bars, [step, *exact, ends, *chain, *host])
    assert one(found, "diffusers' blocks, eager", "speed") == ("3.24 x", "met")
    assert one(found, "under torch.compile")[1] == "not measured"
    assert one(found, "peak memory") == ("0.3086 x", "met")
    assert one(found, "VQGAN", "rate") == ("364 TFLOP/s", "met")  # 18.2 TFLOP in 50 ms
    assert one(found, "wrong code") == ("2", "not met")
    assert one(found, "tests of the kernels") == ("1", "not met")
    assert one(found, "digits") == ("0", "met") and one(found, "photos-kl") == ("1", "not met")
    (forward,) = [value for name, value in found.items() if name.endswith("slowest operation's, forward")]
    assert forward == ("14 us", "met")
    assert one(found, "slowest operation's, forward and backward")[1] == "not measured"
    assert one(found, "with its launches") == ("61 us", "not met")
    assert one(states(bars, exact[:3]), "wrong code") == ("no pairs", "not measured")
    assert one(states(bars, [ends | {"interrupted": True}]), "tests of") == ("cut off after 9 tests, 1 failed", "not measured")
    assert one(states(bars, [{"test": "a"}]), "tests of") == ("cut off, 1 had failed", "not measured")
    assert one(states(bars, chain[:2]), "digits") == ("not run: train_prior, sample", "not measured")


def test_summary_says_what_it_rests_on(module, tmp_path):
    bars = module("bars")
    file = tmp_path / "bench.jsonl"
    where = {"hardware": "a GPU", "versions": {"torch": "2.11.0", "pykeops": None}}
    lines = [json.dumps(row(bars.ENTROPY, case, "both", 1.0) | where) for case in ("triton", "linear + cross_entropy")]
    file.write_text("\n".join([*lines, '{"op": "cut o']))
    command = [sys.executable, str(ROOT / "profiling" / "bars.py"), str(file), str(tmp_path / "absent.jsonl")]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "Measured on a GPU; torch 2.11.0." in text and "1 lines could not be read." in text
    assert "| kernels | linear_cross_entropy N=8,192 V=16,384" in text and "| 1 x | <= 1.1 x | met |" in text
    assert "| 1 x | <= 0.25 x | not met |" in text
    assert re.search(r"^1 met, 1 not met, \d+ not measured\.$", text, re.MULTILINE)
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len(table) == 2 + len(list(bars.all_bars())) and all(line.count("|") == 6 for line in table)


def test_bars_stand_on_cases_that_exist(module):
    """Each panel's shape is one of its operation, and each case that a bar compares is one of the panel's."""
    bars, Panel = module("bars"), module("prepare").Panel
    text = (ROOT / "profiling" / "bars.py").read_text()
    compared = {"triton", "compile", "triton, fast", "triton, exact", "flash-kmeans", "product alone", "linear + cross_entropy"}
    compared |= {"Liger", "cut-cross-entropy", "flash-sinkhorn", "cached", "whole prefix"}
    assert all(f'"{name}"' in text or f'"{name}*"' in text for name in compared)
    names = set()
    for op, shape, dtype in bars.PANELS:
        small = {name: 64 if name == "width" else min(size, 32) for name, size in shape.items()}
        names |= {case.impl for case in Panel(op, small, dtype).cases(torch.device("cpu"))}
    assert compared <= names


def test_a_peer_that_computes_something_else_has_no_figure(module, monkeypatch):
    bench, Case = module("bench_kernels"), module("cases").Case
    x = torch.ones(4)
    cases = [
        Case("op", "reference", lambda: 2 * x),
        Case("op", "right", lambda: 2.1 * x, needs="json"),
        Case("op", "wrong", lambda: 3 * x, needs="json"),
        Case("op", "shaped", lambda: torch.ones(5), needs="json"),
        Case("op", "broken", lambda: {}["absent"], needs="json"),
        Case("op", "absent", lambda: x, needs="no_such_package"),
    ]
    monkeypatch.setattr(bench, "floors_of", lambda *_: iter(()))
    final = {row["impl"]: row for row, last in bench.measure(cases, torch.device("cpu"), 0.0) if last}
    assert final["reference"]["status"] == final["right"]["status"] == "ok"
    assert final["wrong"]["status"] == "not run: 5.0e-01 from the result of reference"
    assert final["shaped"]["status"] == "not run: other shapes than the result of reference"
    assert final["broken"]["status"] == "not run: KeyError: 'absent'"
    assert final["absent"]["status"] == "not installed: no_such_package"
    assert all(final[name]["ms"] is None for name in ("wrong", "shaped", "broken", "absent"))


def test_a_run_that_is_ended_before_the_turns_has_rows(module, monkeypatch):
    bench, Case = module("bench_kernels"), module("cases").Case

    def end():
        raise SystemExit(143)

    cases = [Case("op", "first", lambda: torch.ones(4)), Case("op", "slow", end)]
    monkeypatch.setattr(bench, "floors_of", lambda *_: iter(()))
    rows = []
    with pytest.raises(SystemExit):
        for pair in bench.measure(cases, torch.device("cpu"), 0.0):
            rows.append(pair)
    (last,) = [row for row, final in rows if final]
    assert last["impl"] == "first" and last["rounds"] == 0 and last["ms"]["median"] > 0


@pytest.mark.slow
def test_prepared_is_compiled(tmp_path):
    """After --prepare the measuring run compiles nothing: inductor's cache does not grow."""
    arguments = ["--op", "transformer_layers", "--shape", "B=2,L=4,C=64,swiglu=1", "--dtype", "float32"]
    command = [sys.executable, str(ROOT / "profiling" / "bench_kernels.py"), *arguments, "--device", "cpu", "--seconds", "0"]
    path = os.pathsep.join([str(ROOT / "kernels"), str(ROOT)])
    environment = os.environ | {"PYTHONPATH": path, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    common = {"capture_output": True, "text": True, "env": environment, "check": True}
    done = subprocess.run([*command, "--prepare", "--jobs", "2"], **common)
    (prepared, _) = done.stdout.splitlines()  # what is eager compiles nothing
    assert prepared.endswith("swiglu=1 float32: compile") and "prepared; 0 cases did not run" in done.stdout
    graphs = lambda: {file for file in (tmp_path / "cache").rglob("fxgraph/**/*") if file.is_file()}  # noqa: E731
    compiled = graphs()
    assert len(compiled) == 2  # forward and backward
    done = subprocess.run([*command, "--json", str(tmp_path / "out.jsonl")], **common)
    assert graphs() == compiled and "compile" in done.stdout
    done = subprocess.run([*command, "--no-compile"], **common)
    assert "compile" not in done.stdout.split("x floor")[1]


def test_absent_peers_are_named_once(tmp_path, module, monkeypatch, capsys):
    bench = module("bench_kernels")
    monkeypatch.setattr(module("cases"), "find_spec", lambda name: None)
    monkeypatch.setattr(bench, "floors_of", lambda *_: iter(()))
    shapes = ["--shape", "N=8,V=8,D=4", "--shape", "N=4,V=8,D=4", "--no-compile", "--seconds", "0", "--device", "cpu"]
    file = tmp_path / "out.jsonl"
    monkeypatch.setattr(sys, "argv", ["bench_kernels.py", "--op", "linear_cross_entropy", *shapes, "--json", str(file)])
    monkeypatch.setattr(bench.signal, "signal", lambda *_: None)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    bench.main()
    printed, rows = capsys.readouterr().out, [json.loads(text) for text in file.read_text().splitlines()]
    for name, package in (("Liger", "liger_kernel"), ("cut-cross-entropy", "cut_cross_entropy"), ("quack", "quack")):
        assert printed.count(f"not installed: {package}") == 1
        assert [row["status"] for row in rows if row["impl"] == name] == [f"not installed: {package}"] * 2
    assert not any("compile" in row["impl"] for row in rows)


def test_failing_tests_are_named_at_once(tmp_path):
    (tmp_path / "test_it.py").write_text(
        "import pytest, time\n"
        "def test_wrong(): assert 1 == 2, 'one | two'\n"
        "def test_right(): pass\n"
        "@pytest.mark.skip\n"
        "def test_left(): pass\n"
        "@pytest.fixture\n"
        "def broken(): raise ValueError('no')\n"
        "def test_set_up(broken): pass\n"
        "def test_last(): time.sleep(0)\n"
    )
    (tmp_path / "test_absent.py").write_text("import no_such_package\n")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "--tb=no",
        "-p",
        "failing_tests",
        "--failures",
        "failures.jsonl",
        "-p",
        "no:cacheprovider",
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "profiling")}
    command += ["--continue-on-collection-errors", "--rootdir", str(tmp_path), "."]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, check=False)
    assert done.returncode == 1
    rows = [json.loads(text) for text in (tmp_path / "failures.jsonl").read_text().splitlines()]
    assert [row.get("test", "").split("::")[-1] for row in rows] == ["test_absent.py", "test_wrong", "test_set_up", ""]
    assert rows[1]["message"].startswith("AssertionError: one | two")
    counts = {"tests": 5, "passed": 2, "failed": 3, "skipped": 1, "interrupted": False}
    assert rows[-1] == counts | {"seconds": rows[-1]["seconds"]}
    assert done.stdout.index("FAILED test_it.py::test_wrong: AssertionError") < done.stdout.index("short test summary")


def dry(*arguments, **environment):
    command = ["bash", str(SCRIPT), *arguments]
    environment = os.environ | {"PYTHON": sys.executable, "OUT": "out"} | environment
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, check=False)


def commands(*arguments):
    done = dry("--dry-run", *arguments)
    assert done.returncode == 0, done.stderr
    return [line for line in done.stdout.splitlines() if line and not line.startswith(("#", "===="))]


def test_dry_run_prints_each_part_and_runs_nothing(tmp_path):
    for part in PARTS:
        done = dry("--dry-run", part, OUT=str(tmp_path / "out"))
        assert done.returncode == 0 and f"==== {part}: 400 s at most" in done.stdout
        assert [line for line in done.stdout.splitlines() if line.startswith("====")] == [f"==== {part}: 400 s at most"]
    assert not (tmp_path / "out").exists()
    kernels, chain = commands("kernels"), commands("chain")
    assert "--bars --prepare" in kernels[1]  # what is compiled is compiled before anything is measured
    assert (
        next(line for line in kernels if "--json" in line and "bench_kernels" in line)
        .split("--op ")[1]
        .startswith("nearest_code")
    )
    launched = [line for line in chain if "accelerate.commands.launch" in line]
    assert len(launched) == 8 and sum("train_dae.py" in line for line in launched) == 2
    assert all(("compile=true" in line) == ("photos-kl" in line) for line in launched)


def test_session_refuses_what_it_does_not_know():
    done = dry("kernel")
    assert done.returncode == 2 and "[checks] [kernels] [step] [chain]; got 'kernel'" in done.stderr
    done = dry("--dry-run", "kernels", PART_SECONDS="4m")
    assert done.returncode == 2 and "expected whole seconds, got '4m'" in done.stderr
    if not torch.cuda.is_available():
        done = dry("kernels")
        assert done.returncode == 1 and "sees no CUDA device; --dry-run and --small need none" in done.stderr


def test_session_names_what_exists(module):
    """Files, flags and overrides of the commands, and every operation."""
    for line in commands():
        words = line.split()
        for name in re.findall(r"\b(?:profiling|tests|recipes)/[\w/-]+(?:\.(?:py|yaml))?", line):
            assert (ROOT / name).exists(), name
        for script in {word for word in words if re.fullmatch(r"profiling/\w+\.py", word)}:
            source = (ROOT / script).read_text() + (ROOT / "profiling" / "measuring.py").read_text()
            after = words[words.index(script) :]
            assert not [flag for flag in after if flag.startswith("--") and f'"{flag}"' not in source], line
        overrides = [word for word in words if re.fullmatch(r"[a-z_0-9.]+=\S+", word)]
        if configs := [word for word in words if word.startswith("recipes/configs/")]:
            load_config(ROOT / configs[0], overrides)
    operations = {path.stem for path in (ROOT / "profiling" / "bench").glob("*.py")}
    assert set(re.findall(r"--op (\w+)", "\n".join(commands("kernels")))) == operations
    assert {panel[0] for panel in module("bars").PANELS} <= operations


@pytest.mark.slow
def test_small_session_on_a_cpu(tmp_path):
    """The script itself: steps, their limits, JSON lines, summary."""
    done = dry("--small", "kernels", "checks", OUT=str(tmp_path / "out"), CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    summary = (tmp_path / "out" / "summary.md").read_text()
    assert "| checks | tests of the kernels on this device that fail | 0 | <= 0 | not judged |" in summary
    assert "Small sizes" in summary and "CPU" in summary and " met " not in summary
    assert "sliced_wasserstein, N = 32" in (tmp_path / "out" / "bench.md").read_text()
    done = dry("--small", "kernels", OUT=str(tmp_path / "out"), PART_SECONDS="1", CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 4 and "left out, the part's 1 s are used up" in done.stdout
