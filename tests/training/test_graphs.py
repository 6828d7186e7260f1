"""A step from CUDA graphs: what it computes, that it can be recorded, and what is refused."""

import gc
import sys
import weakref
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from tiny_training import GAN, TINY, Rerun, autoencoder_training, prior_training, weights
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from dae.config import load_config
from dae.training.graphs import WARM_UP, StepGraphs, check_cuda_graphs

pytestmark = pytest.mark.usefixtures("timm")
FEATURES = (  # a frozen encoder, noise on its latent, and a discriminator on frozen features that sees augmented images
    "autoencoder.encoder=tokens", "autoencoder.bottleneck=identity", "autoencoder.latent_channels=8",
    "autoencoder.channel_multipliers=[1,1,2]", "autoencoder.decoder.latent_noise=0.5", "stage2.loss.discriminator=features",
    "stage2.loss.discriminator_features=stages", "stage2.loss.discriminator_heads=2", "stage2.loss.lecam=0.1",
    "stage2.loss.augment=[color,translation,cutout]",
)  # fmt: skip
TOKENS = torch.arange(40 * 2 * 16).view(40, 2, 16) % 16
MOMENTS = torch.randn(40, 2, 8, 4, 4, generator=torch.Generator().manual_seed(0))
EMA = ("stage1.use_ema=true", "stage1.ema_decay=0.9", "prior.use_ema=true", "prior.ema_decay=0.9")
MAKERS = {
    "vq": lambda *more, **where: autoencoder_training(*GAN, *EMA, "data.random_affine=0.5", *more, **where),
    "gan": lambda *more, **where: autoencoder_training(*GAN, "stage2.loss.adversarial_start=4", *more, which=1, **where),
    "features": lambda *more, **where: autoencoder_training(*GAN, *FEATURES, *more, **where),
    "accumulation": lambda *more, **where: autoencoder_training(*EMA, "stage1.gradient_accumulation_steps=3", *more, **where),
    "kl": lambda *more, **where: autoencoder_training("autoencoder.bottleneck=kl", *more, **where),
    "ar": lambda *more, **where: prior_training(*EMA, *more, values=TOKENS, **where),
    "dit": lambda *more, **where: prior_training(
        "autoencoder.bottleneck=kl", "prior.gradient_accumulation_steps=2", *more, values=MOMENTS, **where
    ),
}


def fused(training):
    """As on a GPU: an AdamW that takes its learning rate as a number or as a tensor."""
    for optimizer in training.state.optimizers.values():
        for group in optimizer.param_groups:
            group |= {"fused": True, "foreach": False, "lr": torch.tensor(group["lr"]).item()}
    return training


@pytest.mark.parametrize("name", MAKERS)
def test_a_step_computes_what_it_does_without(name):
    plain, graphed = (fused(MAKERS[name]("stage1.lr_warmup_steps=4", "prior.lr_scheduler=cosine")) for _ in range(2))
    recorders: list[Rerun] = []
    graphed.graphs = StepGraphs(graphed, lambda: recorders.append(Rerun()) or recorders[-1])
    for number in range(9 if name == "gan" else 6):
        plain.step(number)
        graphed.step(number)
    kinds = min(3, plain.settings.gradient_accumulation_steps)
    recorded = [recorder.recorded for recorder in recorders if recorder.recorded]
    assert recorded == ([1, 1] if name == "gan" else [kinds]), "one for each kind of micro-step, and anew at adversarial_start"
    assert torch.equal(torch.stack(graphed.state.losses), torch.stack(plain.state.losses))
    (wanted, state), (found, now) = weights(plain), weights(graphed)
    assert found.keys() == wanted.keys() and [key for key, value in wanted.items() if not torch.equal(found[key], value)] == []
    assert now == state, "rates, counts and positions"


def numbers(owner, path, seen):
    """Numbers, words and Nones that an object and what it holds keep on the host."""
    if isinstance(owner, bool | int | float | str | None):
        yield path, owner
        return
    if id(owner) in seen or isinstance(owner, torch.Tensor | type) or callable(getattr(owner, "__next__", None)):
        return
    seen.add(id(owner))
    if isinstance(owner, Mapping):
        children = owner.items()
    elif isinstance(owner, list | tuple):
        children = enumerate(owner)
    else:
        children = list(getattr(owner, "__dict__", {}).items())
    for key, child in children:
        yield from numbers(child, f"{path}.{key if not isinstance(key, torch.Tensor) else id(key)}", seen)


@pytest.mark.parametrize("name", MAKERS)
def test_the_recorded_part_changes_tensors_alone(name):
    """What it would set on the host, a replay would not set."""
    training = MAKERS[name]()
    for number in range(2):
        training.step(number)
    last = training.settings.gradient_accumulation_steps - 1
    for micro in range(last):
        training.compute(training.next_batch(), 2, micro)
    batch, parts = training.next_batch(), (training.state.modules, training.state.optimizers, training.state.scheduler)
    everything = (*parts, training.state.ema, training.engine, training.settings)
    before = dict(numbers(everything, "", set()))
    training.compute(batch, 2, last)
    after = dict(numbers(everything, "", set()))
    # Sums over the micro-steps begin with None and end as None after the last one, so each kind of micro-step finds its own.
    sums = ("._counts", "._sums", "._latest")
    changed = {key: (before.get(key), after.get(key)) for key in before | after if before.get(key, 0) != after.get(key, 0)}
    assert {key: pair for key, pair in changed.items() if not key.endswith(sums)} == {} and len(before) > 50


def test_what_micro_steps_add_up_keeps_its_place():
    """The graph of those between the first and the last adds to the same tensors, however often it is replayed."""
    training = autoencoder_training("stage1.gradient_accumulation_steps=4")
    bottleneck, places = training.autoencoder.bottleneck, []
    for micro in range(3):
        training.compute(training.next_batch(), 0, micro)
        added = [p.grad for p in training.parameters if p.grad is not None] + [bottleneck._counts, bottleneck._sums]
        places.append([tensor.data_ptr() for tensor in added])
    assert places[0] == places[1] == places[2] and len(places[0]) > 9


class Copies(TorchDispatchMode):
    """Copies from the host's memory to the device, for which the meta device stands; a recording cannot hold them."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        given = [each for each in args if isinstance(each, torch.Tensor)]
        if isinstance(out, torch.Tensor) and out.is_meta and given and any(not each.is_meta and each.dim() for each in given):
            self.found.append(str(function))
        return out


class Constants(TorchFunctionMode):
    """Tensors made of Python's numbers on the device: torch makes them in the host's memory and copies them."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        name = getattr(function, "__name__", "")
        if (
            name in ("tensor", "as_tensor", "new_tensor", "asarray", "from_numpy")
            and isinstance(out, torch.Tensor)
            and out.is_meta
        ):
            self.found.append(f"{name} in {sys._getframe(1).f_code.co_filename}:{sys._getframe(1).f_lineno}")
        return out


META = torch.device("meta")


@pytest.mark.parametrize("name", MAKERS)
def test_the_recorded_part_stays_on_the_device(name, monkeypatch):
    """The meta device has shapes without values: each read of a value fails there."""
    monkeypatch.setattr("dae_kernels.tracing.valueless", lambda tensor: False)  # as for a GPU: checks may read
    training = MAKERS[name]()
    for module in training.state.modules.values():
        module.to(META)
    if training.state.ema:
        training.state.ema.average.to(META)
        training.state.ema.keep_rate_on(META)
    if getattr(training, "perceptual", None):
        training.perceptual.to(META)
    training.parameters = list(training.trained.parameters())
    training.engine.device = META
    batch = training.next_batch()
    with Copies() as copies, Constants() as constants:
        for micro in range(training.settings.gradient_accumulation_steps):
            training.compute(batch, 7, micro)
    assert copies.found == [] and constants.found == []


def test_the_watches_see():
    with Copies() as copies, Constants() as constants:
        torch.ones(3).to(META)
        torch.empty(2, device=META).new_tensor([1.0])
        with pytest.raises((RuntimeError, NotImplementedError)):
            torch.empty(2, device=META).sum().item()
    assert copies.found and constants.found


def test_graphs_are_freed_at_the_end(monkeypatch):
    """By counting references: a stage's graphs would else keep their memory while the next stage records its own."""
    monkeypatch.setattr("dae.training.graphs.Recorder", Rerun)
    training = MAKERS["vq"]()
    training.graphs = StepGraphs(training)
    for number in range(WARM_UP):  # a graph keeps its result alone, where `Rerun` keeps the work
        training.step(number)
    graphs = weakref.ref(training.graphs)
    gc.disable()
    try:
        training.end()
        assert graphs() is None
    finally:
        gc.enable()


def test_a_batch_of_another_shape_is_refused():
    training = MAKERS["vq"]()
    graphs = StepGraphs(training, Rerun)
    graphs(training.next_batch(), 0, 0)
    with pytest.raises(ValueError, match=r"batches of one shape and type: image was \[16, 1, 8, 8\].*now it is \[3, 1, 8, 8\]"):
        graphs({"image": torch.zeros(3, 1, 8, 8)}, 1, 0)


@pytest.mark.parametrize("steps", [WARM_UP, WARM_UP + 1])
def test_a_run_too_short_for_a_graph_says_so(caplog, steps):
    training = fused(MAKERS["ar"]())
    training.graphs = StepGraphs(training, Rerun)
    for number in range(steps):
        training.step(number)
    with caplog.at_level("INFO"):
        training.end()
    said = "prior: no CUDA graph was recorded, as none is before step 3" in caplog.text
    assert said == (steps == WARM_UP)


@pytest.mark.parametrize(
    "device, processes, overrides, words",
    [
        ("cpu", 1, [], "needs a CUDA device, this run is on cpu"),
        ("cuda", 2, [], "needs one process, this run has 2: they agree"),
        ("cuda", 1, ["mixed_precision=fp16"], "needs mixed_precision=bf16 or no"),
        ("cuda", 1, ["stage2.loss.r1=1.0"], "excludes stage2.loss.r1, whose steps are not all alike"),
        ("cuda", 1, ["stage2.gradient_checkpointing=true"], "excludes stage2.gradient_checkpointing=true"),
    ],
)
def test_what_cannot_be_recorded(device, processes, overrides, words):
    config = load_config(TINY, ["cuda_graphs=true", *overrides])
    with pytest.raises(ValueError, match=f"^cuda_graphs=true {words}.*leave cuda_graphs out$") as caught:
        check_cuda_graphs(config, torch.device(device), processes, stage1=config.stage1, stage2=config.stage2)
    assert "\n" not in str(caught.value)
    config.cuda_graphs = False
    check_cuda_graphs(config, torch.device(device), processes, stage1=config.stage1, stage2=config.stage2)


def test_refused_before_anything_is_read(tmp_path, monkeypatch):
    """By the recipes' accelerator, by the rehearsal, and by a training of one's own."""
    from dae.training import make_accelerator
    from dae.training.engine import LocalEngine
    from dae.training.rehearsal import rehearse_autoencoder

    config = load_config(TINY, ["cuda_graphs=true", "report_to=none"])
    for refuse in (
        lambda: make_accelerator(config, Path(tmp_path)),
        lambda: rehearse_autoencoder(config, 100, LocalEngine()),
        lambda: MAKERS["ar"]("cuda_graphs=true"),
    ):
        if not torch.cuda.is_available():
            with pytest.raises(ValueError, match="cuda_graphs=true needs a CUDA device, this run is on cpu"):
                refuse()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", MAKERS)
def test_the_same_losses_on_a_gpu(name):
    """20 steps: bit for bit if two runs without graphs are so."""
    runs = []
    for graphs in (False, False, True):
        training = MAKERS[name]("cudnn_benchmark=false", f"cuda_graphs={graphs}".lower(), device=torch.device("cuda"))
        for number in range(20):
            training.step(number)
        runs.append(torch.stack(training.state.losses))
    assert training.graphs.graphs and training.graphs.steps > WARM_UP
    first, again, graphed = runs
    if torch.equal(first, again):
        assert torch.equal(graphed, first), (graphed - first).abs().max()
    # Else atomic additions round in any order at each step, and 20 steps of AdamW, which divides by the gradient, let that grow.
    torch.testing.assert_close(graphed, first, rtol=1e-3, atol=0)
