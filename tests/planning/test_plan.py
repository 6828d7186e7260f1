"""`--plan` says what profile_step.py measures, from tensors without values, and neither trains nor writes."""

import importlib
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dae.config import load_config
from dae.planning.gpus import EFFICIENCY, GPUS, find_gpu, roofline
from dae.planning.plan import Planned, plan_autoencoder, plan_prior, plan_training
from dae.planning.tracing import PARTS, trace
from dae.planning.trainings import prior_training, stage_training
from dae.training.autoencoder import build_autoencoder
from dae.training.engine import LocalEngine
from dae.training.stages import plan_stages

ROOT = Path(__file__).resolve().parents[2]
SMALL = (
    "autoencoder.base_channels=8", "autoencoder.channel_multipliers=[1,2]", "autoencoder.attention_resolutions=[8]",
    "data.resolution=16", "data.channels=3", "stage1.train_batch_size=8", "stage2.train_batch_size=8",
    "stage2.loss.discriminator_channels=8", "prior.train_batch_size=8", "prior.width=32", "prior.depth=2", "prior.dropout=0.1",
)  # fmt: skip
GAN = ("stage2.loss.adversarial=0.1",)


def building(config, name):
    """The training of a stage, or of the prior, on an engine."""
    if name == "prior":
        return lambda engine: prior_training(config, build_autoencoder(config, plan_stages(config)[-1]), 10, engine)
    stage = next(stage for stage in plan_stages(config) if stage.name == name)
    return lambda engine: stage_training(config, stage, build_autoencoder(config, stage), engine)


@pytest.fixture
def profiled(monkeypatch, tmp_path):
    """`profiled(training)`: bytes at the peak of a step, by the records of torch's allocator, as profile_step.py takes them."""
    monkeypatch.syspath_prepend(str(ROOT / "profiling"))
    profile_step, clock = importlib.import_module("profile_step"), importlib.import_module("clock")

    def measure(config, name):
        watch = clock.Clock(torch.device("cpu"))
        training = building(config, name)(clock.ClockedEngine(watch, config.mixed_precision))
        step = clock.ClockedStep(training, watch, training.settings)
        step()
        return profile_step.record(step, tmp_path / "trace.json.gz")

    yield measure
    for name in ("profile_step", "clock", "training_steps", "measuring", "configuration", "step_figure", "bench_report"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("stage1", ()),
        ("stage1", ("stage1.gradient_checkpointing=true", "stage1.gradient_accumulation_steps=3")),
        ("stage1", ("autoencoder.bottleneck=kl", "mixed_precision=bf16", "stage1.use_ema=false")),
        ("stage2", (*GAN, "stage2.loss.r1=1", "channels_last=true")),
        ("prior", ()),
    ],
)
def test_memory_is_what_is_measured(profiled, name, overrides):
    """Both count the same tensors. 10 %: what an operator allocates for itself, such as oneDNN's layouts, has no tensor."""
    config = load_config(None, [*SMALL, *overrides])
    traced, measured = trace(building(config, name), config.mixed_precision), profiled(config, name)
    assert traced.peak == pytest.approx(measured["peak_bytes"], rel=0.1)
    kept = measured["state_bytes"]
    parts = [traced.memory[part] for part in ("weights", "optimiser", "average")]
    assert parts == [kept["weights"], kept["optimisers"], kept["average"]]
    assert set(traced.memory) == set(PARTS) and min(traced.memory.values()) >= 0


@pytest.mark.parametrize("name", ["stage1", "stage2"])
def test_arithmetic_is_that_of_a_real_step(name):
    config = load_config(None, [*SMALL, *GAN, "autoencoder.attention_resolutions=[]"])
    training = building(config, name)(LocalEngine())
    training.step(0)
    with FlopCounterMode(display=False) as counter:
        training.step(1)
    planned = trace(building(config, name), None)
    searched = 2 * 8 * 8 * 8 * 16 * 64 if name == "stage1" else 2 * 8 * 64 * 16 * 64  # distances, of which torch knows no formula
    assert counter.get_total_flops() <= planned.flops <= counter.get_total_flops() + searched
    config.stage1.gradient_accumulation_steps = config.stage2.gradient_accumulation_steps = 5
    assert trace(building(config, name), None).flops == 5 * planned.flops


def test_savings_are_counted():
    def activations(*overrides):
        config = load_config(None, [*SMALL, "autoencoder.channel_multipliers=[1,2,2]", *overrides])
        return trace(building(config, "stage1"), config.mixed_precision).memory["activations"]

    plain = activations()
    assert activations("stage1.gradient_checkpointing=true") < 0.8 * plain
    assert activations("mixed_precision=bf16") < 0.9 * plain
    assert activations("stage1.train_batch_size=16") == pytest.approx(2 * plain, rel=0.1)


def test_the_random_state_stays():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    config = load_config(None, SMALL)
    trace(building(config, "stage1"), None)
    assert torch.equal(torch.get_rng_state(), before)


def test_efficiency_is_the_measured_one():
    """114 ms of the step of profiling/results/h100; its 9,253 MiB beyond the state are a check of the memory on a GPU."""
    config = load_config(ROOT / "recipes" / "configs" / "imagenet256.yaml", ["method=joint", "mixed_precision=bf16"])
    config.stage2.loss = config.stage1.loss
    traced = trace(building(config, "joint"), "bf16", on_gpu=True)
    assert roofline(traced.calls, GPUS["H100"], allow_tf32=True) / 0.114 == pytest.approx(EFFICIENCY, abs=0.01)
    assert (traced.memory["activations"] + traced.memory["batch"]) / 2**20 == pytest.approx(9253, rel=0.1)


@pytest.mark.parametrize("name", ["H100", "h100", "NVIDIA RTX 4090", "rtx4090", "a100-80gb", "L40S"])
def test_gpus_are_found(name):
    assert find_gpu(name).memory > 2**34


def test_plans_write_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = load_config(None, [*GAN, f"output_dir={tmp_path / 'run'}", "autoencoder.base_channels=8"])
    here = "\n".join(plan_autoencoder(config, ""))
    for words in ("this machine", "stage1", "stage2", "discriminator", "activations", "GFLOP per image", "tokens (4 x 4) of 64"):
        assert words in here
    assert "1,437 training and 360 held-out images" in here and "done in about" in here and "fit into" in here
    assert "prior" in "\n".join(plan_prior(config, "L4"))
    continuous = load_config(ROOT / "recipes" / "configs" / "digits-kl.yaml")
    assert "4 x 4 latents of 4 channels" in "\n".join(plan_prior(continuous, "H200"))
    mixture = load_config(ROOT / "recipes" / "configs" / "digits-gan.yaml")
    assert "is fitted at once" in plan_prior(mixture, "")[0]
    assert list(tmp_path.iterdir()) == []


def test_the_cache_is_as_large_as_planned(tmp_path):
    from dae.data.cache import Fingerprint
    from dae.planning.trainings import random_cache
    from dae.training.encodings import build_cache

    config = load_config(None, ["prior.num_augmentations=2", "autoencoder.base_channels=8"])
    line = next(line for line in plan_prior(config, "L4") if line.startswith("cache on disk"))
    autoencoder = build_autoencoder(config, plan_stages(config)[0])
    train, heldout = (random_cache(config, autoencoder, 10, rows).train for rows in (1437, 360))
    train.values_NC = train.values_NC.expand(-1, 3, -1)
    build_cache(autoencoder, train, heldout, 10, Fingerprint("", "", "")).save(tmp_path / "tokens")
    size = (tmp_path / "tokens" / "tokens.safetensors").stat().st_size
    assert float(line.split()[3]) == pytest.approx(size / 1e6, abs=0.06)  # one decimal, and a header of 300 bytes


def test_what_is_not_known_is_said(monkeypatch):
    config = load_config(None, [*SMALL, "data.dataset_name=somebody/images"])
    monkeypatch.setattr("dae.planning.data.read_splits", lambda _: pytest.fail("looked up a data set that is not here"))
    lines = plan_autoencoder(config, "L4")
    assert lines[-1].startswith("not known: somebody/images is not on this machine")
    assert "bytes per training image" in lines[-2]


def test_what_does_not_fit_is_said():
    config = load_config(None, [*SMALL, "stage1.train_batch_size=200000"])
    assert any(
        "do not fit into L4's 24 GiB" in line and "gradient_checkpointing=true" in line for line in plan_autoencoder(config, "L4")
    )


def test_steps_too_long_for_here_are_timed_with_fewer_images(monkeypatch):
    monkeypatch.setattr("dae.planning.plan.TIMED_FLOPS", 2e7)
    config = load_config(None, [*SMALL, "method=joint"])
    assert any("timed with" in line and "images instead of 8" in line for line in plan_autoencoder(config, ""))
    monkeypatch.setattr("dae.planning.plan.TIMED_FLOPS", 1e3)
    lines = plan_autoencoder(config, "")
    assert any("not timed here, as a single image takes" in line for line in lines) and "not known" in "\n".join(lines)


def test_trainings_of_other_recipes_are_planned():
    config = load_config(None, SMALL)
    stage = plan_stages(config)[1]

    def build(config, engine, data):
        return stage_training(config, stage, build_autoencoder(config, stage), engine, data)

    assert "refit" in plan_training(config, [Planned("refit", stage.config, build)], "H100")[2]


def test_networks_that_read_values_while_they_are_built_are_planned(timm, monkeypatch):
    """timm's Transformers read the rates of their dropped paths from a tensor; and no weights are asked for."""
    make, before = timm.create_model, len(timm.asked)

    def create_model(*arguments, **options):
        torch.linspace(0, 1, 3)[1].item()
        return make(*arguments, **options)

    monkeypatch.setattr(timm, "create_model", create_model)
    encoder = ("autoencoder.encoder=timm:tokens", "autoencoder.bottleneck=identity", "autoencoder.latent_channels=8")
    features = (*GAN, "stage2.loss.discriminator=features", "stage2.loss.discriminator_features=stages")
    config = load_config(None, [*SMALL, *encoder, *features, "stage2.loss.discriminator_heads=2"])
    assert any("done in about" in line for line in plan_autoencoder(config, "L4"))
    assert {asked[1] for asked in timm.asked[before:]} == {False}
