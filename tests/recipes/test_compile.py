"""compile=true trains what eager mode does, through the switch and the prior, with an adversarial loss."""

import functools
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch._dynamo.testing import CompileCounterWithBackend

from dae.config import load_config
from dae.priors import prior_family
from dae.training.in_memory import encode, train_autoencoder, train_prior
from dae.training.loop import Training
from dae.training.stages import plan_stages

CONFIGS = Path(__file__).parents[2] / "recipes" / "configs"
# These have the modules and losses of the others; the encoder of imagenet256_rae needs timm.
ALIKE = {"cifar10_vq", "cifar10_kl", "fashion_mnist_vq", "clothing128_kl", "faceshq256_vqgan", "imagenet256_llamagen"}
ALIKE |= {"imagenet256_kl", "imagenet256_rae"}
SHIPPED = [path for path in sorted(CONFIGS.glob("*.yaml")) if path.stem not in ALIKE]

STEPS = (
    "stage1.max_train_steps=2", "stage2.max_train_steps=2", "prior.max_train_steps=2", "stage2.loss.adversarial=0.1",
    "stage2.loss.discriminator_channels=8", "validation_steps=100", "checkpointing_steps=100",
    "logging_steps=1",
)  # fmt: skip


def losses(folder):
    rows = map(json.loads, (folder / "logs" / "history.jsonl").read_text().splitlines())
    return torch.tensor([row["loss"] for row in rows if row["split"] == "train"])


@pytest.mark.slow
def test_a_compiled_chain(tmp_path, run):
    for name, compiled in (("eager", "false"), ("compiled", "true")):
        run("train_dae", tmp_path / name, *STEPS, f"compile={compiled}")
    eager, compiled = (losses(tmp_path / name / "autoencoder") for name in ("eager", "compiled"))
    assert len(eager) == 4  # means of thousands of float32 terms in other orders, before and after a step, in both stages
    torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=0)
    eager, compiled = (load_file(tmp_path / name / "autoencoder" / "model.safetensors") for name in ("eager", "compiled"))
    assert eager.keys() == compiled.keys()
    for name, value in eager.items():  # AdamW divides by the gradient's size, so rounding can turn whole steps
        torch.testing.assert_close(compiled[name], value, rtol=0, atol=4 * 3e-3, msg=lambda text, name=name: f"{name}: {text}")
    run("encode", tmp_path / "compiled", *STEPS)
    run("train_prior", tmp_path / "compiled", *STEPS, "compile=true")


def reduced(path, *overrides):
    """The configuration with all its parts, narrow, short and on small images."""
    config, batch = load_config(path), 4
    small = ["autoencoder.base_channels=4", "autoencoder.vq.codebook_size=16", "validation_steps=2"]
    if config.data.resolution > 16:
        factor = config.data.resolution // max(16, 2 ** len(config.autoencoder.channel_multipliers))
        attention = [size // factor for size in config.autoencoder.attention_resolutions]
        small += [f"data.resolution={config.data.resolution // factor}", f"autoencoder.attention_resolutions={attention}"]
    for part in ("stage1", "stage2", "prior"):
        small += [f"{part}.{key}" for key in ("max_train_steps=2", f"train_batch_size={batch}", "lr_warmup_steps=0")]
    small += ["stage1.loss.perceptual=0", "stage2.loss.perceptual=0"]  # whose weights are not here
    small += ["stage1.loss.adversarial_start=1", "stage2.loss.adversarial_start=1", "stage2.loss.discriminator_channels=4"]
    small += [f"prior.width={8 * config.prior.num_heads}", "prior.depth=2", "prior.num_components=2"]
    return load_config(path, [*small, *overrides])


def train(config, monkeypatch):
    """Losses of all steps of the chain, and how many graphs torch.compile made, which may not break."""
    seen, counter = [], CompileCounterWithBackend("aot_eager")  # what Inductor makes of a graph, the chain above shows

    def step(self, number, step=Training.step):
        step(self, number)
        seen.append(float(self.state.losses[-1]))

    torch._dynamo.reset()
    with monkeypatch.context() as patch:
        patch.setattr(Training, "step", step)
        patch.setattr(torch, "compile", functools.partial(torch.compile, backend=counter, fullgraph=True))
        size = config.data.channels, config.data.resolution, config.data.resolution
        images = torch.rand(8, *size, generator=torch.Generator().manual_seed(0)) * 2 - 1
        rows = images, torch.arange(8) % 2
        cache = encode(train_autoencoder(images, config), rows, rows, 2, config)
        train_prior(cache, config)
    return torch.tensor(seen), counter.frame_count


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_configuration_compiles_to_one_graph_a_model(path, monkeypatch):
    """No graph breaks and no second graph; losses of every step as without, for the same operations draw the same numbers."""
    expected, _ = train(reduced(path), monkeypatch)
    config = reduced(path, "compile=true")
    losses, graphs = train(config, monkeypatch)
    trained = [stage.config.max_train_steps for stage in plan_stages(config)]
    trained += [config.prior.max_train_steps] * (not prior_family(config).fitted)
    assert (len(losses), graphs) == (sum(trained), len(trained))
    # aot_eager runs the same operations, some decomposed: float32 rounding of 6e-8 through some tens of layers and one step.
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=0)
