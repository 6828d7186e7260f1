"""Bad input: a clear error before anything is trained, no folder that pretends to be a run, nothing lost of an earlier one."""

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dae.hub import fingerprint

CHAIN = ("train_dae", "encode", "train_prior", "sample", "evaluate", "report")


@pytest.fixture
def table(tmp_path):
    """`table(labels)`: folder of a saved table of the first digits with these labels."""

    def save(labels):
        from datasets import Dataset, Features, Value
        from datasets import Image as ImageFeature

        from dae.data.builtin import load_digits

        rows = load_digits()["train"].select(range(len(labels)))
        features = Features({"image": ImageFeature(), "label": Value("int64")})
        folder = tmp_path / "table"
        Dataset.from_dict({"image": rows["image"], "label": labels}, features=features).save_to_disk(str(folder))
        return folder

    return save


REFUSED = {
    "missing data set": (["data.dataset_name=/nowhere/at/all"], FileNotFoundError, "no file or folder.*/nowhere/at/all"),
    "missing image column": (["data.image_column=picture"], ValueError, "image_column='picture'.*image"),
    "missing label column": (["data.label_column=kind"], ValueError, "label_column='kind'.*label"),
    "missing split": (["data.train_split=all"], ValueError, "train_split='all'.*train"),
    "stage 1 larger than the data": (["stage1.train_batch_size=2000"], ValueError, "1437 rows.*2000.*smaller"),
    "stage 2 larger than the data": (["stage2.train_batch_size=2000"], ValueError, "1437 rows.*2000.*smaller"),
    "resolution": (["data.resolution=9"], ValueError, "data.resolution=9 is not divisible.*8, 10"),
    "auxiliary decoder": (["auxiliary_decoder.width_factor=0"], ValueError, "width_factor.*got 0"),
    "real decoder": (["autoencoder.decoder.family=dropout", "autoencoder.decoder.dropout=1"], ValueError, "dropout.*1"),
    "checkpoint": (["resume_from_checkpoint=/nowhere"], FileNotFoundError, "/nowhere is no checkpoint"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_autoencoder_is_not_begun(tmp_path, run, case):
    overrides, kind, message = REFUSED[case]
    with pytest.raises(kind, match=message):
        run("train_dae", tmp_path / "run", *overrides)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("case", ["missing data set", "stage 2 larger than the data", "resolution"])
def test_earlier_run_is_not_touched(copied_chain, run, contents, case):
    before = contents(copied_chain)
    with pytest.raises(REFUSED[case][1]):
        run("train_dae", copied_chain, *REFUSED[case][0], "resume_from_checkpoint=latest")
    assert contents(copied_chain) == before


@pytest.mark.parametrize(
    ("labels", "overrides", "message"),
    [
        ([0, 1, 2] * 20 + [7], ["data.num_classes=3"], "row 60.*label 7 is out of range: expected 0 to 2"),
        ([0, 1, -1] * 20, ["data.num_classes=2"], "row 2.*label -1 is out of range"),
        ([0, 1, None] * 20, [], "row 2.*label.*missing"),
        ([0, 1] * 4, [], "7 rows.*16.*smaller"),
    ],
)
def test_bad_rows(tmp_path, run, table, labels, overrides, message):
    with pytest.raises(ValueError, match=message):
        run("train_dae", tmp_path / "run", f"data.dataset_name={table(labels)}", *overrides)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("bad", [b"no picture at all", b""])
def test_bytes_that_are_no_image(tmp_path, run, image_folder, bad):
    pictures = Path(shutil.copytree(image_folder, tmp_path / "pictures"))
    (pictures / "a" / "0.png").write_bytes(bad)
    with pytest.raises(ValueError, match=r"row 0.*0\.png"):
        run("train_dae", tmp_path / "run", f"data.dataset_name={pictures}", "data.channels=3")
    assert not (tmp_path / "run").exists()


def test_empty_folder(tmp_path, run):
    (tmp_path / "pictures").mkdir()
    with pytest.raises(ValueError, match="holds no images"):
        run("train_dae", tmp_path / "run", f"data.dataset_name={tmp_path / 'pictures'}")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "lost", "remedy"),
    [
        ("encode", "autoencoder", "recipes/train_dae.py"),
        ("encode", "autoencoder/model.safetensors", "recipes/train_dae.py.*resume_from_checkpoint=latest"),
        ("train_prior", "autoencoder", "recipes/train_dae.py"),
        ("train_prior", "tokens", "recipes/encode.py"),
        ("train_prior", "tokens/cache.json", "recipes/encode.py"),
        ("train_prior", "tokens/tokens.safetensors", "recipes/encode.py"),
        ("sample", "autoencoder", "recipes/train_dae.py"),
        ("sample", "prior", "recipes/train_prior.py"),
        ("evaluate", "samples", "recipes/sample.py"),
        ("evaluate", "samples/sampling.json", "recipes/sample.py"),
        ("evaluate", "prior", "recipes/train_prior.py"),
        ("report", "metrics.json", "recipes/evaluate.py"),
        ("report", "samples/samples.npz", "recipes/sample.py"),
    ],
)
def test_what_is_missing_names_the_recipe_that_makes_it(copied_chain, run, contents, name, lost, remedy):
    if name == "train_prior":
        shutil.rmtree(copied_chain / "prior")
    (shutil.rmtree if (copied_chain / lost).is_dir() else os.unlink)(copied_chain / lost)
    before = contents(copied_chain)
    with pytest.raises((FileNotFoundError, ValueError), match=remedy):
        run(name, copied_chain)
    assert contents(copied_chain) == before
    assert name != "train_prior" or not (copied_chain / "prior").exists()


@pytest.mark.parametrize(
    ("overrides", "what"),
    [
        (["data.max_train_samples=100"], "data set"),
        (["data.channels=3"], "data set"),
        (["prior.num_augmentations=1"], "augmentation"),
    ],
)
def test_stale_tokens(copied_chain, run, contents, overrides, what):
    shutil.rmtree(copied_chain / "prior")
    before = contents(copied_chain)
    with pytest.raises(ValueError, match=f"stale.*another {what}.*recipes/encode.py"):
        run("train_prior", copied_chain, *overrides)
    assert contents(copied_chain) == before and not (copied_chain / "prior").exists()


def test_another_decoder(copied_chain, tmp_path, run):
    """Of the same latent: tokens and prior are still right, the samples are not, as they were decoded by the other."""
    run("train_dae", tmp_path / "other", "stage2.learning_rate=1e-4")
    ids = [
        json.loads((folder / "autoencoder" / "latent.json").read_text())["id"] for folder in (tmp_path / "other", copied_chain)
    ]
    assert ids[0] == ids[1]
    shutil.rmtree(copied_chain / "autoencoder")
    shutil.copytree(tmp_path / "other" / "autoencoder", copied_chain / "autoencoder")
    with pytest.raises(ValueError, match=r"samples in .* are of another decoder than .*recipes/sample.py"):
        run("evaluate", copied_chain)
    run("train_prior", copied_chain, "resume_from_checkpoint=latest")
    run("sample", copied_chain, "sampling.num_samples=10")


def test_folders_of_earlier_versions(copied_chain, run):
    """Without latent.json the whole autoencoder is fingerprinted, as in the caches and priors made then; a new one names it."""
    for part, key in (("tokens/cache.json", ("fingerprint", "tokenizer")), ("prior/config.json", ("tokenizer",))):
        description = values = json.loads((copied_chain / part).read_text())
        for name in key[:-1]:
            values = values[name]
        values[key[-1]] = fingerprint(copied_chain / "autoencoder")
        (copied_chain / part).write_text(json.dumps(description))
    latent = copied_chain / "autoencoder" / "latent.json"
    for known in (True, False):
        if not known:
            latent.unlink()
        run("sample", copied_chain, "sampling.num_samples=10")
        shutil.move(copied_chain / "prior", copied_chain / f"prior-{known}")
        run("train_prior", copied_chain, "prior.max_train_steps=2")


def test_another_autoencoder(copied_chain, tmp_path, run, contents):
    """Trained again: its tokens, the prior on them and the samples are worth nothing, and every recipe says so."""
    run("train_dae", tmp_path / "other", "seed=1")
    shutil.rmtree(copied_chain / "autoencoder")
    shutil.copytree(tmp_path / "other" / "autoencoder", copied_chain / "autoencoder")
    before = contents(copied_chain)
    for name in ("sample", "evaluate"):
        with pytest.raises(ValueError, match=r"tokens of another autoencoder.*recipes/encode.py.*recipes/train_prior.py"):
            run(name, copied_chain)
    assert contents(copied_chain) == before
    shutil.rmtree(copied_chain / "prior")
    with pytest.raises(ValueError, match=r"stale.*another tokenizer.*recipes/encode.py"):
        run("train_prior", copied_chain)
    run("encode", copied_chain)
    run("train_prior", copied_chain, "prior.max_train_steps=2")
    before = contents(copied_chain)
    with pytest.raises(ValueError, match=r"samples in .* are of another prior.*recipes/sample.py"):
        run("evaluate", copied_chain)
    assert contents(copied_chain) == before


def test_damaged_tokens(copied_chain, run):
    shutil.rmtree(copied_chain / "prior")
    file = copied_chain / "tokens" / "tokens.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"damaged.*recipes/encode.py"):
        run("train_prior", copied_chain)
    assert not (copied_chain / "prior").exists()


def test_damaged_model(copied_chain, run):
    file = copied_chain / "autoencoder" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ValueError, match="damaged"):
        run("encode", copied_chain)


@pytest.mark.parametrize("name", ["encode", "evaluate"])
def test_other_images_than_it_was_trained_on(copied_chain, run, contents, name):
    before = contents(copied_chain)
    with pytest.raises(ValueError, match=r"another data set than the one asked for \(.*data\.resolution: 8 -> 16"):
        run(name, copied_chain, "data.channels=3", "data.resolution=16")
    assert contents(copied_chain) == before


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["prior.train_batch_size=2000"], "1437 rows.*2000.*smaller"),
        (["prior.num_heads=3"], "prior.width=16 over prior.num_heads=3"),
    ],
)
def test_prior_is_not_begun(copied_chain, run, overrides, message):
    shutil.rmtree(copied_chain / "prior")
    with pytest.raises(ValueError, match=message):
        run("train_prior", copied_chain, *overrides)
    assert not (copied_chain / "prior").exists()


@pytest.fixture
def full_disk(monkeypatch):
    """`full_disk(words)`: from now on nothing can be forced to the disk in a path that holds one of these words."""

    def fill(*words):
        def refuse(descriptor, original=os.fsync):
            if any(word in os.readlink(f"/proc/self/fd/{descriptor}") for word in words):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            original(descriptor)

        monkeypatch.setattr(os, "fsync", refuse)
        return monkeypatch.undo

    return fill


@pytest.mark.parametrize(
    "words",
    ["checkpoint-8", "checkpoint-8.tmp/.manifest", "stage1/", "checkpoint-16", "autoencoder/.model", "autoencoder/.README"],
)
def test_full_disk_in_the_autoencoder(chain, tmp_path, run, history, full_disk, words):
    empty = full_disk(words)
    folder = tmp_path / "autoencoder"
    with pytest.raises(
        OSError, match=r"could not save [\d,]+ bytes \(No space left on device\); free space.*output_dir"
    ) as caught:
        run("train_dae", tmp_path)
    assert str(tmp_path) in caught.value.filename and caught.value.errno == errno.ENOSPC
    assert not list(tmp_path.rglob(".*")), "temporaries"
    assert load_file(folder / "checkpoint-4" / "model.safetensors")
    assert not (folder / "model.safetensors").exists() or words == "autoencoder/.README"
    empty()
    run("train_dae", tmp_path, "resume_from_checkpoint=latest")
    a, b = (load_file(path / "autoencoder" / "model.safetensors") for path in (chain, tmp_path))
    assert all(torch.equal(value, b[key]) for key, value in a.items())
    assert history(folder) == history(chain / "autoencoder")


@pytest.mark.parametrize("words", ["prior/.model", "prior/.checkpoint-8"])
def test_full_disk_in_the_prior(chain, copied_chain, run, full_disk, words):
    shutil.rmtree(copied_chain / "prior")
    empty = full_disk(words)
    with pytest.raises(OSError, match="could not save"):
        run("train_prior", copied_chain)
    assert not list(copied_chain.rglob(".*")), "temporaries"
    empty()
    run("train_prior", copied_chain, "resume_from_checkpoint=latest")
    a, b = (load_file(path / "prior" / "model.safetensors") for path in (chain, copied_chain))
    assert all(torch.equal(value, b[key]) for key, value in a.items())


def test_full_disk_leaves_tokens_and_metrics(copied_chain, run, contents, full_disk):
    before = contents(copied_chain)
    full_disk(".tokens", ".metrics.json")
    for name in ("encode", "evaluate"):
        with pytest.raises(OSError, match="could not save"):
            run(name, copied_chain)
    assert not list(copied_chain.rglob(".*")), "temporaries"
    after = contents(copied_chain)
    assert [
        name for name in ("metrics.json", "tokens/cache.json", "tokens/tokens.safetensors") if before[name] != after.get(name)
    ] == []


@pytest.mark.parametrize("logging_steps", [1, 100])
def test_no_checkpoint_of_a_diverged_run(tmp_path, recipe, configure, logging_steps):
    """Whether the log or the checkpoint sees it first."""
    config = configure(tmp_path, "stage1.max_grad_norm=1e30", f"logging_steps={logging_steps}")
    config.stage1.learning_rate = 1e30  # which no configuration may ask for
    with pytest.raises(FloatingPointError, match=r"[Tt]he last checkpoint is from before.*learning"):
        recipe("train_dae").train(config)
    for file in tmp_path.rglob("checkpoint-*/model.safetensors"):
        assert all(value.isfinite().all() for value in load_file(file).values())
    assert not (tmp_path / "autoencoder" / "model.safetensors").exists()


def test_samples_that_do_not_fit_in_memory(copied_chain, run, contents):
    before = contents(copied_chain)
    with pytest.raises(ValueError, match=r"1,000,000,000,000 samples of 8 x 8 pixels need about .*lower sampling.num_samples"):
        run("sample", copied_chain, "sampling.num_samples=1000000000000")
    assert contents(copied_chain) == before
