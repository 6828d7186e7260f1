"""What is asked of accelerate, by its launcher, its files and its variables, is what runs; or one line says why not."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dae.config import Config
from dae.training import accelerator as module
from dae.training import make_accelerator, one_process

ROOT = Path(__file__).parents[2]
CPU_ONLY = pytest.mark.skipif(torch.cuda.is_available(), reason="what a machine without GPU does")


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """No variable of a launcher, and no Accelerator of the test before."""
    from accelerate.state import AcceleratorState, GradientState

    for name in [name for name in os.environ if name.startswith(("ACCELERATE_", "MASTER_")) or name in module.SIZES]:
        monkeypatch.delenv(name)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def build(tmp_path, **changes):
    return make_accelerator(Config(report_to="none", **changes), tmp_path / "logs")


def test_plain(tmp_path, caplog):
    with caplog.at_level("INFO"):
        accelerator = build(tmp_path)
    assert accelerator.gradient_accumulation_steps == 1 and accelerator.num_processes == 1
    assert f"training on {accelerator.device.type}, 1 process, fp32" in caplog.text


@CPU_ONLY
@pytest.mark.parametrize("by", ["knob", "launcher"])
def test_half_precision_on_a_cpu(tmp_path, monkeypatch, by):
    """It would compute in fp32 and call it fp16."""
    if by == "launcher":
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    with pytest.raises(ValueError, match=r"mixed_precision=fp16 has no effect on cpu.*use bf16 or no"):
        build(tmp_path, **({"mixed_precision": "fp16"} if by == "knob" else {}))


@pytest.mark.parametrize("by", ["knob", "launcher"])
def test_bfloat16(tmp_path, monkeypatch, by):
    if by == "launcher":
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    accelerator = build(tmp_path, **({"mixed_precision": "bf16"} if by == "knob" else {}))
    with accelerator.autocast():
        assert torch.get_autocast_dtype(accelerator.device.type) == torch.bfloat16
        assert torch.is_autocast_enabled(accelerator.device.type)


def test_precision_asked_twice(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    with pytest.raises(ValueError, match=r"mixed_precision=no is configured, `accelerate launch` was told bf16"):
        build(tmp_path, mixed_precision="no")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")  # what the launcher says if nothing was asked of it
    assert build(tmp_path, mixed_precision="bf16").mixed_precision == "bf16"


@pytest.mark.parametrize("precision", ["fp8", "int4"])
def test_precision_that_there_is_not(tmp_path, monkeypatch, precision):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", precision)
    with pytest.raises(ValueError):
        build(tmp_path)


def test_precision_does_not_matter_where_nothing_is_trained(monkeypatch):
    """One file configures a chain that is trained on a GPU and sampled elsewhere."""
    assert one_process(Config(report_to="wandb", mixed_precision="fp16")).type in ("cpu", "cuda")


def test_gradients_are_not_divided(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    with pytest.raises(ValueError, match=r"ACCELERATE_GRADIENT_ACCUMULATION_STEPS=4: unset it and set stage1\.gradient_acc"):
        build(tmp_path)
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    accelerator = build(tmp_path)
    weight = torch.ones(1, requires_grad=True)
    accelerator.backward(3 * weight)
    assert weight.grad.item() == 3


@pytest.mark.parametrize(
    ("variable", "value", "words"),
    [
        ("ACCELERATE_USE_DEEPSPEED", "true", "DeepSpeed is not supported"),
        ("ACCELERATE_USE_FSDP", "true", "FSDP is not supported"),
        ("ACCELERATE_USE_FSDP", "1", "FSDP is not supported"),
        ("ACCELERATE_USE_MEGATRON_LM", "true", "Megatron-LM is not supported"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "true", "parallelism_config is not supported"),
        ("ACCELERATE_USE_SAGEMAKER", "true", "SageMaker is not supported"),
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR", "compile=true"),
        ("ACCELERATE_TORCH_DEVICE", "meta", "expected the CPU or a CUDA GPU"),
    ],
)
def test_what_is_not_supported(tmp_path, monkeypatch, variable, value, words):
    monkeypatch.setenv(variable, value)
    with pytest.raises(ValueError, match=words) as caught:
        build(tmp_path)
    assert "\n" not in str(caught.value)


@CPU_ONLY
def test_a_gpu_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", "cuda:0")
    with pytest.raises(ValueError, match="cuda:0 is asked for"):
        build(tmp_path)


@pytest.mark.parametrize("value", ["true", "True", "1"])
def test_the_cpu_when_asked(tmp_path, monkeypatch, value):
    monkeypatch.setenv("ACCELERATE_USE_CPU", value)
    assert build(tmp_path).device.type == "cpu"


@pytest.mark.parametrize("harmless", ["ACCELERATE_DYNAMO_BACKEND=NO", "ACCELERATE_USE_CPU=False", "ACCELERATE_USE_FSDP=false"])
def test_what_the_launcher_always_says(tmp_path, monkeypatch, harmless):
    monkeypatch.setenv(*harmless.split("="))
    build(tmp_path)


@pytest.mark.parametrize("variable", ["WORLD_SIZE", "OMPI_COMM_WORLD_SIZE"])
def test_processes_that_would_train_apart(tmp_path, monkeypatch, variable):
    build(tmp_path)  # accelerate has made up its mind
    monkeypatch.setenv(variable, "2")
    with pytest.raises(RuntimeError, match="2 processes were started, accelerate sees 1: launch with torchrun"):
        build(tmp_path)


SCRIPT = """
import sys
from pathlib import Path
from dae.config import Config
from dae.training import make_accelerator
try:
    print("processes", make_accelerator(Config(report_to="none"), Path(sys.argv[1])).num_processes)
except (ValueError, RuntimeError) as error:
    print("refused", error)
"""


@pytest.fixture
def launched(monkeypatch):
    """`launched(**variables)`: as if `accelerate launch`, in whose own environment these are, had started this process."""

    def start(**variables):
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
        entries = b"\0".join(f"{name}={value}".encode() for name, value in variables.items())
        monkeypatch.setattr(module.Path, "read_bytes", lambda path: entries)

    return start


def test_the_launcher_that_starts_one_process_of_two(tmp_path, monkeypatch, launched):
    """What it adds to the environment of one process when it was asked for several, but not a rank."""
    launched(HOME="/root")
    monkeypatch.setenv("MASTER_PORT", "29500")
    with pytest.raises(RuntimeError, match="was asked for several processes and started one"):
        build(tmp_path)


def test_a_cluster_that_names_an_address(tmp_path, monkeypatch, launched):
    """In the environment of everything, the launcher's too: it is no sign that several processes were meant."""
    launched(MASTER_PORT="1234")
    monkeypatch.setenv("MASTER_PORT", "1234")
    assert build(tmp_path).num_processes == 1


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="only Linux shows the launcher's environment")
@CPU_ONLY
def test_launched_by_a_file(tmp_path):
    """The real launcher with the file that looks as if it meant two processes on a CPU."""
    settings = "compute_environment: LOCAL_MACHINE\ndistributed_type: MULTI_CPU\nnum_machines: 1\nuse_cpu: true\n"
    (tmp_path / "two.yaml").write_text(f"{settings}num_processes: 2\nmixed_precision: 'no'\n")
    (tmp_path / "script.py").write_text(
        "import pathlib\nfrom dae.config import Config\nfrom dae.training import make_accelerator\ntry:\n"
        "    make_accelerator(Config(report_to='none'), pathlib.Path('logs'))\nexcept RuntimeError as error:\n    print(error)\n"
    )
    launch = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--config_file", "two.yaml", "script.py"]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(launch, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.stdout.startswith("`accelerate launch` was asked for several processes and started one"), done.stderr


LEAVES = """
import sys
from types import SimpleNamespace
import torch
from torch import distributed
from dae.training import end_training
rank, store = int(sys.argv[1]), sys.argv[2]
distributed.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=2)
model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(64, 64))
model(torch.randn(4, 64)).sum().backward()
distributed.all_gather_object([None, None], rank)
end_training(SimpleNamespace(num_processes=2, end_training=distributed.destroy_process_group))
"""


@pytest.mark.slow
def test_two_processes_leave_in_peace(tmp_path):
    """Without the wait in `end_training`, one process of eight dies of SIGABRT after its work (8 of 25 launches were seen)."""
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}
    for launch in range(4):
        commands = [(sys.executable, "-c", LEAVES, str(rank), str(tmp_path / f"store{launch}")) for rank in range(2)]
        processes = [subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) for command in commands]
        errors = [process.communicate(timeout=120)[1] for process in processes]
        assert [process.returncode for process in processes] == [0, 0], errors


@pytest.mark.parametrize("name", ["wandb", "trackio", "tensorboard"])
@pytest.mark.parametrize("state", ["missing", "broken"])
def test_trackers(tmp_path, monkeypatch, name, state):
    module_name = {"tensorboard": "torch.utils.tensorboard"}.get(name, name)
    if state == "missing":
        monkeypatch.setitem(sys.modules, module_name, None)
        words = f"report_to={name} needs the package {name} .*pip install {name}, or choose another tracker, or report_to=none"
    else:
        (tmp_path / f"{name}.py").write_text("raise RuntimeError('operator torchvision::nms\\n does not exist')")
        if name == "tensorboard":
            monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
            monkeypatch.delitem(sys.modules, "tensorboard", raising=False)
        monkeypatch.delitem(sys.modules, name, raising=False)
        monkeypatch.syspath_prepend(tmp_path)
        words = r"installed but cannot be imported \(RuntimeError: operator torchvision::nms does not exist\)"
    with pytest.raises(ImportError, match=words) as caught:
        make_accelerator(Config(report_to=name), tmp_path / "logs")
    assert "\n" not in str(caught.value)
    make_accelerator(Config(report_to=name))  # of a recipe that does not train
