"""The numbers of metrics.json in words: what there is for each prior family and kind of data, and nothing else."""

import pytest

from dae.priors import PRIORS
from dae.reporting.measures import bits_per_image, headline, measurements

LATENT = {"channels": 1, "size": 2, "gaussian_bits": 30.0, "gaussian_bits_by_channel": [30.0]}
SCORES = {
    "ar": {"heldout_bits_per_token": 2.0, "heldout_bits_per_image": 8.0, "tokens_an_image": 4},
    "dit": {"heldout_loss": 0.5, "heldout_bits_per_image": 25.0},
    "mixture": {"heldout_bits_per_image": 25.0},
}


def metrics_of(family: str, recognised: float | None = 0.75, **changed) -> dict:
    shares = {"memorised": 0.02, "memorised_heldout": 0.01, "memorised_threshold": 0.1, "precision": 0.5, "recall": 0.25}
    return {
        "reconstruction": {"final": {"decoder": "full", "psnr": 21.5, "ssim": 0.9, "frechet": 3.0}},
        "codebook": {"usage": 0.5, "perplexity": 4.0, "counts": [1, 1]} if family == "ar" else None,
        "latent": None if family == "ar" else LATENT,
        "prior": {"family": family, "step": 1} | SCORES[family],
        "generation": {"recognised": recognised, "frechet": 5.0, "frechet_std": 0.5, "frechet_ratio": 2.0} | shares,
        "floor": {"frechet": 2.5, "frechet_std": 0.0},
        "extractor": {"heldout_accuracy": 0.875},
    } | changed


@pytest.mark.parametrize("family", PRIORS)
def test_each_family_has_its_rows(family):
    rows = {name: (value, meaning) for name, value, meaning in measurements(metrics_of(family))}
    assert ("Codebook usage" in rows) == ("Held-out bits per token" in rows) == (family == "ar")
    assert ("The same, plain Gaussian" in rows) == (family != "ar") and ("Held-out loss" in rows) == (family == "dit")
    assert ("given the class" in rows["Held-out bits per image"][1]) == (family == "dit")
    assert rows["Fréchet distance"][0] == "5.00 ± 0.50" and rows["Fréchet distance, floor"][0] == "2.50"
    assert not [name for name in rows if name.startswith("Kernel")], "not measured by earlier versions"
    value, name, against = headline(metrics_of(family), 8)[3]
    assert (value, name.split(",")[0]) == (("2.00", "Bits per token") if family == "ar" else ("25.0", "Bits per image"))
    assert against.startswith("2.00 if only the frequency" if family == "ar" else "30.0 if the prior were")


@pytest.mark.parametrize(("labelled", "task"), [(True, "telling their classes apart"), (False, "quarter turns")])
def test_nothing_is_recognised_without_classes(labelled, task):
    metrics = metrics_of("mixture", recognised=None, data={"labelled": labelled})
    rows = {name: meaning for name, _, meaning in measurements(metrics)}
    assert "Recognised" not in rows and task in rows["Classifier's accuracy"] and len(headline(metrics, 0)) == 4


def test_the_balls_of_precision_and_recall_are_open():
    rows = {name: meaning for name, _, meaning in measurements(metrics_of("ar"))}
    assert all("open balls" in rows[name] for name in ("Precision", "Recall"))


def test_bits_of_earlier_versions_are_those_of_a_token():
    assert bits_per_image({"prior": {"heldout_bits_per_token": 2.5, "tokens_an_image": 16}}) == 40
