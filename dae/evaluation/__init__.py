"""Evaluation of samples and reconstructions; inputs from a finished run are in `dae.evaluation.finished`."""

from dae.evaluation.extractor import prediction_task, train_extractor
from dae.evaluation.judge import Judge
from dae.evaluation.reconstruction import describe_latent, reconstruct

__all__ = ["Judge", "describe_latent", "prediction_task", "reconstruct", "train_extractor"]
