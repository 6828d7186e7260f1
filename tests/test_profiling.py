"""The measuring tools run on a CPU and say what they did; their figures are not judged here."""

from __future__ import annotations

import gzip
import importlib
import importlib.util
import json
import os
import runpy
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dae.config import load_config
from dae.models import Autoencoder
from dae.models.layers import Downsample, ResidualBlock
from dae.models.ldm import PaddedDownsample
from dae.planning.trainings import stage_training
from dae.training import plan_stages
from dae.training.autoencoder import build_autoencoder
from dae.training.engine import LocalEngine

ROOT = Path(__file__).resolve().parents[1]
FIELDS = {
    "op", "impl", "phase", "status", "note", "product", "flops", "bytes", "ms", "samples", "rounds", "run", "extra_bytes",
    "gb_per_s", "tflop_per_s", "floor_ms", "times_floor", "error", "shape", "dtype", "for_op", "time", "hardware", "threads",
    "versions", "command",
}  # fmt: skip


def run(script: str, *arguments: object, expected: int = 0, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "profiling" / script), *map(str, arguments)]
    path = os.pathsep.join([str(ROOT / "kernels"), str(ROOT)])
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path} | environment, check=False
    )
    assert done.returncode == expected, done.stderr[-3000:]
    return done


@pytest.fixture
def here(capfd, monkeypatch):
    """`here(script, ...).out` and `.err`: like `run`, in this process, which has torch already: for what measures nothing."""

    def call(script: str, *arguments: object, expected: int = 0) -> SimpleNamespace:
        with monkeypatch.context() as patch, pytest.raises(SystemExit) as exited:
            patch.setattr(sys, "argv", [script, *map(str, arguments)])
            patch.setattr(sys, "path", [str(ROOT / "profiling"), *sys.path])
            for name, value in os.environ.items():
                patch.setenv(name, value)  # and so restored
            runpy.run_path(str(ROOT / "profiling" / script), run_name="__main__")
        assert (exited.value.code or 0) == expected
        return SimpleNamespace(**capfd.readouterr()._asdict())

    return call


def cases(file: Path) -> list[dict]:
    return [json.loads(text) for text in file.read_text().splitlines()]


def test_benchmark_writes_every_field(tmp_path):
    arguments = ["--op", "nearest_code", "--shape", "N=64,K=32,D=8", "--dtype", "float32", "--seconds", 0.1, "--device", "cpu"]
    impls = ["reference", "triton", "product", "cdist", "vector", "keops"]
    wanted = [word for impl in impls for word in ("--impl", impl)]
    output = tmp_path / "out.jsonl"
    printed = run("bench_kernels.py", *arguments, *wanted, "--json", output, "--plot", tmp_path / "plots").stdout
    rows = cases(output)
    assert all(set(row) == FIELDS for row in rows)
    assert all(row["for_op"] == "nearest_code" and row["shape"] == {"N": 64, "K": 32, "D": 8} for row in rows)
    by_impl = {row["impl"]: row for row in rows}
    for impl in ("reference", "product + argmin", "cdist + argmin", "copy", "float32"):
        row = by_impl[impl]
        assert row["status"] == "ok" and row["phase"] == "forward"
        assert 0 < row["ms"]["p20"] <= row["ms"]["median"] <= row["ms"]["p80"]
        assert row["samples"] >= 3 and row["rounds"] >= 3 and row["floor_ms"] > 0 and row["times_floor"] > 0
    assert by_impl["cdist + argmin"]["error"] == by_impl["product + argmin"]["error"] == 0
    assert "cannot run" in by_impl["triton, exact"]["status"]  # also where the interpreter is on
    lines = printed.splitlines()
    alone = [number for number, text in enumerate(lines) if text.startswith("cdist + argmin") and text.endswith("alone")]
    assert len(alone) == 1 and any(text.startswith("reference") for text in lines[alone[0] :])  # before the turns
    assert {"triton, exact", "vector_quantize_pytorch", "keops"} < set(by_impl)  # nothing is left out in silence
    for row in rows:
        assert row["command"].startswith("python profiling/bench_kernels.py --op nearest_code")
        assert str(tmp_path) not in json.dumps(row)
        assert row["hardware"] in printed
    assert (tmp_path / "plots" / "nearest_code.png").stat().st_size > 1000

    table = run("bench_report.py", output).stdout
    assert "| cdist + argmin | forward |" in table and "### nearest_code, N = 64" in table
    run("bench_kernels.py", *arguments, "--impl", "reference", "--json", output)
    assert len(cases(output)) == len(rows) + 3  # appended: the reference and two floors


def test_benchmark_has_backward_and_memory(tmp_path):
    output = tmp_path / "out.jsonl"
    shape = ["--shape", "B=1,H=2,L=512,D=16", "--impl", "reference", "--impl", "sdpa"]
    run("bench_kernels.py", "--op", "attention", *shape, "--seconds", 0.1, "--device", "cpu", "--json", output)
    rows = {(row["impl"], row["phase"]): row for row in cases(output)}
    for impl in ("reference", "sdpa"):
        forward, backward, both = (rows[impl, phase] for phase in ("forward", "backward", "both"))
        assert max(forward["ms"]["median"], backward["ms"]["median"]) < both["ms"]["median"]
        assert both["flops"] == forward["flops"] + backward["flops"]
    # float32 rounding of either; the gradients are a few roundings longer
    assert rows["sdpa", "forward"]["error"] < 1e-5 and rows["sdpa", "backward"]["error"] < 1e-5
    if sys.platform == "linux":
        scores = 2 * 512 * 512 * 4  # bytes, which the reference writes and sdpa does not
        assert rows["reference", "both"]["extra_bytes"] > scores > rows["sdpa", "forward"]["extra_bytes"]


def test_benchmark_refuses_what_it_cannot_read(here):
    message = here("bench_kernels.py", "--shape", "N8", expected=2).err
    assert "expected N=8192,K=4096,D=64 or the like, got 'N8'" in message
    assert "expected sizes of at least 1, got 'N=0'" in here("bench_kernels.py", "--shape", "N=0", expected=2).err


def test_benchmark_refuses_a_shape_that_is_not_the_operations(here):
    """Before anything is measured, though the first operation could take it."""
    arguments = ["--op", "mmd", "--op", "sliced_wasserstein", "--shape", "N=128,M=100,D=3", "--device", "cpu"]
    done = here("bench_kernels.py", *arguments, expected=2)
    expected = "--shape of sliced_wasserstein needs N, M, D, L, as in N=2000,M=2000,D=16,L=64, got N=128,M=100,D=3 (missing: L)"
    assert expected in done.err and not done.out
    message = here("bench_kernels.py", "--op", "mmd", "--shape", "N=9,K=8,D=2,Z=1", "--device", "cpu", expected=2).err
    assert "got N=9,K=8,D=2,Z=1 (missing: M; unknown: K, Z)" in message


def test_module_of_an_operation_is_found_by_its_name(monkeypatch):
    """torch.compile imports the module of each function that it inlines."""
    monkeypatch.syspath_prepend(ROOT / "profiling")
    module = importlib.import_module("measuring").load_module(ROOT / "profiling" / "bench" / "vector_quantize.py")
    assert importlib.import_module(module.__name__) is module


def test_figures_show_points_with_their_quantiles(tmp_path, monkeypatch):
    """No bars: their axis is logarithmic, where a length from the left edge means nothing."""
    pyplot = pytest.importorskip("matplotlib.pyplot")
    monkeypatch.syspath_prepend(ROOT / "profiling")
    bench_report = importlib.import_module("bench_report")
    kept = []
    monkeypatch.setattr(pyplot, "close", kept.append)
    times = {"slow": (40.0, 50.0, 90.0), "fast": (1.0, 2.0, 2.5)}
    common = {"op": "mmd", "for_op": "mmd", "status": "ok", "shape": {"N": 8}, "dtype": "float32", "hardware": "CPU"}
    rows = [
        common | {"impl": impl, "phase": phase, "ms": dict(zip(("p20", "median", "p80"), three, strict=True))}
        for impl, three in times.items()
        for phase in ("forward", "backward", "both")
    ]
    bench_report.plot(rows, tmp_path)
    assert (tmp_path / "mmd.png").stat().st_size > 1000
    (figure,) = [each for each in kept if each != "all"]  # which matplotlib 3.9 asks for itself, before the first figure
    assert len(figure.axes) == 2  # forward and both
    for axis in figure.axes:
        assert axis.get_xscale() == "log" and not axis.patches
        names = [label.get_text() for label in axis.get_yticklabels()]
        (points, _, (ranges,)) = axis.containers[0]
        got = {
            name: (low, median, high)
            for name, median, ((low, _), (high, _)) in zip(names, points.get_xdata(), ranges.get_segments(), strict=True)
        }
        assert got == times


@pytest.mark.parametrize("impl, interpret", [("reference", "0"), ("triton", "1")])
def test_exactness(tmp_path, impl, interpret):
    output = tmp_path / "out.jsonl"
    arguments = ["--queries", 300, "--codes", 200, "--impl", impl, "--device", "cpu", "--json", output]
    run("exactness.py", *arguments, TRITON_INTERPRET=interpret)
    rows = cases(output)
    assert [row["family"] for row in rows] == ["random", "uniform", "normalized", "pairs"]
    assert all(row["queries"] == 300 and row["K"] == 200 and row["wrong"] == row["beyond_rounding"] == 0 for row in rows)


def test_exactness_sees_a_wrong_code():
    script = (
        "import sys, torch; sys.path.insert(0, sys.argv[1]); from exactness import judge\n"
        "x, codes = torch.eye(4), torch.cat([torch.eye(4), torch.eye(4)])\n"
        "for index in ([0, 1, 2, 3], [4, 5, 6, 7], [0, 1, 2, 0]): print(judge(x, codes, torch.tensor(index)))"
    )
    command = [sys.executable, "-c", script, str(ROOT / "profiling")]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    # Equal codes are no error; the last vector is |x|^2 + |c|^2 = 2 from a code across, so 2 |x| |c| too far.
    assert printed.splitlines() == ["(0, 0, 0.0)", "(0, 0, 0.0)", "(1, 1, 2.0)"]


@pytest.fixture
def clock(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "profiling")
    return importlib.import_module("clock")


PHOTOS = ROOT / "recipes" / "configs" / "photos.yaml"


TINY = [
    "data.resolution=16", "data.channels=3", "autoencoder.base_channels=8", "autoencoder.latent_channels=4",
    "stage1.train_batch_size=4", "stage2.train_batch_size=4", "prior.train_batch_size=4", "prior.width=16", "prior.depth=2",
    "prior.num_heads=2",
]  # fmt: skip


def test_profile_of_a_recipe(tmp_path):
    """Each stage and the prior, with a discriminator: tables, JSON, traces with the blocks in them, a picture."""
    output = tmp_path / "out.jsonl"
    overrides = ["stage2.loss.adversarial=0.1", "stage1.gradient_accumulation_steps=2", "stage1.gradient_checkpointing=true"]
    arguments = ["--config", ROOT / "tests" / "recipes" / "tiny.yaml", *overrides, "--steps", 3, "--device", "cpu"]
    done = run("profile_step.py", *arguments, "--output", tmp_path / "profile", "--json", output)
    one, two, prior = cases(output)
    assert [row["stage"] for row in (one, two, prior)] == ["stage1", "stage2", "prior"]
    assert one["batch"] == 32  # two micro-batches of 16
    for row in (one, two, prior):
        assert row["ms"]["p20"] <= row["ms"]["median"] <= row["ms"]["p80"]
        assert set(row["parts"]) == {"data", "forward", "backward", "update"} and min(row["parts"].values()) > 0
        assert row["peak_bytes"] > sum(row["state_bytes"].values()) > 0
        assert f"{row['stage']:<26}" in done.stdout
        with gzip.open(tmp_path / "profile" / f"trace_{row['stage']}.json.gz", "rt") as file:
            events = [event for event in json.load(file)["traceEvents"] if event.get("pid") == "training step"]
        assert {event["name"] for event in events if event["tid"] == "blocks"} == set(row["blocks"])
        phases = [event["name"] for event in events if event["tid"] == "phases"]
        assert phases[:3] == ["data", "forward", "backward"] and phases[-1] == "update"
    layers = ["encoder 8x8", "encoder 4x4", "encoder out", "decoder 4x4", "decoder 8x8", "decoder out", "losses"]
    assert all(one["blocks"][name].keys() == {"forward", "backward"} for name in layers)
    # Stage 2's encoder is frozen.
    assert [name for name in layers if two["blocks"][name].keys() == {"forward"}] == layers[:3]
    assert two["blocks"]["discriminator"].keys() == {"forward", "backward"}
    assert {"embedding", "attention", "MLP", "head and loss"} < prior["blocks"].keys()
    assert (tmp_path / "profile" / "profile.png").stat().st_size > 10000


def test_profile_runs_with_torch_alone(tmp_path):
    """As on a machine that is lent for an hour; also the picture's absence is said."""
    absent = {"omegaconf", "datasets", "accelerate", "matplotlib", "scipy", "sklearn", "safetensors", "huggingface_hub", "tqdm"}
    script = (
        "import runpy, sys\n"
        "class Absent:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name.split('.')[0] in {absent}: raise ModuleNotFoundError(name)\n"
        "import importlib.util\n"
        "found = importlib.util.find_spec\n"
        f"importlib.util.find_spec = lambda name, *rest: None if name in {absent} else found(name, *rest)\n"
        "sys.meta_path.insert(0, Absent())\n"
        "sys.argv = sys.argv[1:]\n"
        "sys.path.insert(0, sys.argv[0].rsplit('/', 1)[0])\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    profile = str(ROOT / "profiling" / "profile_step.py")
    command = [sys.executable, "-c", script, profile, "--output", str(tmp_path), "--steps", "1", "--synthetic"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT / "kernels"), str(ROOT)])}
    common = {"capture_output": True, "text": True, "env": environment, "check": False}
    done = subprocess.run([*command, "--config", str(PHOTOS), *TINY, "--stage", "stage1", "--device", "cpu"], **common)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "no profile.png: matplotlib is not installed" in done.stdout
    assert (tmp_path / "trace_stage1.json.gz").is_file()
    done = subprocess.run([*command, "--config", str(PHOTOS), "stage1.batch=3"], **common)
    assert done.returncode == 2 and "StageConfig has no field 'batch'" in done.stderr
    done = subprocess.run([*command, "--config", "x.yaml"], **common)
    assert done.returncode == 2 and "x.yaml" in done.stderr and "Traceback" not in done.stderr


def test_profile_refuses_what_it_does_not_know(clock, monkeypatch, capsys):
    def refusal(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["profile_step.py", "--config", str(PHOTOS), *arguments])
        with pytest.raises(SystemExit):
            importlib.import_module("profile_step").main()
        return capsys.readouterr().err

    assert "unknown key 'stage1.batch'; the nearest one is 'stage1.train_batch_size'" in refusal("stage1.batch=3")
    assert "--stage: expected one of joint, prior, got stage1" in refusal("method=joint", "--stage", "stage1")
    assert "--steps: expected at least 1, got 0" in refusal("--steps", "0")
    assert "a CUDA graph has no blocks to time: profile without cuda_graphs" in refusal("cuda_graphs=true")


class Slow(torch.autograd.Function):
    """The identity, which takes a while in each direction."""

    @staticmethod
    def forward(ctx, x):
        time.sleep(0.05)
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        time.sleep(0.1)
        return gradient


@pytest.mark.parametrize(
    "where, block",
    [("encoder.levels.1.0", "encoder 8x8"), ("decoder.levels.0.0", "decoder 8x8"), ("decoder.conv_out", "decoder out")],
)
def test_time_goes_to_the_block_that_spends_it(clock, where, block):
    """Also behind a perceptual loss and a discriminator, whose gradients meet those of the pixel loss."""
    training = tiny_training(clock, on=True)
    training.autoencoder.get_submodule(where).register_forward_pre_hook(lambda _, args: Slow.apply(args[0]))
    step = clock.ClockedStep(training, training.engine.clock, training.stage.config)
    step()
    stamps = step.clock.take()
    spent = clock.seconds_of(stamps)
    assert sum(spent.values()) == pytest.approx(stamps[-1].seconds - stamps[0].seconds)
    assert spent["forward", block] > 0.05 and spent["backward", block] > 0.1
    assert {"data", "losses", "perceptual loss", "discriminator", "codebook", "AdamW"} < {name for _, name in spent}


def tiny_training(clock, on):
    """Training of the one stage of `joint` with every loss, under a clock or not."""
    overrides = [*TINY, "method=joint", "stage2.loss.perceptual=0.1", "stage2.loss.adversarial=0.1", "stage1.loss.perceptual=0.1"]
    config = load_config(PHOTOS, [*overrides, "autoencoder.channel_multipliers=[1, 2]"])
    (stage,) = plan_stages(config)
    torch.manual_seed(0)
    engine = clock.ClockedEngine(clock.Clock(torch.device("cpu")), None) if on else LocalEngine()
    autoencoder = build_autoencoder(config, stage)
    return stage_training(config, stage, autoencoder, engine)


def test_the_clock_changes_nothing(clock):
    """But the order in which the gradients of several losses are added: rounding, of 6e-8 per sum."""
    plain, clocked = tiny_training(clock, on=False), tiny_training(clock, on=True)
    step = clock.ClockedStep(clocked, clocked.engine.clock, clocked.stage.config)
    for number in range(3):
        plain.step(number)
        assert step().item() == pytest.approx(plain.state.losses[-1].item(), rel=1e-5)


def test_step_beside_diffusers(tmp_path):
    pytest.importorskip("diffusers")
    output = tmp_path / "out.jsonl"
    arguments = ["--config", PHOTOS, *TINY, "autoencoder.attention_resolutions=[4]", "stage1.loss.adversarial=0.1"]
    arguments += ["stage1.loss.perceptual=0.1"]
    done = run("bench_step.py", *arguments, "--seconds", 0.1, "--device", "cpu", "--json", output)
    (found,) = cases(output)
    assert [row["step"] for row in found["steps"]] == [
        f"{who}, {layout}" for layout in ("contiguous", "channels_last") for who in ("ours", "diffusers")
    ]
    assert "diffusers 0." in done.stdout and "the same model" in done.stdout
    # One seed, one model: the first steps of all differ by the rounding of float32.
    assert [row["first_loss"] for row in found["steps"]] == pytest.approx([found["steps"][0]["first_loss"]] * 4, rel=1e-5)
    for pair in found["compared"]:
        assert pair["ours"].startswith("ours") and pair["diffusers"].startswith("diffusers")
        assert 0 < pair["speed"]["p20"] <= pair["speed"]["median"] <= pair["speed"]["p80"]


def test_plans_are_checked(tmp_path):
    output = tmp_path / "out.jsonl"
    done = run("check_plan.py", ROOT / "tests" / "recipes" / "tiny.yaml", "--rounds", 1, "--device", "cpu", "--json", output)
    assert [row["training"] for row in cases(output)] == ["stage1", "stage2", "prior"] and "| tiny stage1" in done.stdout
    for row in cases(output):
        assert row["bytes"]["planned"] == pytest.approx(row["bytes"]["measured"], rel=0.1) and row["ms"]["planned"] > 0


TOKENIZER = ("autoencoder.base_channels=8", "stage1.train_batch_size=8", "data.num_workers=0", "--device", "cpu", "--images", 40)
DIGITS = ROOT / "recipes" / "configs" / "digits.yaml"


@pytest.mark.parametrize("bottleneck", ["vq", "kl"])
def test_tokenizers_in_turns(tmp_path, bottleneck):
    pytest.importorskip("diffusers")
    output, overrides = tmp_path / "out.jsonl", ("method=joint", f"autoencoder.bottleneck={bottleneck}")
    done = run("bench_tokenizer.py", "--config", DIGITS, *overrides, *TOKENIZER, "--minutes", 0.04, "--json", output)
    (found,) = cases(output)
    ours, theirs = found["models"]
    assert (ours["model"], theirs["model"]) == ("ours", "diffusers") and found["n"] == 40
    for each in (ours, theirs):
        assert each["steps"] >= 1 and each["seconds"] >= 2.4 and each["psnr"] > 5  # 0.04 minutes
        assert (each["codes_used"] is None) == (bottleneck == "kl")
    assert found["gain"] == pytest.approx(ours["psnr"] - theirs["psnr"], abs=1e-6)
    assert "ours - diffusers" in done.stdout and "n=40" in done.stdout


def test_tokenizers_are_compared_in_one_stage(here):
    pytest.importorskip("diffusers")
    assert "method=joint" in here("bench_tokenizer.py", "--config", DIGITS, "method=dae", *TOKENIZER, expected=2).err


@pytest.mark.parametrize("architecture", ["conv", "ldm"])
def test_another_model_is_not_compared(clock, architecture):
    """A block with another epsilon, say, would be a benchmark of something else."""
    pytest.importorskip("diffusers")
    bench_step = importlib.import_module("bench_step")
    config = load_config(PHOTOS, [*TINY, "autoencoder.attention_resolutions=[4]", f"autoencoder.architecture={architecture}"])
    model = Autoencoder(config.autoencoder, 3, 16)
    peer = bench_step.with_diffusers_blocks(model)
    assert not any(isinstance(module, (ResidualBlock, Downsample, PaddedDownsample)) for module in peer.modules())
    assert bench_step.difference(config, [model, peer], torch.device("cpu")) < 1e-6
    for module in peer.modules():
        if isinstance(module, torch.nn.GroupNorm):
            module.eps = 1e-3
    assert bench_step.difference(config, [model, peer], torch.device("cpu")) > 1e-6


def test_every_kernel_is_measured_and_inspected(here):
    kernels = {path.parent.name for path in (ROOT / "kernels" / "dae_kernels").glob("*/fused.py")} - {"pairwise"}
    assert kernels <= {path.stem for path in (ROOT / "profiling" / "bench").glob("*.py")}
    inspected = here("inspect_kernels.py", "--help").out
    for path in (ROOT / "profiling" / "aot").glob("*.py"):
        assert path.stem in inspected
