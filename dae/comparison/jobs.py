"""The trials of a comparison: checks before any runs, the list of jobs, and the files with their outcomes."""

from __future__ import annotations

import dataclasses
import difflib
import io
import itertools
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Sequence

import numpy as np

from dae.comparison.arms import Arm, arm_config, parse_arms, require_matched
from dae.config import RENAMED, CompareConfig, Config
from dae.config.knobs import leaves
from dae.files import write_file
from dae.metrics import versions
from dae.priors import prior_family, require_guidance
from dae.quantizers import bottleneck_class


@dataclass(frozen=True)
class Job:
    """One trial of a comparison.

    Args:
        learning_rate: for both stages of the autoencoder.
        purpose: "measure" on the held-out images, or "tune" on images held out of the training set.
        rate: codebook size (vq) or KL weight (kl), if other than the configuration's.
        prior_learning_rate: for the prior, if other than the configuration's.
    """

    arm: str
    seed: int
    learning_rate: float
    purpose: str = "measure"
    rate: float | None = None
    prior_learning_rate: float | None = None

    @property
    def key(self) -> str:
        prior = "" if self.prior_learning_rate is None else f"-prior{self.prior_learning_rate:g}"
        rate = "" if self.rate is None else f"-rate{self.rate:g}"
        return f"{self.purpose}-{self.arm}-seed{self.seed}-lr{self.learning_rate:g}{prior}{rate}"


def job_config(config: Config, job: Job) -> Config:
    """The configuration that `job` trains. ValueError: no such arm."""
    arms = {arm.name: arm for arm in parse_arms(config.compare)}
    if job.arm not in arms:
        raise ValueError(f"no arm {job.arm!r} in this comparison; it has {', '.join(arms)}")
    overrides = [f"seed={job.seed}", *(f"{stage}.learning_rate={job.learning_rate!r}" for stage in ("stage1", "stage2"))]
    if job.prior_learning_rate is not None:
        overrides.append(f"prior.learning_rate={job.prior_learning_rate!r}")
    if job.rate is not None:
        bottleneck = bottleneck_class(config.autoencoder)
        overrides.append(f"{bottleneck.rate_knob}={int(job.rate) if bottleneck.discrete else job.rate!r}")
    return arm_config(config, arms[job.arm], *overrides)


def name_of(job: Job) -> str:
    """A readable name of a trial."""
    rate = "" if job.rate is None else f", rate {job.rate:g}"
    rates = f"learning rate {learning_rates_in_words(job.learning_rate, job.prior_learning_rate)}{rate}"
    return f"{'tuning of ' if job.purpose == 'tune' else ''}{job.arm}, seed {job.seed}, {rates}"


def learning_rates_in_words(autoencoder: float | None, prior: float | None) -> str:
    """The learning rate of the autoencoder, and the prior's if it is set separately."""
    return "–" if autoencoder is None else f"{autoencoder:g}" + ("" if prior is None else f", of the prior {prior:g}")


@dataclass(frozen=True)
class Outcome:
    """The result of a trial: its record, or why it diverged or failed.

    A trial that diverged is a result: it is saved and not repeated. A failed one is repeated at the next start.
    """

    job: Job
    record: dict | None = None
    diverged: str | None = None
    failed: str | None = None

    @property
    def distance(self) -> float | None:
        """Distance of the main prior's samples to the held-out images, if there is one."""
        value = self.record["priors"][0]["frechet"] if self.record else None
        return value if value is not None and math.isfinite(value) else None


# ---- which trials there are ----


def check_comparison(config: Config) -> list[Arm]:
    """Check a comparison before anything runs, and return its arms.

    Raises:
        ValueError: unmatched or unknown arms, a baseline or rate arm that is not among them, repeated seeds or learning
            rates, a tuning seed among the seeds, or rates and widths that do not fit the configuration.
    """
    compare, arms = config.compare, parse_arms(config.compare)
    names = [arm.name for arm in arms]
    require_matched(config, arms)
    if config.init_from or config.prior.init_from:
        raise ValueError("the arms of a comparison start from their seeds: set init_from=null and prior.init_from=null")
    require_guidance(config)
    family = prior_family(config)  # raises for a prior that does not fit the bottleneck's latent
    _require_known("baseline", [compare.baseline], names)
    if len(arms) < 2:
        raise ValueError(f"compare.arms: expected the baseline and at least one other, got only {names[0]!r}")
    _require_different(compare, "seeds", "learning_rates")
    if compare.prior_learning_rates:
        _require_different(compare, "prior_learning_rates")
        if family.fitted:
            raise ValueError("compare.prior_learning_rates: a mixture is fitted without a learning rate; leave them empty")
    if len(tried_learning_rates(config)) > 1 and compare.tuning_seed in compare.seeds:
        raise ValueError(
            f"compare.tuning_seed={compare.tuning_seed} is among compare.seeds={compare.seeds}: a learning rate chosen on a seed "
            "favours it; take another"
        )
    if compare.rates:
        _check_rates(config, names)
    unit = family.head_unit * config.prior.num_heads
    if unit and (odd := [w for w in (config.prior.width, *compare.prior_widths) if w % unit]):
        raise ValueError(
            f"prior.width and compare.prior_widths: {odd} are no multiples of {unit}, which {family.name} needs for "
            f"prior.num_heads={config.prior.num_heads}"
        )
    return arms


def _require_known(key: str, wanted: Sequence[str], names: Sequence[str]) -> None:
    for name in wanted:
        if name not in names:
            near = difflib.get_close_matches(name, names, 1, 0.0)[0]
            raise ValueError(f"compare.{key}: no arm {name!r} among compare.arms {list(names)}; the nearest one is {near!r}")


def _require_different(compare: CompareConfig, *keys: str) -> None:
    for key in keys:
        values = getattr(compare, key)
        if not values or len(set(values)) < len(values):
            raise ValueError(f"compare.{key}: expected different values, at least one, got {values}")


def _check_rates(config: Config, names: Sequence[str]) -> None:
    rates = config.compare.rates
    _require_different(config.compare, "rates", "rate_arms")
    _require_known("rate_arms", config.compare.rate_arms, names)
    if config.compare.baseline not in config.compare.rate_arms:
        raise ValueError(
            f"compare.rate_arms: {config.compare.rate_arms} lacks the baseline {config.compare.baseline!r}, whose frontier the "
            "others are held against at equal rate; add it, or leave compare.rates empty"
        )
    bottleneck_class(config.autoencoder).check_rates(rates)
    if strange := [rate for rate in config.compare.other_rates if rate not in rates]:
        raise ValueError(f"compare.other_rates: {strange[0]:g} is not among compare.rates={rates}")


def own_rate(config: Config) -> float:
    """The configuration's own rate setting: codebook size or KL weight."""
    return bottleneck_class(config.autoencoder).rate(config.autoencoder)


LearningRates = tuple[float, float | None]  # the autoencoder's, and the prior's if other than the configuration's


def tried_learning_rates(config: Config) -> list[LearningRates]:
    """The pairs over which each arm is tuned; with a single pair there is no tuning."""
    of_prior: list[float | None] = [*config.compare.prior_learning_rates] or [None]
    return list(itertools.product(config.compare.learning_rates, of_prior))


def tuning_jobs(config: Config, arms: Sequence[Arm]) -> list[Job]:
    """Every arm at every pair of learning rates, with the tuning seed; empty if there is only one pair."""
    tried, seed = tried_learning_rates(config), config.compare.tuning_seed
    return [Job(a.name, seed, rate, "tune", None, prior) for rate, prior in tried for a in arms] if len(tried) > 1 else []


def chosen_learning_rates(config: Config, arms: Sequence[Arm], tuning: Sequence[Outcome]) -> dict[str, LearningRates]:
    """Per arm the learning rates with the smallest generation distance in tuning (on ties, the smaller ones).

    An arm is missing if one of its tuning trials failed, since it would have had fewer trials than the others, or if all
    of them diverged.
    """
    if len(tried := tried_learning_rates(config)) == 1:
        return {arm.name: tried[0] for arm in arms}
    chosen = {}
    for arm in arms:
        mine = [o for o in tuning if o.job.arm == arm.name]
        finite = [(o.distance, o.job.learning_rate, o.job.prior_learning_rate) for o in mine if o.distance is not None]
        if finite and not any(o.failed for o in mine):
            chosen[arm.name] = min(finite)[1:]
    return chosen


def measuring_jobs(config: Config, learning_rates: dict[str, LearningRates]) -> list[Job]:
    """Every arm with every seed, then the rate arms at the further rates; ordered by seed, so that early results pair."""
    compare = config.compare

    def job(arm: str, seed: int, rate: float | None = None) -> Job:
        return Job(arm, seed, learning_rates[arm][0], rate=rate, prior_learning_rate=learning_rates[arm][1])

    own = [job(arm, seed) for seed in compare.seeds for arm in learning_rates]
    further = [(rate, arm) for rate in compare.rates for arm in arms_at_rate(config, rate) if arm in learning_rates]
    return own + [job(arm, seed, float(rate)) for seed in compare.seeds for rate, arm in further]


def arms_at_rate(config: Config, rate: float) -> list[str]:
    """The arms to train at one of `compare.rates`: all rate arms, or only the baseline; none at the configuration's rate."""
    compare = config.compare
    if rate == own_rate(config):
        return []
    return [a for a in compare.rate_arms if a == compare.baseline or not compare.other_rates or rate in compare.other_rates]


# ---- their files ----


def trial_path(config: Config, job: Job) -> Path:
    return Path(config.output_dir) / "trials" / f"{job.key}.json"


def trial_settings(config: Config, job: Job) -> dict[str, Any]:
    """Everything that a trial's result depends on: its configuration by dotted keys, and the versions of the software."""
    used = ("compare.prior_widths",) if job.purpose == "measure" else ()
    settings = {leaf.key: leaf.value for leaf in leaves(job_config(config, job)) if leaf.key in used or leaf.role != "free"}
    return settings | {f"versions.{name}": version for name, version in versions().items()}


def load_trial(config: Config, job: Job) -> Outcome | None:
    """The outcome of `job`, or None if it is not finished.

    Raises:
        ValueError: its file is damaged, or made with another configuration (the differing keys are listed).
    """
    path = trial_path(config, job)
    if not path.is_file():
        return None
    try:
        saved = json.loads(path.read_text())
        settings = {RENAMED.get(key, key): value for key, value in saved["settings"].items()}
        record, diverged = saved["record"], saved["diverged"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged ({error}): delete it to run the trial again") from error
    wanted = json.loads(json.dumps(trial_settings(config, job)))
    keys = sorted(key for key in settings.keys() | wanted.keys() if settings.get(key, ...) != wanted.get(key, ...))
    if keys:
        listed = "; ".join(f"{key}: {settings.get(key)!r} -> {wanted.get(key)!r}" for key in keys)
        raise ValueError(f"{path} was made by another configuration: {listed}. Choose another output_dir, or delete the trials")
    for prior in (record or {}).get("priors", ()):
        if "copies" in prior:  # its name in earlier versions
            prior["memorised"] = prior.pop("copies")
    return Outcome(job, record, diverged)


def load_trial_samples(config: Config, job: Job) -> np.ndarray | None:
    """The first samples of a trial, uint8 [n, H, W, C]; None if there are none."""
    path = trial_path(config, job).with_suffix(".npz")
    if not path.is_file():
        return None
    with np.load(path) as file:
        return file["arr_0"]


def save_trial(config: Config, outcome: Outcome, samples: np.ndarray | None = None) -> None:
    """Write the samples, then <output_dir>/trials/<key>.json, so that every record has its samples.

    Raises:
        OSError: writing failed; names the path and the remedy.
        ValueError: the record is not valid JSON.
    """
    path = trial_path(config, outcome.job)
    path.parent.mkdir(parents=True, exist_ok=True)
    if samples is not None:
        file = io.BytesIO()
        np.savez_compressed(file, arr_0=samples)
        write_file(path.with_suffix(".npz"), file.getvalue())
    content = {
        "job": dataclasses.asdict(outcome.job),
        "settings": trial_settings(config, outcome.job),
        "diverged": outcome.diverged,
        "record": outcome.record,
    }
    write_file(path, json.dumps(content, indent=1).encode())
    path.with_suffix(".error.txt").unlink(missing_ok=True)
