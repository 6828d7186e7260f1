"""The document of evidence, from comparisons so small that they show nothing."""

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TINY = [
    "compare.seeds=[0,1]", "compare.arms=[joint,dae-linear]", "compare.learning_rates=[1e-3,2e-3]", "compare.processes=2",
    "stage1.max_train_steps=2", "stage2.max_train_steps=2", "prior.max_train_steps=2", "prior.width=16", "prior.depth=1",
    "prior.num_components=2", "evaluation.classifier_steps=10", "sampling.num_samples=40", "sampling.num_inference_steps=1",
]  # fmt: skip


@pytest.fixture(scope="module")
def evidence():
    spec = importlib.util.spec_from_file_location("recipe_evidence", ROOT / "recipes" / "evidence.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_smoke_of_all_carriers(evidence, tmp_path, monkeypatch):
    monkeypatch.setattr(evidence, "DATA", {"digits": evidence.DATA["digits"]})
    path = evidence.evidence(tmp_path / "runs", tmp_path / "docs", TINY)
    text = path.read_text()
    for title, _ in evidence.CARRIERS.values():
        assert f"## {title} on digits" in text
    assert text.count("| joint | ") == 6 and text.count("| dae-linear | ") >= 7  # a table of results and one of sizes each
    assert "Does decoupling help at equal steps?" in text and "Does decoupling help at equal rate?" in text
    assert not re.search(r"\bnan\b|None", text)
    for picture in re.findall(r"\]\((evidence/[^)]+\.png)\)", text):
        assert (path.parent / picture).read_bytes().startswith(b"\x89PNG")
    assert len(list((tmp_path / "runs" / "digits-vq" / "trials").glob("measure-*.json"))) == 2 * 2 + 2 * 2 * 2
    # The same command finds all trials finished, and writes the same document.
    trials = {p: p.stat().st_mtime_ns for p in (tmp_path / "runs").glob("*/trials/*.json")}
    assert evidence.evidence(tmp_path / "runs", tmp_path / "docs", TINY).read_text() == text
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "runs").glob("*/trials/*.json")} == trials


def test_words_follow_the_intervals(evidence):
    def row(better, worse, same, low, high):
        ratio = {"mean": (low * high) ** 0.5, "low": low, "high": high, "n": 6}
        return {"better": better, "worse": worse, "no difference shown": same, "not known": 0, "ratio": ratio}

    pooled = {"equal_steps": {"dae-linear": row(5, 0, 1, 0.5, 0.8), "weak": row(0, 6, 0, 2.0, 3.0)}, "equal_rate": {}}
    said = "\n".join(evidence.answers(pooled, "joint"))
    assert "Of 6 pairs" in said and "than joint's in 5, farther in 0, and in 1 no difference was shown." in said
    assert "over the comparisons nearer (0.63 times the distance, [0.50, 0.80])" in said
    assert "weak" not in said and "**At equal rate** nothing can be said" in said
    pooled["equal_rate"] = {"dae-linear": row(1, 1, 4, 0.8, 1.25), "dae-narrow": row(0, 3, 3, 1.1, 1.3)}
    said = "\n".join(evidence.answers(pooled, "joint"))
    assert "Of 12 pairs" in said and "neither nearer nor farther by this evidence (1.00 times" in said
    assert "dae-narrow: worse 3, no difference shown 3; over the comparisons farther" in said
