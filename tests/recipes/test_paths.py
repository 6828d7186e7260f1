"""A run is continued by what its images are, not by how their path is written; screen and card say what it reads."""

import pytest


def test_resume_under_another_path_of_the_same_images(tmp_path, run, image_folder, capsys, monkeypatch):
    options = ("data.channels=3", "data.resolution=16", "stage1.max_train_steps=2", "stage2.max_train_steps=2")
    run("train_dae", tmp_path / "run", *options, f"data.dataset_name={image_folder}")
    screen = capsys.readouterr().out
    card = (tmp_path / "run" / "autoencoder" / "README.md").read_text()
    for words in ("87 to train on, 9 held out", "found     train 96", "classes   3: a ", "left out  nothing"):
        assert words in screen and words in card
    (tmp_path / "link").symlink_to(image_folder)
    monkeypatch.chdir(tmp_path)
    for name in (f"{image_folder}/", "link", f"{image_folder}/../{image_folder.name}"):
        run("train_dae", tmp_path / "run", *options, f"data.dataset_name={name}", "resume_from_checkpoint=latest")
    with pytest.raises(ValueError, match="max_train_samples"):
        other = (*options, f"data.dataset_name={image_folder}", "data.max_train_samples=50")
        run("train_dae", tmp_path / "run", *other, "resume_from_checkpoint=latest")
