"""Try a whole chain before its first model is trained: two images through every model, and counts of rows.

A mistake in the settings of the prior, of sampling or of the evaluation would else show after hours, in a later recipe.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from dae.config import Config
from dae.data.cache import Fingerprint
from dae.data.columns import resolve_classes
from dae.distributed import as_single_process, world_size
from dae.losses import PerceptualLoss, discriminator_loss, gradient_penalty
from dae.models import Autoencoder, choose_kernels
from dae.priors import prior_family
from dae.quantizers import bottleneck_class
from dae.training.adversary import build_discriminator
from dae.training.autoencoder import build_autoencoder, build_perceptual_loss
from dae.training.encodings import build_cache, cache_class
from dae.training.engine import Engine
from dae.training.graphs import check_cuda_graphs
from dae.training.stages import Stage, plan_stages

Autocast = Callable[[], AbstractContextManager]
CLASSIFIER_PIXELS = 8  # a side of the smallest image that `dae.metrics.Classifier` takes


def rehearse_chain(config: Config, num_classes: int, rows: int | None, engine: Engine, processes: int = 1) -> None:
    """Try autoencoder and prior before anything is trained: `rehearse_autoencoder`, `require_batches`, `rehearse_prior`."""
    autoencoder = rehearse_autoencoder(config, rows, engine)
    require_batches(config, rows, processes)
    rehearse_prior(config, autoencoder, num_classes, rows, engine.autocast)


def rehearse_autoencoder(config: Config, rows: int | None, engine: Engine) -> Autoencoder:
    """Try all stages of `config.method` before the first one is trained, see `rehearse_stage`.

    Args:
        rows: of the training set; None is not known.
        engine: where the training will compute.

    Returns:
        The autoencoder of the last stage, untrained.

    Raises:
        ValueError, TypeError, ImportError: what a model, a loss or a kernel refuses, or fewer `rows` than a batch.
    """
    for stage in plan_stages(config):
        check_cuda_graphs(config, engine.device, world_size(), **{stage.name: stage.config})
        if rows is not None and rows < (batch := stage.config.train_batch_size):
            raise ValueError(f"{stage.name}: the training set has {rows} rows, fewer than one batch of {batch}; make it smaller")
        with torch.random.fork_rng(devices=[]):
            autoencoder = build_autoencoder(config, stage).to(engine.device)
        rehearse_stage(config, stage, autoencoder, build_perceptual_loss(config, stage), engine.autocast)
    return autoencoder


def rehearse_stage(config: Config, stage: Stage, autoencoder: Autoencoder, perceptual: PerceptualLoss | None, autocast: Autocast):
    """Send two images (one if the batch is one) forward and backward through a stage, with its kernels, precision and losses.

    And through the model once more in float32, as later recipes encode and decode.

    Args:
        autoencoder: of the stage, untrained, on its device; it is changed.
        perceptual: of the stage.
        autocast: context in which the training computes.

    Raises:
        ValueError, TypeError, ImportError: what a model, a loss or a kernel refuses.
    """
    loss, device = stage.config.loss, autoencoder.device
    with _rehearsal(config, device, f"the autoencoder ({stage.name})"):
        choose_kernels(autoencoder, config.kernels)
        size = (min(2, stage.config.train_batch_size), config.data.channels, config.data.resolution, config.data.resolution)
        images = torch.rand(size, device=device) * 2 - 1
        with autocast():
            output = autoencoder.train()(images)
            total = output.sample.float().square().mean() + output.encoding.loss
            if perceptual is not None:
                choose_kernels(perceptual.to(device), config.kernels)
                total = total + perceptual(output.sample, images).mean()
            if loss.adversarial > 0:
                discriminator = build_discriminator(config, loss, device)
                real, fake = discriminator(images), discriminator(output.sample)
                total = total + discriminator_loss(real, fake, loss.adversarial_loss)
                if loss.r1 > 0:
                    total = total + gradient_penalty(discriminator, images)
        total.backward()
        with torch.inference_mode():
            autoencoder.eval()(images)


def rehearse_prior(config: Config, autoencoder: Autoencoder, num_classes: int, rows: int | None, autocast: Autocast) -> None:
    """Try the settings of prior and sampling on one encoded image, with one block of the prior.

    Args:
        autoencoder: of the chain's last stage, as `rehearse_stage` leaves it.
        num_classes: of the data.
        rows: that the prior will be trained on; None is not known.
        autocast: context in which the training computes.

    Raises:
        ValueError, TypeError, ImportError: what the prior or a kernel refuses, or too few rows.
    """
    family, settings, device = prior_family(config), config.prior, autoencoder.device
    if config.sampling.cuda_graphs and device.type != "cuda":
        raise ValueError(f"sampling.cuda_graphs=true needs a CUDA device, this run is on {device.type}; leave it out")
    family.require_rows(config, autoencoder, rows)
    if family.fitted:
        return
    check_cuda_graphs(config, device, world_size(), prior=settings)
    with _rehearsal(config, device, f"the prior ({family.name})"):
        encoded = cache_class(autoencoder.bottleneck).dataset(*_encoding(config, autoencoder))
        cache = build_cache(autoencoder, encoded, encoded, num_classes, Fingerprint("", "", ""))
        prior = family.build(dataclasses.replace(settings, depth=1), cache).to(device)
        choose_kernels(prior, config.kernels)
        batch = {encoded.name: encoded.values_NC.to(device, encoded.given), "label": encoded.labels_N.to(device)}
        with autocast():
            loss = family.loss(prior.train(), prior, batch)
        loss.backward()
        with torch.inference_mode():
            family.score(prior.eval(), encoded, config)
            family.rehearse(prior, batch)


def sampled_classes(config: Config, class_names: list[str], labels: list | None) -> list[int]:
    """Numbers of the classes that `sampling.classes` names, none for all. ValueError: unknown, or the prior knows no classes."""
    if config.sampling.classes and prior_family(config).fitted:
        raise ValueError(f"sampling.classes={config.sampling.classes}: a mixture knows no classes; leave it out")
    return resolve_classes(config.sampling.classes, class_names, labels)


def require_batches(config: Config, rows: int | None, processes: int) -> None:
    """ValueError if `rows` training rows (None: unknown) are fewer than a global batch of the prior."""
    batch = config.prior.train_batch_size * processes
    if rows is not None and rows < batch and not prior_family(config).fitted:
        raise ValueError(
            f"prior.train_batch_size={config.prior.train_batch_size} x {processes} processes: the training set has {rows} rows, "
            "fewer than one global batch; make the batch smaller"
        )


def require_measurable(config: Config, **images: int | None) -> None:
    """ValueError if recipes/evaluate.py cannot measure on so many `images` (by name; None is not known), or of this size."""
    if (resolution := config.data.resolution) < CLASSIFIER_PIXELS:
        raise ValueError(
            f"data.resolution={resolution}: the classifier whose features the metrics use takes images from "
            f"{CLASSIFIER_PIXELS} x {CLASSIFIER_PIXELS} pixels; choose data.resolution={CLASSIFIER_PIXELS} or more"
        )
    neighbours, limit = config.evaluation.neighbours, config.evaluation.max_images
    needed = max(2, neighbours + 1)
    for name, count in images.items():
        if count is not None and (count := min(count, limit)) < needed:
            what = name.replace("_", " ")
            lower = f", or evaluation.neighbours={count - 1}" if count > 1 else ""
            raise ValueError(
                f"precision and recall of evaluation.neighbours={neighbours} need at least {needed} {what}, got {count}: "
                f"give more{lower}"
            )


def _encoding(config: Config, autoencoder: Autoencoder) -> tuple[Tensor, Tensor]:
    """Random encodings as recipes/encode.py would cache them of two images: [2, 1, ...] and labels [2]."""
    side, bottleneck = autoencoder.latent_size, bottleneck_class(config.autoencoder)
    if bottleneck.discrete:
        return torch.randint(bottleneck.num_codes(config.autoencoder), (2, 1, side**2)), torch.zeros(2, dtype=torch.int64)
    return torch.randn(2, 1, 2 * config.autoencoder.latent_channels, side, side), torch.zeros(2, dtype=torch.int64)


@contextlib.contextmanager
def _rehearsal(config: Config, device: torch.device, what: str) -> Iterator[None]:
    """Keeps the global random state, and waits for no other process; a refusal says which model of the chain it concerns."""
    fork = torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])
    try:
        with fork, torch.enable_grad(), as_single_process():
            yield
    except (ValueError, TypeError, ImportError) as error:
        chosen = {key: value for key, value in dataclasses.asdict(config.kernels).items() if value not in ("auto", "reference")}
        knobs = f" with {', '.join(f'kernels.{key}={value}' for key, value in chosen.items())}" if chosen else ""
        kind = next(kind for kind in (ValueError, TypeError, ImportError) if isinstance(error, kind))
        raise kind(f"{what} cannot run{knobs}: {' '.join(str(error).split())}") from error
