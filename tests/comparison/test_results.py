"""Summaries of made-up trials with known answers; in words and as a table."""

import dataclasses
import json
import math

import pytest

from dae.comparison.jobs import Job, Outcome
from dae.comparison.results import BY_KEY, summarize_comparison, verdict_in_words
from dae.config import load_config
from dae.reporting.findings import answer_lines, bits_mean, budgets, in_short, rate_means, results_markdown, with_interval
from dae.statistics import paired_interval

FACTS = {"floor": {"frechet": 2.0, "frechet_std": 0.1}, "memorised_heldout": 0.01}
SEEDS = (0, 1, 2, 3)
NOISE = (0.1, -0.1, 0.2, -0.2)  # of the seeds, shared by the arms


def configure(*overrides):
    arms = "compare.arms=[joint,weak,dae-linear]"
    return load_config(None, [arms, "compare.seeds=[0,1,2,3]", "compare.learning_rates=[0.001]", *overrides])


def make(arm, seed, frechet, rate_bits=40.0, *, rate=None, priors=(64,), card=None, purpose="measure"):
    job = Job(arm, seed, 0.001, purpose, rate)
    prior = {"frechet_std": 0.0, "recognised": 0.9, "precision": 0.5, "recall": 0.4, "memorised": 0.02, "seconds": 1.0}
    rows = [{"size": n, "parameters": n * n, "bits": rate_bits - 5, "frechet": frechet * 64 / n} | prior for n in priors]
    record = {"rate_bits": rate_bits, "psnr": 20.0 + rate_bits / 10, "ssim": 0.8, "reconstruction_frechet": 1.0}
    record |= {"codebook": {"usage": 1.0, "perplexity": 8.0}, "card": card, "stages": [["joint", "full", 800]], "priors": rows}
    return Outcome(job, dataclasses.asdict(job) | record)


def three_arms(**options):
    """joint at 10; weak 3 + its own noise below; dae-linear equal but for its own noise."""
    own = {"joint": (0, 0, 0, 0), "weak": (-3.1, -2.9, -3.0, -3.2), "dae-linear": (0.3, -0.2, 0.1, -0.3)}
    return [make(a, s, 10 + NOISE[s] + d[s], **options) for a, d in own.items() for s in SEEDS]


def test_means_and_paired_differences():
    summary = summarize_comparison(configure(), FACTS, three_arms())
    weak = summary["differences"]["frechet"]["weak"]
    expected = paired_interval([-3.1, -2.9, -3.0, -3.2], [0] * 4)
    assert [weak[k] for k in ("mean", "low", "high", "n")] == pytest.approx(list(expected))  # the seeds' shared noise is gone
    assert weak["values"] == pytest.approx([-3.1, -2.9, -3.0, -3.2]) and weak["seeds"] == [0, 1, 2, 3]
    joint = summary["arms"][0]
    assert joint["name"] == "joint" and joint["measures"]["frechet"]["mean"] == pytest.approx(10)
    assert (joint["trials"], joint["finished"], joint["diverged"], joint["failed"]) == (4, 4, 0, 0)
    assert summary["arms"][1]["measures"]["memorised"]["mean"] == pytest.approx(0.02)
    assert set(summary["differences"]["frechet"]) == {"weak", "dae-linear"}
    assert (summary["tuning"], summary["equal_rate"], summary["prior_sizes"]) == (None, None, [])
    json.dumps(summary, allow_nan=False)


def test_words_follow_the_intervals():
    summary = summarize_comparison(configure(), FACTS, three_arms())
    rows, frechet = summary["differences"]["frechet"], BY_KEY["frechet"]
    assert (verdict_in_words(frechet, rows["weak"]), verdict_in_words(frechet, rows["dae-linear"])) == (
        "better",
        "no difference shown",
    )
    assert in_short(summary, rows) == "Better than joint: weak; no difference shown: dae-linear."
    first, weak, linear, adjusted = answer_lines(summary, rows)
    assert first == in_short(summary, rows) and weak == (
        "  weak: −3.05 [−3.26, −2.84]; 4 seeds (−30\u00a0% of joint's distance, −152\u00a0% of training images')"
    )
    assert linear.startswith("  dae-linear: −0.0") and "2 comparisons at once" in adjusted and "not adjusted" in adjusted
    worse = dict(rows["weak"], verdict=1)
    assert (verdict_in_words(frechet, worse), verdict_in_words(BY_KEY["psnr"], worse)) == ("worse", "better")
    assert verdict_in_words(BY_KEY["rate_bits"], worse) == verdict_in_words(BY_KEY["bits"], worse) == "higher"
    assert answer_lines(summary, None) == []


def test_chance_findings_are_adjusted():
    """An interval that just leaves out 0 is called so, but does not survive two comparisons."""
    # For 4 seeds t = 3.5 has p = 0.039: below 0.05, and above half of it.
    d = [3.5 * 0.5 + e for e in (-0.5 * math.sqrt(3), 0.5 * math.sqrt(3), -0.5 * math.sqrt(3), 0.5 * math.sqrt(3))]
    outcomes = [o for o in three_arms() if o.job.arm != "weak"] + [make("weak", s, 10 + NOISE[s] + d[s]) for s in SEEDS]
    summary = summarize_comparison(configure(), FACTS, outcomes)
    row = summary["differences"]["frechet"]["weak"]
    assert row["low"] > 0 and row["p"] == pytest.approx(0.0394, abs=2e-3) and row["adjusted"] == pytest.approx(2 * row["p"])
    rows = summary["differences"]["frechet"]
    assert verdict_in_words(BY_KEY["frechet"], row) == "no difference shown"
    assert in_short(summary, rows) == "No difference shown: dae-linear, weak."
    assert answer_lines(summary, rows)[-1].endswith("By its own interval, which leaves out 0, weak would count, too.")
    assert "no difference shown | 0.079" in results_markdown(summary) and "worse" not in results_markdown(summary)


def test_one_seed_has_no_interval():
    summary = summarize_comparison(configure("compare.seeds=[0]"), FACTS, [o for o in three_arms() if o.job.seed == 0])
    row = summary["differences"]["frechet"]["weak"]
    assert row["mean"] == pytest.approx(-3.1) and row["low"] is None and row["p"] is None
    said = in_short(summary, summary["differences"]["frechet"])
    assert said == "Not known, for want of two seeds: weak, dae-linear."
    assert "not known" in results_markdown(summary) and with_interval(BY_KEY["frechet"], row, sign=True) == "−3.10"


def test_what_diverged_or_failed_is_shown_and_its_pair_is_missing():
    outcomes = three_arms()
    lost = [o for o in outcomes if (o.job.arm, o.job.seed) not in {("weak", 1), ("joint", 2)}]
    lost += [Outcome(Job("weak", 1, 0.001), diverged="loss is nan"), Outcome(Job("joint", 2, 0.001), failed="OSError: x")]
    summary = summarize_comparison(configure(), FACTS, lost)
    row = summary["differences"]["frechet"]["weak"]
    assert (row["n"], row["of"], row["seeds"]) == (2, 4, [0, 3])
    assert [(x["arm"], x["seed"], x["kind"], x["why"]) for x in summary["left_out"]] == [
        ("weak", 1, "diverged", "loss is nan"), ("joint", 2, "failed", "OSError: x"),
    ]  # fmt: skip
    weak = next(arm for arm in summary["arms"] if arm["name"] == "weak")
    assert (weak["trials"], weak["finished"], weak["diverged"]) == (4, 3, 1)
    table = results_markdown(summary)
    assert "weak (1 diverged of 4)" in table and "joint (1 failed of 4)" in table and "diverged: loss is nan" in table
    said = " ".join(answer_lines(summary, summary["differences"]["frechet"]))
    assert "2 of 4 seeds" in said and "weak (1 of 4 diverged)" in said and "only the trials that did not diverge" in said


def test_an_arm_that_diverged_throughout_and_a_baseline_that_did_once_are_in_the_answer():
    outcomes = [o for o in three_arms() if o.job.arm != "weak" and (o.job.arm, o.job.seed) != ("joint", 0)]
    lost = [("joint", 0), *(("weak", s) for s in SEEDS)]
    outcomes += [Outcome(Job(arm, seed, 0.001), diverged="nan") for arm, seed in lost]
    summary = summarize_comparison(configure(), FACTS, outcomes)
    said = in_short(summary, summary["differences"]["frechet"])
    assert said.endswith("no result: weak (4 of 4 diverged). joint (1 of 4 diverged) itself.")


def test_a_trial_without_a_finite_distance_is_left_out():
    outcomes = three_arms()
    outcomes[4] = make("weak", 0, math.nan)  # its PSNR is finite, and is not used either
    summary = summarize_comparison(configure(), FACTS, outcomes)
    assert [(x["arm"], x["seed"], x["kind"]) for x in summary["left_out"]] == [("weak", 0, "diverged")]
    assert "not finite" in summary["left_out"][0]["why"] and summary["trials"] == {"planned": 12, "finished": 11}
    weak = summary["arms"][1]
    assert (weak["finished"], weak["diverged"], len(weak["values"]["psnr"])) == (3, 1, 3)
    assert "weak (1 of 4 diverged)" in in_short(summary, summary["differences"]["frechet"])


def test_intervals_stay_where_values_can_be():
    outcomes = three_arms()
    for o, share in zip(outcomes[:4], (0.0, 0.01, 0.0, 0.02), strict=True):
        o.record["priors"][0] |= {"memorised": share, "recognised": 1 - share, "frechet": 100 * share + 0.1}
    joint = summarize_comparison(configure(), FACTS, outcomes)["arms"][0]["measures"]
    assert paired_interval([0.0, 0.01, 0.0, 0.02], [0] * 4).low < 0
    assert (joint["memorised"]["low"], joint["recognised"]["high"], joint["frechet"]["low"]) == (0, 1, 0)
    assert 0 < joint["memorised"]["high"] < 1


def test_arms_know_how_they_were_trained():
    """From the stages of each arm's configuration, whatever its name."""
    overrides = ["compare.arms=[joint,joint_finetuned,weak,'own: method=dae auxiliary_decoder.family=narrow']"]
    config = configure(*overrides, "stage1.max_train_steps=30", "stage2.max_train_steps=50")
    shift = {"joint": 0, "joint_finetuned": -1, "weak": 1, "own": -3}
    outcomes = [make(a, s, 10 + d + NOISE[s] * (1 + 0.1 * d)) for a, d in shift.items() for s in SEEDS]
    summary = summarize_comparison(config, FACTS, outcomes)
    assert {a["name"]: (a["decoupled"], a["encoder_steps"], a["decoder_steps"]) for a in summary["arms"]} == {
        "joint": (False, 80, 80), "joint_finetuned": (False, 30, 80), "weak": (False, 80, 80), "own": (True, 30, 50),
    }  # fmt: skip
    words = budgets(summary)
    assert "Steps are equal in sum only" in words and "of joint, weak: encoder 80, decoder 80" in words
    assert "of own: encoder 30, decoder 50" in words and "in all but weak (" in words
    equal = summary["equal_encoder"]
    assert (equal["baseline"], equal["steps"], list(equal["frechet"])) == ("joint_finetuned", 30, ["own"])
    assert equal["frechet"]["own"]["mean"] == pytest.approx(-2)
    assert in_short(summary, equal["frechet"], equal["baseline"]) == "Better than joint_finetuned: own."
    assert summarize_comparison(configure(), FACTS, three_arms())["equal_encoder"] is None


def test_a_weak_decoder_that_is_kept_is_no_baseline_of_decoupling():
    kept = "'kept: method=dae auxiliary_decoder.family=dropout auxiliary_decoder.keep=true'"
    arms = f"compare.arms=[joint,{kept},joint_finetuned,'own: method=dae auxiliary_decoder.family=narrow']"
    outcomes = [make(a, s, 10 + NOISE[s] * i) for i, a in enumerate(("joint", "kept", "joint_finetuned", "own")) for s in SEEDS]
    summary = summarize_comparison(configure(arms), FACTS, outcomes)
    assert summary["equal_encoder"]["baseline"] == "joint_finetuned"
    kept = next(arm for arm in summary["arms"] if arm["name"] == "kept")
    assert not kept["decoupled"] and kept["decoder_steps"] == summary["arms"][0]["decoder_steps"]


@pytest.mark.parametrize(
    ("overrides", "rate", "labelled"),
    [
        ([], "tokens of an image were independent", ", told the image's class."),
        (["autoencoder.bottleneck=kl"], "Gaussian with the moments", ", told the image's class."),
        (["autoencoder.bottleneck=kl", "prior.family=mixture"], "Gaussian with the moments", ", not told its class."),
    ],
)
def test_rate_and_bits_are_named_for_the_latent_type(overrides, rate, labelled):
    summary = summarize_comparison(configure(*overrides), FACTS | {"labelled": True}, three_arms())
    assert rate in rate_means(summary) and "upper bound" in rate_means(summary) and bits_mean(summary).endswith(labelled)
    earlier = {"carrier" if key == "latent_type" else key: value for key, value in summary.items()}
    assert rate_means(earlier) == rate_means(summary) and bits_mean(earlier) == bits_mean(summary)
    assert "class" not in bits_mean(summarize_comparison(configure(*overrides), FACTS, three_arms()))


def test_without_a_baseline_there_is_nothing_to_compare():
    outcomes = [o for o in three_arms() if o.job.arm != "joint"]
    outcomes += [Outcome(Job("joint", s, 0.001), diverged="loss is inf") for s in SEEDS]
    with pytest.raises(ValueError, match=r"'joint' has a result.*joint, seed 0, learning rate 0.001: loss is inf"):
        summarize_comparison(configure(), FACTS, outcomes)


def test_equal_rate_is_against_the_frontier_of_the_same_seed():
    """joint's distance is 50 - rate; weak lies on that line: better at equal steps, equal at equal rate."""
    own_noise = (0.01, -0.02, 0.02, -0.01)
    outcomes = [make("joint", s, 50 - 30 + NOISE[s], 30) for s in SEEDS]
    outcomes += [make("joint", s, 50 - r + NOISE[s], r, rate=k) for s in SEEDS for k, r in ((16, 20), (128, 40))]
    outcomes += [make("weak", s, 50 - 34 + NOISE[s] + own_noise[s], 34) for s in SEEDS]
    outcomes += [make("dae-linear", s, 5, 36 if s < 2 else 41) for s in SEEDS]
    summary = summarize_comparison(configure("compare.rates=[16,128]"), FACTS, outcomes)
    steps, rate = summary["differences"]["frechet"]["weak"], summary["equal_rate"]["frechet"]["weak"]
    assert steps["mean"] == pytest.approx(-4) and verdict_in_words(BY_KEY["frechet"], steps) == "better"
    assert rate["values"] == pytest.approx(own_noise) and verdict_in_words(BY_KEY["frechet"], rate) == "no difference shown"
    linear = summary["equal_rate"]["frechet"]["dae-linear"]
    assert (linear["n"], linear["of"], linear["seeds"]) == (2, 4, [0, 1])  # two seeds lie beyond joint's rates
    assert linear["values"] == pytest.approx([5 - 14 - NOISE[0], 5 - 14 - NOISE[1]])
    assert {(p["arm"], p["rate"]) for p in summary["frontier"]} == {
        ("joint", 64.0), ("joint", 16), ("joint", 128), ("weak", 64.0), ("dae-linear", 64.0),
    }  # fmt: skip
    assert "(2 of 4)" in results_markdown(summary)


def test_an_arm_outside_of_all_rates_says_so():
    outcomes = [make("joint", s, 10, r, rate=k) for s in SEEDS for k, r in ((None, 30), (16, 20))]
    outcomes += [make("weak", s, 5, 60) for s in SEEDS]
    summary = summarize_comparison(configure("compare.rates=[16]"), FACTS, outcomes)
    row = summary["equal_rate"]["frechet"]["weak"]
    assert (row["n"], row["of"], row["mean"]) == (0, 4, None)
    assert "0 of 4 seeds" in " ".join(answer_lines(summary, summary["equal_rate"]["frechet"]))
    json.dumps(summary, allow_nan=False)


def test_prior_sizes_by_growing_size():
    summary = summarize_comparison(configure("compare.prior_widths=[16,128]"), FACTS, three_arms(priors=(64, 16, 128)))
    weak = [row for row in summary["prior_sizes"] if row["arm"] == "weak"]
    assert [row["size"] for row in weak] == [16, 64, 128] and [row["parameters"] for row in weak] == [256, 4096, 16384]
    assert weak[0]["frechet"]["mean"] == pytest.approx(4 * weak[1]["frechet"]["mean"])


def test_predictors_are_ranked_by_their_strength():
    outcomes = []
    for number, o in enumerate(three_arms()):
        card = {"sensitivity": -o.distance, "shift_error": float(number % 3), "code_entropy": 1.0, "flip_error": None}
        card |= {"codebook_perplexity": 2.0, "linear_probe": o.distance if number else None}
        outcomes.append(Outcome(o.job, o.record | {"card": card}))
    outcomes += [make("joint", s, 100 + s, 200, rate=128) for s in SEEDS]  # of a further rate, which has no card
    rows = summarize_comparison(configure("compare.rates=[128]"), FACTS, outcomes)["predictors"]
    by_key = {row["key"]: row for row in rows}
    assert (
        (rows[0]["key"], rows[0]["name"]) == ("sensitivity", "Sensitivity")
        and rows[0]["rho"] == pytest.approx(-1)
        and rows[0]["n"] == 12
    )
    assert rows[0]["low"] == pytest.approx(-1) and abs(by_key["shift_error"]["rho"]) < 0.9
    assert by_key["code_entropy"]["rho"] is None and "flip_error" not in by_key
    assert {"rate_bits", "bits"} < set(by_key)  # for comparison
    assert {row["n"] for row in rows if row["key"] != "linear_probe"} == {12}  # all over the same trials
    assert by_key["linear_probe"]["n"] == 11 and [r["key"] for r in rows if r["rho"] is not None][-1] == "linear_probe"
    assert not {"psnr", "codebook_perplexity"} & set(by_key)  # the order of the reconstruction error, and of the entropy


def test_tuning_shows_every_trial():
    tuned = [make(a, 1000, d, purpose="tune") for a, d in (("joint", 3.0), ("weak", 2.0))]
    tuned.append(Outcome(Job("dae-linear", 1000, 0.001, "tune"), diverged="nan"))
    tuning = summarize_comparison(configure(), FACTS, tuned + three_arms())["tuning"]
    assert [(t["arm"], t["frechet"], t["diverged"]) for t in tuning["trials"]] == [
        ("joint", 3.0, None), ("weak", 2.0, None), ("dae-linear", None, "nan"),
    ]  # fmt: skip
    assert tuning["seed"] == 1000


def test_markdown_has_a_row_an_arm():
    lines = results_markdown(summarize_comparison(configure(), FACTS, three_arms())).splitlines()
    assert [line.split(" | ")[0] for line in lines[2:5]] == ["| joint", "| weak", "| dae-linear"]
    assert len({line.count("|") for line in lines[:5]}) == 1
    assert "10.00 [9.71, 10.29]" in lines[2] and "2.0 [2.0, 2.0]\u00a0%" in lines[2]
    assert "2.00 from the held-out ones" in lines[-1] and "1.0 %" in lines[-1]
