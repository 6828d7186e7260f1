"""Training a prior on encodings: the step, the loop, and the fit of a prior without steps."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from dae.config import Config
from dae.data.cache import EncodedDataset, EncodingCache
from dae.distributed import failing_together, run_on_first_process
from dae.hub import load_weights
from dae.models import Prior
from dae.priors import PriorFamily
from dae.progress import progress_bar
from dae.training.checkpoint import Checkpoint
from dae.training.engine import Engine
from dae.training.loop import Training, is_due, validation_images

if TYPE_CHECKING:
    import numpy as np

    from dae.data import TrainLoader
    from dae.data.tensors import TensorLoader
    from dae.training.run import Run


@dataclass
class Best:
    """The weights to deliver: their step, and their held-out score, if it was measured."""

    step: int
    tensors: dict[str, Tensor]
    score: float | None = None


class PriorTraining(Training):
    """The training step of a prior.

    Args:
        family: of the prior; one that is not fitted.
        prior: on the engine's device.
        loader: batches of encodings and labels.
    """

    def __init__(self, config: Config, family: PriorFamily, prior: Prior, loader: TrainLoader | TensorLoader, engine: Engine):
        self.family, self.prior = family, prior
        prior.gradient_checkpointing = config.prior.gradient_checkpointing
        super().__init__(config, config.prior, "prior", prior, prior, loader, engine)

    def twin(self, engine: Engine) -> PriorTraining:
        config = dataclasses.replace(self.config, compile=False, cuda_graphs=False)
        return PriorTraining(config, self.family, copy.deepcopy(self.prior), self.state.loader, engine)  # type: ignore[arg-type]

    def micro_step(self, batch: dict[str, Tensor], number: int) -> Tensor:
        loss = self.family.loss(self.model, self.prior, batch)
        self.backward(loss)
        return loss.detach()


def train_by_steps(
    training: PriorTraining,
    heldout: EncodedDataset | None,
    *,
    run: Run | None = None,
    resumed: Checkpoint | None = None,
    picture: Callable[[], np.ndarray] | None = None,
    save_best: Callable[[Best], None] | None = None,
) -> Best:
    """Train. The prior ends with the returned weights: the last ones, or the best ones with `prior.early_stopping`.

    Args:
        heldout: encodings of the validations; None for none.
        run: where log and checkpoints go; None for nowhere.
        resumed: the checkpoint to go on from.
        picture: of samples, for trackers that take pictures.
        save_best: called by the first process with `prior.early_stopping`, whenever a validation was the best so far.

    Raises:
        FloatingPointError: the loss is not finite.
    """
    config, family, prior, state = training.config, training.family, training.prior, training.state
    settings, total = config.prior, config.prior.max_train_steps
    start, best = state.restore(resumed), None if resumed is None else _best_of(resumed)
    if heldout is not None:
        heldout = heldout.spread(validation_images(config, settings))
    bar = progress_bar(total, start, "prior", shown=run is not None)
    prior.train()
    for step in range(start, total):
        training.step(step)
        done = step + 1
        bar.update()
        if is_due(done, config.logging_steps, total):
            training.log(done, bar, run, done)
        if heldout is not None and is_due(done, config.validation_steps, total):
            with training.averaged():
                with failing_together():
                    score = family.score(prior, heldout, config)
                if run is not None:
                    run.record(done, {family.criterion: score}, stage="prior", split="validation")
                with failing_together():
                    if picture is not None and run is not None:
                        run.record_picture(done, "samples", picture())
                if best is None or best.score is None or score < best.score or not settings.early_stopping:
                    best = Best(done, _copied(prior.state_dict()), score)
                    if settings.early_stopping and save_best is not None:
                        run_on_first_process(functools.partial(save_best, best))
            prior.train()
        if run is not None and is_due(done, config.checkpointing_steps, total):
            tensors, rest = state.pack()
            if best is not None:
                tensors, rest = tensors | {"best": best.tensors}, rest | {"best": {"step": best.step, "score": best.score}}
            run.save(done, tensors, rest, stage="prior", stage_step=done)
    bar.close()
    if best is None:  # there was no validation, or an earlier version wrote the checkpoint
        best = Best(total, _copied((state.ema or prior).state_dict()))
    prior.load_state_dict(best.tensors)
    training.end()
    return best


def _best_of(checkpoint: Checkpoint) -> Best | None:
    """The best weights so far, which every checkpoint holds, so that a lost model can be delivered again."""
    return Best(**checkpoint.state["best"], tensors=checkpoint.tensors["best"]) if "best" in checkpoint.state else None


def _copied(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: weight.detach().cpu().clone() for name, weight in weights.items()}


def deliver(prior: Prior, best: Best, family: PriorFamily, heldout: EncodedDataset, run: Run, card: Callable[[int], str]) -> None:
    """Measure what is too slow for every validation, then save the prior. One process calls it."""
    logged, last = {(row["split"], row["step"]) for row in run.history()}, run.config.prior.max_train_steps
    if best.score is not None and ("validation", best.step) not in logged:  # the log was lost
        run.record(best.step, {family.criterion: best.score}, stage="prior", split="validation")
    if family.costly_bits and ("delivered", last) not in logged:
        bits = family.bits_per_image(prior, heldout, run.config)
        run.record(last, {family.bits_key: bits}, stage="prior", split="delivered")
    prior.save_pretrained(run.folder, card=card(best.step))


def fit_at_once(
    prior: Prior, family: PriorFamily, cache: EncodingCache, run: Run, resumed: Checkpoint | None, card: Callable[[int], str]
) -> None:
    """Fit a prior that has no steps: one fit, one log entry per split, one checkpoint; a resumed run finds it done."""
    if resumed is not None:
        load_weights(prior, resumed.tensors["model"], str(resumed.path))

    def log_fit() -> None:
        if resumed is None:
            family.fit(prior, cache, run.config)
        if not run.history():
            for split, encoded in (("train", cache.train), ("validation", cache.validation)):
                values = {family.criterion: family.score(prior, encoded, run.config)}
                run.record(1, values, stage="prior", split=split)

    run_on_first_process(log_fit)
    if resumed is None:
        run.save(1, {"model": prior.state_dict()}, {}, stage="prior", stage_step=1)
    run_on_first_process(lambda: prior.save_pretrained(run.folder, card=card(1)))
