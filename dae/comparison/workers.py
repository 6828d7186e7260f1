"""Run trials in worker processes, each saved when finished."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import traceback
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any, Callable, Iterator, Sequence

import numpy as np
import torch

from dae.comparison.jobs import Job, Outcome, load_trial, name_of, save_trial, trial_path
from dae.comparison.trial import Bench, run_trial
from dae.config import Config
from dae.files import write_file


def run_jobs(
    config: Config,
    jobs: Sequence[Job],
    *,
    prepare: Callable[[Config], Any] = Bench.prepare,
    trial: Callable[[Any, Config, Job], tuple[dict, Any]] = run_trial,
    describe: str = "trials",
    workers: list[_Worker] | None = None,
) -> list[Outcome]:
    """Run the unfinished trials, `compare.processes` at a time, and return all outcomes in the order of `jobs`.

    A trial that raises, or whose process dies, does not affect the others; its error is kept beside them as
    <key>.error.txt. FloatingPointError means that the training diverged, which is a result.

    Args:
        config: of the comparison.
        jobs: the trials.
        prepare: called once per worker; its result is the first argument of `trial`. Both must be module-level functions,
            because workers are new Python processes that import them.
        trial: returns a record (JSON) and samples, uint8 [n, H, W, C].
        describe: text of the progress bar.
        workers: from `worker_processes`, to be reused by further jobs; None starts and ends some for this call.

    Raises:
        ValueError: a trial in the folder belongs to another configuration; nothing was run.
        OSError: a result could not be saved; the other trials stop.
        KeyboardInterrupt: the workers are ended, the finished trials are kept.
    """
    from tqdm import tqdm

    outcomes = {job: found for job in jobs if (found := load_trial(config, job))}
    waiting = [job for job in jobs if job not in outcomes]
    with contextlib.ExitStack() as stack:
        workers = workers or stack.enter_context(worker_processes(config.compare.processes))
        bar = stack.enter_context(tqdm(total=len(jobs), initial=len(outcomes), desc=describe, unit="trial", smoothing=0))
        idle = list(workers)
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


def _finish(config: Config, job: Job, future: Future) -> Outcome:
    samples, error = None, future.exception()
    if error is None:
        record, samples = future.result()
        outcome = Outcome(job, record)
    elif isinstance(error, FloatingPointError):
        outcome = Outcome(job, diverged=str(error))
    else:
        path = trial_path(config, job).with_suffix(".error.txt")
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, "".join(traceback.format_exception(error)).encode())
        died = isinstance(error, BrokenProcessPool)
        words = "its process died (killed from outside, or out of memory)" if died else f"{type(error).__name__}: {error}"
        return Outcome(job, failed=words)
    save_trial(config, outcome, samples)
    return outcome


@contextlib.contextmanager
def worker_processes(count: int) -> Iterator[list[_Worker]]:
    """Worker processes, started on demand; leaving the `with` block ends them, busy or not."""
    workers = [_Worker() for _ in range(count)]
    try:
        yield workers
    finally:
        for worker in workers:
            worker.end()


class _Worker:
    """One process that runs one trial at a time and is replaced if it dies.

    One pool per process: a dying process breaks its whole pool, so this identifies its trial. The process ends when the
    other end of `stop` is closed, by us or by the system if we are killed.
    """

    def __init__(self) -> None:
        self.executor: ProcessPoolExecutor | None = None

    def submit(self, function: Callable, *operands: Any) -> Future:
        if self.executor is not None:
            with contextlib.suppress(BrokenProcessPool):
                return self.executor.submit(function, *operands)
            self.end()
        context = multiprocessing.get_context("spawn")  # a fork would inherit torch's threads in an undefined state
        listener, self.stop = context.Pipe(duplex=False)
        self.executor = ProcessPoolExecutor(1, mp_context=context, initializer=_start, initargs=(listener,))
        future = self.executor.submit(function, *operands)
        listener.close()  # the process has its own copy
        return future

    def end(self) -> None:
        if self.executor is not None:
            self.stop.close()
            self.executor.shutdown()
            self.executor = None


_prepared: list = []  # in a worker: the result of `prepare`, for all its trials


def _start(stop: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
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
