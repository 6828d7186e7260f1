"""Benchmark a training step of the autoencoder against the same model built of diffusers' blocks, in turns in one run.

    python profiling/bench_step.py                                       # 32x32 VQ on a CPU, 256x256 VQGAN on a GPU
    python profiling/bench_step.py --config recipes/configs/imagenet256.yaml mixed_precision=bf16 --compile --json out.jsonl

The peer is the same autoencoder with each block replaced by the one that diffusers builds its VQModel from: ResnetBlock2D,
Downsample2D, Upsample2D, Attention, and torch's own GroupNorm and SiLU for the rest, with the same weights. Both share all other
code (dae/training): losses, AdamW, clipping, average of weights, and our vector quantizer with its moving averages, which
diffusers' lacks; so differences come from the blocks alone. Before timing, both must give the same loss and gradient in float64,
which shows that they are the same model; `loss` is the first one of each as timed.

The step is that of the baseline `joint`: the real decoder, stage 1's losses. Each is measured contiguous and channels_last, in
turns; with --ours, ours with a further override, too. A step is printed as soon as it has run, and one that fails says why.
Milliseconds and ratios: median with the 20 % and 80 % quantiles, a ratio of each round's two times. Peak is what a step allocates
beyond the state, which is the weights and what the optimiser keeps: on a GPU by torch's allocator, on Linux the growth of the
process's resident memory.
"""

import copy
import dataclasses
import importlib.util
import itertools
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from bench_report import software
from configuration import CONFIGS, read_config
from measuring import append_row, growth, machine, measuring_parser, now, quantiles, synchronize
from torch import nn
from training_steps import TrainingStep, state_bytes

from dae.config import Config, KernelsConfig
from dae.models import Autoencoder, choose_kernels
from dae.models.layers import Downsample, GroupNorm, ResidualBlock, SelfAttention2d, Upsample
from dae.models.ldm import PaddedDownsample
from dae.planning.trainings import stage_training
from dae.training import graphs, plan_stages
from dae.training.engine import LocalEngine, set_backends

WARM_UP = graphs.WARM_UP  # then with `cuda_graphs` the next step, whose memory is measured, is recorded
HEADER = f"{'step':<36}{'median ms':>11}{'20 %':>9}{'80 %':>9}{'images/s':>10}{'peak MiB':>10}{'state MiB':>11}{'loss':>10}"


def with_diffusers_blocks(autoencoder: Autoencoder) -> Autoencoder:
    """A copy with the same weights, built of diffusers' blocks."""
    model = copy.deepcopy(autoencoder)
    for part in (model.encoder, model.decoder):
        exchange(part)
    return model


def exchange(parent: nn.Module) -> None:
    for name, child in parent.named_children():
        if (peer := diffusers_block(child)) is None:
            exchange(child)
        else:
            setattr(parent, name, peer.train(child.training))


def without_time(_: nn.Module, inputs: tuple) -> tuple:
    """Forward pre-hook that drops the time embedding, which ResnetBlock2D requires and an autoencoder lacks."""
    return (*inputs, None)


def diffusers_block(block: nn.Module) -> nn.Module | None:
    """diffusers' block with our weights; None if this block is not replaced."""
    from diffusers.models.attention_processor import Attention
    from diffusers.models.downsampling import Downsample2D
    from diffusers.models.resnet import ResnetBlock2D
    from diffusers.models.upsampling import Upsample2D

    weights = block.state_dict()
    peer: Any
    if isinstance(block, ResidualBlock):
        if block.dropout.p:
            expected = f"expected no dropout, got {block.dropout.p}"
            raise ValueError(f"diffusers drops single entries where ours drops channels: {expected}")
        first, second = block.norm1, block.norm2
        peer = ResnetBlock2D(
            in_channels=first.num_channels, out_channels=second.num_channels, temb_channels=None,  # type: ignore[arg-type]
            groups=first.num_groups, groups_out=second.num_groups, eps=first.eps, non_linearity="silu",
        )  # fmt: skip
        peer.load_state_dict({key.replace("skip.", "conv_shortcut."): value for key, value in weights.items()})
        peer.register_forward_pre_hook(without_time)
        return peer
    if isinstance(block, SelfAttention2d):
        channels = block.norm.num_channels
        peer = Attention(
            channels, heads=1, dim_head=channels, eps=block.norm.eps, norm_num_groups=block.norm.num_groups,
            residual_connection=True, bias=True, _from_deprecated_attn_block=True,
        )  # fmt: skip
        flat = {key: value.view(value.shape[:2]) for key, value in weights.items()}  # our 1x1 convolutions are linear there
        found = {key.replace("norm.", "group_norm.").replace("out.", "to_out.0."): value for key, value in flat.items()}
        for key in ("weight", "bias"):
            found |= zip((f"to_{name}.{key}" for name in "qkv"), found.pop(f"qkv.{key}").chunk(3), strict=True)
        peer.load_state_dict(found)
        return peer
    if isinstance(block, (Downsample, PaddedDownsample)):  # without padding of its own theirs pads at the end, too
        peer = Downsample2D(block.in_channels, use_conv=True, padding=int(isinstance(block, Downsample)), name="op")
        peer.conv.load_state_dict(weights)
        return peer
    if isinstance(block, Upsample):
        peer = Upsample2D(block.conv.in_channels, use_conv=True)
        peer.load_state_dict(weights)
        return peer
    if isinstance(block, GroupNorm):
        norm = nn.GroupNorm(block.num_groups, block.num_channels, block.eps)
        norm.load_state_dict(weights)
        return nn.Sequential(norm, nn.SiLU()) if block.activation else norm
    return None


def difference(config: Config, models: list[Any], device: torch.device) -> float:
    """Largest relative difference of features, sample, loss and a gradient at each end, in float64 and plain torch.

    The quantizer computes in float32, so only its rounding may differ.
    """
    shape = 1, config.data.channels, config.data.resolution, config.data.resolution
    images = torch.rand(shape, dtype=torch.float64, device=device)
    found = []
    for model in models:
        model = copy.deepcopy(model).to(device).train()
        choose_kernels(model, KernelsConfig(**{knob.name: "reference" for knob in dataclasses.fields(KernelsConfig)}))
        model.encoder.double(), model.decoder.double()
        features = model.encoder(2 * images - 1)
        encoding = model.bottleneck(features, True)
        sample = model.decoder(encoding.latents.double())
        loss = (sample - images).square().mean() + encoding.loss
        ends = [model.encoder.conv_in.weight, model.decoder.conv_out.weight]
        found.append([features.detach(), sample.detach(), loss.detach(), *torch.autograd.grad(loss, ends)])
    return max(((a - b).norm() / a.norm()).item() for a, b in zip(*found, strict=True))


class MeasuredStep:
    """The training step of a model in a layout, with its samples and its memory."""

    def __init__(self, name: str, config: Config, model: Autoencoder, device: torch.device):
        self.name, self.device, self.setting = name, device, (config.channels_last, config.compile)
        (stage,) = plan_stages(config)
        set_backends(config, device)
        engine = LocalEngine(device, config.mixed_precision)
        self.step = TrainingStep(stage_training(config, stage, copy.deepcopy(model), engine))
        self.batch = stage.config.train_batch_size
        self.loss, *_ = [self.step().item() for _ in range(WARM_UP)]
        self.state_bytes = sum(state_bytes(self.step.training).values())
        grown = growth(device)
        self.step().item()
        self.peak_bytes = grown() if grown else None
        self.samples: list[float] = []
        self.sample()

    def sample(self) -> None:
        synchronize(self.device)
        start = time.perf_counter()
        self.step().item()
        synchronize(self.device)
        self.samples.append(1000 * (time.perf_counter() - start))

    def row(self) -> dict[str, Any]:
        ms = quantiles(self.samples)
        return {
            "step": self.name,
            "ms": ms,
            "samples": len(self.samples),
            "images_per_second": 1000 * self.batch / ms["median"],
            "peak_bytes": self.peak_bytes,
            "state_bytes": self.state_bytes,
            "first_loss": self.loss,
        }


def show(row: dict[str, Any]) -> str:
    """One line of the table under HEADER."""
    ms, peak = row["ms"], "" if row["peak_bytes"] is None else format(row["peak_bytes"] / 2**20, ".1f")
    times = f"{ms['median']:>11.2f}{ms['p20']:>9.2f}{ms['p80']:>9.2f}{row['images_per_second']:>10.1f}"
    return f"{row['step']:<36}{times}{peak:>10}{row['state_bytes'] / 2**20:>11.1f}{row['first_loss']:>10.6f}"


def verdict(steps: list[MeasuredStep]) -> list[dict[str, Any]]:
    """Speed-up and memory of ours against diffusers', per layout, then each at its fastest."""
    ours, theirs = ([step for step in steps if step.name.startswith(who)] for who in ("ours", "diffusers"))
    pairs = [(a, b) for a in ours for b in theirs if a.setting == b.setting]
    if ours and theirs:
        fastest = [min(group, key=lambda step: statistics.median(step.samples)) for group in (ours, theirs)]
        pairs.append((fastest[0], fastest[1]))
    compared = []
    for a, b in pairs:
        speed = quantiles([y / x for x, y in zip(a.samples, b.samples, strict=True)])
        memory = (a.peak_bytes + a.state_bytes) / (b.peak_bytes + b.state_bytes) if a.peak_bytes and b.peak_bytes else None
        compared.append({"ours": a.name, "diffusers": b.name, "speed": speed, "memory": memory})
    return compared


def variants(
    config: Config, of_ours: list[tuple[str, Config]], layouts: list[str], compiled: bool, peer: bool
) -> Iterator[tuple[str, Config]]:
    """Name and configuration of each step: of each layout, eager and compiled, ours, ours with each override, diffusers'."""
    for layout, whole in itertools.product(layouts, [False, True][: 1 + compiled]):
        for who, its in [("ours", config), *of_ours, *[("diffusers", config)] * peer]:
            name, _, override = who.partition(" ")
            words = [f"{name}, {layout}", *["compiled"] * whole, *filter(None, [override])]
            yield ", ".join(words), dataclasses.replace(its, channels_last=layout == "channels_last", compile=whole)


def main() -> None:
    parser = measuring_parser(__doc__)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for example stage1.train_batch_size=8")
    parser.add_argument("--config", help="YAML file of a recipe (default: imagenet256 on a GPU, photos elsewhere)")
    parser.add_argument("--compile", action="store_true", help="measure both under torch.compile too")
    layouts = ["contiguous", "channels_last"]
    parser.add_argument("--layout", choices=layouts, action="append", help="default: both (may be repeated)")
    parser.add_argument("--ours", metavar="key=value", action="append", default=[], help="ours with this, too (may be repeated)")
    parser.add_argument("--seconds", type=float, default=30.0, help="measuring time in all, after warm-up; at least three rounds")
    arguments = parser.parse_intermixed_args()
    device = torch.device(arguments.device)
    file = arguments.config or CONFIGS / ("imagenet256.yaml" if device.type == "cuda" else "photos.yaml")

    def configured(*overrides: str) -> Config:
        config = read_config(file, ["method=joint", *arguments.overrides, *overrides])
        config.stage2.loss = config.stage1.loss  # of the one stage of `joint`
        return config

    try:
        config, of_ours = configured(), [(f"ours {override}", configured(override)) for override in arguments.ours]
        (stage,) = plan_stages(config)
    except ValueError as error:
        parser.error(str(error))
    torch.manual_seed(0)
    ours = Autoencoder(config.autoencoder, config.data.channels, config.data.resolution)
    models = {"ours": ours}
    where, title = machine(device, "torch", "triton", "diffusers"), " ".join([Path(file).stem, *arguments.overrides])
    print(f"training step of {title}, batch {stage.config.train_batch_size}, on {where['hardware']}; {software(where)}")
    if importlib.util.find_spec("diffusers") is None:
        print("not installed: diffusers (pip install diffusers): ours is measured alone")
    else:
        models["diffusers"] = with_diffusers_blocks(ours)
        apart = difference(config, list(models.values()), device)
        if not apart < 1e-6:  # float32 rounds to 6e-8; the quantizer's rounding reaches loss and gradients
            sys.exit(f"the models differ: losses, samples or gradients in float64 are {apart:.1e} apart, expected less than 1e-6")
        print(f"diffusers {where['versions']['diffusers']}: the same model, float64 losses and gradients {apart:.0e} apart")
    print(HEADER, flush=True)
    steps, failed = [], []
    for name, chosen in variants(config, of_ours, arguments.layout or layouts, arguments.compile, "diffusers" in models):
        try:
            steps.append(MeasuredStep(name, chosen, models[name.split(",")[0]], device))
            print(f"{name:<36}{steps[-1].samples[0]:>11.2f}   alone", flush=True)
        except Exception as error:  # of a compiler, of a driver; the other steps are still measured
            failed.append({"step": name, "status": f"not run: {type(error).__name__}: {' '.join(str(error).split())[:300]}"})
            print(f"{name:<36}{failed[-1]['status']}", flush=True)
    if not steps:
        sys.exit("no step ran")
    for step in steps:
        step.samples.clear()  # before the turns
    start = time.perf_counter()
    for turn in itertools.count():
        if turn >= 3 and time.perf_counter() - start > arguments.seconds:
            break
        for step in steps if turn % 2 == 0 else reversed(steps):
            step.sample()
    rows = [step.row() for step in steps]
    print("\n".join(["in turns", *map(show, rows)]))
    compared = verdict(steps) if "diffusers" in models else []
    for pair in compared:
        memory = "" if pair["memory"] is None else f", {pair['memory']:.2f} x the memory (state and peak)"
        low, median, high = (f"{pair['speed'][name]:.2f}" for name in ("p20", "median", "p80"))
        print(f"{pair['ours']}: {median} ({low} to {high}) x the images/s of {pair['diffusers']}{memory}")
    append_row(arguments.json, {"config": title, "steps": rows + failed, "compared": compared, "time": now()} | where)


if __name__ == "__main__":
    main()
