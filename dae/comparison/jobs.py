"""The trials of a comparison: which there are, in worker processes, each saved when it is finished."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import io
import itertools
import json
import math
import multiprocessing
import os
import signal
import threading
import traceback
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Iterable, Sequence

import numpy as np
import torch

from dae.comparison.arms import Arm, parse_arms, require_matched
from dae.comparison.trial import Bench, Job, job_config, run_trial
from dae.config import RENAMED, Config, knobs
from dae.files import write_file
from dae.metrics import versions
from dae.priors import prior_family, require_guidance
from dae.quantizers import bottleneck_class


@dataclass(frozen=True)
class Outcome:
    """The result of a trial: its record, or why it diverged or failed.

    A trial that diverged is a result: it is saved, and not tried again. A failed one is tried again by the next start.
    """

    job: Job
    record: dict | None = None
    diverged: str | None = None
    failed: str | None = None

    @property
    def distance(self) -> float | None:
        """The generation distance, if there is one: that of the main prior's samples to the held-out images."""
        value = self.record["priors"][0]["frechet"] if self.record else None
        return value if value is not None and math.isfinite(value) else None


# ---- which trials there are ----


def check_comparison(config: Config) -> list[Arm]:
    """The arms of a comparison that can run.

    Raises:
        ValueError: arms that are not matched or not known, a baseline or rate arm that is not among them, seeds or learning
            rates that come twice, a tuning seed among the seeds, or rates and widths that do not fit the configuration.
    """
    compare, arms = config.compare, parse_arms(config.compare)
    names = [arm.name for arm in arms]
    require_matched(config, arms)
    if config.init_from or config.prior.init_from:
        raise ValueError("the arms of a comparison start from their seeds: set init_from=null and prior.init_from=null")
    require_guidance(config)
    family = prior_family(config)  # refuses a prior that the bottleneck has no latent for
    _require_known("baseline", [compare.baseline], names)
    if len(arms) < 2:
        raise ValueError(f"compare.arms: expected the baseline and at least one other, got only {names[0]!r}")
    _require_different("seeds", compare.seeds)
    _require_different("learning_rates", compare.learning_rates)
    if compare.prior_learning_rates:
        _require_different("prior_learning_rates", compare.prior_learning_rates)
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


def _require_different(key: str, values: Sequence[float]) -> None:
    if not values or len(set(values)) < len(values):
        raise ValueError(f"compare.{key}: expected different values, at least one, got {values}")


def _check_rates(config: Config, names: Sequence[str]) -> None:
    rates = config.compare.rates
    _require_different("rates", rates)
    _require_different("rate_arms", config.compare.rate_arms)
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
    """The rate setting of the configuration itself: its codebook size, or its KL weight."""
    return bottleneck_class(config.autoencoder).rate(config.autoencoder)


LearningRates = tuple[float, float | None]  # of the autoencoder, and of the prior if it is not the configuration's


def tried_learning_rates(config: Config) -> list[LearningRates]:
    """The pairs that each arm is tuned over; a single one tunes nothing."""
    return list(itertools.product(config.compare.learning_rates, config.compare.prior_learning_rates or [None]))


def tuning_jobs(config: Config, arms: Sequence[Arm]) -> list[Job]:
    """Every arm at every pair of learning rates, with the tuning seed; none if there is one pair only."""
    tried, seed = tried_learning_rates(config), config.compare.tuning_seed
    return [Job(a.name, seed, rate, "tune", None, prior) for rate, prior in tried for a in arms] if len(tried) > 1 else []


def chosen_learning_rates(config: Config, arms: Sequence[Arm], tuning: Sequence[Outcome]) -> dict[str, LearningRates]:
    """For each arm the learning rates with the smallest generation distance in tuning (of equals, the smaller ones).

    An arm of which a tuning trial failed is not in the answer, since it would have had fewer trials than the others; nor
    is one of which all diverged.
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
    """Every arm with every seed, then the rate arms at the further rates; seed by seed, so that early results are paired."""
    compare = config.compare

    def job(arm: str, seed: int, rate: float | None = None) -> Job:
        return Job(arm, seed, learning_rates[arm][0], rate=rate, prior_learning_rate=learning_rates[arm][1])

    own = [job(arm, seed) for seed in compare.seeds for arm in learning_rates]
    further = [(rate, arm) for rate in compare.rates for arm in arms_at_rate(config, rate) if arm in learning_rates]
    return own + [job(arm, seed, float(rate)) for seed in compare.seeds for rate, arm in further]


def arms_at_rate(config: Config, rate: float) -> list[str]:
    """The arms trained at one of `compare.rates`: all rate arms, or the baseline alone, or none if it is their own rate."""
    compare = config.compare
    if rate == own_rate(config):
        return []
    return [a for a in compare.rate_arms if a == compare.baseline or not compare.other_rates or rate in compare.other_rates]


# ---- their files ----


def trial_path(config: Config, job: Job) -> Path:
    return Path(config.output_dir) / "trials" / f"{job.key}.json"


def trial_settings(config: Config, job: Job) -> dict[str, Any]:
    """All that a trial's result depends on: its configuration by dotted keys, and the versions of the software."""
    used = ("compare.prior_widths",) if job.purpose == "measure" else ()
    leaves = _leaves(dataclasses.asdict(job_config(config, job)))
    settings = {key: value for key, value in leaves if key in used or knobs()[key].role != "free"}
    return settings | {f"versions.{name}": version for name, version in versions().items()}


def _leaves(tree: dict, prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in tree.items():
        yield from _leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else [(prefix + key, value)]


def load_trial(config: Config, job: Job) -> Outcome | None:
    """The finished trial `job`, None if it is not finished.

    Raises:
        ValueError: its file is damaged, or another configuration made it (the differing keys are listed).
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


def load_samples(config: Config, job: Job) -> np.ndarray | None:
    """The first samples of a trial, uint8 [n, H, W, C]; None if there are none."""
    path = trial_path(config, job).with_suffix(".npz")
    if not path.is_file():
        return None
    with np.load(path) as file:
        return file["arr_0"]


def save_trial(config: Config, outcome: Outcome, samples: np.ndarray | None = None) -> None:
    """Write <output_dir>/trials/<key>.json, and the samples beside it first: where there is a record, there are samples.

    Raises:
        OSError: with the path and the remedy.
        ValueError: the record holds something that JSON does not.
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


# ---- running them ----


def run_jobs(
    config: Config,
    jobs: Sequence[Job],
    *,
    prepare: Callable[[Config], Any] = Bench.prepare,
    trial: Callable[[Any, Config, Job], tuple[dict, Any]] = run_trial,
    describe: str = "trials",
    workers: Workers | None = None,
) -> list[Outcome]:
    """Run the trials that are not finished yet, `compare.processes` at a time, and return all outcomes in the order of `jobs`.

    Each trial is saved when it is done. One that raises, or whose process dies, costs itself and no other: its error is kept
    beside the trials as <key>.error.txt. FloatingPointError means that the training diverged, which is a result.

    Args:
        config: of the comparison.
        jobs: the trials.
        prepare: called once in each worker; its result is the first operand of `trial`. Module-level, as `trial`: workers are
            new Python processes that import them.
        trial: returns a record (JSON) and samples, uint8 [n, H, W, C].
        describe: what the progress bar says.
        workers: to be used again for other jobs of this comparison; None starts and ends some.

    Raises:
        ValueError: a trial in the folder belongs to another configuration; nothing was run.
        OSError: a result could not be saved; the other trials stop.
        KeyboardInterrupt: the workers are ended, the finished trials are kept.
    """
    from tqdm import tqdm

    outcomes = {job: found for job in jobs if (found := load_trial(config, job))}
    waiting = [job for job in jobs if job not in outcomes]
    with contextlib.ExitStack() as stack:
        workers = workers or stack.enter_context(Workers(config.compare.processes))
        bar = stack.enter_context(tqdm(total=len(jobs), initial=len(outcomes), desc=describe, unit="trial", smoothing=0))
        idle = list(workers.all)
        running: dict[Future, tuple[_Worker, Job]] = {}
        while waiting or running:
            while idle and waiting:
                worker, job = idle.pop(), waiting.pop(0)
                running[worker.submit(_work, prepare, trial, config, job)] = (worker, job)
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                worker, job = running.pop(future)
                outcomes[job] = _finish(config, job, future)
                if outcomes[job].failed:
                    bar.write(f"{name_of(job)} failed: {outcomes[job].failed}")
                idle.append(worker)
                bar.update()
    return [outcomes[job] for job in jobs]


def name_of(job: Job) -> str:
    """A trial in words."""
    rate = "" if job.rate is None else f", rate {job.rate:g}"
    rates = f"learning rate {learning_rates_in_words(job.learning_rate, job.prior_learning_rate)}{rate}"
    return f"{'tuning of ' if job.purpose == 'tune' else ''}{job.arm}, seed {job.seed}, {rates}"


def learning_rates_in_words(autoencoder: float | None, prior: float | None) -> str:
    """The learning rate of the autoencoder, and that of the prior if it has one of its own."""
    return "–" if autoencoder is None else f"{autoencoder:g}" + ("" if prior is None else f", of the prior {prior:g}")


def _finish(config: Config, job: Job, future: Future) -> Outcome:
    error = future.exception()
    if error is None:
        record, samples = future.result()
        outcome = Outcome(job, record)
        save_trial(config, outcome, samples)
        return outcome
    if isinstance(error, FloatingPointError):
        outcome = Outcome(job, diverged=str(error))
        save_trial(config, outcome)
        return outcome
    words = "its process died (killed from outside, or out of memory)"
    if not isinstance(error, BrokenProcessPool):
        words = f"{type(error).__name__}: {error}"
    path = trial_path(config, job).with_suffix(".error.txt")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, "".join(traceback.format_exception(error)).encode())
    return Outcome(job, failed=words)


class Workers:
    """Processes that run trials, started when they are needed; leaving the `with` block ends them, whatever they are doing."""

    def __init__(self, count: int):
        self.all = [_Worker() for _ in range(count)]

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *error: object) -> None:
        for worker in self.all:
            worker.end()


class _Worker:
    """One process that runs one trial at a time, and is replaced should it die.

    A pool of its own for each process, because a process that dies breaks its whole pool, and which trial it ran is then known.
    The process ends when the other end of `stop` is closed: by us, or by the system if we are killed.
    """

    def __init__(self) -> None:
        self.executor: ProcessPoolExecutor | None = None

    def submit(self, function: Callable, *operands: Any) -> Future:
        if self.executor is not None:
            with contextlib.suppress(BrokenProcessPool):
                return self.executor.submit(function, *operands)
            self.end()
        context = multiprocessing.get_context("spawn")  # a fork would inherit torch's threads in whatever state they are
        listener, self.stop = context.Pipe(duplex=False)
        self.executor = ProcessPoolExecutor(1, mp_context=context, initializer=_start, initargs=(listener,))
        future = self.executor.submit(function, *operands)
        listener.close()  # the process has its own
        return future

    def end(self) -> None:
        if self.executor is not None:
            self.stop.close()
            self.executor.shutdown()
            self.executor = None


_prepared: list = []  # in a worker: what `prepare` made, for all of its trials


def _start(stop: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the first process decides
    torch.set_num_threads(1)

    def end() -> None:
        stop.poll(None)
        os._exit(1)

    threading.Thread(target=end, daemon=True).start()


def _work(prepare: Callable, trial: Callable, config: Config, job: Job) -> tuple[dict, np.ndarray]:
    if not _prepared:
        _prepared.append(prepare(config))
    record, samples = trial(_prepared[0], config, job)
    return record, np.asarray(samples)
