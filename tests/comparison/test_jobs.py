"""Which trials there are, what is refused before any, and that each is saved, skipped, named or retried as it should be."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from dae.comparison.arms import parse_arms
from dae.comparison.jobs import (
    Job,
    Outcome,
    check_comparison,
    chosen_learning_rates,
    job_config,
    load_trial,
    load_trial_samples,
    measuring_jobs,
    name_of,
    own_rate,
    save_trial,
    trial_path,
    tuning_jobs,
)
from dae.comparison.workers import run_jobs
from dae.config import load_config

ROOT = Path(__file__).parents[2]
SMALL = ("compare.arms=[joint,weak,dae-linear]", "compare.seeds=[0,1]", "compare.processes=2")


def configure(folder, *overrides):
    return load_config(None, [f"output_dir={folder}", *SMALL, *overrides])


def prepare(config):
    """A bench that counts how often it was made."""
    with open(Path(config.output_dir) / "prepared.txt", "a") as file:
        file.write(f"{os.getpid()}\n")
    return "bench"


def trial(bench, config, job):
    assert bench == "bench"
    folder = Path(config.output_dir)
    with open(folder / "ran.txt", "a") as file:
        file.write(f"{job.key}\n")
    if (folder / "slow").exists():
        (folder / f"started-{job.seed}").touch()
        time.sleep(600)
    if job.arm == "weak" and job.seed == 1:
        raise FloatingPointError("loss is nan at step 7")
    if job.arm == "dae-linear" and job.seed == 0 and not (folder / "mended").exists():
        raise KeyError("a bug")
    if job.arm == "joint" and job.seed == 1 and not (folder / "mended").exists():
        os._exit(9)
    return dataclasses.asdict(job) | {"priors": [{"frechet": job.seed + 1.0}]}, np.full((2, 4, 4, 1), job.seed, np.uint8)


JOBS = [Job(arm, seed, 0.001) for seed in (0, 1) for arm in ("joint", "weak", "dae-linear")]


def test_trials_are_saved_named_retried_and_skipped(tmp_path, capsys):
    config = configure(tmp_path)
    outcomes = run_jobs(config, JOBS, prepare=prepare, trial=trial)
    by_key = {(o.job.arm, o.job.seed): o for o in outcomes}
    assert [o.job for o in outcomes] == JOBS
    # An error and a dead process cost one trial each; the others are there.
    assert by_key["dae-linear", 0].failed == "KeyError: 'a bug'" and "died" in by_key["joint", 1].failed
    assert by_key["weak", 1].diverged == "loss is nan at step 7" and by_key["weak", 1].record is None
    assert [by_key[k].distance for k in (("joint", 0), ("weak", 0), ("dae-linear", 1))] == [1.0, 1.0, 2.0]
    assert "dae-linear, seed 0, learning rate 0.001 failed: KeyError: 'a bug'" in capsys.readouterr().out
    error = trial_path(config, JOBS[2]).with_suffix(".error.txt")
    assert "in trial" in error.read_text() and not trial_path(config, JOBS[2]).exists()
    # Two workers, and one in the place of the one that died; each prepares once.
    assert len((tmp_path / "prepared.txt").read_text().split()) <= 3
    samples = load_trial_samples(config, JOBS[5])
    assert samples.shape == (2, 4, 4, 1) and (samples == 1).all() and load_trial_samples(config, JOBS[2]) is None

    (tmp_path / "mended").touch()
    (tmp_path / "ran.txt").unlink()
    again = run_jobs(config, JOBS, prepare=prepare, trial=trial)
    assert sorted((tmp_path / "ran.txt").read_text().split()) == sorted([JOBS[2].key, JOBS[3].key])
    assert not any(o.failed for o in again) and not error.exists()
    assert again[4] == by_key["weak", 1]

    (tmp_path / "ran.txt").unlink()
    assert run_jobs(config, JOBS, prepare=prepare, trial=trial) == again
    assert not (tmp_path / "ran.txt").exists()


def wait_for(condition):
    while not condition():
        time.sleep(0.1)


SCRIPT = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background jobs inherit as ignored
sys.path[:0] = {path!r}
from tests.comparison.test_jobs import *
if __name__ == "__main__":
    try:
        run_jobs(configure(sys.argv[1], "compare.processes=1"), JOBS, prepare=prepare, trial=trial)
    except KeyboardInterrupt:
        print("stopped")
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_no_worker_outlives_the_comparison(tmp_path, number):
    (tmp_path / "slow").touch()
    (tmp_path / "main.py").write_text(SCRIPT.format(path=[str(ROOT), str(ROOT / "kernels")]))
    command = [sys.executable, str(tmp_path / "main.py"), str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    wait_for(lambda: (tmp_path / "ran.txt").exists() and len((tmp_path / "ran.txt").read_text().split()) == 1)
    workers = [int(pid) for pid in (tmp_path / "prepared.txt").read_text().split()]
    if number == signal.SIGINT:  # as a terminal sends it: to the whole group
        os.killpg(process.pid, number)
    else:
        process.kill()
    out, err = process.communicate()
    assert (out == "stopped\n" and "Traceback" not in err) or number == signal.SIGKILL
    wait_for(lambda: not any(Path(f"/proc/{pid}/stat").exists() and state(pid) not in "ZX" for pid in workers))


def state(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return "X"


def test_another_configuration_is_refused_with_its_keys(tmp_path):
    job = JOBS[0]
    save_trial(configure(tmp_path), Outcome(job, {"priors": [{"frechet": 1.0}]}))
    assert load_trial(configure(tmp_path), job).distance == 1.0
    # What a trial does not depend on: the other arms and seeds, how many run at once, the log.
    free = ("compare.arms=[joint,weak]", "compare.seeds=[0,7]", "compare.processes=1", "logging_steps=3", "compare.rates=[8,16]")
    assert load_trial(configure(tmp_path, *free), job) is not None
    changed = configure(tmp_path, "autoencoder.base_channels=8", "sampling.temperature=0.5", "compare.prior_widths=[32]")
    with pytest.raises(
        ValueError, match=r"autoencoder.base_channels: 64 -> 8; compare.prior_widths: \[\] -> \[32\]; .*temperature"
    ):
        load_trial(changed, job)
    with pytest.raises(ValueError, match=r"auxiliary_decoder.num_blocks.*another output_dir"):
        run_jobs(configure(tmp_path, "auxiliary_decoder.num_blocks=1"), [job])


def test_other_software_is_refused(tmp_path):
    config, path = configure(tmp_path), trial_path(configure(tmp_path), JOBS[0])
    save_trial(config, Outcome(JOBS[0], {}))
    saved = json.loads(path.read_text())
    saved["settings"]["versions.torch"] = "1.0"
    path.write_text(json.dumps(saved))
    with pytest.raises(ValueError, match=r"versions.torch: '1.0' -> "):
        load_trial(config, JOBS[0])


def test_trials_of_earlier_versions_are_read(tmp_path):
    config, path = configure(tmp_path), trial_path(configure(tmp_path), JOBS[0])
    save_trial(config, Outcome(JOBS[0], {}))
    saved = json.loads(path.read_text())
    saved["settings"]["prior.augmented_copies"] = saved["settings"].pop("prior.num_augmentations")
    path.write_text(json.dumps(saved))
    assert load_trial(config, JOBS[0]) == Outcome(JOBS[0], {})


@pytest.mark.parametrize("content", ["", "[]", '{"job": 1}', '{"settings": {'])
def test_a_damaged_trial_is_named(tmp_path, content):
    config = configure(tmp_path)
    trial_path(config, JOBS[0]).parent.mkdir()
    trial_path(config, JOBS[0]).write_text(content)
    with pytest.raises(ValueError, match=r"measure-joint-seed0.*is damaged.*delete it"):
        load_trial(config, JOBS[0])


def test_every_arm_is_tuned_by_as_many_trials():
    config = configure("x", "compare.learning_rates=[0.001,0.004]", "compare.tuning_seed=9")
    arms = check_comparison(config)
    jobs = tuning_jobs(config, arms)
    assert {(j.arm, j.learning_rate) for j in jobs} == {(a.name, r) for a in arms for r in (0.001, 0.004)} and len(jobs) == 6
    assert {(j.seed, j.purpose, j.rate) for j in jobs} == {(9, "tune", None)}
    assert tuning_jobs(configure("x", "compare.learning_rates=[0.002]"), arms) == []
    config = configure("x", "compare.learning_rates=[0.002]", "compare.prior_learning_rates=[0.001,0.003]")
    jobs = tuning_jobs(config, arms)
    assert {(j.arm, j.learning_rate, j.prior_learning_rate) for j in jobs} == {
        (a.name, 0.002, r) for a in arms for r in (0.001, 0.003)
    }
    assert len({j.key for j in jobs}) == len(jobs) == 6
    assert {job_config(config, j).prior.learning_rate for j in jobs} == {0.001, 0.003}
    assert job_config(config, Job("joint", 0, 0.002)).prior.learning_rate == config.prior.learning_rate


def test_learning_rates_are_chosen_by_the_smallest_distance():
    config = configure("x", "compare.learning_rates=[0.001,0.004]")
    arms = parse_arms(config.compare)

    def outcome(arm, rate, distance, prior=None):
        record = {"priors": [{"frechet": distance}]}
        job = Job(arm, 9, rate, "tune", prior_learning_rate=prior)
        return Outcome(job, failed="died") if distance == "failed" else Outcome(job, record if distance else None)

    table = {"joint": (3.0, 2.0), "weak": (None, 5.0), "dae-linear": (1.0, 1.0)}
    tuning = [outcome(a, r, d) for a, ds in table.items() for r, d in zip((0.001, 0.004), ds, strict=True)]
    assert chosen_learning_rates(config, arms, tuning) == {
        "joint": (0.004, None), "weak": (0.004, None), "dae-linear": (0.001, None),
    }  # fmt: skip
    lost = [outcome("joint", 0.001, "failed"), outcome("weak", 0.001, float("nan")), *tuning[1::2]]
    lost = [o for o in lost if (o.job.arm, o.job.learning_rate) != ("weak", 0.004)]
    assert chosen_learning_rates(config, arms, lost) == {"dae-linear": (0.004, None)}  # one failed; all diverged
    alone = configure("x", "compare.learning_rates=[0.003]")
    assert chosen_learning_rates(alone, arms, []) == dict.fromkeys(["joint", "weak", "dae-linear"], (0.003, None))
    config = configure("x", "compare.learning_rates=[0.001,0.004]", "compare.prior_learning_rates=[0.002,0.008]")
    grid = {(0.001, 0.002): 3.0, (0.001, 0.008): 2.0, (0.004, 0.002): 2.0, (0.004, 0.008): None}
    tuning = [outcome("weak", rate, distance, prior) for (rate, prior), distance in grid.items()]
    assert chosen_learning_rates(config, arms, tuning) == {"weak": (0.001, 0.008)}


def test_measuring_jobs():
    config = configure("x", "compare.rates=[16,64]", "autoencoder.vq.codebook_size=64")
    rates = {"joint": (0.004, None), "dae-linear": (0.001, 0.02)}
    jobs = measuring_jobs(config, rates)
    assert own_rate(config) == 64
    assert jobs[:2] == [Job("joint", 0, 0.004), Job("dae-linear", 0, 0.001, prior_learning_rate=0.02)]
    assert {(j.arm, j.learning_rate, j.prior_learning_rate) for j in jobs} == {(arm, *pair) for arm, pair in rates.items()}
    assert [(j.arm, j.seed, j.rate) for j in jobs if j.rate is not None] == [
        (arm, seed, 16.0) for seed in (0, 1) for arm in ("joint", "dae-linear")
    ]  # 64 is the configuration's own
    assert len({j.key for j in jobs}) == len(jobs) == 8
    assert name_of(jobs[-1]) == "dae-linear, seed 1, learning rate 0.001, of the prior 0.02, rate 16"


def test_the_baseline_alone_gets_the_whole_frontier():
    config = configure("x", "compare.rates=[16,32,128]", "compare.other_rates=[128]", "compare.seeds=[0]")
    jobs = measuring_jobs(check_comparison(config) and config, dict.fromkeys(["joint", "weak", "dae-linear"], (0.004, None)))
    further = [("joint", 16), ("joint", 32), ("joint", 128), ("dae-linear", 128)]
    assert [(j.arm, j.rate) for j in jobs if j.rate is not None] == further


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["compare.arms=[joint,'a: method=dae prior.width=64']"], "not matched.*prior.width"),
        (["compare.tuning_seed=1"], r"tuning_seed=1 is among compare.seeds=\[0, 1\]"),
        (["compare.baseline=join"], "'join'.*nearest one is 'joint'"),
        (["compare.baseline=dae-narrow"], "nearest one is 'dae-linear'"),
        (["compare.arms=[joint]"], "at least one other"),
        (["compare.seeds=[]"], "seeds: expected different"),
        (["compare.seeds=[0,0]"], r"seeds: expected different values, at least one, got \[0, 0\]"),
        (["compare.learning_rates=[]"], "learning_rates"),
        (["compare.learning_rates=[0.001,0.0]"], r"compare\.learning_rates: expected more than 0"),
        (["compare.learning_rates=[.nan]"], r"compare\.learning_rates: expected a finite number"),
        (["compare.prior_learning_rates=[0.001,0.001]"], "prior_learning_rates: expected different"),
        (["compare.prior_learning_rates=[-1]"], r"compare\.prior_learning_rates: expected more than 0"),
        (["compare.prior_learning_rates=[1]", "autoencoder.bottleneck=kl", "prior.family=mixture"], "without a learning rate"),
        (["compare.rates=[16]", "compare.rate_arms=[joint,dae-liner]"], "'dae-liner'.*nearest one is 'dae-linear'"),
        (["compare.rates=[16]", "compare.rate_arms=[weak]"], "lacks the baseline 'joint'"),
        (["compare.rates=[16]", "compare.rate_arms=[]"], "rate_arms: expected different"),
        (["compare.rates=[16]", "compare.other_rates=[32]"], r"other_rates: 32 is not among compare.rates=\[16"),
        (["compare.rates=[16.5]"], "codebook sizes"),
        (["compare.rates=[1]"], "codebook sizes"),
        (["compare.rates=[-1]", "autoencoder.bottleneck=kl"], r"compare\.rates: expected at least 0"),
        (["compare.prior_widths=[33]"], r"\[33\] are no multiples of 8, which ar needs for prior.num_heads=4"),
        (["prior.family=dit"], "dit"),
    ],
)
def test_what_is_refused_before_anything_runs(overrides, words):
    with pytest.raises(ValueError, match=words):
        check_comparison(configure("x", *overrides))


def test_what_is_allowed():
    assert len(check_comparison(configure("x", "compare.seeds=[3]"))) == 3  # without intervals
    assert check_comparison(configure("x", "compare.learning_rates=[0.001]", "compare.tuning_seed=0"))  # tunes nothing
    assert check_comparison(configure("x", "compare.rates=[0,1e-4]", "autoencoder.bottleneck=kl"))
