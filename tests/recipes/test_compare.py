"""The recipe of comparisons with made-up trials: phases, page, resuming, failures; and its refusals."""

import base64
import dataclasses
import json
import os
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from dae.comparison.arms import STANDARD
from dae.comparison.jobs import Job, Outcome
from dae.comparison.results import summarize_comparison
from dae.diagnostics.report_card import PREDICTORS
from dae.reporting.comparison import write_comparison

GAIN = {"joint": 0.0, "joint_finetuned": 1.0, "weak": 4.0, "dae-linear": -3.0, "dae-narrow": -0.5, "own": 0.2}


def prepare(config):
    (Path(config.output_dir) / "bench").mkdir(parents=True, exist_ok=True)
    counts = {"train": 1437, "heldout": 360, "frechet": 360}
    facts = {
        "floor": {"frechet": 2.0, "frechet_std": 0.1}, "memorised_heldout": 0.011, "heldout_accuracy": 0.99,
        "extractor": "digits-0", "counts": counts, "labelled": True, "data": {}, "versions": {"torch": "2.99"},
    }  # fmt: skip
    heldout = torch.linspace(-1, 1, 16 * 64).reshape(16, 1, 8, 8)
    return SimpleNamespace(facts=lambda: facts, measure=SimpleNamespace(heldout=heldout))


def trial(bench, config, job):
    """joint's distance falls with its rate; the arms differ by GAIN; the best learning rates are 0.002 and 0.006 (prior)."""
    with open(Path(config.output_dir) / "ran.txt", "a") as file:
        file.write(f"{job.key}\n")
    if (Path(config.output_dir) / "broken").exists() and (job.arm, job.seed) == ("weak", 1):
        raise ValueError("made to fail <b>")
    if (Path(config.output_dir) / "diverging").exists() and (job.arm, job.seed) == ("dae-narrow", 0):
        raise FloatingPointError("loss is nan at step 3")
    random = np.random.default_rng([job.seed, *job.arm.encode()])
    shared, own = np.random.default_rng(job.seed).normal(), 0.2 * random.normal()
    rate = 6.0 * np.log2(job.rate or 64) + GAIN[job.arm]
    mistuned = abs(job.learning_rate - 0.002) + abs((job.prior_learning_rate or 0.006) - 0.006)
    distance = 46 - rate + GAIN[job.arm] + shared + own + 1000 * mistuned
    widths = [128] if job.purpose == "tune" else [128, *config.compare.prior_widths]
    quality = {
        "recognised": 0.95,
        "precision": 0.7,
        "recall": 0.6,
        "memorised": 0.03 + 0.01 * own,
        "seconds": 1.0,
        "frechet_std": 0.1,
    }
    priors = [
        {"size": w, "parameters": 12 * w * w, "bits": rate - w / 64, "frechet": distance * (1 + 16 / w)} | quality for w in widths
    ]
    card = {name: float(random.normal()) for name in PREDICTORS} | {"mlp_distance": distance, "linear_probe": None}
    record = dataclasses.asdict(job) | {
        "rate_bits": rate, "psnr": 25 - GAIN[job.arm] / 10, "ssim": 0.9, "reconstruction_frechet": 1.0, "priors": priors,
        "codebook": {"usage": 1.0, "perplexity": 40.0}, "card": card if job.rate is None else None,
        "stages": [["joint", "full", 1600]], "seconds": 60.0,
    }  # fmt: skip
    images = random.integers(0, 256, (16, 8, 8, 1)).astype(np.uint8)
    return record, torch.from_numpy(images)


ARMS = "compare.arms=[joint,weak,dae-linear,dae-narrow,'own: method=dae auxiliary_decoder.width_factor=0.5']"
FULL = (
    ARMS, "compare.seeds=[0,1,2]", "compare.learning_rates=[0.001,0.002]", "compare.prior_learning_rates=[0.003,0.006]",
    "compare.rates=[16,128]",
    "compare.prior_widths=[32,64]", "compare.processes=1",
)  # fmt: skip
SMALL = ("compare.arms=[joint,weak,dae-narrow]", "compare.seeds=[0,1,2]", "compare.learning_rates=[0.002]", "compare.processes=1")


@pytest.fixture
def compare(recipe, configure):
    def run(folder, *overrides):
        return recipe("compare").compare(configure(folder, "autoencoder.vq.codebook_size=64", *overrides), prepare, trial)

    return run


def test_a_whole_comparison(tmp_path, compare, capsys, read_page):
    path = compare(tmp_path, *FULL)
    found = read_page(path)
    page, words = found.html, found.words
    ran = (tmp_path / "ran.txt").read_text().split()
    assert len(ran) == 5 * 2 * 2 + 5 * 3 + 2 * 2 * 3
    assert all("lr0.002-prior0.006" in key for key in ran if key.startswith("measure"))
    # The made-up truth: what an arm wins at equal steps by its lower rate, or loses, it does not at equal rate, but for GAIN.
    assert "worse than joint: weak" in words and "Better than joint: dae-linear" in words
    assert "own" in words and "method=dae auxiliary_decoder.width_factor=0.5" in words
    for heading in ("The answer", "At equal rate", "Tuning", "Left out", "Copies?", "Samples", "Size of the prior"):
        assert heading in words, heading
    assert "all 47 trials have a result" in words and "each had" not in words
    assert "At the edge of the tried rates" in words  # 0.002 is the largest
    assert "had 4 trials, one for each learning rate of its autoencoder with each of its prior" in words
    assert "0.002, of the prior 0.006" in words
    assert "Over the 15 trials that have such a report card" in words
    assert "“Distance for slightly richer generators” orders the trials most" in words
    assert "Steps are equal in sum only" in words and "every arm’s encoder starts from the same weights" in words
    assert "as if the tokens of an image were independent" in words and "told the image’s class" in words.replace("'", "’")
    assert "of joint's distance" in words and "all other chance" not in words
    for svg in re.findall('data:image/svg\\+xml;base64,([^"]*)', page):
        ElementTree.fromstring(base64.b64decode(svg).decode())
    assert page.count("data:image/svg") == 8 and page.count("data:image/png") == 6
    assert "http:" not in page and "https:" not in page.replace("https://arxiv.org/abs/2307.08283", "")
    assert len(page) < 2e6 and Image.open(tmp_path / "compare.png").size[0] == 1024

    summary = json.loads((tmp_path / "compare.json").read_text())
    steps, rate = (summary[key]["frechet"]["dae-linear"] for key in ("differences", "equal_rate"))
    assert (steps["verdict"], rate["verdict"], rate["n"]) == (0, -1, 3)
    assert summary["predictors"][0]["key"] == "mlp_distance"
    assert "| dae-linear |" in (tmp_path / "compare.md").read_text()
    assert "Better than joint: dae-linear" in capsys.readouterr().out

    before = path.read_bytes()
    (tmp_path / "ran.txt").unlink()
    assert compare(tmp_path, *FULL).read_bytes() == before and not (tmp_path / "ran.txt").exists()
    with pytest.raises(ValueError, match=r"prior.width: .* -> 48.*another output_dir"):
        compare(tmp_path, *FULL, "prior.width=48")


def test_failures_and_divergence_are_on_the_page(tmp_path, compare, read_page):
    (tmp_path / "broken").touch()
    (tmp_path / "diverging").touch()
    with pytest.raises(RuntimeError, match=r"1 of 9 trials failed \(weak, seed 1.*made to fail"):
        compare(tmp_path, *SMALL)
    found = read_page(tmp_path / "compare.html")
    page, words = found.html, found.words
    assert "2 of 9 trials have no result" in words and "loss is nan at step 3" in words
    assert "made to fail <b>" in words and "<b>" not in page
    assert "2 of 3 seeds" in words and "2 (1 diverged)" in words and "dae-narrow (1 of 3 diverged)" in words
    assert "Not measured. A latent with less information" in words  # no frontier was trained
    assert "Nothing was tuned" in words and "One size of prior" in words

    (tmp_path / "broken").unlink()
    words = read_page(compare(tmp_path, *SMALL)).words
    assert "made to fail" not in words and "1 of 9 trials have no result" in words


def test_one_seed_has_no_interval(tmp_path, configure, read_page):
    config = configure(tmp_path, *SMALL, "compare.seeds=[4]", "autoencoder.vq.codebook_size=64")
    outcomes = [Outcome(Job(arm, 4, 0.002), trial(None, config, Job(arm, 4, 0.002))[0]) for arm in ("joint", "weak")]
    summary = summarize_comparison(config, prepare(config).facts(), outcomes)
    words = read_page(write_comparison(config, summary, {}, tmp_path)).words
    assert "One seed shows no spread" in words and "Not known, for want of two seeds: weak." in words
    assert "etter than" not in words and "orse than" not in words and "No pictures were kept" in words
    assert "No report cards were made" in words  # of two trials


def test_one_seed_cannot_tell_the_best_predictor(tmp_path, configure, read_page):
    config = configure(tmp_path, FULL[0], "compare.seeds=[4]", "autoencoder.vq.codebook_size=64")
    jobs = [Job(arm, 4, 0.002) for arm in ("joint", "weak", "dae-linear", "dae-narrow", "own")]
    summary = summarize_comparison(config, prepare(config).facts(), [Outcome(job, trial(None, config, job)[0]) for job in jobs])
    words = read_page(write_comparison(config, summary, {}, tmp_path)).words
    assert "one seed cannot tell which number is best" in words and "reaches as far" not in words and "nan" not in words


def test_decoupled_arms_are_held_against_one_with_as_many_encoder_steps(tmp_path, compare, read_page):
    arms = "compare.arms=[joint,joint_finetuned,dae-linear]"
    words = read_page(
        compare(tmp_path, arms, "compare.seeds=[0,1,2]", "compare.learning_rates=[0.002]", "compare.processes=1")
    ).words
    assert "With equally many steps of the encoder" in words
    assert "here they are held against it instead of joint" in words
    assert "generation distance, minus joint_finetuned’s" in words


@pytest.mark.parametrize("overrides", [["compare.baseline=join"], ["compare.arms=[joint,'a: prior.width=64']"]])
def test_refusals_come_before_anything_runs(tmp_path, compare, overrides):
    with pytest.raises(ValueError, match=r"nearest one is 'joint'|not matched.*prior.width"):
        compare(tmp_path / "new", *overrides)
    assert not os.path.exists(tmp_path / "new")


def test_help_lists_every_arm(recipe, script):
    assert set(recipe("compare").ABOUT) == set(STANDARD)
    shown = script("compare", "--help").stdout
    assert all(f"  {name} " in shown for name in STANDARD) and "compare.tuning_seed" in shown
