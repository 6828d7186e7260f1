"""The page of a run: self-contained, well-formed, escaped, for every kind of run; and what it refuses."""

import base64
import html
import importlib.util
import json
import os
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dae.config import load_config, save_config
from dae.reporting.record import Record, seconds_by_stage
from dae.reporting.run import METHODS, STAGES
from dae.training import plan_stages

RECIPE = Path(__file__).parents[2] / "recipes" / "report.py"
SECTIONS = [
    "In numbers", "Samples", "Reconstructions", "Training", "Warnings", "Codebook", "Copies?", "All measurements", "Time",
    "Configuration and versions",
]  # fmt: skip


@pytest.fixture(scope="module")
def report():
    spec = importlib.util.spec_from_file_location("report_recipe", RECIPE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.report


def make_run(folder: Path, *, method="dae", classes=3, shape=(8, 8, 1), samples=24, overrides=(), **changed) -> Path:
    """The files of a finished run with made-up contents; `changed` replaces entries of metrics.json."""
    random, labelled = np.random.default_rng(0), classes > 1
    config = load_config(None, [f"output_dir={folder}", f"method={method}", *overrides])
    for name in ("samples", "evaluation", "autoencoder/logs", "prior/logs"):
        (folder / name).mkdir(parents=True)
    for place in (folder, folder / "autoencoder", folder / "prior"):
        save_config(config, place / "config.yaml")

    def images(n):
        return random.integers(0, 256, (n, *shape)).astype(np.uint8)

    sampling = {"num_samples": samples, "cfg_scale": 1.5, "temperature": 1.0, "top_k": None, "top_p": 0.9}
    sampling |= {"seconds": 2.0, "prior": "0" * 64, "seed": 0}
    (folder / "samples" / "sampling.json").write_text(json.dumps(sampling))
    np.savez(folder / "samples" / "samples.npz", arr_0=images(samples), arr_1=np.arange(samples) % classes)
    decoders = {"stage 1": "narrow", "final": "full"} if method == "dae" else {"final": "full"}
    pictures = dict.fromkeys(("originals", *decoders, "samples", "nearest training images"))
    np.savez(folder / "evaluation" / "pictures.npz", **{name: images(16) for name in pictures})

    stages = ("stage1", "stage2") if method == "dae" else ("joint",)
    rows = []
    for i, stage in enumerate(stages):
        steps = [(100 * i + s, s) for s in (50, 100)]
        rows += [{"step": a, "seconds": a / 10, "stage": stage, "split": "train", "loss": 1 / s, "lr": 0.1} for a, s in steps]
        last = 100 * (i + 1)
        rows += [{"step": last, "seconds": last / 10 + 1, "stage": stage, "split": "validation", "psnr": 20.0 + i}]
    write_rows(folder / "autoencoder", rows)
    rows = [{"step": s, "seconds": s, "stage": "prior", "split": "train", "loss": 100 / s} for s in range(10, 60, 10)]
    rows += [{"step": s, "seconds": s, "stage": "prior", "split": "validation", "bits_per_token": 2 + s / 100} for s in (25, 50)]
    write_rows(folder / "prior", rows)

    judged = {
        "recognised": 0.75 if labelled else None, "frechet": 12.5, "frechet_std": 0.25, "frechet_ratio": 5.0, "precision": 0.5,
        "recall": 0.25, "memorised": 0.0125, "memorised_heldout": 0.01, "memorised_threshold": 0.1,
    }  # fmt: skip
    metrics = {
        "reconstruction": {n: {"decoder": d, "psnr": 21.5, "ssim": 0.9, "frechet": 3.0} for n, d in decoders.items()},
        "codebook": {"usage": 0.75, "perplexity": 2.0, "counts": [4, 0, 8, 4]},
        "prior": {"heldout_bits_per_token": 2.25, "step": 25, "tokens_an_image": 16},
        "generation": judged,
        "floor": {"frechet": 2.5, "frechet_std": 0.0, "meaning": ""},
        "guidance_sweep": [{"prior_step": 25, "heldout_bits_per_token": 2.25, "cfg_scale": c} | judged for c in (1.0, 1.5)],
        "extractor": {"id": "digits-classifier-0", "note": "digits features, not Inception", "heldout_accuracy": 0.875},
        "counts": {"train": 4321, "heldout": 360, "samples": samples, "frechet": 360},
        "sampling": sampling, "method": method, "seed": 7, "versions": {"torch": "2.99"}, "seconds": 125.0,
    }  # fmt: skip
    (folder / "metrics.json").write_text(json.dumps(metrics | changed))
    return folder


def write_rows(folder: Path, rows: list[dict]) -> None:
    (folder / "logs" / "history.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def page_of(report, read_page):
    return lambda folder: read_page(report(load_config(None, [f"output_dir={folder}"])))


KINDS = {
    "dae": {},
    "joint": {"method": "joint"},
    "unlabelled": {"classes": 1},
    "rgb": {"shape": (64, 64, 3)},
    "large": {"shape": (128, 128, 3), "samples": 6},
    "thousand classes": {"classes": 1000, "samples": 2000},
    "earlier": {"codebook": None, "guidance_sweep": [], "data": None},
}


@pytest.mark.parametrize("kind", KINDS)
def test_page_is_complete_well_formed_and_self_contained(tmp_path, page_of, kind):
    reader = page_of(make_run(tmp_path / "run", **KINDS[kind]))
    page = reader.html
    assert [re.sub("<.*?>", "", h) for h in re.findall("<h2>(.*?)</h2>", page)] == SECTIONS
    targets = {a["id"] for _, a in reader.tags if "id" in a}
    for address in reader.values("a", "href"):
        assert address == "https://arxiv.org/abs/2307.08283" or address[1:] in targets
    assert set(re.findall('https?://[^"<]*', page)) == {"https://arxiv.org/abs/2307.08283"}
    assert not {"script", "link", "iframe"} & {tag for tag, _ in reader.tags}
    assert reader.values("img", "src") and all(src.startswith("data:image/") for src in reader.values("img", "src"))
    assert all(len(alt) > 3 for alt in reader.values("img", "alt"))
    assert len(reader.values("img", "alt")) == len(reader.values("img", "src"))
    for svg in re.findall('data:image/svg\\+xml;base64,([^"]*)', page):
        drawing = base64.b64decode(svg).decode()
        ElementTree.fromstring(drawing)
        assert 'href="http' not in drawing and "prefers-color-scheme" in drawing
        assert "#0" not in re.sub(r":root\{.*?\}", "", drawing), "a dark colour that is not one of the rules"
    assert len(page) < 5e6


@pytest.mark.parametrize("shape", [(8, 8, 1), (64, 64, 3)])
def test_samples_stand_beside_originals(tmp_path, report, shape):
    folder = make_run(tmp_path / "run", shape=shape, samples=40)
    report(load_config(None, [f"output_dir={folder}"]))
    picture = np.asarray(Image.open(folder / "report.png")).reshape(-1, 2 * (8 * 66 + 2) + 32, shape[2])
    samples, originals = np.load(folder / "samples" / "samples.npz")["arr_0"], np.load(folder / "evaluation" / "pictures.npz")
    factor = 64 // shape[0]
    np.testing.assert_array_equal(picture[2:66:factor, 2:66:factor], originals["originals"][0])
    np.testing.assert_array_equal(picture[2 + 66 : 66 + 66 : factor, 562 + 2 : 562 + 66 : factor], samples[8])
    assert (picture[:, 530:562] == 255).all() and len(picture) == 2 * 66 + 2, "as many samples as there are originals, 16"


def test_metrics_of_earlier_versions_give_the_same_page(tmp_path, page_of):
    """They call the sweep of guidance scales a trade."""
    file = make_run(tmp_path / "run") / "metrics.json"
    page, metrics = page_of(file.parent).html, json.loads(file.read_text())
    metrics["trade"] = metrics.pop("guidance_sweep")
    written = file.stat().st_mtime
    file.write_text(json.dumps(metrics))
    os.utime(file, (written, written))
    assert page_of(file.parent).html == page and "What fidelity costs" in page


def test_numbers_stand_beside_their_baselines(tmp_path, page_of):
    page = page_of(make_run(tmp_path / "run")).html
    text = re.sub("<.*?>", " ", page).replace("\u00a0", " ")
    for words in (
        "Samples recognised as their class  75.0 %", "real held-out images: 87.5 %", "5.00 × that of real training images (2.50)",
        "Near-copies of training images  1.2 %",
        "real held-out images: 1.0 %", "1.00 if only the frequency of each code is known; 36.0 a whole image", "21.5 dB",
        "4,321 training images", "360 held-out images", "digits features, not Inception", "12.50 ± 0.25", "top-p 0.9",
        "The row in bold", "Training: stage 2, real decoder", "2 min", "2.99", "7 for training",
        "hyper-parameters are ours",
    ):  # fmt: skip
        assert words in text, words
    assert page.count('class="marked"') == 1


def test_kinds_of_runs_differ_where_they_should(tmp_path, page_of):
    pages = {kind: page_of(make_run(tmp_path / kind, **KINDS[kind])).html for kind in ("dae", "joint", "unlabelled", "earlier")}
    assert "Decoupled Autoencoder on digits" in pages["dae"] and "Jointly trained autoencoder on digits" in pages["joint"]
    assert "weak decoder (narrow)" in pages["dae"] and "weak decoder (narrow)" not in pages["joint"]
    assert "marks the switch" in pages["dae"] and "marks the switch" not in pages["joint"]
    assert (
        "ecognised" not in pages["unlabelled"].split("</header>")[1].split("fewest")[0] and "quarter turns" in pages["unlabelled"]
    )
    assert "without classes" in pages["unlabelled"] and "3 classes" in pages["dae"]
    assert "No codes were counted" in pages["earlier"] and "What fidelity costs" not in pages["earlier"]


@pytest.mark.parametrize("method", ["dae", "joint", "joint_dropout", "joint_finetuned", "weak", "refit"])
def test_every_method_and_stage_has_words(method):
    config = load_config(None, [f"method={method}"])
    assert "{" not in METHODS[method][1].format(codes="tokens")
    assert {stage.name for stage in plan_stages(config)} <= STAGES.keys()


def test_warnings_stand_on_the_page(tmp_path, page_of):
    folder = make_run(tmp_path / "run")
    assert "Nothing in the log of training looked wrong." in page_of(folder).words
    for name, stage in (("autoencoder", "stage1"), ("prior", "prior")):
        row = {"step": 3, "seconds": 2.5, "stage": stage, "split": "warning", "condition": "loss_spike"}
        with open(folder / name / "logs" / "history.jsonl", "a") as file:
            file.write(json.dumps(row | {"message": f"{stage}, step 3: the loss jumps to <b>; lower it"}) + "\n")
    section = page_of(folder).html.split('<section id="warnings">')[1].split("</section>")[0]
    assert section.count("step 3: the loss jumps to &lt;b&gt;; lower it") == 2 and "Nothing" not in section


TABLE = [["data", "<b>x</b>"], ["rows", "18 to train on, 2 held out"], ["left out", "1 file: suffix .txt is not read, notes.txt"]]


@pytest.mark.parametrize(("prior", "tables"), [(None, 1), ("same", 1), ("other", 2)])
def test_what_training_read_stands_on_the_page(tmp_path, page_of, prior, tables):
    folder = make_run(tmp_path / "run")
    for name, fingerprint in {"autoencoder": "same", "prior": prior}.items():
        if fingerprint:
            data = {"fingerprint": fingerprint, "class_names": ["a"], "table": TABLE}
            (folder / name / "data.json").write_text(json.dumps(data))
    reader = page_of(folder)
    assert re.findall("<h2>(.*?)</h2>", reader.html) == [*SECTIONS[:3], "Data", *SECTIONS[3:]]
    section = reader.html.split('<section id="data">')[1].split("</section>")[0]
    for what, fact in TABLE:
        assert section.count(html.escape(fact)) == section.count(f">{what}</td>") == tables
    assert ("trained on other data" in section) == (tables == 2) and "<b>" not in section


def test_a_damaged_description_of_the_data_is_named(tmp_path, page_of):
    folder = make_run(tmp_path / "run")
    for content in ("{", "[]", '{"class_names": ["a"], "table": [["one"]]}', '{"class_names": ["a"], "table": []}'):
        (folder / "autoencoder" / "data.json").write_text(content)
        with pytest.raises(ValueError, match=r"data\.json is damaged .*: resume the run"):
            page_of(folder)


def test_many_classes_show_the_first_twenty(tmp_path, page_of):
    reader = page_of(make_run(tmp_path / "run", **KINDS["thousand classes"]))
    assert "(20 of 1,000 classes)" in reader.html
    assert sum(alt.startswith("2 samples of class") for alt in reader.values("img", "alt")) == 20


def test_names_and_settings_are_escaped(tmp_path, page_of):
    data = {
        "name": "a<b>&\"c'",
        "train": None,
        "num_classes": 3,
        "class_names": ["<script>x</script>", "b", "c"],
        "fingerprint": "f",
    }
    reader = page_of(make_run(tmp_path / "run", data=data, overrides=["hub_model_id='<img src=x>'"]))
    assert "script" not in {tag for tag, _ in reader.tags} and "x" not in reader.values("img", "src")
    words = reader.words
    assert "<script>x</script>" in words and "a<b>&\"c'" in words and "<img src=x>" in words
    assert "a stream of training images" in words


def test_missing_optional_files(tmp_path, page_of):
    folder = make_run(tmp_path / "run")
    for name in (
        "evaluation/pictures.npz",
        "autoencoder/logs/history.jsonl",
        "prior/logs/history.jsonl",
        "samples/sampling.json",
    ):
        (folder / name).unlink()
    for name in ("", "autoencoder", "prior"):
        (folder / name / "config.yaml").unlink()
    page = page_of(folder).html
    assert "no evaluation/pictures.npz" in page and "no prior/logs" in page and "Training took" not in page


@pytest.mark.parametrize(("name", "recipe"), [("metrics.json", "evaluate.py"), ("samples/samples.npz", "sample.py")])
def test_missing_files_name_the_recipe(tmp_path, report, name, recipe):
    (make_run(tmp_path / "run") / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"recipes/{recipe}"):
        report(load_config(None, [f"output_dir={tmp_path / 'run'}"]))


def test_samples_newer_than_the_measurements_are_announced(tmp_path, page_of):
    folder = make_run(tmp_path / "run")
    assert 'class="notice"' not in page_of(folder).html
    (folder / "samples" / "sampling.json").write_text('{"seed": 1}')
    assert "drawn after the measurements" in page_of(folder).html


def test_record_tells_what_each_part_was_trained_with(tmp_path):
    folder = make_run(tmp_path / "run")
    other = load_config(None, ["method=joint", "stage1.max_train_steps=9", "prior.depth=9"])
    save_config(other, folder / "autoencoder" / "config.yaml")
    trained = Record.load(load_config(None, [f"output_dir={folder}"])).config
    assert (trained.method, trained.stage1.max_train_steps, trained.prior.depth) == ("joint", 9, 4)


def test_seconds_of_a_resumed_run_add_up():
    rows = [("stage1", 5), ("stage1", 9), ("stage1", 2), ("stage2", 3.5)]
    assert seconds_by_stage([{"stage": s, "seconds": t} for s, t in rows]) == {"stage1": 11, "stage2": 1.5}
