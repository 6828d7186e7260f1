"""What a recipe announces is there when it ends: whatever was deleted or cut before, and however few images are drawn."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

LATEST = "resume_from_checkpoint=latest"
MODEL = ("model.safetensors", "config.json", "README.md", "config.yaml")
PROMISED = {
    "train_dae": [f"autoencoder/{name}" for name in (*MODEL, "latent.json")],
    "encode": ["tokens/tokens.safetensors", "tokens/cache.json"],
    "train_prior": [f"prior/{name}" for name in MODEL],
    "sample": ["samples/samples.npz", "samples/sampling.json", "samples/grid.png", "samples/png/000007_class7.png"],
    "evaluate": ["metrics.json", "evaluation/classifier.safetensors", "evaluation/pictures.npz"],
    "report": ["report.html", "report.png"],
}
CASES = [(name, [file]) for name, promised in PROMISED.items() if name != "evaluate" for file in promised]
CASES.append(("evaluate", PROMISED["evaluate"]))  # which takes longer: all at once


def same(a, b):
    """Whether two files hold the same, without what a clock or a place wrote into them."""
    if a.suffix == ".safetensors":
        a, b = load_file(a), load_file(b)
        return a.keys() == b.keys() and all(value.equal(b[key]) for key, value in a.items())
    if a.suffix == ".npz":
        a, b = np.load(a), np.load(b)
        return a.files == b.files and all(np.array_equal(a[key], b[key]) for key in a.files)
    if a.name in ("sampling.json", "metrics.json"):
        a, b = (json.loads(p.read_text()) for p in (a, b))
        return a.keys() == b.keys()
    if a.suffix in (".png", ".json"):
        return a.read_bytes() == b.read_bytes()
    return b.stat().st_size > 0


@pytest.mark.parametrize(("name", "lost"), CASES, ids=[lost[0] for _, lost in CASES])
def test_made_again(chain, copied_chain, run, capsys, name, lost):
    """An output deleted, and the recipe run again as its own messages say; training resumes at its last step."""
    for file in lost:
        (copied_chain / file).unlink()
    run(name, copied_chain, LATEST)
    assert [f for f in PROMISED[name] if not same(chain / f, copied_chain / f)] == []
    assert "saved " in capsys.readouterr().out
    assert list(copied_chain.rglob(".*")) == []


@pytest.mark.parametrize("name", ["train_dae", "encode", "train_prior", "sample", "evaluate"])
def test_made_again_where_it_was_cut(chain, copied_chain, run, name):
    """Half of a file, as a crash of the machine leaves it."""
    file = copied_chain / next(f for f in PROMISED[name] if f.endswith((".safetensors", ".npz")))
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    run(name, copied_chain, LATEST)
    assert same(chain / file.relative_to(copied_chain), file)


def test_diffusion_transformer_made_again(made_once, tmp_path, run, history):
    """Its bits per image are measured after the training: at the last step they are there, or made good."""
    kl = ("autoencoder.bottleneck=kl", "prior.max_train_steps=8")
    whole = made_once("kl_outputs", ("train_dae", "encode", "train_prior"), *kl)
    copy = Path(shutil.copytree(whole, tmp_path / "copy"))
    (copy / "prior" / "model.safetensors").unlink()
    log = copy / "prior" / "logs" / "history.jsonl"
    log.write_text("".join(line + "\n" for line in log.read_text().splitlines() if "delivered" not in line))
    run("train_prior", copy, *kl, LATEST)
    assert same(whole / "prior" / "model.safetensors", copy / "prior" / "model.safetensors")
    assert history(copy / "prior") == history(whole / "prior")
    bits = history(whole / "prior")[-1]["bits_per_image"]
    assert all(f"| bits_per_image | {bits:.4g} |" in (f / "prior" / "README.md").read_text() for f in (whole, copy))


WORSE = (
    "prior.learning_rate=0.3", "prior.lr_scheduler=constant", "prior.ema_decay=0", "prior.max_train_steps=5",
    "validation_steps=2", "checkpointing_steps=2",
)  # fmt: skip


@pytest.fixture
def worse(chain, copied_chain, run, history):
    """A prior that a large learning rate makes worse and worse: the weights of its first validation are delivered."""
    shutil.rmtree(copied_chain / "prior")
    run("train_prior", copied_chain, *WORSE)
    rows = [row for row in history(copied_chain / "prior") if row["split"] == "validation"]
    assert min(rows, key=lambda row: row["bits_per_token"])["step"] == 2 and rows[-1]["step"] == 5
    return copied_chain


def test_the_card_tells_of_the_delivered_weights(worse, history):
    first = next(row for row in history(worse / "prior") if row["split"] == "validation")
    assert f"| bits_per_token | {first['bits_per_token']:.4g} |" in (worse / "prior" / "README.md").read_text()


def test_the_best_weights_are_in_every_checkpoint(worse, tmp_path, run, history):
    """Model, the checkpoint of that step and the log are lost."""
    model, log = worse / "prior" / "model.safetensors", worse / "prior" / "logs" / "history.jsonl"
    (worse / "prior" / "checkpoint-2").rename(tmp_path / "checkpoint-2")
    model.rename(tmp_path / "model.safetensors")
    log.unlink()
    run("train_prior", worse, *WORSE, LATEST)
    assert same(tmp_path / "model.safetensors", model)
    assert same(tmp_path / "checkpoint-2" / "ema.safetensors", model)
    assert [(row["step"], row["split"]) for row in history(worse / "prior")] == [(2, "validation")]
    run("sample", worse, "sampling.num_samples=20")
    run("evaluate", worse, *WORSE)


def test_a_lost_stage(chain, copied_chain, run, contents):
    """Its decoder is in no checkpoint of the next stage: said before anything is trained, and a way to have it again."""
    shutil.rmtree(copied_chain / "autoencoder" / "stage1")
    before = contents(copied_chain)
    with pytest.raises(FileNotFoundError, match=r"stage1 holds no model.*checkpoint-16, of a later stage, cannot restore it"):
        run("train_dae", copied_chain, LATEST)
    assert contents(copied_chain) == before
    run("train_dae", copied_chain, f"resume_from_checkpoint={copied_chain / 'autoencoder' / 'checkpoint-10'}")
    for name in ("model.safetensors", "stage1/model.safetensors"):
        assert same(chain / "autoencoder" / name, copied_chain / "autoencoder" / name)


def test_a_stage_comes_along_into_another_folder(chain, tmp_path, run):
    run("train_dae", tmp_path, f"resume_from_checkpoint={chain / 'autoencoder' / 'checkpoint-12'}")
    for name in ("model.safetensors", "stage1/model.safetensors"):
        assert same(chain / "autoencoder" / name, tmp_path / "autoencoder" / name)


COUNTS = {
    "one": ["sampling.num_samples=1"],
    "fewer than classes": ["sampling.num_samples=3"],
    "no multiple of the classes": ["sampling.num_samples=13"],
    "larger batch": ["sampling.num_samples=4", "sampling.batch_size=500"],
    "batches of one": ["sampling.num_samples=3", "sampling.batch_size=1"],
    "last batch of one": ["sampling.num_samples=11", "sampling.batch_size=5"],
}


@pytest.mark.parametrize("case", COUNTS)
def test_few_samples(copied_chain, run, case):
    run("sample", copied_chain, *COUNTS[case])
    count = int(COUNTS[case][0].split("=")[1])
    samples = np.load(copied_chain / "samples" / "samples.npz")
    assert samples["arr_0"].shape == (count, 8, 8, 1) and samples["arr_1"].tolist() == [i % 10 for i in range(count)]
    assert len(os.listdir(copied_chain / "samples" / "png")) == count
    rows, columns = min(count, 10), -(-count // 10)
    if count == 1:
        rows = columns = 1
    assert Image.open(copied_chain / "samples" / "grid.png").size == (columns * 9 + 1, rows * 9 + 1)


def test_grid_has_one_row_a_class(recipe):
    overview = recipe("sample").overview
    images = np.arange(13, dtype=np.uint8).reshape(13, 1, 1, 1).repeat(2, 1).repeat(2, 2)
    shown = overview(images, np.arange(13) % 10)[1::3, 1::3, 0]
    assert shown.shape == (10, 2) and shown.tolist() == [[c, c + 10 if c < 3 else 128] for c in range(10)]
    assert overview(images, np.zeros(13, int))[1::3, 1::3, 0].tolist() == [list(range(13))]


@pytest.mark.parametrize(
    ("name", "where"),
    [("sample", "recipe_sample.write_png"), ("evaluate", "recipe_evaluate.write_npz"), ("encode", "dae.data.cache.write_file")],
)
def test_interrupted_while_it_writes(copied_chain, run, contents, recipe, monkeypatch, name, where):
    """Ctrl-C: all that was there is there, to the last file."""
    module, function = where.rsplit(".", 1)
    target = recipe(name) if module.startswith("recipe_") else __import__(module, fromlist=["*"])
    calls, original = [], getattr(target, function)

    def interrupted(*arguments, **options):
        calls.append(arguments)
        if len(calls) == (2 if name != "evaluate" else 1):
            raise KeyboardInterrupt
        return original(*arguments, **options)

    monkeypatch.setattr(target, function, interrupted)
    before = contents(copied_chain)
    with pytest.raises(KeyboardInterrupt):
        run(name, copied_chain, "seed=0", *(["sampling.num_samples=5"] if name == "sample" else []))
    assert contents(copied_chain) == before
