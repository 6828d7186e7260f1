"""The doctor: reads the log of a training while it is written, and says in plain words what looks wrong, and what helps."""

from __future__ import annotations

import itertools
import math
import statistics
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

WINDOW = 10  # entries of the log that a tendency is seen in; fewer are noise
REMEMBERED = 4 * WINDOW
CHANCE = {"hinge": 1.0, "non_saturating": math.log(2), "least_squares": 0.25}  # a discriminator's loss if it cannot tell
PINNED = (1e-6, 0.99e4)  # the adaptive weight is clamped at 1e4


@dataclass(frozen=True)
class Warning:
    """What looks wrong at an entry of the log.

    Attributes:
        condition: in one word, the same in all runs.
        message: what was seen, what it means, what helps; one line.
    """

    condition: str
    message: str


class Doctor:
    """Reads the rows of a history one by one; each condition is reported once, until it was absent for `WINDOW` rows.

    It observes: nothing that trains knows of it. Its state is made of the rows alone, so that a resumed run, whose earlier rows
    are read again, warns as an uninterrupted one does.

    Args:
        chance: by stage, the loss of its discriminator if it cannot tell real from generated images (`CHANCE`).
    """

    def __init__(self, chance: Mapping[str, float] | None = None):
        self.chance = dict(chance or {})
        self.absent: dict[str, int] = {}  # by condition that was reported, rows since it was last seen
        self._begin(None)

    def _begin(self, stage: str | None) -> None:
        self.stage, self.rows = stage, deque[Mapping[str, Any]](maxlen=REMEMBERED)
        self.peak_usage = self.peak_perplexity = 0.0
        self.first: float | None = None
        self._begin_losses()

    def _begin_losses(self) -> None:
        self.losses, self.norms = deque[float](maxlen=REMEMBERED), deque[float](maxlen=REMEMBERED)
        self.best_loss = self.best_norm = math.inf

    def examine(self, row: Mapping[str, Any]) -> list[Warning]:
        """Warnings of the next row of the history; those of validations are passed over.

        Args:
            row: with `stage`, `split`, `step`, and for `split` train `loss`, `lr` and what `dae.training.signals` measures.
        """
        if row.get("split") != "train" or "loss" not in row:
            return []
        if row["stage"] != self.stage:
            self.absent.clear()
            self._begin(row["stage"])
        if self.rows and ("adaptive_weight" in row) != ("adaptive_weight" in self.rows[-1]):
            self._begin_losses()  # the adversarial loss begins: the others rise where it asks for it
        found = {name: words for name, check in CONDITIONS.items() if (words := check(self, row)) is not None}
        self._remember(row)
        new = [
            Warning(name, f"{self.stage}, step {row['step']}: {words}")
            for name, words in found.items()
            if name not in self.absent
        ]
        self.absent = {name: 0 if name in found else count + 1 for name, count in self.absent.items()} | dict.fromkeys(found, 0)
        self.absent = {name: count for name, count in self.absent.items() if count < WINDOW}
        return new

    def _remember(self, row: Mapping[str, Any]) -> None:
        self.rows.append(row)
        self.losses.append(row["loss"])
        self.first = row["loss"] if self.first is None else self.first
        self.peak_usage = max(self.peak_usage, row.get("code_usage", 0.0))
        self.peak_perplexity = max(self.peak_perplexity, row.get("code_perplexity", 0.0))
        if math.isfinite(norm := row.get("grad_norm", math.nan)):
            self.norms.append(norm)
        if len(self.losses) >= WINDOW:
            self.best_loss = min(self.best_loss, _median(self.losses))
        if len(self.norms) >= WINDOW:
            self.best_norm = min(self.best_norm, _median(self.norms))

    def last(self, row: Mapping[str, Any], count: int, *names: str) -> list[tuple[float, ...]] | None:
        """These numbers of the last `count` rows, this one included; None if there are fewer, or a row lacks one."""
        rows = [*self.rows, row][-count:]
        if len(rows) < count or any(name not in each for each in rows for name in names):
            return None
        return [tuple(each[name] for name in names) for each in rows]


def _median(values: Sequence[float] | deque[float]) -> float:
    return statistics.median(list(values)[-WINDOW:])


def _codebook_collapse(doctor: Doctor, row: Mapping[str, Any]) -> str | None:
    seen = doctor.last(row, 3, "code_usage", "code_perplexity")
    peaks = doctor.peak_usage, doctor.peak_perplexity
    if seen is None or not all(p < 1.1 or u < 0.02 or (3 * u < peaks[0] and 3 * p < peaks[1]) for u, p in seen):
        return None
    usage, perplexity = seen[-1]
    return (
        f"the codebook collapses: the batch uses {usage:.0%} of the codes that it could, at its best {max(usage, peaks[0]):.0%}, "
        f"as varied as {perplexity:.1f} in equal parts; lower {doctor.stage}.learning_rate, raise "
        "autoencoder.vq.revive_threshold, or take a smaller codebook"
    )


def _posterior_collapse(doctor: Doctor, row: Mapping[str, Any]) -> str | None:
    seen = doctor.last(row, WINDOW, "idle_channels", "posterior_kl")
    if seen is None or any(idle < 0.5 for idle, _ in seen):
        return None
    return (
        f"the posterior collapses: {seen[-1][0]:.0%} of the latent's channels tell nothing of an image, all of them together "
        f"{seen[-1][1]:.2g} nats; lower autoencoder.kl.kl_weight"
    )


def _dead_discriminator(doctor: Doctor, row: Mapping[str, Any]) -> str | None:
    seen = doctor.last(row, 2 * WINDOW, "discriminator_loss", "real_logit", "fake_logit")
    chance = doctor.chance.get(str(doctor.stage))
    if seen is None or chance is None:
        return None
    if any(abs(loss / chance - 1) > 0.01 or abs(real - fake) > 0.01 for loss, real, fake in seen):
        return None
    return (
        f"the discriminator is dead: its loss stays at {seen[-1][0]:.3g}, which is chance, and its logits of real and generated "
        f"images are equal; raise {doctor.stage}.loss.discriminator_learning_rate, or lower lecam and r1"
    )


def _winning_discriminator(doctor: Doctor, row: Mapping[str, Any]) -> str | None:
    seen = doctor.last(row, WINDOW, "discriminator_loss")
    chance = doctor.chance.get(str(doctor.stage))
    if seen is None or chance is None or any(loss > 0.05 * chance for (loss,) in seen):
        return None
    return (
        f"the discriminator wins: its loss has been {seen[-1][0]:.2g} or so for {WINDOW} entries of the log, where chance is "
        f"{chance:.2g}, and the decoder learns little from it; lower {doctor.stage}.loss.discriminator_learning_rate, or set r1, "
        "lecam or augment"
    )


def _adaptive_weight(doctor: Doctor, row: Mapping[str, Any]) -> str | None:
    seen = doctor.last(row, WINDOW // 2, "adaptive_weight")
    if seen is None:
        return None
    if all(weight >= PINNED[1] for (weight,) in seen):
        return (
            "the adaptive weight of the adversarial loss is pinned at its limit of 1e4: the discriminator gives the decoder "
            f"hardly any gradient; set {doctor.stage}.loss.adversarial_start later, or raise discriminator_learning_rate"
        )
    if all(weight <= PINNED[0] for (weight,) in seen):
        return (
            "the adaptive weight of the adversarial loss is all but 0: the reconstruction has no gradient beside it; raise the "
            f"weights of l1, l2 or perceptual in {doctor.stage}.loss, or lower discriminator_learning_rate"
        )
    return None


def _loss_spike(doctor: Doctor, row: Mapping[str, Any]) -> str | None:
    before = list(doctor.losses)[-2 * WINDOW :]
    if len(before) < WINDOW:
        return None
    median = statistics.median(before)
    deviation = 1.4826 * statistics.median(abs(x - median) for x in before)  # that of a Gaussian
    if row["loss"] <= max(2 * median, median + 8 * max(deviation, 0.05 * abs(median))):
        return None
    return (
        f"the loss jumps to {row['loss']:.3g}, {median:.3g} was the median of the {len(before)} entries before; if it happens "
        f"again, lower {doctor.stage}.learning_rate or max_grad_norm, and look at the data"
    )


def _learning_rate(doctor: Doctor, row: Mapping[str, Any]) -> str | None:
    losses, norms = [*doctor.losses, row["loss"]], [*doctor.norms, *([row["grad_norm"]] if "grad_norm" in row else [])]
    if len(losses) < WINDOW or row["lr"] == 0:
        return None
    recent, best, why = _median(losses), doctor.best_loss, None
    lately = losses[-2 * WINDOW :]
    rises = statistics.mean(max(0.0, b - a) for a, b in itertools.pairwise(lately))  # near 0 while it falls, however fast
    adversarial = "adaptive_weight" in row
    if recent > 0 and doctor.first is not None and not adversarial and recent > 1.2 * doctor.first:
        why = f"the loss is {recent:.3g} and was {doctor.first:.3g} at the beginning"
    elif 0 < (3 if adversarial else 1.5) * best < recent:
        why = f"the loss rises: {recent:.3g}, after {best:.3g} at its best"
    elif len(losses) >= 2 * WINDOW and 0 < recent < 2 * rises and recent > 0.8 * best:
        why = f"the loss oscillates about {recent:.3g}, between {min(lately):.3g} and {max(lately):.3g} lately"
    elif len(norms) >= 2 * WINDOW and _median(norms) > 10 * doctor.best_norm and recent > 1.1 * best > 0:
        why = f"the gradient's norm grows, from {doctor.best_norm:.3g} to {_median(norms):.3g}, and the loss with it"
    if why is None:
        return None
    remedy = f"lower {doctor.stage}.learning_rate ({row['lr']:.2g} now), or lengthen lr_warmup_steps"
    return f"the learning rate looks too high: {why}; {remedy}"


CONDITIONS: dict[str, Callable[[Doctor, Mapping[str, Any]], str | None]] = {
    "codebook_collapse": _codebook_collapse,
    "posterior_collapse": _posterior_collapse,
    "dead_discriminator": _dead_discriminator,
    "winning_discriminator": _winning_discriminator,
    "adaptive_weight": _adaptive_weight,
    "loss_spike": _loss_spike,
    "learning_rate": _learning_rate,
}
