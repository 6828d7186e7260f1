from dae.training.accelerator import end_training, make_accelerator, one_process
from dae.training.checkpoint import Checkpoint, Checkpoints
from dae.training.ema import EMA
from dae.training.optimization import build_optimizer, build_scheduler
from dae.training.run import Run
from dae.training.stages import Stage, plan_stages
from dae.training.state import TrainingState

__all__ = [
    "EMA",
    "Checkpoint",
    "Checkpoints",
    "Run",
    "Stage",
    "TrainingState",
    "build_optimizer",
    "build_scheduler",
    "end_training",
    "make_accelerator",
    "one_process",
    "plan_stages",
]
