"""Several comparisons together, from rows with known answers."""

import math

import pytest

from dae.comparison.pooling import pool, pooled_predictors
from dae.reporting.evidence import pooled_tables
from dae.statistics import fisher_z, mean_interval

BASE = (10.1, 9.9, 10.2, 9.8)


def row(differences, baseline=BASE, *, verdict=0, of=4):
    n = len(differences)
    known = {"low": -1.0, "high": 1.0} if n > 1 else {"low": None, "high": None}
    mean = sum(differences) / n if n else None
    return known | {"mean": mean, "n": n, "of": of, "verdict": verdict, "values": differences, "baseline": baseline[:n]}


def comparison(steps, rate=None, finetuned=None):
    equal = finetuned and {"baseline": "joint_finetuned", "frechet": finetuned}
    found = {"baseline": "joint", "differences": {"frechet": steps}, "equal_encoder": equal}
    return found | {"equal_rate": rate and {"frechet": rate}}


def test_each_comparison_counts_once():
    d = (-3.1, -2.9, -3.0, -3.2)
    scaled = [100 * x for x in d], [100 * b for b in BASE]
    first = comparison({"weak": row(d, verdict=-1), "dae-linear": row((0.1, -0.1, 0.2, 0))})
    second = comparison({"weak": row(*scaled, verdict=1), "dae-linear": row((0.1, -0.1, 0.2, 0))})
    pooled = pool({"digits": first, "photos": second})
    weak = pooled["equal_steps"]["weak"]
    assert (weak["better"], weak["worse"], weak["no difference shown"]) == (1, 1, 0)
    assert pooled["equal_steps"]["dae-linear"]["no difference shown"] == 2
    assert pooled["equal_rate"] is None and pooled["equal_encoder"] is None
    assert weak["ratios"]["digits"] == pytest.approx(weak["ratios"]["photos"])  # a ratio knows no scale
    expected = math.exp(sum(math.log((b + x) / b) for b, x in zip(BASE, d, strict=True)) / 4)
    assert weak["ratio"]["mean"] == pytest.approx(expected) and weak["ratio"]["n"] == 2
    table = "\n".join(pooled_tables(pooled))
    assert f"| weak | 1 | 1 | 0 | 0 | {expected:.2f} [" in table and "| 2 of 2 | 8 of 8 |" in table
    assert "At equal rate" not in table and "of the encoder" not in table


def test_a_comparison_with_too_few_seeds_inside_does_not_enter_the_ratio():
    steps, half = {"a": row((-1, -1, -1, -1))}, {"a": row((-1, -1))}
    lone = {"a": row((-9,))}
    pooled = pool({"x": comparison(steps, half), "y": comparison(steps, half), "z": comparison(steps, lone)})["equal_rate"]["a"]
    assert sorted(pooled["ratios"]) == ["x", "y"] and (pooled["seeds"], pooled["of"], pooled["not known"]) == (5, 12, 1)
    assert pool({"x": comparison(steps, {"a": row((-1, -1), of=5)})})["equal_rate"]["a"]["ratio"] is None  # under half
    assert pool({"x": comparison(steps, {"a": row((), of=4)})})["equal_rate"]["a"]["ratio"] is None
    both = {"x": comparison(steps, half), "z": comparison(steps, lone, {"a": row((-1, -1, -1, -1))})}
    table = "\n".join(pooled_tables(pool(both), "tuned"))
    assert "| 1 of 2 | 3 of 8 |" in table and "against tuned instead" in table


@pytest.mark.parametrize("wrong", [{}, {"a": comparison({}), "b": comparison({}) | {"baseline": "weak"}}])
def test_different_baselines_are_refused(wrong):
    with pytest.raises(ValueError, match="one baseline"):
        pool(wrong)


def predictors(**rhos):
    return {"predictors": [{"name": name, "rho": rho, "low": 0, "high": 1, "n": 20} for name, rho in rhos.items()]}


def test_predictors_known_in_fewer_comparisons_come_last():
    found = pooled_predictors({"a": predictors(x=0.5, y=-0.9), "b": predictors(x=0.7, z=None)})
    assert [(r["name"], r["n"]) for r in found] == [("x", 2), ("y", 1)]
    assert found[0]["mean"] == pytest.approx(math.tanh((math.atanh(0.5) + math.atanh(0.7)) / 2))
    assert found[1]["low"] is None and found[0]["rivals"] == []
    few = predictors(x=0.5)
    few["predictors"].append({"name": "partial", "rho": 1.0, "low": 0, "high": 1, "n": 19})  # not over the same trials
    assert [r["name"] for r in pooled_predictors({"a": few})] == ["x"]


def test_correlations_average_within_their_range():
    rhos = (1.0, 0.1, 0.9)
    (found,) = pooled_predictors({str(i): predictors(x=rho) for i, rho in enumerate(rhos)})
    z = mean_interval([fisher_z(rho, 20) for rho in rhos])
    assert (found["low"], found["high"]) == pytest.approx((math.tanh(z.low), math.tanh(z.high))) and found["high"] < 1


def test_the_best_predictor_is_told_from_others_by_pairs():
    """`near` follows the best one but for chance, against the sign; `far` is below it everywhere by much the same."""
    best = (0.9, 0.7, 0.8, 0.9)
    summaries = {
        str(i): predictors(best=b, near=-math.tanh(math.atanh(b) + e), far=math.tanh(math.atanh(b) - 0.8 - e / 10))
        for i, (b, e) in enumerate(zip(best, (0.1, -0.2, 0.15, -0.1), strict=True))
    }
    found = pooled_predictors(summaries)
    assert [r["name"] for r in found] == ["best", "near", "far"] and found[0]["rivals"] == ["near"]
    assert found[1]["rivals"] is None
    assert pooled_predictors({"a": summaries["0"]})[0]["rivals"] is None  # one comparison tells nothing
    assert pooled_predictors({"a": {"predictors": []}}) == []
