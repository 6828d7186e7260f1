"""Where the time of a training step goes: data, forward, backward, optimiser; for each stage and the prior.

    python profiling/step_time.py --config recipes/configs/digits.yaml
    python profiling/step_time.py --config recipes/configs/digits.yaml stage1.train_batch_size=128 mixed_precision=bf16

Medians over 20 steps after 5 of warm-up, on synthetic tokens for the prior. Figures of different machines, or of one machine
under different load, do not compare; ratios within one run do.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import platform
import statistics
import time
from collections.abc import Callable

import torch

from dae.config import Config, config_from_command_line
from dae.data import TrainLoader, load_data
from dae.losses import reconstruction_loss
from dae.models import ARPrior, Autoencoder
from dae.training import build_optimizer, plan_stages

WARM_UP, STEPS = 5, 20


def measure(data: Callable, forward: Callable, optimizer: torch.optim.Optimizer, device: torch.device) -> dict[str, float]:
    """Median milliseconds of each part of a step."""

    def clock() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    rows = []
    for _ in range(WARM_UP + STEPS):
        marks = [clock()]
        batch = data()
        marks.append(clock())
        loss = forward(batch)
        marks.append(clock())
        loss.backward()
        marks.append(clock())
        optimizer.step()
        optimizer.zero_grad()
        marks.append(clock())
        rows.append([1000 * (b - a) for a, b in itertools.pairwise(marks)])
    medians = [statistics.median(column) for column in zip(*rows[WARM_UP:], strict=True)]
    return dict(zip(("data", "forward", "backward", "optimizer"), medians, strict=True))


def profile(config: Config) -> dict:
    """Time every stage and the prior; print a table and return it."""
    device = torch.device(torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu")
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(config.mixed_precision or "no")
    images = load_data(config.data, config.seed)
    table = {}
    for stage in plan_stages(config):
        architecture = dataclasses.replace(config.autoencoder, decoder=stage.decoder)
        autoencoder = Autoencoder(architecture, config.data.channels, config.data.resolution).to(device).train()
        if stage.latent_frozen:
            autoencoder.freeze_latent()
        optimizer = build_optimizer(autoencoder, stage.config)
        batches = iter(TrainLoader(images.train, stage.config.train_batch_size, seed=0, num_workers=config.data.num_workers))

        def forward(x: torch.Tensor, model: Autoencoder = autoencoder, stage=stage) -> torch.Tensor:
            with torch.autocast(device.type, dtype, enabled=dtype is not None):
                with torch.set_grad_enabled(not stage.latent_frozen):
                    encoding = model.encode(x, sample_posterior=True)
                sample = model.decode(encoding.latents).sample
            return reconstruction_loss(sample, x, stage.config.loss) + (0 if stage.latent_frozen else encoding.loss)

        times = measure(lambda b=batches: next(b)["image"].to(device), forward, optimizer, device)
        table[stage.name] = {"batch": stage.config.train_batch_size} | times

    if config.autoencoder.bottleneck == "vq":
        size = autoencoder.latent_size**2
        prior = ARPrior(
            config.prior, vocab_size=config.autoencoder.vq.codebook_size, sequence_length=size, num_classes=images.num_classes
        )
        prior.to(device).train()
        tokens = torch.randint(prior.vocab_size, (config.prior.train_batch_size, size), device=device)
        labels = torch.randint(prior.num_classes, (len(tokens),), device=device)

        def prior_forward(_: None) -> torch.Tensor:
            with torch.autocast(device.type, dtype, enabled=dtype is not None):
                return prior(labels, tokens[:, :-1], targets_BT=tokens)

        optimizer = build_optimizer(prior, config.prior)
        table["prior"] = {"batch": len(tokens)} | measure(lambda: None, prior_forward, optimizer, device)

    cpu = f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    name = torch.cuda.get_device_name() if device.type == "cuda" else cpu
    print(f"{name}, torch {torch.__version__}; milliseconds, medians of {STEPS}")
    print(f"{'':<8}{'batch':>7}{'data':>10}{'forward':>10}{'backward':>10}{'optimizer':>10}{'images/s':>10}")
    for row, times in table.items():
        parts = [times[k] for k in ("data", "forward", "backward", "optimizer")]
        times["images_per_second"] = times["batch"] / sum(parts) * 1000
        print(f"{row:<8}{times['batch']:>7}" + "".join(f"{p:>10.2f}" for p in parts) + f"{times['images_per_second']:>10.0f}")
    print(json.dumps(table))
    return table


if __name__ == "__main__":
    profile(config_from_command_line(__doc__))
