"""Compare ways to train the encoder: all arms at equal steps, paired by seed, and at equal rate, with intervals.

    python recipes/compare.py --config recipes/configs/digits.yaml output_dir=runs/compare
    python recipes/compare.py --config recipes/configs/digits.yaml output_dir=runs/small \\
        compare.arms=[joint,dae-linear] compare.seeds=[0,1,2] compare.learning_rates=[4e-3] compare.rates=[16,32,128]

First every arm, the baseline too, tries each of compare.learning_rates once, with compare.tuning_seed and on images held out of
the training set. Then every arm is trained with every seed at its best rate, and compare.rate_arms also at compare.rates (arms
other than the baseline only at compare.other_rates, if given). Each trial trains autoencoder and prior, draws samples and
measures; compare.processes of them run at a time, with one CPU thread each. Each is saved when finished: the same command
resumes a stopped comparison. Another configuration is refused.
Writes <output_dir>: compare.html (the answer, in words and pictures), compare.png, compare.json, compare.md (the table of all
arms), trials/<trial>.json and .npz (samples), and bench/ (the classifier of the feature metrics).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, Callable

import numpy as np

from dae.cli import main
from dae.comparison.jobs import (
    Outcome,
    check_comparison,
    chosen_learning_rates,
    load_trial_samples,
    measuring_jobs,
    name_of,
    trial_path,
    tuning_jobs,
)
from dae.comparison.results import summarize_comparison
from dae.comparison.trial import Bench, run_trial
from dae.comparison.workers import run_jobs, worker_processes
from dae.config import Config, save_config
from dae.data.pictures import to_uint8
from dae.files import announce, replaced_files, write_file
from dae.lock import writes
from dae.reporting.comparison import ABOUT, write_comparison
from dae.reporting.findings import answer_lines, results_markdown

ARMS = "\narms of compare.arms:\n" + "".join(f"  {name:<16} {words}\n" for name, words in ABOUT.items())
SHOWN = 12


@writes("comparison", makes_folder=True)
def compare(config: Config, prepare: Callable[[Config], Any] = Bench.prepare, trial: Callable = run_trial) -> Path:
    """Run the comparison and write its page; returns the path of the page. `prepare` and `trial` as in `run_jobs`."""
    arms = check_comparison(config)
    folder = Path(config.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    bench = prepare(config)  # first in this process: it shows the user's errors and caches the classifier for the workers
    try:
        with worker_processes(config.compare.processes) as workers:
            work = {"prepare": prepare, "trial": trial, "workers": workers}
            tuning = run_jobs(config, tuning_jobs(config, arms), describe="tuning", **work)
            learning_rates = chosen_learning_rates(config, arms, tuning)
            measured = run_jobs(config, measuring_jobs(config, learning_rates), describe="measuring", **work)
    except KeyboardInterrupt:
        print(f"\nstopped; finished trials are in {folder / 'trials'}, the same command goes on from there", file=sys.stderr)
        sys.exit(130)

    summary = summarize_comparison(config, bench.facts(), tuning + measured)
    with replaced_files(folder) as new:
        save_config(config, new / "compare.yaml")
        write_file(new / "compare.json", json.dumps(summary, indent=1, allow_nan=False).encode())
        write_file(new / "compare.md", results_markdown(summary).encode())
        path = folder / write_comparison(config, summary, pictures(config, bench, measured), new).name
    for title, rows in (("equal steps", summary["differences"]), ("equal rate", summary["equal_rate"])):
        if rows:
            print("\n".join([f"At {title}:", *answer_lines(summary, rows["frechet"])]))
    names = ["compare.html", "compare.png", "compare.json", "compare.md"]
    announce(folder, [*names, "compare.yaml"], f": {', '.join(names)}")
    if failed := [o for o in tuning + measured if o.failed]:
        listed = "; ".join(f"{name_of(o.job)}: {o.failed}" for o in failed)
        raise RuntimeError(
            f"{len(failed)} of {len(tuning + measured)} trials failed ({listed}). The page leaves them out and says so; their "
            f"tracebacks are {trial_path(config, failed[0].job).parent}/*.error.txt; the same command tries them again"
        )
    return path


def pictures(config: Config, bench: Any, measured: list[Outcome]) -> dict[str, np.ndarray]:
    """Real images, and samples of each arm with the first seed at the configuration's own rate."""
    rows = {"real images": to_uint8(bench.measure.heldout[:SHOWN])}
    for outcome in measured:
        if outcome.job.seed == config.compare.seeds[0] and outcome.job.rate is None:
            images = load_trial_samples(config, outcome.job)
            rows |= {} if images is None else {outcome.job.arm: images[:SHOWN]}
    return rows


if __name__ == "__main__":
    main(compare, __doc__ + ARMS)
