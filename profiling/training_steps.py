"""Training steps of dae/training for measurements: with all losses on, on random images if no data set is given."""

import dataclasses
import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from dae.config import Config
from dae.losses import PerceptualLoss
from dae.models import Autoencoder
from dae.training import Stage
from dae.training.autoencoder import StageTraining, build_perceptual_loss
from dae.training.engine import LocalEngine
from dae.training.prior import PriorTraining


class TrainingStep:
    """A training step to call repeatedly."""

    def __init__(self, training: StageTraining | PriorTraining):
        self.training, self.number = training, 0

    def __call__(self) -> Tensor:
        """Run the step; returns the loss of the last micro-batch."""
        self.training.step(self.number)
        self.number += 1
        loss = self.training.state.losses[-1]
        self.training.state.losses.clear()
        return loss


def stage_training(
    config: Config, stage: Stage, autoencoder: Autoencoder, engine: LocalEngine, data: Any = None
) -> StageTraining:
    """The training of a stage, with the adversarial loss on from the first step and no codebook initialisation.

    Without `data` the images are random, and so are the perceptual loss's weights, which cost the same as trained ones.
    """
    loss = dataclasses.replace(stage.config.loss, adversarial_start=0)
    stage = dataclasses.replace(stage, config=dataclasses.replace(stage.config, loss=loss))
    if data is None:
        torch.manual_seed(0)
        perceptual = PerceptualLoss() if loss.perceptual else None
    else:
        perceptual = build_perceptual_loss(config, stage)

    def loaders(stage: Stage, _: str) -> Any:
        if data is None:
            return synthetic_images(config, stage)
        from dae.data import TrainLoader

        return TrainLoader(data.train, stage.config.train_batch_size, seed=0, num_workers=config.data.num_workers)

    autoencoder = autoencoder.to(engine.device).train()
    if stage.latent_frozen:
        autoencoder.freeze_latent()
    return StageTraining(config, stage, autoencoder, loaders, engine, perceptual, new_codebook=False)


def synthetic_images(config: Config, stage: Stage) -> Iterator[dict]:
    """Endless repetition of the same random images, as drawing them is not part of the step."""
    shape = (stage.config.train_batch_size, config.data.channels, config.data.resolution, config.data.resolution)
    return itertools.repeat({"image": torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 2 - 1})


def state_bytes(training: StageTraining | PriorTraining) -> dict[str, int]:
    """Bytes kept between steps: weights and buffers, optimiser state, average of the weights."""
    state, kind = training.state, training.engine.device.type

    def count(tensors: Iterable[Tensor]) -> int:
        return sum({t.data_ptr(): t.numel() * t.element_size() for t in tensors if t.device.type == kind}.values())

    modules = [*state.modules.values(), *filter(None, [getattr(training, "perceptual", None)])]
    moments = [entry for optimizer in state.optimizers.values() for entry in optimizer.state.values()]
    return {
        "weights": count(t for m in modules for t in itertools.chain(m.parameters(), m.buffers())),
        "optimisers": count(t for entry in moments for t in entry.values() if isinstance(t, Tensor)),
        "average": count(state.ema.state_dict().values()) if state.ema else 0,
    }
