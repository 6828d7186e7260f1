"""The document of evidence, from comparisons so small that they show nothing."""

import importlib.util
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TINY = [
    "compare.seeds=[0,1]", "compare.arms=[joint,dae-linear]", "compare.learning_rates=[1e-3,2e-3]", "compare.processes=1",
    "stage1.max_train_steps=2", "stage2.max_train_steps=2", "prior.max_train_steps=2", "prior.width=32", "prior.depth=1",
    "prior.num_components=2", "data.max_train_samples=96", "data.validation_size=48", "evaluation.classifier_steps=10",
    "sampling.num_samples=40", "sampling.num_inference_steps=1",
]  # fmt: skip


@pytest.fixture(scope="module")
def evidence():
    spec = importlib.util.spec_from_file_location("recipe_evidence", ROOT / "recipes" / "evidence.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def digits(evidence, tmp_path_factory):
    """`digits(only)`: the document of these comparisons on the digits alone, a finished one not run again; or from `results`."""
    folder, data = tmp_path_factory.mktemp("evidence"), {"digits": evidence.DATA["digits"]}

    def write(only=None, results=None):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(evidence, "DATA", data)
            if results is not None:
                return evidence.document(results, TINY)
            return evidence.evidence(folder / "runs", folder / "docs", TINY, only)

    write.trials = folder / "runs"
    return write


@pytest.mark.slow
@pytest.mark.parametrize("carrier", ["vq", "kl", "gan"])
def test_smoke_of_one_carrier(evidence, digits, carrier):
    text = digits([f"digits-{carrier}"]).read_text()
    assert f"## {evidence.CARRIERS[carrier][0]} on digits" in text and "**This is not all:" in text
    assert len(re.findall(r"(?m)^\| joint \| ", text)) == 2 and text.count("| dae-linear | ") >= 2  # results and sizes
    assert not re.search(r"\bnan\b|None", text)
    if carrier == "vq":
        measured = len(list(digits.trials.glob("digits-vq/trials/measure-*.json")))
        assert measured == 2 * 2 + 2 * (2 + 1)  # joint at both further rates, dae-linear at one


@pytest.mark.slow
def test_smoke_of_all_carriers(evidence, digits):
    """The trials of the tests above are finished: nothing is run again, and their results write the same document again."""
    trials = {p: p.stat().st_mtime_ns for p in digits.trials.glob("*/trials/*.json")}
    path = digits()
    text = path.read_text()
    assert {p: t for p in trials if (t := p.stat().st_mtime_ns) != trials[p]} == {}
    assert list(evidence.CARRIERS) == ["vq", "kl", "gan"]
    for title, _ in evidence.CARRIERS.values():
        assert f"## {title} on digits" in text
    assert (
        len(re.findall(r"(?m)^\| joint \| ", text)) == 6 and text.count("| dae-linear | ") >= 7
    )  # a table of results and one of sizes each
    assert "Does decoupling help at equal steps?" in text and "Does decoupling help at equal rate?" in text
    assert not re.search(r"\bnan\b|None", text)
    for picture in re.findall(r"\]\((evidence/[^)]+\.png)\)", text):
        assert (path.parent / picture).read_bytes().startswith(b"\x89PNG")
    results = {f"digits-{c}": json.loads((digits.trials / f"digits-{c}" / "compare.json").read_text()) for c in evidence.CARRIERS}
    assert digits(results=results) == text


def row(better, worse, same, low=None, high=None):
    ratio = low and {"mean": (low * high) ** 0.5, "low": low, "high": high, "n": 6}
    counts = {"better": better, "worse": worse, "no difference shown": same, "not known": 0}
    return counts | {"ratio": ratio, "seeds": 28, "of": 30}


def test_words_follow_the_counts_and_not_the_names(evidence):
    pooled = {"equal_steps": {"own": row(5, 0, 1, 0.5, 0.8), "dae-like": row(0, 6, 0, 2.0, 3.0)}}
    pooled |= {"equal_encoder": None, "equal_rate": None}
    said = "\n".join(evidence.answers(pooled, "joint", {"own"}))
    assert "Of 6 pairs" in said and "than joint's in 5, farther in 0, and in 1 no difference was shown." in said
    assert "- own: better 5, no difference shown 1; 0.63 [0.50, 0.80] times the distance in the mean of 6 comparisons (28" in said
    assert "dae-like" not in said and "equal rate** nothing can be said: no frontier" in said
    pooled |= {"equal_rate": {"own": row(1, 1, 4, 0.8, 1.25), "two": row(0, 3, 3)}, "equal_encoder": {"own": row(2, 0, 4)}}
    said = "\n".join(evidence.answers(pooled, "joint", {"own", "two"}, "tuned"))
    assert "Of 12 pairs" in said and "than tuned's in 2" in said and "two: worse 3, no difference shown 3; too few" in said
    assert "over the comparisons nearer" not in said and "farther by this evidence" not in said
    none = evidence.answers(pooled, "joint", set())
    assert sum("nothing can be said: no arm is decoupled" in line for line in none) == 3
    assert "no decoupled arm has a result" in "\n".join(evidence.answers(pooled, "joint", {"lost"}))


def test_each_comparison_has_its_verdict_beside_its_ratio(evidence):
    steps = {"own": {"verdicts": {"a": "better"}, "ratios": {"a": 0.5}}}
    rate = {"own": {"verdicts": {"a": "not known", "b": "no difference shown"}, "ratios": {"b": 1.2}}}
    pooled = {"equal_steps": steps, "equal_encoder": None, "equal_rate": rate}
    table = evidence.by_comparison(["a", "b"], pooled, "joint")
    assert table[2] == "| arm | against | a | b |"
    assert table[4:-1] == [
        "| own | joint | better, 0.50 | – |",
        "| own | joint, equal rate | not known | no difference shown, 1.20 |",
    ]


def predictor(name, mean, low=None, high=None, n=6, rivals=None):
    return {"name": name, "mean": mean, "low": low, "high": high, "n": n, "rivals": rivals}


def test_the_best_predictor_is_said_with_its_interval_or_that_it_cannot_be_told(evidence):
    two = [predictor("A", 0.8, 0.6, 0.9, rivals=[]), predictor("B", -0.5, -0.7, -0.2), predictor("C", 0.9, 0.8, 0.95, n=2)]
    said = evidence.predictors(two)
    assert said[0].startswith("*A* has the strongest mean correlation, 0.80 [0.60, 0.90], of 2 numbers known in 6 comparisons (")
    assert said.index("Known in fewer comparisons, and so not ranked beside those above:") < said.index(
        "| C | 0.90 [0.80, 0.95] | 2 |"
    )
    close = [two[0] | {"rivals": ["B"], "low": -0.1}, *two[1:]]
    assert "The intervals of 1 of the 2 leave out 0" in evidence.predictors(close)[0]
    assert evidence.predictors(close)[0].startswith("Which is best cannot be told: *A* has")
    assert (
        "does not differ by more than chance from 1 of the others, the next one, *B*, among them" in evidence.predictors(close)[0]
    )
    assert evidence.predictors([predictor("A", 0.8, n=1)])[0].startswith("One comparison cannot tell")
    assert "No report cards" in evidence.predictors([])[0]


def test_what_holds_for_all_comparisons_is_said_once(evidence):
    assert evidence.in_all(lambda s: s["x"], {"a": {"x": "1"}, "b": {"x": "1"}}) == ["1"]
    assert evidence.in_all(lambda s: s["x"], {"a": {"x": "1"}, "b": {"x": "2"}, "c": {"x": "1"}}) == ["In a, c: 1", "In b: 2"]


def test_some_comparisons_alone(evidence, tmp_path):
    with pytest.raises(ValueError, match="no comparison 'digits-ar'; there are digits-vq, digits-kl"):
        evidence.evidence(tmp_path, tmp_path, [], only=["digits-ar"])
    assert (
        "photos-gan" in evidence.incomplete({"digits-vq": {}})[0] and "digits-vq" not in evidence.incomplete({"digits-vq": {}})[0]
    )
    assert evidence.incomplete({f"{data}-{carrier}": {} for data in evidence.DATA for carrier in evidence.CARRIERS}) == []
