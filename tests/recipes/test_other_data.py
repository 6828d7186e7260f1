"""Recipes that read a run and its data: other data than it was trained on are refused, and so is output among the images."""

import json
import shutil

import pytest

from dae.config import load_config

OTHER = "data.max_train_samples=300"
CONSUMERS = ("encode", "evaluate", "report_latent", "measure_latent")
QUICK = ("measure.max_images=64", "measure.steps=1", "measure.seeds=[0]", "measure.families=[linear]")


def arguments(recipe, folder):
    return (*QUICK, f"measure.latents=[gaussian,'autoencoder:{folder}']") if recipe == "measure_latent" else QUICK


@pytest.mark.parametrize("recipe", CONSUMERS)
def test_other_data_are_refused(copied_chain, run, contents, recipe):
    before = contents(copied_chain)
    with pytest.raises(ValueError, match=r"another data set than the one asked for \(data.max_train_samples: None -> 300\)"):
        run(recipe, copied_chain, OTHER, *arguments(recipe, copied_chain))
    after = contents(copied_chain)
    assert {name: after[name] for name in before} == before  # no more than a lock beside them


def test_files_that_have_changed(copied_chain, run):
    """The same configuration, other content."""
    inputs = copied_chain / "autoencoder" / "inputs.json"
    assert set(json.loads(inputs.read_text())) == {"data set"}
    inputs.write_text(json.dumps({"data set": "0" * 32}))
    with pytest.raises(ValueError, match=r"the files have changed since"):
        run("encode", copied_chain)
    shutil.rmtree(copied_chain / "tokens")
    run("encode", copied_chain, "data.allow_other=true")
    assert (copied_chain / "tokens").is_dir()


def test_a_run_that_recorded_its_data_in_checkpoints_only(copied_chain, run):
    (copied_chain / "autoencoder" / "inputs.json").unlink()
    with pytest.raises(ValueError, match="another data set"):
        run("encode", copied_chain, OTHER)
    for checkpoint in (copied_chain / "autoencoder").glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    run("encode", copied_chain, OTHER)  # nobody knows


@pytest.mark.parametrize("output", ["", "runs/x", "a/../runs"])
def test_output_among_the_images_is_refused(image_folder, output, monkeypatch):
    for name in (str(image_folder), f"{image_folder}/", f"{image_folder}/../{image_folder.name}"):
        with pytest.raises(ValueError, match="lies in the folder of the images"):
            load_config(None, [f"data.dataset_name={name}", f"output_dir={image_folder}/{output}"])
    monkeypatch.chdir(image_folder)
    with pytest.raises(ValueError, match="lies in the folder of the images"):
        load_config(None, ["data.dataset_name=.", "output_dir=runs/x"])
    load_config(None, [f"data.dataset_name={image_folder}", f"output_dir={image_folder}-run"])


@pytest.mark.parametrize("key", ["dataset_name", "train_files", "validation_files"])
def test_output_among_whatever_is_read_is_refused(image_folder, key, tmp_path, monkeypatch):
    monkeypatch.chdir(image_folder)
    (tmp_path / "link").symlink_to(image_folder)
    for name, output in (
        (image_folder, "a/x"),
        ("*", "runs/x"),
        (f"{image_folder}/**/*.png", "x"),
        (f"{image_folder}/[ab]", "b"),
        (f"{tmp_path}/link/*", "runs"),
        ("*/*/*.png", "."),
        ("*/*/*/*.png", "a"),
    ):
        with pytest.raises(ValueError, match=rf"lies in the folder of the images, data\.{key}="):
            load_config(None, [f"data.{key}={name}", f"output_dir={output}"])
    for name, output in (
        ("*.png", "runs/x"),
        ("*/*.png", "runs"),
        ("*.tar", "."),
        (f"{image_folder}/[ab]", "c"),
        ("a", "c"),
        ("digits", "digits"),
    ):
        load_config(None, [f"data.{key}={name}", f"output_dir={output}"])
    if key == "train_files":  # then it is not read
        load_config(None, [f"data.dataset_name={image_folder}", "data.train_files=/elsewhere", "output_dir=runs"])
