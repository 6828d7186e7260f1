"""Training steps of `dae.planning.trainings` to call repeatedly, and the bytes that they keep."""

import itertools
from collections.abc import Iterable

from torch import Tensor

from dae.training.autoencoder import StageTraining
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
