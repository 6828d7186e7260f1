"""One trial: what is trained, measured and left alone."""

import json
import math
from pathlib import Path

import pytest
import torch

from dae.comparison.jobs import Job, job_config
from dae.comparison.trial import Bench, run_trial
from dae.config import load_config

TINY = Path(__file__).parents[1] / "recipes" / "tiny.yaml"
KL = ["autoencoder.bottleneck=kl", "autoencoder.kl.kl_weight=1e-3"]
GAN = [
    *KL,
    "prior.family=mixture",
    "prior.num_components=2",
    "stage2.loss.adversarial=0.1",
    "stage2.loss.discriminator_channels=8",
]


def configure(folder, *overrides):
    return load_config(TINY, [f"output_dir={folder}", "sampling.num_inference_steps=2", "compare.prior_widths=[8]", *overrides])


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return Bench.prepare(configure(tmp_path_factory.mktemp("bench")))


def test_bench_is_found_again_and_says_what_it_is(tmp_path):
    config = configure(tmp_path)
    first, second = Bench.prepare(config), Bench.prepare(config)
    assert first.facts() == second.facts() and len(list((tmp_path / "bench").iterdir())) == 1
    facts = json.loads(json.dumps(first.facts()))
    assert facts["counts"] == {"train": 1437, "heldout": 360, "frechet": 360, "tuning_train": 1078, "tuning_heldout": 359}
    assert facts["floor"]["frechet"] > 0
    # Tuning sees no held-out image, and does not train on what it is judged by.
    tuned, measured = first.tune, first.measure
    assert torch.cdist(tuned.heldout.flatten(1), measured.heldout.flatten(1)).min() > 0
    assert not (torch.cdist(tuned.heldout.flatten(1)[:50], tuned.train.flatten(1)) == 0).all(1).any()
    assert len(tuned.train) + len(tuned.heldout) == len(measured.train)


def test_too_few_images_are_refused_before_the_classifier_is_trained(tmp_path):
    fewest, tuning = "train_images: expected at least 10 images, got 8", "at least 4 images held out for tuning, got 3"
    small = [f"{section}.train_batch_size=4" for section in ("stage1", "stage2", "prior")]
    for count, message in ((8, fewest), (12, tuning)):
        with pytest.raises(ValueError, match=message):
            Bench.prepare(configure(tmp_path, f"evaluation.max_images={count}", "compare.learning_rates=[1e-3,2e-3]", *small))
    assert not (tmp_path / "bench").exists()


@pytest.mark.parametrize("overrides", [[], KL, GAN], ids=["vq", "kl", "gan"])
def test_a_trial_of_each_latent_type(bench, tmp_path, overrides):
    config, job = configure(tmp_path, *overrides), Job("dae-linear", 3, 2e-3)
    state = torch.get_rng_state()
    record, samples = run_trial(bench, config, job)
    assert torch.equal(torch.get_rng_state(), state)
    assert json.loads(json.dumps(record)) == record
    assert (record["arm"], record["seed"], record["rate"], record["purpose"]) == ("dae-linear", 3, None, "measure")
    assert record["stages"] == [["stage1", "linear", 10], ["stage2", "full", 6]]
    assert samples.dtype == torch.uint8 and samples.shape[1:] == (8, 8, 1) and len(samples) > 0
    assert (record["codebook"] is None) == bool(overrides)
    main, small = record["priors"]
    assert small["size"] == 8 and main["size"] == (2 if overrides == GAN else 16)
    # Adam's best step falls as 1 / width; a mixture has none.
    rates = [prior["learning_rate"] for prior in (main, small)]
    assert rates == [None, None] if overrides == GAN else rates == [config.prior.learning_rate, 2 * config.prior.learning_rate]
    for prior in record["priors"]:
        assert all(math.isfinite(prior[k]) for k in ("bits", "frechet", "precision", "recall", "memorised"))
        assert prior["frechet"] > 0 and (prior["recognised"] is None) == (overrides == GAN)
    if not overrides:
        assert 0 < record["rate_bits"] <= 16 * math.log2(16) and record["card"]["codebook_usage"] is not None
    again, _ = run_trial(bench, config, job)
    timed = ("seconds", "autoencoder_seconds")
    for each in (record, again):
        for part in (each, *each["priors"]):
            for key in timed:
                part.pop(key, None)
    assert again == record  # one seed, one result


def test_jobs_change_what_they_name_and_nothing_else(tmp_path):
    config = configure(tmp_path)
    made = job_config(config, Job("joint", 5, 3e-3, rate=32))
    assert (made.seed, made.method, made.autoencoder.vq.codebook_size) == (5, "joint", 32)
    assert made.stage1.learning_rate == made.stage2.learning_rate == 3e-3
    assert job_config(configure(tmp_path, *KL), Job("joint", 5, 3e-3, rate=1e-2)).autoencoder.kl.kl_weight == 1e-2
    assert config.seed == 0
    keys = {
        Job("joint", 5, 3e-3).key,
        Job("joint", 5, 3e-3, rate=32).key,
        Job("joint", 5, 3e-3, "tune").key,
        Job("joint", 6, 3e-3).key,
    }
    assert len(keys) == 4
    with pytest.raises(ValueError, match="no arm 'nobody'"):
        job_config(config, Job("nobody", 0, 1e-3))


def test_a_tuning_trial_is_judged_on_training_images_and_has_one_prior(bench, tmp_path):
    record, _ = run_trial(bench, configure(tmp_path), Job("joint", 0, 2e-3, "tune"))
    assert len(record["priors"]) == 1 and record["card"] is None


def test_divergence_is_an_error_of_its_own(bench, tmp_path):
    with pytest.raises(FloatingPointError, match="loss is"):
        run_trial(bench, configure(tmp_path, "stage2.loss.l1=3e38", "stage2.loss.l2=3e38"), Job("joint", 0, 1e-3))
