"""The page of a latent's report card: what it writes for both bottlenecks and with trials, and what it refuses."""

import json
import math
import re
import shutil
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
import torch
from PIL import Image

from dae.config import save_config
from dae.diagnostics import predictors
from dae.diagnostics.latent_report import as_colours
from dae.diagnostics.report_card import PREDICTORS
from dae.models import Autoencoder
from dae.reporting import latent_card
from dae.statistics import RankCorrelation

FEW = "measure.max_images=100"
PICTURES = ("reconstructions", "disturbances", "interpolations", "map")


@pytest.fixture(scope="module", autouse=True)
def short():
    """The trainings of the card itself are tested in tests/diagnostics."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(predictors, "PRIOR_STEPS", 5)
        patch.setattr(predictors, "MLP_STEPS", 5)
        yield


@pytest.fixture(scope="module")
def trained(tmp_path_factory, configure):
    """Runs with an autoencoder as initialised, by bottleneck."""
    return {name: save_autoencoder(tmp_path_factory.mktemp(name), configure, name) for name in ("vq", "kl")}


def save_autoencoder(folder, configure, bottleneck="vq", *overrides):
    config = configure(folder, f"autoencoder.bottleneck={bottleneck}", *overrides)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Autoencoder(config.autoencoder, config.data.channels, config.data.resolution)
    model.save_pretrained(folder / "autoencoder")
    save_config(config, folder / "autoencoder" / "config.yaml")
    return folder


SETTINGS = {"data.dataset_name": "digits", "data.resolution": 8, "autoencoder.bottleneck": "vq", "seed": 7}


def write_trials(folder, seeds=(0, 1, 2, 3, 4), arms=("joint", "dae-linear"), **other):
    """`other` settings by the last part of their key."""
    settings = {key: other.get(key.rpartition(".")[2], value) for key, value in SETTINGS.items()}
    (folder / "trials").mkdir(parents=True)
    for seed in seeds:
        for number, arm in enumerate(arms):
            distance = 10.0 - 3 * number + seed / 10
            card = dict.fromkeys(PREDICTORS) | {"prior_bits": 3 * distance, "linear_probe": -distance, "codebook_usage": 1.0}
            record = {"arm": arm, "seed": seed, "purpose": "measure", "rate": None, "priors": [{"frechet": distance}]}
            for name, rest in ((f"{arm}-{seed}", {"card": card}), (f"{arm}-{seed}-rate", {"card": None, "rate": 64.0})):
                content = {"settings": settings, "diverged": None, "record": record | rest}
                (folder / "trials" / f"{name}.json").write_text(json.dumps(content))
    content = {"settings": settings, "diverged": "the loss is nan", "record": None}
    (folder / "trials" / "other.json").write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize("bottleneck", ["vq", "kl"])
def test_page_and_card(bottleneck, trained, run):
    folder = trained[bottleneck]
    assert run("report_latent", folder) == folder / "latent"
    found = json.loads((folder / "latent" / "card.json").read_text())
    assert list(found["card"]) == list(PREDICTORS) == list(found["predictors"])
    assert (found["card"]["gaussian_rate"] is None) == (bottleneck == "vq")
    assert (found["card"]["ngram_bits"] is None) == (bottleneck == "kl")
    assert found["counts"] == {"train": 1437, "heldout": 360} and found["rank_correlations"] == {}
    page = (folder / "latent" / "card.html").read_text()
    body = page[page.index("<body>") :]
    ElementTree.fromstring(re.sub(r"<img ([^>]*)>", r"<img \1/>", body[: body.index("</body>") + 7]).replace("<body>", "<body>"))
    for name, predictor in PREDICTORS.items():
        assert (predictor.meaning.replace("'", "&#x27;") in page) == (found["card"][name] is not None), name
    assert "No comparison was given" in page and "nan" not in re.sub(r"base64,[^\"]*", "", page).lower()
    assert ("How often each code is used" in page) == (bottleneck == "vq")
    for name in PICTURES:
        with Image.open(folder / "latent" / f"{name}.png") as sheet:
            assert np.ptp(np.asarray(sheet)) > 0, name
    assert not re.search(r'(src|href)="(?!data:|#|https://arxiv)', page), "nothing is fetched"


@pytest.mark.parametrize("bottleneck", ["vq", "kl"])
def test_same_command_same_card(bottleneck, trained, run, tmp_path):
    """And the card is the library's, whatever happened to the global random state."""
    folder = trained[bottleneck]
    copy = shutil.copytree(folder, tmp_path / "copy", ignore=shutil.ignore_patterns("latent"))
    cards = []
    for each in (folder, copy):
        torch.rand(3)
        cards.append(json.loads((run("report_latent", each, FEW) / "card.json").read_text()))
    assert cards[0]["card"] == cards[1]["card"] and cards[0]["counts"] == {"train": 100, "heldout": 100}


def test_rank_correlations(trained, run, tmp_path):
    trials = write_trials(tmp_path / "compare")
    written = run("report_latent", trained["vq"], FEW, f"measure.compare_folders=[{trials}]")
    found = json.loads((written / "card.json").read_text())["rank_correlations"][str(trials)]
    assert found["prior_bits"]["rho"] == pytest.approx(1) and found["linear_probe"]["rho"] == pytest.approx(-1)
    assert found["prior_bits"]["n"] == 10 and found["prior_bits"]["seeds"] == 5 and found["codebook_usage"]["rho"] is None
    assert set(found) == {"prior_bits", "linear_probe", "codebook_usage"}
    page = (written / "card.html").read_text()
    assert page.count('<td class="prose">as hoped</td>') == 2 and "the same in all trials" in page
    assert (
        "10 autoencoders were trained" in page
        and "n = 10" in page
        and page.count(" to ") > 3
        and "No comparison was given" not in page
    )


def test_too_few_trials_and_trials_of_the_run_itself(trained, run, tmp_path):
    own = write_trials(shutil.copytree(trained["vq"], tmp_path / "own"), seeds=(0,))
    page = (run("report_latent", own, FEW) / "card.html").read_text()
    assert "fewer than three finished trials" in page
    two_seeds = write_trials(tmp_path / "compare", seeds=(0, 1))
    page = (run("report_latent", trained["vq"], FEW, f"measure.compare_folders=[{two_seeds}]") / "card.html").read_text()
    assert page.count("too few seeds") == 3 and "as hoped" not in page
    assert "no interval is given" in page and "95\u00a0% interval" not in page


def test_unlabelled_images(tmp_path, run, configure):
    folder = save_autoencoder(tmp_path, configure)
    found = json.loads((run("report_latent", folder, FEW, "data.label_column=none") / "card.json").read_text())
    assert found["card"]["linear_probe"] is None and found["card"]["linear_distance"] > 0


def test_one_latent_channel_has_a_picture():
    colours = as_colours(torch.arange(8.0).view(2, 1, 2, 2))
    assert colours.shape == (2, 3, 2, 2) and (colours[:, 1:] == 0).all()
    assert colours[:, 0].flatten().diff().abs().min() > 0 and colours.abs().max() <= 1


def test_verdicts():
    def verdict(name, *values):
        return latent_card.outcome(name, RankCorrelation(*values, 9))

    assert verdict("prior_bits", 0.5, 0.1, 0.9) == "as hoped" and verdict("prior_bits", -0.5, -0.9, -0.1) == "the opposite"
    assert verdict("linear_probe", -0.5, -0.9, -0.1) == "as hoped" and verdict("prior_bits", 0.5, -0.1, 0.9) == "cannot be told"
    assert verdict("code_entropy", 0.5, 0.1, 0.9) == "more is worse"
    assert verdict("code_entropy", 0.5, math.nan, math.nan) == "no interval"


# ---- bad input ----


def test_no_autoencoder(run, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no trained model in .*autoencoder: make it with recipes/train_dae\.py"):
        run("report_latent", tmp_path)


def test_other_data(tmp_path, run, configure):
    folder = save_autoencoder(tmp_path, configure)
    with pytest.raises(ValueError, match=r"another data set than the one asked for \(data\.dataset_name: 'digits' -> 'photos'"):
        run("report_latent", folder, "data.dataset_name=photos")
    with pytest.raises(ValueError, match=r"data\.resolution=16"):
        run("report_latent", folder, "data.resolution=16")


def test_too_few_images(tmp_path, run, configure):
    folder = save_autoencoder(tmp_path, configure)
    with pytest.raises(ValueError, match="expected at least 10 images, got 4"):
        run("report_latent", folder, "measure.max_images=4")


def test_diverged(tmp_path, configure, run):
    folder = save_autoencoder(tmp_path, configure)
    model = Autoencoder.from_pretrained(folder / "autoencoder")
    model.encoder.conv_in.weight.data[0] = torch.nan
    model.save_pretrained(folder / "autoencoder")
    with pytest.raises(FloatingPointError, match="the encoder gives NaN"):
        run("report_latent", folder)


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"dataset_name": "faces"}, "data.dataset_name is 'faces' there and 'digits' of the latent"),
        ({"resolution": 16}, "data.resolution is 16 there and 8 of the latent"),
        ({"bottleneck": "kl"}, "autoencoder.bottleneck is 'kl' there and 'vq' of the latent"),
    ],
)
def test_trials_of_something_else(tmp_path, run, configure, other, words):
    folder = save_autoencoder(tmp_path / "run", configure)
    trials = write_trials(tmp_path / "compare", **other)
    with pytest.raises(ValueError, match=re.escape(f"the trials in {trials} ") + ".*" + re.escape(words)):
        run("report_latent", folder, f"measure.compare_folders=[{trials}]")
    assert not (folder / "latent").exists()


def test_folders_without_trials(tmp_path, run, configure):
    folder = save_autoencoder(tmp_path / "run", configure)
    with pytest.raises(FileNotFoundError, match=r"holds no trials/; expected the output_dir of recipes/compare\.py"):
        run("report_latent", folder, f"measure.compare_folders=[{tmp_path}]")
    write_trials(tmp_path)
    (tmp_path / "trials" / "joint-0.json").write_text("{")
    with pytest.raises(ValueError, match=r"joint-0\.json is damaged"):
        run("report_latent", folder, f"measure.compare_folders=[{tmp_path}]")
