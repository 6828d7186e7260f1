"""The document of evidence, from comparisons so small that they show nothing."""

import importlib.util
import json
import re
from pathlib import Path

import pytest

from dae.comparison.experiments import EXPERIMENTS, TITLES
from dae.reporting.evidence import best_predictor, by_comparison, evidence_document, incomplete, pooled_answers, said_of_all

ROOT = Path(__file__).parents[2]
TINY = [
    "compare.seeds=[0,1]", "compare.arms=[joint,dae-linear]", "compare.learning_rates=[1e-3,2e-3]", "compare.processes=1",
    "stage1.max_train_steps=2", "stage2.max_train_steps=2", "prior.max_train_steps=2", "prior.width=32", "prior.depth=1",
    "prior.num_components=2", "data.max_train_samples=96", "data.validation_size=48", "evaluation.classifier_steps=10",
    "sampling.num_samples=40", "sampling.num_inference_steps=1",
]  # fmt: skip
COMMAND = " ".join(["python recipes/evidence.py", *(f"'{override}'" for override in TINY)])


@pytest.fixture(scope="module")
def evidence():
    spec = importlib.util.spec_from_file_location("recipe_evidence", ROOT / "recipes" / "evidence.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def digits(evidence, tmp_path_factory):
    """`digits(only)`: the document of these comparisons on the digits alone, a finished one not run again; or from `results`."""
    folder, photos = tmp_path_factory.mktemp("evidence"), [name for name in EXPERIMENTS if name.startswith("photos")]

    def write(only=None, results=None):
        with pytest.MonkeyPatch.context() as patch:
            for name in reversed(photos):  # put back in the order they had
                patch.delitem(EXPERIMENTS, name)
            if results is not None:
                return evidence_document(results, COMMAND)
            return evidence.evidence(folder / "runs", folder / "docs", TINY, only)

    write.trials = folder / "runs"
    return write


@pytest.mark.slow
@pytest.mark.parametrize("latent", ["vq", "kl", "gan"])
def test_smoke_of_one_latent_type(digits, latent):
    text = digits([f"digits-{latent}"]).read_text()
    assert f"## {TITLES[latent]} on digits" in text and "**This is not all:" in text
    assert len(re.findall(r"(?m)^\| joint \| ", text)) == 2 and text.count("| dae-linear | ") >= 2  # results and sizes
    assert not re.search(r"\bnan\b|None", text)
    if latent == "vq":
        measured = len(list(digits.trials.glob("digits-vq/trials/measure-*.json")))
        assert measured == 2 * 2 + 2 * (2 + 1)  # joint at both further rates, dae-linear at one


@pytest.mark.slow
def test_smoke_of_all_latent_types(digits):
    """The trials of the tests above are finished: nothing is run again, and their results write the same document again."""
    trials = {p: p.stat().st_mtime_ns for p in digits.trials.glob("*/trials/*.json")}
    path = digits()
    text = path.read_text()
    assert {p: t for p in trials if (t := p.stat().st_mtime_ns) != trials[p]} == {}
    assert list(TITLES) == ["vq", "kl", "gan"]
    for title in TITLES.values():
        assert f"## {title} on digits" in text
    assert (
        len(re.findall(r"(?m)^\| joint \| ", text)) == 6 and text.count("| dae-linear | ") >= 7
    )  # a table of results and one of sizes each
    assert "Does decoupling help at equal steps?" in text and "Does decoupling help at equal rate?" in text
    assert not re.search(r"\bnan\b|None", text)
    for picture in re.findall(r"\]\((evidence/[^)]+\.png)\)", text):
        assert (path.parent / picture).read_bytes().startswith(b"\x89PNG")
    results = {f"digits-{c}": json.loads((digits.trials / f"digits-{c}" / "compare.json").read_text()) for c in TITLES}
    assert digits(results=results) == text


def row(better, worse, same, low=None, high=None):
    ratio = low and {"mean": (low * high) ** 0.5, "low": low, "high": high, "n": 6}
    counts = {"better": better, "worse": worse, "no difference shown": same, "not known": 0}
    return counts | {"ratio": ratio, "seeds": 28, "of": 30}


def test_words_follow_the_counts_and_not_the_names():
    pooled = {"equal_steps": {"own": row(5, 0, 1, 0.5, 0.8), "dae-like": row(0, 6, 0, 2.0, 3.0)}}
    pooled |= {"equal_encoder": None, "equal_rate": None}
    said = "\n".join(pooled_answers(pooled, "joint", {"own"}))
    assert "Of 6 pairs" in said and "than joint's in 5, farther in 0, and in 1 no difference was shown." in said
    assert "- own: better 5, no difference shown 1; 0.63 [0.50, 0.80] times the distance in the mean of 6 comparisons (28" in said
    assert "dae-like" not in said and "equal rate** nothing can be said: no frontier" in said
    pooled |= {"equal_rate": {"own": row(1, 1, 4, 0.8, 1.25), "two": row(0, 3, 3)}, "equal_encoder": {"own": row(2, 0, 4)}}
    said = "\n".join(pooled_answers(pooled, "joint", {"own", "two"}, "tuned"))
    assert "Of 12 pairs" in said and "than tuned's in 2" in said and "two: worse 3, no difference shown 3; too few" in said
    assert "over the comparisons nearer" not in said and "farther by this evidence" not in said
    none = pooled_answers(pooled, "joint", set())
    assert sum("nothing can be said: no arm is decoupled" in line for line in none) == 3
    assert "no decoupled arm has a result" in "\n".join(pooled_answers(pooled, "joint", {"lost"}))


def test_each_comparison_has_its_verdict_beside_its_ratio():
    steps = {"own": {"verdicts": {"a": "better"}, "ratios": {"a": 0.5}}}
    rate = {"own": {"verdicts": {"a": "not known", "b": "no difference shown"}, "ratios": {"b": 1.2}}}
    pooled = {"equal_steps": steps, "equal_encoder": None, "equal_rate": rate}
    table = by_comparison(["a", "b"], pooled, "joint")
    assert table[2] == "| arm | against | a | b |"
    assert table[4:-1] == [
        "| own | joint | better, 0.50 | – |",
        "| own | joint, equal rate | not known | no difference shown, 1.20 |",
    ]


def predictor(name, mean, low=None, high=None, n=6, rivals=None):
    return {"name": name, "mean": mean, "low": low, "high": high, "n": n, "rivals": rivals}


def test_the_best_predictor_is_said_with_its_interval_or_that_it_cannot_be_told():
    two = [predictor("A", 0.8, 0.6, 0.9, rivals=[]), predictor("B", -0.5, -0.7, -0.2), predictor("C", 0.9, 0.8, 0.95, n=2)]
    said = best_predictor(two)
    assert said[0].startswith("*A* has the strongest mean correlation, 0.80 [0.60, 0.90], of 2 numbers known in 6 comparisons (")
    assert said.index("Known in fewer comparisons, and so not ranked beside those above:") < said.index(
        "| C | 0.90 [0.80, 0.95] | 2 |"
    )
    close = [two[0] | {"rivals": ["B"], "low": -0.1}, *two[1:]]
    assert "The intervals of 1 of the 2 leave out 0" in best_predictor(close)[0]
    assert best_predictor(close)[0].startswith("Which is best cannot be told: *A* has")
    assert "does not differ by more than chance from 1 of the others, the next one, *B*, among them" in best_predictor(close)[0]
    assert best_predictor([predictor("A", 0.8, n=1)])[0].startswith("One comparison cannot tell")
    assert "No report cards" in best_predictor([])[0]


def test_what_holds_for_all_comparisons_is_said_once():
    assert said_of_all(lambda s: s["x"], {"a": {"x": "1"}, "b": {"x": "1"}}) == ["1"]
    assert said_of_all(lambda s: s["x"], {"a": {"x": "1"}, "b": {"x": "2"}, "c": {"x": "1"}}) == ["In a, c: 1", "In b: 2"]


def test_some_comparisons_alone(evidence, tmp_path):
    with pytest.raises(ValueError, match="no comparison 'digits-ar'; there are digits-vq, digits-kl"):
        evidence.evidence(tmp_path, tmp_path, [], only=["digits-ar"])
    assert "photos-gan" in incomplete({"digits-vq": {}})[0] and "digits-vq" not in incomplete({"digits-vq": {}})[0]
    assert incomplete(EXPERIMENTS) == []
